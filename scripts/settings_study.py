"""Does the default hold with other settings? One setting changed at a time, on two labs, against full.

    python -m scripts.settings_study --runs runs/settings     # about an hour of one core, resumable
    python -m scripts.settings_study --runs runs/settings --gather         # the page of what has finished
    python -m scripts.settings_study --gather                              # the page from its saved file

300 steps of 32 rollouts, exact reverse KL, learning rate 3e-4 constant, 10 % of the tokens, two seeds; every
row of the table changes what its name says. Writes docs/results/settings.json and the page beside it.
"""

import json
from pathlib import Path
from typing import Any

from scripts.arguments import Arguments
from scripts.panels import Line, draw_panels
from taopd.cli import positive
from taopd.experiments.study.file import parse_study_file
from taopd.experiments.study.run import plan_study, run_study
from taopd.report.generated_part import markdown_table, write_generated
from taopd.runs.jsonl import write_text
from taopd.trainer.environment import environment

LABS = ("dialect", "reversal")
SEEDS = (0, 1)
SETTLED = 100
"""Step from which an accuracy that is high is one to keep."""
BASE: dict[str, Any] = {
    "max_steps": 300,
    "per_device_train_batch_size": 32,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant",
    "loss": "reverse_kl",
    "budget": 0.1,
}
LORA = {"use_peft": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "no change": {},
    "loss: sampled_reverse_kl": {"loss": "sampled_reverse_kl"},
    "loss: forward_kl": {"loss": "forward_kl"},
    "loss: jsd": {"loss": "jsd"},
    "LoRA, rank 16, rate 3e-3": LORA | {"lora_target_modules": "all-linear", "learning_rate": 3e-3},
    "temperature: 0.7": {"temperature": 0.7},
    "num_generations: 8": {"num_generations": 8},
    "num_iterations: 2": {"num_iterations": 2},
    "8 rollouts a step": {"per_device_train_batch_size": 8},
    "4 micro-batches of 8": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
    "linear schedule, warmup": {"lr_scheduler_type": "linear", "warmup_steps": 30},
    "weight_decay: 0.1": {"weight_decay": 0.1},
    "optim: adafactor": {"optim": "adafactor"},
    "bf16: true": {"bf16": True},
    "gradient_window: 4": {"gradient_window": 4},
    "budget: 0.02": {"budget": 0.02},
    "budget: 0.3": {"budget": 0.3},
    "temperature: 0.7, 1,000 steps": {"temperature": 0.7, "max_steps": 1000},
    "8 rollouts a step, 1,000 steps": {"per_device_train_batch_size": 8, "max_steps": 1000},
}
"""Panels side by side in a picture."""
OF_THE_SELECTOR = {"gradient_window", "budget"}
"""Full distillation has none of these: its row is the first."""
METHODS: dict[str, dict[str, Any]] = {
    "reach": {"selector": "teachability", "method": "reach"},
    "full": {"selector": "full"},
}


def folder_names() -> dict[str, str]:
    """Name of an arm by its setting: a folder's name has no spaces or colons."""
    return {setting: f"s{index:02d}" for index, setting in enumerate(SETTINGS)}


def study(lab: str) -> dict[str, Any]:
    """The study of one lab, as its file would say it."""
    names = folder_names()
    arms = [
        {"name": f"{method}-{names[setting]}"} | own | changed
        for setting, changed in SETTINGS.items()
        for method, own in METHODS.items()
        if method == "reach" or not OF_THE_SELECTOR & changed.keys()
    ]
    return {
        "lab": lab,
        "config": BASE,
        "arms": arms,
        "seeds": list(SEEDS),
        "evaluate_every": 50,
        "num_test_prompts": 200,
        "random_control": False,
        "full_control": False,
    }


def gather(folders: dict[str, Path]) -> dict[str, Any]:
    """Accuracy over steps of every arm, by lab."""
    names, found = folder_names(), {}
    for lab, folder in folders.items():
        rows = []
        for setting in SETTINGS:
            for method in METHODS:
                paths = [
                    folder / "arms" / f"{method}-{names[setting]}-seed{seed}" / "results.json"
                    for seed in SEEDS
                ]
                done = [json.loads(path.read_text()) for path in paths if path.exists()]
                if done:
                    curves = {
                        kind: [arm[f"accuracy{kind}_curve"] for arm in done]
                        for kind in ("", "_sampled")
                    }
                    rows.append({"setting": setting, "method": method, "curves": curves})
        found[lab] = rows
    machine = environment()
    return {"versions": machine["versions"], "device": machine["devices"][0], "labs": found}


def tables(labs: dict[str, list[dict[str, Any]]]) -> str:
    """A table a lab: greedy accuracy at the end and at its lowest on the way, sampled at the end."""
    cells = ("end", f"least from step {SETTLED}", "sampled, end")
    heads = ["setting", *(f"{method}: {cell}" for cell in cells for method in METHODS)]
    lines = []
    for lab, rows in labs.items():
        picture = f"![Accuracy over steps by setting, {lab}](settings-{lab}.png)"
        table = []
        for setting in SETTINGS:
            own = {row["method"]: row["curves"] for row in rows if row["setting"] == setting}
            if not own:
                continue
            shown = [
                numbers(own[method]) if method in own else ["-"] * len(cells) for method in METHODS
            ]
            table.append([setting, *(cell for pair in zip(*shown, strict=True) for cell in pair)])
        lines += [f"### {lab}", "", picture, "", *markdown_table(heads, table), ""]
    return "\n".join(lines)


def numbers(curves: dict[str, list[list[list[float]]]]) -> list[str]:
    """The cells of an arm, each with a number a seed, %."""
    greedy, sampled = curves[""], curves["_sampled"]
    least = [min(value for step, value in curve if step >= SETTLED) for curve in greedy]
    found = ([curve[-1][1] for curve in greedy], least, [curve[-1][1] for curve in sampled])
    return [", ".join(f"{100 * value:.0f}" for value in values) for values in found]


def panels(rows: list[dict[str, Any]]) -> dict[str, list[Line]]:
    """Greedy accuracy over steps on one lab: a panel a setting, a line a method and seed."""
    found: dict[str, list[Line]] = {}
    for row in rows:
        lines = [(row["method"], *zip(*curve, strict=True)) for curve in row["curves"][""]]
        found.setdefault(row["setting"], []).extend(lines)
    return found


def main() -> None:
    """Run what is missing, and write the page."""
    parser = Arguments(description=(__doc__ or "").splitlines()[0])
    parser.add_runs("runs/settings", finished=["*/arms/*/results.json"], from_saved=True)
    parser.add_argument("--workers", type=positive, default=1)
    parser.add_argument("--data", type=Path, default=Path("docs/results/settings.json"))
    args = parser.parse_args()
    folders = {} if args.runs is None else {lab: args.runs / lab for lab in LABS}
    for lab, folder in () if args.gather else folders.items():
        plan = plan_study(parse_study_file(study(lab)))
        run_study(plan, output=folder, resume=folder.exists(), num_workers=args.workers)
        print(f"{lab}: {len(plan.runs)} arms", flush=True)
    if folders:
        write_text(args.data, json.dumps(gather(folders)) + "\n")
    found = json.loads(args.data.read_text())
    for lab, rows in found["labs"].items():
        draw_panels(panels(rows), args.data.with_name(f"settings-{lab}.png"))
    title = "The default with other settings"
    about = (
        "Accuracy in %, one number for each seed: of greedy answers at the end, the least of them from step "
        f"{SETTLED} on, and of sampled answers at the end. {found['device']}."
    )
    write_generated(
        args.data.with_suffix(".md"), f"{about}\n\n{tables(found['labs'])}", title=title
    )


if __name__ == "__main__":
    main()
