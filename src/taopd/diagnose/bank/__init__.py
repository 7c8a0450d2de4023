"""The fixed-context bank: completions of the student with every signal before training, frozen on disk."""

from taopd.diagnose.bank.bank import FixedContextBank
from taopd.diagnose.bank.completions import (
    MAX_TOKENS,
    NUM_COMPLETIONS,
    read_completions,
    sample_rollouts,
)
from taopd.diagnose.bank.fingerprints import model_fingerprint, tokenizer_fingerprint
from taopd.diagnose.bank.token_features import BANK_TOP_K
from taopd.models.batch import Rollouts
from taopd.runs.schemas import BANK_FORMAT

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
