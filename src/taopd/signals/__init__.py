"""Signals: what student and teacher say about every completion position."""

from taopd.signals.arithmetic import LIBM, TORCH, Arithmetic
from taopd.signals.derived import (
    BOUND_GIVES,
    INITIAL_GIVES,
    KNOWN_SIGNALS,
    LISTS_GIVE,
    OF_THE_START,
    SERVER_GIVES,
    available_signals,
    signal_table,
)
from taopd.signals.drift import at_ids, idle_drift, ids_to_compare
from taopd.signals.exact import (
    exact_signals,
    signals_from_answer,
    signals_from_logprobs,
    signals_from_pair,
)
from taopd.signals.merge_stops import merge_stop_class
from taopd.signals.reach import (
    THRESHOLD,
    foreign_bound,
    foreign_mass,
    reach_bound,
    reach_by_teacher,
    reach_from_logprobs,
    reach_from_states,
)
from taopd.signals.remembered import (
    StartMemory,
    reach_from_shares,
    remembered_reach,
    sums_from_logprobs,
    sums_from_states,
)
from taopd.signals.situation import Situation, situation
from taopd.signals.topk_lists import ListMetrics, list_metrics, lists_from_exact, topk_lists_signals
from taopd.signals.types import (
    COMPATIBILITIES,
    FOREIGN,
    INITIAL,
    TEACHER,
    SignalTable,
    TokenSignals,
    compatibility_proxy,
    concatenate,
    prefix_ema,
    taken,
)

__all__ = [
    "BOUND_GIVES",
    "COMPATIBILITIES",
    "FOREIGN",
    "INITIAL",
    "INITIAL_GIVES",
    "KNOWN_SIGNALS",
    "LIBM",
    "LISTS_GIVE",
    "OF_THE_START",
    "SERVER_GIVES",
    "TEACHER",
    "THRESHOLD",
    "TORCH",
    "Arithmetic",
    "ListMetrics",
    "SignalTable",
    "Situation",
    "StartMemory",
    "TokenSignals",
    "at_ids",
    "available_signals",
    "compatibility_proxy",
    "concatenate",
    "exact_signals",
    "foreign_bound",
    "foreign_mass",
    "idle_drift",
    "ids_to_compare",
    "list_metrics",
    "lists_from_exact",
    "merge_stop_class",
    "prefix_ema",
    "reach_bound",
    "reach_by_teacher",
    "reach_from_logprobs",
    "reach_from_shares",
    "reach_from_states",
    "remembered_reach",
    "signal_table",
    "signals_from_answer",
    "signals_from_logprobs",
    "signals_from_pair",
    "situation",
    "sums_from_logprobs",
    "sums_from_states",
    "taken",
    "topk_lists_signals",
]
