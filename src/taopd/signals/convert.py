"""From exact signals to what the released code would have seen: two top-K lists."""

from dataclasses import replace

from taopd.signals.topk_lists import topk_lists_signals
from taopd.signals.types import TokenSignals


def lists_from_exact(signals: TokenSignals) -> TokenSignals:
    """Recompute D, H and the proxies from the two top-K lists alone; C stays the exact mass.

    `compatibility="bound"` selects the lower bound that the lists alone give. Carried over is what a
    teacher's server can give beside its list: log-probs of the sampled token and of the student's ids.
    """
    lists = topk_lists_signals(
        signals.student_topk_ids,
        signals.student_topk_logprobs,
        signals.teacher_topk_ids,
        signals.teacher_topk_logprobs,
        k=signals.student_topk_ids.shape[1],
    )
    return replace(
        lists,
        compatibility=signals.compatibility,
        compatibility_is_exact=signals.compatibility_is_exact,
        student_logprobs=signals.student_logprobs,
        teacher_logprobs=signals.teacher_logprobs,
        token_ids=signals.token_ids,
        teacher_at_student_ids=signals.teacher_at_student_ids,
    )
