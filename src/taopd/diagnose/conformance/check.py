"""Conformance check against the released selector: recorded decisions, computed again and compared.

What: a file holds batches of top-K lists with every metric, score and mask the released code made
of them (`tests/golden/README.md` names the fields). Everything is computed again with `LIBM`, the
arithmetic that agrees to the last bit, and compared: masks, ranks and quadrants exactly, floats to
1e-9 relative.

Why a file with nothing to compare is an error: it would pass without having shown anything.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from taopd.diagnose.conformance.files import SELECTION, Batch, Json, read_batches
from taopd.errors import DataError, suggest
from taopd.runs.validation import fit
from taopd.selectors import REFERENCE_NAMES, NormalizedView, normalized_view, select
from taopd.selectors.formulas import (
    incompatible,
    low_entropy_teachability,
    teachability,
    teachability_entropy_reference,
    tip,
)
from taopd.signals import LIBM, ListMetrics, SignalTable, list_metrics, prefix_ema

RELATIVE_TOLERANCE = 1e-9
"""Floats; docs/released-code.md."""
ABSOLUTE_FLOOR = 1e-13
"""Differences below this count as none: a value that is 0 but for rounding has no relative
error."""
KINDS = ("token metrics", "scores", "selections")
NORMALIZATION_NAMES = {
    "quantile": "quantile",
    "batch_quantile": "quantile",
    "batch_minmax": "minmax",
    "minmax": "minmax",
    "none": "none",
}
PROXY_METRICS = {
    "mass": "Cmass",
    "set": "Coverlap",
    "bc": "CBC",
    "prefix_ema": "Cprefix_ema",
}
NUM_SHOWN = 10
"""Mismatches a report keeps."""


@dataclass(slots=True)
class ConformanceReport:
    """Numbers of compared and differing values of one file."""

    path: str
    num_batches: int = 0
    num_tokens: int = 0
    not_compared: Counter[str] = field(default_factory=Counter)
    """What the file records and nothing here recomputes: random choices, unknown columns."""
    compared: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    """Numbers of values (token metrics, scores) or of whole selections compared, by kind."""
    mismatches: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    first_mismatches: list[str] = field(default_factory=list)
    """Place, expected and found, of the first few."""

    @property
    def num_compared(self) -> int:
        return sum(self.compared.values())

    @property
    def num_mismatches(self) -> int:
        return sum(self.mismatches.values())

    def count(self, kind: str, same: bool, place: str, expected: object, found: object) -> None:
        """Record one comparison, and its place if it failed."""
        self.compared[kind] += 1
        if not same:
            self.mismatches[kind] += 1
            if len(self.first_mismatches) < NUM_SHOWN:
                self.first_mismatches.append(f"{place}: expected {expected}, found {found}")


def _metrics(batch: Batch) -> tuple[dict[str, list[Json]], ListMetrics]:
    """(columns under the file's names, our metrics); C is exact where it was recorded."""
    metrics = list_metrics(
        batch.student_ids,
        batch.student_logprobs,
        batch.teacher_ids,
        batch.teacher_logprobs,
        k=batch.k,
        teacher_logprobs_at_student_ids=batch.requested_logprobs,
        target_ids=batch.target_ids,
        arithmetic=LIBM,
    )
    mass = torch.where(batch.requested, metrics.compatibility, metrics.compatibility_bound)
    assert metrics.student_target_rank is not None and metrics.teacher_target_rank is not None
    columns: dict[str, list[Json]] = {
        "KLf_union": metrics.disagreement.tolist(),
        "KLr_union": metrics.reverse_disagreement.tolist(),
        "CBC": metrics.bhattacharyya.tolist(),
        "Cmass": mass.tolist(),
        "Cmass_topk": metrics.compatibility_bound.tolist(),
        "Coverlap": metrics.overlap.tolist(),
        "Hs_topk": metrics.student_entropy_nats.tolist(),
        "Ht_topk": metrics.teacher_entropy_nats.tolist(),
        "Hs_topk_norm": metrics.student_entropy.tolist(),
        "Ht_topk_norm": metrics.teacher_entropy.tolist(),
        "student_topk_mass": metrics.student_mass.tolist(),
        "teacher_topk_mass": metrics.teacher_mass.tolist(),
        "reach_t1": metrics.teacher_best_reached.long().tolist(),
        "target_student_rank": [rank or None for rank in metrics.student_target_rank.tolist()],
        "target_teacher_rank": [rank or None for rank in metrics.teacher_target_rank.tolist()],
        "Cprefix_ema": prefix_ema(mass, batch.completion).tolist(),
    }
    return columns, metrics


def _scores(view: NormalizedView) -> dict[str, list[Json]]:
    return {
        "H_norm": view.h.tolist(),
        "D_norm": view.d.tolist(),
        "C_norm": view.c.tolist(),
        "DC_norm": view.dc.tolist(),
        "Dlearn": teachability(view).tolist(),
        "Dincompat": incompatible(view).tolist(),
        "tip_score": tip(view).tolist(),
        "ca_softor_score": teachability_entropy_reference(view).tolist(),
        "split_ca_score": low_entropy_teachability(view).tolist(),
        "quadrant": view.quadrant.tolist(),
    }


def _same(expected: Json, found: Json) -> bool:
    if expected is None or found is None:
        return expected is found
    if isinstance(expected, int) and isinstance(found, int):
        return expected == found
    difference = abs(float(expected) - float(found))
    return difference <= max(RELATIVE_TOLERANCE * abs(float(expected)), ABSOLUTE_FLOOR)


def _compare_columns(
    report: ConformanceReport, kind: str, batch: Batch, found: dict[str, list[Json]]
) -> None:
    key = kind.replace(" ", "_")
    expected = batch.expected(key, found)
    for name in batch.recorded[key].keys() - found.keys():
        report.not_compared[f"columns {name!r}"] += 1
    for name, ours in found.items():
        rows = zip(batch.places, expected[name], ours, strict=True)
        for place, theirs, value in rows:
            report.count(
                kind, _same(theirs, value), f"{batch.place}, {place}, {name}", theirs, value
            )


def _known(names: Mapping[str, str], recorded: dict[str, Json], key: str, place: str) -> str:
    """What a recorded name stands for; an absent one is the first of the known names."""
    name = recorded.get(key, next(iter(names)))
    if name not in names:
        raise DataError(f"{place}, {key}: {name!r} is unknown.{suggest(name, names)}")
    return names[name]


def _compare_selections(
    report: ConformanceReport, batch: Batch, tables: dict[str, SignalTable]
) -> None:
    for number, recorded in enumerate(batch.selections):
        place, method = f"{batch.place}, selections[{number}]", recorded["method"]
        selector = _known(REFERENCE_NAMES, recorded, "method", place)
        if method == "random":  # Its generator is not recorded, so there is nothing to recompute.
            report.not_compared["random choices"] += 1
            continue
        fit(recorded, SELECTION, place)
        selection = select(
            tables[_known(PROXY_METRICS, recorded, "proxy", place)],
            selector=selector,
            budget=recorded["ratio"],
            min_keep=recorded["min_keep"],
            normalization=_known(NORMALIZATION_NAMES, recorded, "normalization", place),
            gamma=recorded.get("gamma", recorded.get("split_gamma", batch.gamma)),
            rules="reference",
        )
        theirs, ours = batch.flat_masks(recorded, place), selection.kept.long().tolist()
        differing = [row for row, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b]
        label = f"{place}, {method} ratio {recorded['ratio']:g} min_keep {recorded['min_keep']}"
        shown = "; ".join(batch.places[row] for row in differing[:4])
        report.count(
            "selections",
            not differing,
            label,
            f"{sum(theirs)} kept",
            f"{sum(ours)} kept, {len(differing)} rows differ: {shown}",
        )


def check_batch(report: ConformanceReport, batch: Batch) -> None:
    """Recompute one batch and add what was compared to the report."""
    columns, metrics = _metrics(batch)
    _compare_columns(report, "token metrics", batch, columns)
    tables = {
        name: SignalTable(
            disagreement=metrics.disagreement,
            compatibility=torch.tensor(columns[name], dtype=torch.float64),
            entropy=metrics.student_entropy,
            completion=batch.completion,
            position=batch.position,
            valid=batch.valid,
        )
        for name in PROXY_METRICS.values()
    }
    scores = _scores(normalized_view(tables["Cmass"], rules="reference"))
    _compare_columns(report, "scores", batch, scores)
    _compare_selections(report, batch, tables)
    report.num_batches += 1
    report.num_tokens += len(batch.places)


def check_file(path: str | Path) -> ConformanceReport:
    """Recompute every metric, score and selection recorded in a file and compare.

    Raises:
        DataError: the file is missing, not JSON or not of the golden file's form (says which batch
            and field, and what is expected there), or it holds nothing to compare.
    """
    report = ConformanceReport(path=str(path))
    for batch in read_batches(Path(path)):
        check_batch(report, batch)
    if report.num_compared == 0:
        raise DataError(f"{path}: nothing to compare; expected at least one recorded selection")
    return report
