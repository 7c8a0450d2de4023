"""Signals: what student and teacher say about every completion position."""

from taopd.signals.arithmetic import LIBM, TORCH, Arithmetic
from taopd.signals.convert import lists_from_exact
from taopd.signals.exact import concatenate, exact_signals, signals_from_logprobs
from taopd.signals.lists import ListMetrics, list_metrics, topk_lists_signals
from taopd.signals.tables import (
    COMPATIBILITIES,
    SignalTable,
    TokenSignals,
    compatibility_proxy,
    prefix_ema,
    signal_table,
)

__all__ = [
    "COMPATIBILITIES",
    "LIBM",
    "TORCH",
    "Arithmetic",
    "ListMetrics",
    "SignalTable",
    "TokenSignals",
    "compatibility_proxy",
    "concatenate",
    "exact_signals",
    "list_metrics",
    "lists_from_exact",
    "prefix_ema",
    "signal_table",
    "signals_from_logprobs",
    "topk_lists_signals",
]
