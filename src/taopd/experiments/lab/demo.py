"""The demo: four selectors on the tiny lab at one budget, trained past the peak of accuracy."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from taopd.experiments.arm_settings import Arm
from taopd.experiments.kept_arms import prepare
from taopd.experiments.lab import Lab, build_lab, token_kinds
from taopd.experiments.pool import logged_steps, run_pool
from taopd.experiments.study.finished import read_outcome
from taopd.models.prompts import load_tokenizer
from taopd.runs.folder import RunFolder
from taopd.runs.jsonl import write_json
from taopd.runs.lock import hold
from taopd.trainer.environment import environment

BUDGET = 0.1
STEPS = 300
EVALUATE_EVERY = 25
_OWNED = ("arms", "best-student", "summary.md", "*.png", "*.svg")
ARMS: dict[str, dict[str, Any]] = {
    "full": {"selector": "full"},
    "teachability": {"selector": "teachability"},
    "reach": {"selector": "teachability", "method": "reach"},
    "random": {"selector": "random"},
}
MORE_ARMS: dict[str, dict[str, Any]] = {
    "teachability+anchor": {"selector": "teachability", "method": "anchored"},
    **{name: {"selector": name} for name in ("compatibility", "entropy", "divergence", "tip")},
}
VARIANT_CONFIG: dict[str, dict[str, Any]] = {
    # The student gives the teacher's words about one per cent: too rare to be sampled often enough, so that
    # only a loss over the whole distribution can teach them to anyone.
    "reversal": {"loss": "reverse_kl"},
    "jargon": {"loss": "reverse_kl"},
}
LAB_CONFIG: dict[str, Any] = {
    "per_device_train_batch_size": 64,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "gradient_checkpointing": False,
    "loss": "sampled_reverse_kl",
    "budget": BUDGET,
    # Arms are the published ones unless they say otherwise.
    "method": "published",
    "logging_steps": 1,
}


def lab_arm(
    lab: Lab,
    name: str,
    settings: dict[str, Any],
    *,
    seed: int,
    steps: int,
    save_model: bool = False,
) -> Arm:
    """An arm on a tiny lab: the lab's files and sizes, `LAB_CONFIG`, and the given settings on top."""
    fixed = VARIANT_CONFIG.get(lab.variant, {}) | {
        "max_steps": steps,
        "max_completion_length": lab.max_completion_length,
        "score_top_k": lab.top_k,
    }
    return Arm(
        name=name,
        seed=seed,
        config=LAB_CONFIG | fixed | settings,
        student=str(lab.student),
        teacher=str(lab.teacher),
        prompts=str(lab.prompts),
        match=f"regex:{lab.answer_pattern}",
        evaluate_every=EVALUATE_EVERY,
        num_test_prompts=lab.manifest["spec"]["num_test_prompts"],
        token_kinds=list(token_kinds(load_tokenizer(lab.student))),
        save_model=save_model,
    )


def run_demo(
    *,
    output_dir: Path,
    variant: str = "dialect",
    all_arms: bool = False,
    steps: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    num_workers: int | None = None,
    lab_sizes: dict[str, Any] | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Build the lab, run the arms, save the best student, and return what `results.json` holds.

    Args:
        output_dir: a folder that holds another run is refused unless `overwrite` or `resume`; resuming
            keeps the arms that had finished, and refuses those of other settings.
        lab_sizes: fields of `taopd.experiments.lab.LabSpec`, for a smaller lab.
        progress: called with ("teacher" | "student" | "steps of all arms", done, in all).

    Raises:
        ConfigError: for an unknown variant. DataError: if the folder cannot be used or an arm fails.
    """
    steps = STEPS if steps is None else steps
    claim: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "also_owns": _OWNED}
    RunFolder.check(output_dir, command="demo", **claim)
    lab = build_lab(variant, progress=progress, **(lab_sizes or {}))
    output_dir.mkdir(parents=True, exist_ok=True)
    with hold(output_dir):
        folder = RunFolder.create(output_dir, **claim).path
        settings = ARMS | MORE_ARMS if all_arms else ARMS
        seeds = (0, 1, 2) if all_arms else (0,)
        arms = [
            lab_arm(lab, name, settings[name], seed=seed, steps=steps, save_model=True)
            for seed in seeds
            for name in settings
        ]
        folders = [folder / "arms" / arm.folder_name for arm in arms]
        prepare(zip(arms, folders, strict=True))
        write_json(
            folder / "config.json",
            {
                "command": "demo",
                "variant": variant,
                "steps": steps,
                "arms": settings,
                "seeds": list(seeds),
            },
        )
        write_json(folder / "env.json", environment(seed=seeds[0]))

        def count(_folder: Path, _step: int) -> None:
            done = sum(map(logged_steps, folders))
            progress("steps of all arms", min(done, steps * len(arms)), steps * len(arms))

        run_pool(folders, num_workers=num_workers, progress=count)
        outcomes = [read_outcome(each / "results.json") for each in folders]
        best = max(zip(outcomes, folders, strict=True), key=lambda pair: pair[0]["accuracy_greedy"])
        shutil.rmtree(folder / "best-student", ignore_errors=True)
        shutil.copytree(best[1] / "model", folder / "best-student")
        results = {
            "task": f"tinylab/{variant}",
            "base_accuracy": outcomes[0]["base_accuracy"],
            "teacher_accuracy": lab.manifest["accuracy"]["teacher"],
            "best_student": best[0]["name"],
            "arms": outcomes,
            "versions": environment()["versions"],
        }
        write_json(folder / "results.json", results)
        return results
