"""Every metric that the trainer logs, with its meaning and unit; and those that describe a selection.

The same key is the same definition everywhere.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from taopd.distributed.collectives import ALONE, Ranks, order_statistics
from taopd.selectors import Selection
from taopd.signals import TEACHER, SignalTable

METRICS: dict[str, str] = {
    "select/nominal_fraction": "The configured budget.",
    "select/kept_fraction": "Tokens kept over valid tokens of the generation batch, min_keep included.",
    "select/kept_tokens": "Tokens kept in the generation batch, all ranks.",
    "select/valid_tokens": "Completion tokens of the generation batch that may train, all ranks.",
    "select/quadrant_q1": "Share of valid tokens with high H and high D (medians of H~ and D~).",
    "select/quadrant_q2": "Share of valid tokens with high H and low D.",
    "select/quadrant_q3": "Share of valid tokens with low H and high D.",
    "select/quadrant_q4": "Share of valid tokens with low H and low D.",
    "select/kept_disagreement_nats": "Mean D of the kept tokens.",
    "select/kept_compatibility": "Mean C of the kept tokens, likewise.",
    "select/kept_entropy_nats": "Mean H of the kept tokens (topk_lists: normalized to [0, 1]).",
    "select/empty_completions": "Share of completions in which no token was kept.",
    "teacher/completions/*": "Several teachers: completions with a valid token, by teacher, all ranks.",
    "teacher/valid_tokens/*": "Valid tokens by teacher, all ranks.",
    "teacher/kept_fraction/*": "Tokens kept over valid tokens, by teacher.",
    "teacher/disagreement_nats/*": "Mean D over valid tokens, by teacher.",
    "teacher/compatibility/*": "Mean C over valid tokens, by teacher; in [0, 1].",
    "select/off_teacher_list": "verl: share of sampled tokens that the teacher's list does not hold.",
    "select/teacher_list_covers": "verl: share of tokens at which it holds all K ids of the student's list.",
    "signal/disagreement_nats/*": "D over valid tokens: mean, p10, p50, p90.",
    "signal/compatibility/*": "C over valid tokens, which is what the setting compatibility says (method "
    "reach: r): mean, p10, p50, p90; in [0, 1].",
    "signal/entropy_nats/*": "H over valid tokens: mean, p10, p50, p90 (topk_lists: normalized to [0, 1]).",
    "signal/teachability/*": "D^L = D~ C~ over valid tokens: mean, p10, p50, p90; in [0, 1].",
    "signal/incompatible/*": "D^I = D~ (1 - C~) over valid tokens: mean, p10, p50, p90; in [0, 1].",
    "situation/*": "First 20 steps, main process: share of the sum of D on tokens that are teachable, "
    "within_reach, out_of_reach, foreign_ends (taopd.signals.situation).",
    "signal/off_support_mass": "Mean teacher mass outside the student's top-K, 1 - C by the mass proxy.",
    "signal/teacher_entropy_nats": "Mean entropy of the teacher over valid tokens (topk_lists: likewise).",
    "signal/sampled_reverse_kl_nats": "Mean of log p_S(y) - log p_T(y) over valid tokens; k1 estimate.",
    "select/mean_weight": "Mean weight of the kept tokens before the reduction; 1 for hard selection.",
    "shadow/jaccard/*": "Per shadow selector: tokens that it and the active selector both keep over tokens "
    "that either keeps; same table, same budget.",
    "shadow/jaccard_between/*": "The same for two shadow selectors, named 'a & b'.",
    "loss/selected_nats": "The distillation part of the loss, reduced over the whole batch; method reach: "
    "with the drawn tokens' pull towards the teacher. Without batches of which nothing trains.",
    "loss/anchor_nats": "Weighted KL(student || initial student) on drawn tokens, without the coefficient.",
    "sparse/gradient_share": "gradient_window: positions that carry gradient over those up to the last kept "
    "one, prompts included; mean over micro-batches, this rank.",
    "sparse/gradient_cosine": "Cosine of the windowed with the exact gradient; every gradient_check_every "
    "steps, first micro-batch, this rank.",
    "sparse/gradient_norm_ratio": "Norm of the windowed over that of the exact gradient, likewise.",
    "update/norm": "L2 norm of the change of all trainable parameters in the optimizer step, before "
    "match_update_norm and max_update_norm.",
    "update/scale": "match_update_norm, max_update_norm: what the change was multiplied by.",
    "perf/sample_s": "Seconds spent sampling completions, per generation batch.",
    "perf/score_s": "Seconds spent on the two scoring forwards and the signals, per batch.",
    "perf/select_s": "Seconds spent on the global selection and the reduction weights.",
    "perf/train_s": "Seconds spent on forward, loss and backward, per optimizer step.",
    "perf/cpu_s": "Without a GPU: CPU seconds of the process in the optimizer step, all threads.",
    "perf/sample_tokens": "Completion tokens sampled on this rank.",
    "perf/score_tokens": "Positions scored on this rank.",
    "perf/train_tokens": "Positions in the training forward on this rank, prompts included.",
    "perf/reused_tokens": "Positions of the training forward that the scoring pass had already computed: all "
    "of them (one micro-batch a step) or the sparse forward's prefix.",
    "guard/idle_drift_nats": "Mean idle drift (taopd.signals.drift) of the watched unselected tokens, "
    "every guard_every steps.",
    "perf/guard_s": "Seconds spent on the guard's comparison with the initial student.",
    "perf/anchor_s": "Seconds spent on the reference student's forward and on reach, per generation batch.",
    "perf/peak_memory_mib": "Peak so far: tensors on this rank's GPU; without a GPU the resident set of the "
    "process, libraries and both models included.",
    "perf/gradient_check_s": "Seconds spent on comparing the windowed gradient with the exact one.",
    "bank/gain_forward_nats/*": "Fall of KL(teacher || student) on the bank since it was frozen; > 0 is "
    "better. mean; learnable: D at or above the bank's median and C > 0.5; incompatible: C <= 0.5.",
    "bank/gain_reverse_nats/*": "The same for KL(student || teacher).",
    "bank/gain_forward_share/*": "Sum of these gains over the sum of the initial KL, same groups.",
    "bank/gain_reverse_share/*": "The same for KL(student || teacher).",
    "bank/excluded_fraction": "Share of the bank's tokens whose gain is not finite; in no mean.",
    "perf/bank_s": "Seconds spent on the bank's measurement.",
    "numerics/skipped": "Share of the steps that made no update: bad numbers, or no token to train on. "
    "Not those that the scaler of fp16 leaves out, of which update/norm is 0.",
    "rollout/empty_completions": "Share of completions in which nothing was sampled, this process.",
    "rollout/outside_vocabulary": "Share of sampled tokens that only one model knows, this process; neither "
    "they nor what follows them in the completion trains.",
    "rollout/drift_nats/*": "|log p of the sampler - log p of the scoring pass| of sampled tokens, main "
    "process: mean, max.",
    "completions/clipped_ratio": "TRL's: share of completions truncated at max_completion_length.",
    "completions/mean_length": "TRL's: mean completion length in tokens; also min_, max_, *_terminated_.",
    "entropy": "TRL's key: mean entropy of the student over completion tokens, nats; the mean of the means "
    "of micro-batches (signal/entropy_nats/mean is over all tokens alike).",
    "num_tokens": "TRL's: prompt and completion tokens seen so far.",
    "step_time": "TRL's: seconds of the whole optimizer step.",
}
"""Keys ending in `/*` stand for the statistics their text lists. A mean or a share over nothing, as of a
batch that is skipped, is left out: a 0 would be a number, and would enter the mean of the steps of a log."""


def selection_metrics(
    table: SignalTable,
    selection: Selection,
    budget: float,
    shadows: Mapping[str, Tensor] | None = None,
    *,
    part: SignalTable | None = None,
) -> dict[str, float]:
    """What was kept out of what: `select/*`, `signal/*` and `shadow/*` of one generation batch.

    Args:
        shadows: by name what other selectors would have kept.
        part: this rank's rows with every signal, which are more than `table` may hold; default `table`.
    """
    ranks, valid, kept = table.ranks, table.valid, selection.kept
    metrics = {
        "select/nominal_fraction": budget,
        "select/kept_tokens": float(selection.num_kept),
        "select/valid_tokens": float(selection.num_valid),
    }
    # Counts of completions add up over processes: no completion lies on two.
    num_responses = ranks.total(table.completion[valid].unique().numel())
    num_taught = ranks.total(table.completion[kept].unique().numel())
    if selection.num_valid:
        metrics["select/kept_fraction"] = selection.kept_fraction
        metrics["select/empty_completions"] = 1.0 - num_taught / num_responses
    averaged = {
        "select/mean_weight": selection.weights[kept],
        "select/kept_disagreement_nats": table.disagreement[kept],
        "select/kept_compatibility": table.compatibility[kept],
        "select/kept_entropy_nats": table.entropy[kept],
    }
    averaged |= {
        f"select/quadrant_q{quadrant}": selection.quadrant[valid] == quadrant
        for quadrant in (1, 2, 3, 4)
    }
    signals = {
        "signal/disagreement_nats": table.disagreement[valid],
        "signal/compatibility": table.compatibility[valid],
        "signal/entropy_nats": table.entropy[valid],
        "signal/teachability": selection.learnable[valid],
        "signal/incompatible": selection.incompatible[valid],
    }
    averaged |= {f"{name}/mean": column for name, column in signals.items()}
    # Signals that no selector reads stay on their process; their means need only sums.
    part = table if part is None else part
    return (
        metrics
        | _percentiles(signals, selection.num_valid, ranks)
        | _means(averaged, ranks)
        | _means(_sampled(part), part.ranks)
        | (shadow_metrics(kept, shadows or {}, ranks) if selection.num_valid else {})
    )


def teacher_metrics(
    table: SignalTable, selection: Selection, names: Sequence[str]
) -> dict[str, float]:
    """`teacher/*`: what was kept of the rows of each of several teachers; nothing where there is one.

    A teacher without a valid token in the generation batch has counts of 0, and no shares and means.
    """
    found: dict[str, float] = {}
    for teacher, name in enumerate(names):
        own = table.valid & (table.extra[TEACHER] == teacher)
        num_valid = table.ranks.total(own.sum())
        num_completions = table.ranks.total(table.completion[own].unique().numel())
        found |= {
            f"teacher/completions/{name}": float(num_completions),
            f"teacher/valid_tokens/{name}": float(num_valid),
        }
        means = {
            f"teacher/kept_fraction/{name}": selection.kept[own],
            f"teacher/disagreement_nats/{name}": table.disagreement[own],
            f"teacher/compatibility/{name}": table.compatibility[own],
        }
        found |= _means(means, table.ranks)
    return found


def shadow_metrics(
    kept: Tensor, shadows: Mapping[str, Tensor], ranks: Ranks = ALONE
) -> dict[str, float]:
    """Jaccard index of every shadow selector's mask with the active one, and of every pair of shadows."""
    active = {
        f"shadow/jaccard/{name}": jaccard(kept, mask, ranks) for name, mask in shadows.items()
    }
    pairs = combinations(shadows.items(), 2)
    return active | {
        f"shadow/jaccard_between/{one} & {other}": jaccard(mask, another, ranks)
        for (one, mask), (other, another) in pairs
    }


def jaccard(one: Tensor, other: Tensor, ranks: Ranks = ALONE) -> float:
    """|A and B| / |A or B| of two masks; 1 where both are empty."""
    union = ranks.total((one | other).sum())
    return ranks.total((one & other).sum()) / union if union else 1.0


def _sampled(part: SignalTable) -> dict[str, Tensor]:
    """Signals that no selection of the paper reads, at the valid tokens."""
    extra, found = {name: column[part.valid] for name, column in part.extra.items()}, {}
    if "mass" in extra:
        found["signal/off_support_mass"] = 1.0 - extra["mass"]
    if "teacher_entropy" in extra:
        found["signal/teacher_entropy_nats"] = extra["teacher_entropy"]
    if "student_logprobs" in extra and "teacher_logprobs" in extra:
        gap = extra["student_logprobs"] - extra["teacher_logprobs"]
        found["signal/sampled_reverse_kl_nats"] = gap
    return found


def _means(columns: Mapping[str, Tensor], ranks: Ranks) -> dict[str, float]:
    """Mean over all ranks of each column that is not empty on all of them."""
    sums = [(values.double().sum(), float(values.numel())) for values in columns.values()]
    total = ranks.sums(torch.tensor(sums, dtype=torch.float64).reshape(-1, 2)).tolist()
    return {
        name: value / count for name, (value, count) in zip(columns, total, strict=True) if count
    }


def _percentiles(columns: Mapping[str, Tensor], num_valid: int, ranks: Ranks) -> dict[str, float]:
    """p10, p50 and p90 of each column by nearest rank, so that no interpolation is implied."""
    if num_valid == 0:
        return {}
    percents = (10, 50, 90)
    # Interpolation would invent a value that no token has.
    places = [round(q / 100 * (num_valid - 1)) for q in percents]
    return {
        f"{name}/p{q}": value
        for name, values in columns.items()
        for q, value in zip(
            percents, order_statistics(values.sort().values, places, ranks), strict=True
        )
    }
