"""`FixedContextBank`: completions of the student with every signal before training, frozen on disk.

Why frozen: after training the student writes other contexts, so a divergence measured there mixes learning
with the change of contexts. Here before and after are measured at the same positions against the same
teacher; the difference is the gain of a token. Why features are stored: predictors must come from the
student before training.

A folder holds `tokens.parquet` (one row per completion token), `rollouts.safetensors` (ids and masks),
`teacher_topk.safetensors` and `manifest.json`. Freezing the same input twice gives the same bytes.

Source: docs/math.md, "The diagnostic"; arXiv 2605.26844.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taopd.diagnose.bank.fingerprints import (
    Fingerprint,
    check_fingerprint,
    model_fingerprint,
    tokenizer_fingerprint,
)
from taopd.diagnose.bank.manifest import (
    MANIFEST,
    check_destination,
    read_manifest,
    write_manifest,
    write_parquet,
    written_whole,
)
from taopd.diagnose.bank.score import known_positions, locate, score_rollouts
from taopd.diagnose.bank.token_features import BANK_TOP_K
from taopd.errors import ConfigError, DataError, require
from taopd.models.batch import SEQUENCE, TEACHER_PROMPT, Rollouts, teacher_side
from taopd.models.forward import State, backbone_forward, bare, on_device, states_at
from taopd.models.output_head import head_rows
from taopd.models.prompts import context_length
from taopd.models.tokenizers import shared_vocabulary
from taopd.runs.parquet import PLACES, read_table
from taopd.runs.paths import expanded
from taopd.runs.schemas import BANK_FORMAT
from taopd.runs.validation import ANY, Some, fit, number, whole
from taopd.runs.versions import installed_version

_TOKENS, _ROLLOUTS, _TEACHER = "tokens.parquet", "rollouts.safetensors", "teacher_topk.safetensors"
_PACKAGES = ("taopd", "torch", "transformers", "safetensors", "pyarrow")
_SHAPE = {
    "vocab_size": whole(1),
    "k": Some(whole(1)),
    "temperature": number(1e-6),
    "rollouts": {...: ANY},
    "fingerprints": {role: {...: ANY} for role in ("student", "teacher", "tokenizer")},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedContextBank:
    """A bank on disk, opened and verified.

    Example:
        >>> bank = FixedContextBank.open("runs/bank")  # doctest: +SKIP
        >>> bank.tokens[["entropy", "compatibility_k16"]].describe()  # doctest: +SKIP
    """

    folder: Path
    tokens: pd.DataFrame
    """One row per completion token, in the order (completion, position); columns: `token_features`."""
    rollouts: Rollouts
    teacher_topk_ids: Tensor
    """int32 [N, max K], best first."""
    teacher_topk_logprobs: Tensor
    """float32 [N, max K], nats."""
    manifest: dict[str, Any]

    @classmethod
    def freeze(
        cls,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rollouts: Rollouts,
        folder: str | Path,
        *,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        k: Sequence[int] = BANK_TOP_K,
        temperature: float = 1.0,
        batch_size: int = 8,
        overwrite: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> "FixedContextBank":
        """Score rollouts with both models and write the bank atomically.

        Both models are scored in evaluation mode, in the dtype they have, and left in the mode they had.

        Args:
            rollouts: from `sample_rollouts`, `read_completions` or a `RolloutCollector`.
            teacher_tokenizer: None: the teacher uses the student's.
            k: support sizes; of the default ones, one beyond the shared vocabulary becomes the vocabulary.
            temperature: divides the logits of both models; give what the rollouts were sampled with.
            batch_size: completions in one forward; kept, because it decides the last bits.
            progress: called with (positions done, positions in all).

        Raises:
            ConfigError: a setting out of range.
            DataError: tokenizers that differ, a folder that holds something else, or rollouts that do not
                fit the models.
            NumericsError: NaN or infinite logits; names model, completion and position.
        """
        path = check_destination(folder, BANK_FORMAT, overwrite=overwrite)
        vocab_size, sizes = vocabulary_and_sizes(
            student, teacher, tokenizer, teacher_tokenizer or tokenizer, k
        )
        settings = {
            "vocab_size": vocab_size,
            "k": sizes,
            "temperature": float(temperature),
            "batch_size": batch_size,
        }
        _check(rollouts, temperature, batch_size, student, teacher)
        columns, topk = score_rollouts(student, teacher, rollouts, settings, progress)
        with written_whole(path, BANK_FORMAT, overwrite=overwrite) as partial_folder:
            write_parquet(partial_folder / _TOKENS, columns)
            # No metadata: safetensors writes that map in random order.
            tensors = {
                name: values.to(torch.uint8 if name.endswith("mask") else torch.int32).contiguous()
                for name, values in rollouts.batch().items()
            }
            save_file(tensors, partial_folder / _ROLLOUTS)
            save_file({"ids": topk[0], "logprobs": topk[1]}, partial_folder / _TEACHER)
            num_tokens = len(columns["token_id"])
            content = settings | {
                "num_tokens": num_tokens,
                "num_completions": len(rollouts),
                "num_prompts": len(set(rollouts.prompts)),
                "num_outside_vocabulary": sum(map(len, rollouts.completion_ids)) - num_tokens,
                "rollouts": rollouts.settings,
                "fingerprints": {
                    "student": model_fingerprint(bare(student)),
                    "teacher": model_fingerprint(bare(teacher)),
                    "tokenizer": tokenizer_fingerprint(tokenizer),
                },
                "versions": {name: installed_version(name) for name in _PACKAGES},
            }
            write_manifest(partial_folder, BANK_FORMAT, content)
        return cls.open(path)

    @classmethod
    def open(cls, folder: str | Path) -> "FixedContextBank":
        """A bank read from its folder, every file checked against the manifest.

        Raises:
            DataError: no bank there, or a file that is missing, truncated or edited; says which and how.
        """
        path = expanded(folder).absolute()
        manifest = read_manifest(path, BANK_FORMAT)
        fit(manifest, _SHAPE, str(path / MANIFEST))
        tokens = read_table(path / _TOKENS, PLACES)
        try:
            batch, topk = load_file(path / _ROLLOUTS), load_file(path / _TEACHER)
        except (OSError, safetensors.SafetensorError) as error:
            raise DataError(f"cannot read the bank {path}: {error}") from error
        if tokens.empty:
            raise DataError(f"the bank {path} is empty: no completion token to measure on")
        _check_tensors(path, len(tokens), batch, topk)
        return cls(
            folder=path,
            tokens=tokens,
            rollouts=Rollouts.of_batch(batch, manifest["rollouts"]),
            teacher_topk_ids=topk["ids"],
            teacher_topk_logprobs=topk["logprobs"],
            manifest=manifest,
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids that student and teacher share; distributions are over these."""
        return int(self.manifest["vocab_size"])

    @property
    def k(self) -> list[int]:
        """Support sizes of the feature columns, ascending."""
        return list(self.manifest["k"])

    @property
    def temperature(self) -> float:
        """Temperature of both models' distributions."""
        return float(self.manifest["temperature"])

    @property
    def fingerprints(self) -> dict[str, Fingerprint]:
        """Fingerprints of "student" (before training), "teacher" and "tokenizer"."""
        return self.manifest["fingerprints"]

    def states(self, model: Any, *, of_teacher: bool = False) -> Iterator[State]:
        """A model's hidden states at the bank's tokens with its head, per micro-batch; lazy.

        Args:
            of_teacher: after the prompts that the teacher reads.
        """
        batch = on_device(self.rollouts.batch(), model)
        batch = dict(teacher_side(batch)) if of_teacher else batch
        positions = known_positions(batch, self.vocab_size)
        size = int(self.manifest["batch_size"])
        return states_at(backbone_forward(self.vocab_size), model, batch, positions, size)

    def check_model(self, role: str, model: PreTrainedModel) -> None:
        """Refuse a model that is not the bank's.

        Args:
            role: "student" (the one before training) or "teacher".

        Raises:
            DataError: names every part that differs.
        """
        check_fingerprint(role, self.fingerprints[role], model_fingerprint(bare(model)))

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer that gives an id another token.

        Raises:
            DataError: names what differs.
        """
        current = tokenizer_fingerprint(tokenizer)
        check_fingerprint("tokenizer", self.fingerprints["tokenizer"], current)

    def locate(self, row: int) -> str:
        """Completion and position of a row of `tokens`, in words."""
        return locate(self.tokens["completion"], self.tokens["position"], row)


def _check_tensors(
    path: Path, num_tokens: int, batch: dict[str, Tensor], topk: dict[str, Tensor]
) -> None:
    """Refuse tensors with other names than a bank has, or whose sizes do not fit each other."""
    known = {*SEQUENCE, *TEACHER_PROMPT} if TEACHER_PROMPT[0] in batch else {*SEQUENCE}
    if set(batch) != known or set(topk) != {"ids", "logprobs"}:
        raise DataError(f"{path}: its tensors are {sorted(batch)} and {sorted(topk)}")
    prompt, prompt_mask, completion, completion_mask = (batch[name].shape for name in SEQUENCE)
    own = [tuple(batch[name].shape for name in TEACHER_PROMPT if name in batch)]
    shapes = [
        (prompt, prompt_mask),
        (completion, completion_mask),
        (topk["ids"].shape, topk["logprobs"].shape),
        *filter(None, own),
    ]
    fitting = all(len(one) == 2 and one == other for one, other in shapes)
    fitting = fitting and all(pair[0][0] == prompt[0] for pair in filter(None, own))
    if not fitting or shapes[0][0][0] != shapes[1][0][0] or shapes[2][0][0] != num_tokens:
        raise DataError(f"{path}: its tensors have shapes {shapes} for {num_tokens} tokens")


def vocabulary_and_sizes(
    student: Any,
    teacher: Any,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    k: Sequence[int],
) -> tuple[int, list[int]]:
    """The number of ids that both models share, and a bank's support sizes, ascending.

    Raises:
        ConfigError: a size below 1 or beyond these ids.
        DataError: tokenizers that differ.
    """
    rows = [head_rows(model.config) for model in (student, teacher)]
    vocab_size = shared_vocabulary(tokenizer, teacher_tokenizer, *rows)
    return vocab_size, _support_sizes(k, vocab_size)


def _support_sizes(k: Sequence[int], vocab_size: int) -> list[int]:
    if not k or any(isinstance(size, bool) or size < 1 for size in k):
        raise ConfigError(f"k={list(k)}: support sizes must be whole numbers of at least 1")
    # The default ones are cut to a small vocabulary.
    if max(k) > vocab_size and tuple(k) != BANK_TOP_K:
        raise ConfigError(f"k={max(k)}: larger than the vocabulary of {vocab_size} ids")
    return sorted({min(int(size), vocab_size) for size in k})


def _check(rollouts: Rollouts, temperature: float, batch_size: int, *models: Any) -> None:
    require(temperature > 0, "temperature", temperature, "above 0")
    require(batch_size >= 1, "batch_size", batch_size, "at least 1")
    num_ids = min(model.get_input_embeddings().weight.shape[0] for model in models)
    context = context_length(*(bare(model) for model in models))
    both = zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)
    texts = [(index, prompt + ids) for index, (prompt, ids) in enumerate(both)]
    own = zip(rollouts.teacher_prompt_ids or (), rollouts.completion_ids, strict=False)
    texts += [(index, prompt + ids) for index, (prompt, ids) in enumerate(own)]
    for index, ids in texts:
        if max(ids) >= num_ids:
            raise DataError(
                f"rollout {index} holds token id {max(ids)}, but one of the models knows only "
                f"{num_ids} ids: these completions are of another tokenizer"
            )
        if context is not None and len(ids) > context:
            raise DataError(
                f"rollout {index} has {len(ids)} tokens, more than the context of {context}; cut it "
                "with max_tokens or drop it"
            )
