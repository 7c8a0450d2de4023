"""Accuracy and pass@k of graded completions, with a standard error clustered by problem.

Why clustered: samples of one problem are not independent, so the unit of the error is the problem.

Source of pass@k: Chen et al., "Evaluating Large Language Models Trained on Code" (2021), the
unbiased estimator.
"""

import math
import statistics
from dataclasses import dataclass, field, fields
from typing import Any

from taopd.experiments.study.statistics import wilson


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """Rates and transcripts of one evaluation. Rates are in [0, 1]."""

    accuracy: float
    """Mean over problems of the share of right samples (pass@1)."""
    standard_error: float | None
    """Of `accuracy`: standard deviation of the problems' shares over sqrt(problems), or None."""
    pass_at_k: dict[int, float]
    """Unbiased pass@k for k = 1, 2, 4, ... and k = num_samples."""
    pass_at_k_standard_error: dict[int, float | None]
    """Of each pass@k, likewise over problems."""
    intervals: dict[int, tuple[float, float]]
    """95 % interval of each pass@k (Wilson, over problems); that of `accuracy` under 1."""
    num_problems: int
    num_samples: int
    """Completions per problem."""
    num_truncated: int
    """Completions that reached `max_new_tokens` without an end-of-sequence token."""
    num_unparsed: int
    """Completions in which the grader found nothing to compare; they count as wrong."""
    settings: dict[str, Any]
    """Generation and grading settings, enough to run it again."""
    transcripts: list[dict[str, Any]] = field(repr=False)
    """One per completion: prompt, completion, answer, correct, truncated, num_tokens, ..."""

    def summary(self) -> dict[str, Any]:
        """Return everything but the transcripts, for `results.json`."""
        shown = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.repr}
        for name in ("pass_at_k", "pass_at_k_standard_error", "intervals"):
            shown[name] = {str(k): rate for k, rate in shown[name].items()}
        return shown


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is right, from n samples of
    one problem.

        1 - C(n - c, k) / C(n, k)

    Example:
        >>> pass_at_k(4, 1, 2)
        0.5
    """
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def summarize(
    transcripts: list[dict[str, Any]],
    *,
    num_problems: int,
    num_samples: int,
    settings: dict[str, Any],
) -> EvaluationResult:
    """Return the rates of graded transcripts, `num_samples` for each of `num_problems`."""
    right = [0] * num_problems
    for transcript in transcripts:
        right[transcript["problem"]] += transcript["correct"]
    shares = [count / num_samples for count in right]
    powers = {2**power for power in range(num_samples.bit_length()) if 2**power <= num_samples}
    chances = {
        k: [pass_at_k(num_samples, count, k) for count in right]
        for k in sorted(powers | {num_samples})
    }
    most = num_problems * num_samples
    errors = {k: _clustered_error(values) for k, values in chances.items()}
    means = {k: statistics.fmean(values) for k, values in chances.items()}
    return EvaluationResult(
        accuracy=statistics.fmean(shares),
        standard_error=_clustered_error(shares),
        pass_at_k=means,
        pass_at_k_standard_error=errors,
        intervals={
            # Groups of k samples overlap: their number bounds nothing.
            k: wilson(means[k], num_problems, errors[k], most=most if k == 1 else math.inf)
            for k in chances
        },
        num_problems=num_problems,
        num_samples=num_samples,
        num_truncated=sum(transcript["truncated"] for transcript in transcripts),
        num_unparsed=sum(not transcript["parsed"] for transcript in transcripts),
        settings=settings,
        transcripts=transcripts,
    )


def _clustered_error(values: list[float]) -> float | None:
    """Standard error of the mean over problems; None with one problem."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
