"""A look before the GPU hours: what is checked, as functions from plain values to verdicts.

Most failed distillation runs die of a mismatch that nobody looked for: end-of-sequence ids, chat template,
thinking mode, padded vocabulary, a stale adapter in the sampler. Each function here judges one of them.

Not here: how settings become models and samples, which is `taopd.preflight.subject`.
"""

from taopd.models.sampler_drift import Drift, drift
from taopd.preflight.machine import Precision, check_context, check_memory, check_precision
from taopd.preflight.measure import Measured, measure
from taopd.preflight.remote_teacher import (
    TEXTS,
    check_sampled_divergence,
    check_server,
    check_tokens,
    measure_asked,
)
from taopd.preflight.rollout_checks import (
    check_divergence,
    check_drift,
    check_kept,
    check_stops,
    check_support,
    check_truncation,
)
from taopd.preflight.tokenizer_checks import (
    check_chat_template,
    check_generation_config,
    check_special_tokens,
    check_thinking,
    check_tokenizers,
    token_name,
)
from taopd.preflight.verdict import LEVELS, Verdict, guarded, judge
from taopd.runs.limits import DRIFT_WARN, TRUNCATED, drift_cause, truncation_cause

__all__ = [
    "DRIFT_WARN",
    "LEVELS",
    "TEXTS",
    "TRUNCATED",
    "Drift",
    "Measured",
    "Precision",
    "Verdict",
    "check_chat_template",
    "check_context",
    "check_divergence",
    "check_drift",
    "check_generation_config",
    "check_kept",
    "check_memory",
    "check_precision",
    "check_sampled_divergence",
    "check_server",
    "check_special_tokens",
    "check_stops",
    "check_support",
    "check_thinking",
    "check_tokenizers",
    "check_tokens",
    "check_truncation",
    "drift",
    "drift_cause",
    "guarded",
    "judge",
    "measure",
    "measure_asked",
    "token_name",
    "truncation_cause",
]
