"""Forms of reach that were tried for `method: reach`. Writes docs/results/reach_forms.json and its page.

    python -m scripts.reach_forms --runs runs/reach_forms               # what is missing, resumable
    python -m scripts.reach_forms --runs runs/reach_forms --labs jargon --forms "p^0.2" "ramp"
    python -m scripts.reach_forms --runs runs/reach_forms --steps 400   # the first screening
    python -m scripts.reach_forms --runs runs/reach_forms --steps 400 --parts   # the rule and its parts
    python -m scripts.reach_forms --gather      # the page from its saved file
    python -m scripts.reach_forms --runs runs/reach_forms --labs unknown --seeds 5 \
        --forms "the rule, half 0.0001, hold 3" "order D r, half 0.0001, hold 3"
    python -m scripts.reach_forms --runs runs/reach_longer --output docs/results/reach_longer.json \
        --labs unknown --forms "the rule, half 0.0001, hold 3" "the rule, longer from 0.2 nats on"

What the file holds of other forms, labs and steps stays in it.

Settings as in scripts/default_method.py (exact reverse KL, 10 %), a checkpoint every 50 steps.
p is the initial student's probability of a token, s(p) the share of the teacher's mass on it that counts as
within reach. The teacher's own ends have s = 0 unless the form says otherwise.
"""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts import unseen_labs
from scripts.arguments import Arguments
from scripts.collapse import BASE
from scripts.lab_results import curves_of, write_rows
from taopd.cli import positive
from taopd.experiments.lab import VARIANTS, build_lab
from taopd.experiments.lab.demo import lab_arm
from taopd.experiments.lab.stacked import Stack, run_stack
from taopd.losses import by_reach, held_share, start_share
from taopd.report.generated_part import markdown_table, write_generated
from taopd.runs.jsonl import write_json
from taopd.signals import FOREIGN, INITIAL
from taopd.trainer.reach_sums import in_new_context, judged_reach, start_shares
from taopd.trainer.selection import choose

LABS = ("jargon", "dialect", "loanwords", "signoff")
"""The labs that tell the forms apart."""
Share = Callable[[Tensor], Tensor]
"""From log p to s(p)."""


def hard(threshold: float) -> Share:
    """[p >= threshold]."""
    least = math.log(threshold) if threshold else -math.inf
    return lambda logp: (logp >= least).to(logp.dtype)


def power(exponent: float) -> Share:
    """p^exponent."""
    return lambda logp: (exponent * logp).exp()


def ramp(low: float, high: float) -> Share:
    """0 at `low`, 1 at `high`, linear in log p between them."""
    return lambda logp: ((logp - math.log(low)) / math.log(high / low)).clamp(0.0, 1.0)


def sigmoid(half: float, slope: float = 0.5) -> Share:
    """p^slope / (p^slope + half^slope)."""
    return lambda logp: (slope * (logp - math.log(half))).sigmoid()


@dataclass(frozen=True, kw_only=True)
class Form:
    """One form of the rule."""

    share: Share
    ends: bool = True
    """The teacher's own ends are out of reach."""
    hold: bool = True
    """The hold reads r; else all but these ends is held to the teacher."""
    coef: float = 3.0
    """Weight of the hold at the start."""
    floor_on_d: bool = False
    """What is selected has D >= 0.05 nats and r >= 0.01; else D r >= 0.05 nats."""
    forward: bool = False
    """Selected tokens have r KL(S||T) + (1 - r) KL(T||S); else KL(S||T)."""
    release: float = 0.0
    """Share of the run over which the hold lets go of the start, foreign ends apart; 0: it does not."""
    kept: bool = False
    """The start is held where contexts that are new to it are worse."""
    least: float = 0.0
    """By more than so many nats."""
    anneal: float = 1.0
    """Factor on a threshold of 3e-4 whenever 20 steps in a row used less than half of the budget."""
    everywhere: bool = True
    """The initial student is the judge in contexts that are new to it, too."""
    ends_held: bool = True
    """The teacher's own ends are held to the start; else they teach the student's own end."""
    slips: bool = False
    """A context is also new after a token that the student alone says more often, not the teacher."""
    drawn: bool = True
    """A random tenth of the other tokens is held; else only what is selected trains."""
    order: Callable[[Tensor, Tensor], Tensor] = lambda r, _: r
    """What D~ is multiplied by to order the tokens: of r, and of 1 - h, the share that the hold leaves to
    the teacher."""


SMOOTH = Form(share=sigmoid(1e-4, 1.0), floor_on_d=True, forward=True)
FORMS: dict[str, Form] = {
    "threshold 3e-4, ends like any token": Form(share=hard(3e-4), ends=False),
    "threshold 3e-4": Form(share=hard(3e-4)),
    "threshold 1e-5": Form(share=hard(1e-5)),
    "threshold 0": Form(share=hard(0.0)),
    "threshold 3e-4, times 0.3 when exhausted": Form(share=hard(3e-4), anneal=0.3),
    "threshold 3e-4, hold to the teacher": Form(share=hard(3e-4), hold=False),
    "p^0.1": Form(share=power(0.1)),
    "p^0.2": Form(share=power(0.2)),
    "p^0.3": Form(share=power(0.3)),
    "p^0.2, hold 1": Form(share=power(0.2), coef=1.0),
    "p^0.3, hold 1": Form(share=power(0.3), coef=1.0),
    "p^0.2, hold 0.3": Form(share=power(0.2), coef=0.3),
    "p^0.2, hold to the teacher": Form(share=power(0.2), hold=False),
    "ramp": Form(share=ramp(1e-6, 1e-2)),
    "ramp, hold 1": Form(share=ramp(1e-6, 1e-2), coef=1.0),
    "ramp, hold to the teacher": Form(share=ramp(1e-6, 1e-2), hold=False),
    "sigmoid": Form(share=sigmoid(3e-4)),
    "sigmoid, hold 1": Form(share=sigmoid(3e-4), coef=1.0),
    "sigmoid, floor on D": Form(share=sigmoid(3e-4), floor_on_d=True),
    "p / (p + 3e-4), floor on D": Form(share=sigmoid(3e-4, 1.0), floor_on_d=True),
    "p / (p + 1e-4), floor on D": Form(share=sigmoid(1e-4, 1.0), floor_on_d=True),
    "the same, rest by forward KL": SMOOTH,
    "the same, half 1e-5": replace(SMOOTH, share=sigmoid(1e-5, 1.0)),
    "the same, half 1e-6": replace(SMOOTH, share=sigmoid(1e-6, 1.0)),
    "rest by forward KL, hold 1": replace(SMOOTH, coef=1.0),
    "rest by forward KL, hold to the teacher": replace(SMOOTH, hold=False),
    "rest by forward KL, start let go over the run": replace(SMOOTH, release=1.0),
    "rest by forward KL, start let go over its first half": replace(SMOOTH, release=0.5),
}
"""Tried on the way to the rule."""
HALVES, HOLDS = (1e-3, 1e-4, 1e-5), (1.0, 3.0, 10.0)


def around(name: str, form: Form) -> dict[str, Form]:
    """A grid over half and hold, and each part of the form changed once."""
    grid = {
        f"half {half:g}, hold {hold:g}": replace(form, share=sigmoid(half, 1.0), coef=hold)
        for half in HALVES
        for hold in HOLDS
    }
    parts = {
        "without the forward KL": replace(form, forward=False),
        "floor on D r": replace(form, floor_on_d=False),
        "ends like any token": replace(form, ends=False),
        "start held to the end": replace(form, release=0.0, kept=False),
        "start let go by the clock": replace(form, kept=False),
        "hold to the teacher": replace(form, hold=False),
        "without a hold": replace(form, drawn=False),
    }
    return {f"{name}, {changed}": own for changed, own in (grid | parts).items()}


BY_DR = replace(SMOOTH, release=0.5, kept=True)
FORMS |= around("order D r", BY_DR)
FORMS["order D r (1 - h)"] = replace(BY_DR, order=lambda r, taught: r * taught)
BY_NOT_HELD = replace(BY_DR, order=lambda _, taught: taught.square())
FORMS |= around("judged everywhere", BY_NOT_HELD)
FORMS |= around("slips are new", replace(BY_NOT_HELD, everywhere=False, slips=True))
FORMS |= around("ends held", replace(BY_NOT_HELD, everywhere=False))
FORMS |= around("the rule", replace(BY_NOT_HELD, everywhere=False, ends_held=False))
RULE = "the rule, half 0.0001, hold 3"
FORMS |= {
    "the rule, order D r": replace(FORMS[RULE], order=lambda r, _: r),
    "the rule, judged everywhere": replace(FORMS[RULE], everywhere=True),
    "the rule, slips are new": replace(FORMS[RULE], slips=True),
    "the rule, ends held": replace(FORMS[RULE], ends_held=True),
    "the rule, longer from 0.2 nats on": replace(FORMS[RULE], least=0.2),
}
PARTS = [name for name in FORMS if name.startswith("the rule,")]


class FormStack(Stack):
    """A stack whose arms are named after their forms."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._forms = [FORMS[arm.name] for arm in self.arms]
        self._thresholds, self._idle = [3e-4] * len(self.arms), [0] * len(self.arms)
        self._foreign: list[Tensor] = []
        # The score of this selector is D~ C, and C is here what the form orders by.
        for args in self.settings:
            args.selector = "teachability_raw_c"
        self._num_steps = self.settings[0].max_steps
        for arm, form in enumerate(self._forms):
            if not form.ends:
                # Judged like any token it is taught like any token, too.
                self._losses[arm] = by_reach(self._anchor)
            elif form.ends_held:
                self._losses[arm] = by_reach(self._anchor, foreign_ends=self._foreign_ends[arm])

    def _with_initial(self, signals, initial, teacher, rows):
        found, self._foreign = [], []
        for arm, (own, form) in enumerate(zip(rows, self._forms, strict=True)):
            share = form.share if form.anneal == 1.0 else hard(self._thresholds[arm])
            counted, mass = share(initial[own]), teacher[own].exp()
            ends = list(self._foreign_ends[arm]) if form.ends else []
            counted[:, ends] = 0.0
            self._foreign.append(mass[:, ends].sum(1).double())
            found.append((1.0 - (mass * (1.0 - counted)).sum(1)).clamp(0.0, 1.0))
        signals = super()._with_initial(signals, initial, teacher, rows)
        return replace(signals, reach=torch.cat(found))

    def _choose(self, arm, table, step):
        form, args, r = self._forms[arm], self.settings[arm], table.extra["reach"]
        d = table.disagreement
        foreign = self._foreign[arm]
        whole = replace(table, extra=table.extra | {FOREIGN: foreign})
        # With the student in the teacher's place it alone decides what is new.
        alone = table.extra | {"teacher_logprobs": table.extra["student_logprobs"]}
        new = in_new_context(replace(table, extra=alone) if form.slips else table)
        judged = r if form.everywhere else judged_reach(whole, new)
        worth = (d >= 0.05) & (judged >= 0.01) if form.floor_on_d else d * judged >= 0.05
        num_steps = round(2 * form.release * self._num_steps)
        schedule = start_share(step, num_steps)
        start = schedule
        if form.kept:
            clock = {"step": step, "num_steps": num_steps}
            start = start_shares(table, new, **clock, least=form.least)
        held = held_share(judged, foreign, start=start)
        taught = (1.0 - foreign - held).to(table.compatibility.dtype)
        order = form.order(table.compatibility, taught)
        # Decided already: no context is new to `choose`.
        decided = {"reach": worth.double(), INITIAL: table.extra["student_logprobs"]}
        made = choose(
            replace(table, compatibility=order, extra=table.extra | decided),
            args,
            step=step,
            training=True,
        )
        used = made.selection.num_kept / made.selection.num_budget
        self._idle[arm] = self._idle[arm] + 1 if used < 0.5 else 0
        if self._idle[arm] == 20:
            self._thresholds[arm], self._idle[arm] = self._thresholds[arm] * form.anneal, 0
        # The hold of what was drawn, by the form's own r.
        drawn = made.reference_mask.double() / (args.anchor_fraction * int(table.valid.sum()))
        share = held * form.hold + foreign * form.ends_held
        selected = torch.where(made.reference_mask, 0.0, made.loss_weights)
        factor = float(form.drawn)
        weights = {
            "loss_weights": selected + factor * drawn * (1.0 - share),
            "anchor_weights": factor * drawn * share * form.coef,
        }
        return replace(made, **weights, reach=r if form.forward else None)


def run(folder: Path, variant: str, names: list[str], steps: int, seed: int) -> None:
    """Train the forms of one lab side by side; one file a form."""
    lab = build_lab(variant, parallel=False)
    settings = BASE | {"method": "reach", "budget": 0.1}
    arms = [
        replace(
            lab_arm(
                lab, name, settings | {"anchor_coef": FORMS[name].coef}, seed=seed, steps=steps
            ),
            evaluate_every=50,
            num_test_prompts=200,
        )
        for name in names
    ]
    for row in run_stack(arms, output_dir=str(folder), kind=FormStack):
        about = {"form": row["name"], "variant": variant, "steps": steps, "seed": seed}
        measured = {"kept": row["kept_fraction"]} | curves_of(row)
        write_json(file_of(folder, row["name"], variant, steps, seed), about | measured)


def file_of(folder: Path, name: str, variant: str, steps: int, seed: int) -> Path:
    """The file of one form in one lab."""
    plain = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name)
    return folder / f"{plain}__{variant}__{steps}__seed{seed}.json"


def table(rows: list[dict[str, Any]]) -> str:
    """Greedy end, lowest of the second half, sampled end: means over the seeds, of each form and lab.

    Forms are rows, unless there are more labs than forms.
    """
    more = {row["variant"] for row in rows}.difference(LABS)
    labs = [*LABS, *sorted(more)]
    grid = [["form", "steps", *labs]]
    for name in FORMS:
        for steps in sorted({row["steps"] for row in rows if row["form"] == name}):
            cells = []
            for lab in labs:
                own = [
                    row
                    for row in rows
                    if (row["form"], row["variant"], row["steps"]) == (name, lab, steps)
                ]
                cells.append(cell(own) if own else "")
            grid.append([name, str(steps), *cells])
    if len(labs) > len(grid):
        grid = [list(column) for column in zip(*grid, strict=True)]
    return "\n".join(markdown_table(grid[0], grid[1:]))


def cell(rows: list[dict[str, Any]]) -> str:
    """`end (lowest) / sampled`, %, means over the seeds, with their number where there are several."""
    late = [row["greedy"][len(row["greedy"]) // 2 :] for row in rows]
    ends = [curve[-1] for curve in late], [min(curve) for curve in late]
    end, low, sampled = (
        100 * sum(values) / len(rows) for values in (*ends, [row["sampled"][-1] for row in rows])
    )
    of = f", {len(rows)} seeds" if len(rows) > 1 else ""
    return f"{end:.0f} ({low:.0f}) / {sampled:.0f}{of}"


def main() -> None:
    """Run what is missing, gather, and put the table into the page."""
    unseen_labs.register()
    parser = Arguments(description=(__doc__ or "").splitlines()[0])
    parser.add_runs("runs/reach_forms", from_saved=True)
    parser.add_argument("--output", type=Path, default=Path("docs/results/reach_forms.json"))
    parser.add_argument(
        "--labs", nargs="*", choices=list(VARIANTS), default=list(LABS), metavar="LAB"
    )
    parser.add_argument(
        "--forms", nargs="*", choices=list(FORMS), default=list(FORMS), metavar="FORM"
    )
    parser.add_argument(
        "--parts", action="store_true", help="the rule: a grid, and each part changed once"
    )
    parser.add_argument("--steps", type=positive, default=1000)
    parser.add_argument("--seeds", type=positive, default=1)
    args = parser.parse_args()
    forms = PARTS if args.parts else args.forms
    torch.set_num_threads(1)
    wanted = [] if args.gather else list(itertools.product(args.labs, range(args.seeds)))
    for variant, seed in wanted:
        own = variant, args.steps, seed
        missing = [name for name in forms if not file_of(args.runs, name, *own).exists()]
        if missing:
            args.runs.mkdir(parents=True, exist_ok=True)
            run(args.runs, variant, missing, args.steps, seed)
            print(f"{variant}, seed {seed}: {len(missing)} forms", flush=True)
    known = json.loads(args.output.read_text())["forms"] if args.output.exists() else []
    done = [] if args.runs is None else sorted(args.runs.glob("*.json"))
    known += [json.loads(path.read_text()) for path in done]
    # A run that was made again replaces the one that was saved.
    keys = "form", "variant", "steps", "seed"
    rows = list({tuple(row[key] for key in keys): row for row in known}.values())
    write_rows(args.output, {"settings": BASE}, "forms", rows)
    write_generated(args.output.with_suffix(".md"), table(rows))


if __name__ == "__main__":
    main()
