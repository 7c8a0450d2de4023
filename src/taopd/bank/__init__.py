"""The fixed-context bank: what the student wrote, frozen, with what was known before training."""

from taopd.bank.bank import BANK_FORMAT, FixedContextBank
from taopd.bank.features import BANK_TOP_K
from taopd.bank.fingerprints import model_fingerprint, tokenizer_fingerprint
from taopd.bank.rollouts import (
    MAX_TOKENS,
    NUM_COMPLETIONS,
    Rollouts,
    read_completions,
    sample_rollouts,
)

__all__ = [
    "BANK_FORMAT",
    "BANK_TOP_K",
    "MAX_TOKENS",
    "NUM_COMPLETIONS",
    "FixedContextBank",
    "Rollouts",
    "model_fingerprint",
    "read_completions",
    "sample_rollouts",
    "tokenizer_fingerprint",
]
