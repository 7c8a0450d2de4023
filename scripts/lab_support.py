"""How likely the initial student of each lab is to say what its teacher says. Writes docs/results/labs.md.

    python scripts/lab_support.py                  # 20 seconds once the labs are built, a minute each before

512 rollouts of the initial student on training prompts. Measured are the positions where the teacher's first
choice is one of its own forms: a marker word `t0` .. `t15`, or its end where the student's is another.

    p       the initial student's probability of the teacher's first choice
    C       teacher mass on the student's top 4
    share   of these positions among all
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.arguments import Arguments
from taopd.experiments.lab import VARIANTS, Lab, build_lab
from taopd.experiments.lab.demo import lab_arm
from taopd.experiments.lab.stacked import Stack, StackStep
from taopd.experiments.lab.task import NUM_MARKERS, TEACHER_MARKER_ID, WORDS
from taopd.experiments.lab.variants import EOS, Variant
from taopd.report.generated_part import markdown_table, write_generated

ROLLOUTS = 512
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def own_forms(rules: Variant, first_choices: Tensor) -> Tensor:
    """Where the teacher's first choice is a form of its own."""
    marker = (first_choices >= TEACHER_MARKER_ID) & (
        first_choices < TEACHER_MARKER_ID + NUM_MARKERS
    )
    if rules.teacher_end == EOS:
        return marker
    return marker | (first_choices == WORDS.index(rules.teacher_end))


def support(student: Tensor, teacher: Tensor, compatibility: Tensor, rules: Variant) -> dict:
    """Quantiles of p and C at the teacher's own forms.

    Args:
        student, teacher: log-probs [N, V] at the same positions; compatibility: C, [N].
    """
    first = teacher.argmax(-1)
    at = own_forms(rules, first)
    probability = student[at].gather(1, first[at].unsqueeze(1)).squeeze(1).exp()
    levels = torch.tensor(QUANTILES)
    return {
        "share": float(at.float().mean()),
        "p": probability.quantile(levels).tolist(),
        "C": compatibility[at].float().quantile(levels).tolist(),
    }


def measure(lab: Lab) -> dict[str, Any]:
    """Support of one lab, with its two accuracies."""
    found: dict[str, Any] = {}

    def look(seen: StackStep) -> None:
        found.update(
            support(
                seen.student_logprobs,
                seen.teacher_logprobs,
                seen.tables[0].compatibility,
                VARIANTS[lab.variant],
            )
        )

    settings = {"per_device_train_batch_size": ROLLOUTS}
    arm = replace(lab_arm(lab, "support", settings, seed=0, steps=1), num_test_prompts=1)
    with tempfile.TemporaryDirectory() as folder:
        Stack([arm], output_dir=folder).step(0, (look,))
    return found | {"accuracy": lab.manifest["accuracy"]}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The page's table."""
    first, *others = (f"{100 * level:g} %" for level in QUANTILES)
    heads = ["lab", "teacher", "student", "share", f"p: {first}", *others, "C: 5 %", "50 %", "95 %"]
    cells = []
    for name, row in rows.items():
        accuracy = [f"{100 * row['accuracy'][role]:.0f} %" for role in ("teacher", "student")]
        p = [f"{value:.0e}" for value in row["p"]]
        c = [f"{row['C'][place]:.3f}" for place in (0, 2, 4)]
        cells.append([name, *accuracy, f"{100 * row['share']:.0f} %", *p, *c])
    return "\n".join(markdown_table(heads, cells))


def main() -> None:
    """Measure the labs and put the table into the page."""
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), default=[])
    parser.add_argument("--page", type=Path, default=Path("docs/results/labs.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name in args.variant or VARIANTS:
        rows[name] = measure(build_lab(name))
        print(json.dumps({name: rows[name]}), flush=True)
    if args.variant:
        return  # A part of the table is for the eyes alone.
    write_generated(args.page, table(rows))


if __name__ == "__main__":
    main()
