"""A teacher in this process: its loading, and the same protocol as a server's."""

import logging
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taopd.errors import ConfigError, DataError
from taopd.kernels import topk_score
from taopd.models.batch import Positions, Rollouts
from taopd.models.forward import backbone_forward, states_at
from taopd.models.load_options import current_names
from taopd.models.loading import load_model, load_tokenizer
from taopd.models.output_head import head_rows, merge_head_adapter
from taopd.models.own_forward import compare_with_own_forward, require_agreement
from taopd.models.quantization import check_layers, quantization_config, quantized_kind
from taopd.models.tokenizers import shared_vocabulary
from taopd.teachers.protocol import TeacherScores

logger = logging.getLogger(__name__)

_TOKENIZERS = WeakKeyDictionary[PreTrainedModel, PreTrainedTokenizerBase]()
"""Of teachers that were loaded here."""


class LocalTeacher:
    """A `Teacher` that is a model in this process.

    `TeachabilityTrainer` given the model itself does more: it keeps the teacher's hidden states, which the
    losses over the full distribution read. This one is what a server's numbers are compared with.

    Args:
        vocab_size: ids shared with the student; the head is cut to them.
        batch_size: sequences in one forward; 1 for a model whose numbers change with padding.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int, *, batch_size: int = 8) -> None:
        self._model, self._vocab_size, self._batch_size = model.eval(), vocab_size, batch_size
        self._forward, self._agreed = backbone_forward(vocab_size), False
        self._one_at_a_time = threading.Lock()

    def describe(self) -> dict[str, Any]:
        """Kind and model; always exact."""
        return {"kind": "local", "model": str(self._model.name_or_path), "exact": True, "why": ""}

    @torch.no_grad()
    def score(
        self,
        token_ids: Sequence[Sequence[int]],
        completion_start: Sequence[int],
        want_ids: Int[Tensor, "N W"] | None,
        top_k: int,
    ) -> TeacherScores:
        """See `Teacher.score`.

        Raises:
            DataError: at first, a model that is scored otherwise than its own forward computes.
        """
        pairs = list(zip(token_ids, completion_start, strict=True))
        rollouts = Rollouts(
            prompt_ids=[list(tokens[:start]) for tokens, start in pairs],
            completion_ids=[list(tokens[start:]) for tokens, start in pairs],
        )
        batch = rollouts.batch(device=self._model.device)
        positions = Positions.of(batch["completion_mask"].bool())
        ids = batch["completion_ids"][positions.row, positions.column]
        with self._one_at_a_time:
            if not self._agreed:
                self._require_agreement(batch)
            parts = list(states_at(self._forward, self._model, batch, positions, self._batch_size))
            want = None if want_ids is None else want_ids.to(ids.device)
            states = torch.cat([hidden for hidden, _ in parts])
            scores = topk_score(states, parts[0][1], ids, k=top_k, want_ids=want)
            return TeacherScores(
                logprobs=scores.target_logprobs,
                topk_ids=scores.topk_ids,
                topk_logprobs=scores.topk_logprobs,
                want_logprobs=scores.want_logprobs,
            )

    def _require_agreement(self, batch: dict[str, Tensor]) -> None:
        compare = partial(compare_with_own_forward, self._forward, self._model, self._model, batch)
        found = compare(self._vocab_size, padded=self._batch_size > 1)
        if found.problem and self._batch_size > 1:
            # Padding or rows beside it change its numbers: sparse attention takes other keys of one score.
            self._batch_size = 1
            found = compare(self._vocab_size, padded=False)
        require_agreement("teacher", found)
        self._agreed = True


def load_teacher(
    teacher: str | PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    revision: str | None = None,
    init_kwargs: dict[str, Any] | None = None,
    quantization: str | None = None,
    cut_renamed_control_tokens: bool = False,
) -> tuple[PreTrainedModel, int]:
    """The frozen teacher, and how many ids it shares with the student.

    Args:
        teacher: a path or hub id, loaded with `init_kwargs` (dtype float32 unless said, as TRL does),
            or a model. Its `name_or_path` says which tokenizer it has; where it does not, this is said in the
            log, and the student's is assumed.
        tokenizer: the student's.
        quantization: `8bit` or `4bit`, of a teacher that is loaded here.
        cut_renamed_control_tokens: see `taopd.models.tokenizers.check_same_tokenizer`.

    Raises:
        DataError: if the teacher cannot be loaded, or the tokenizers give one id to two different tokens
            (names the first). ConfigError: `init_kwargs` with a model, or a model that shares weights with
            the student.
    """
    if not isinstance(teacher, str) and not hasattr(teacher, "config"):
        raise ConfigError(
            f"the teacher is a {type(teacher).__name__}: pass a folder, a hub id, a causal language model "
            "or a `taopd.teachers.Teacher`"
        )
    if not isinstance(teacher, str):
        refuse_loading_options(teacher, init_kwargs, quantization)
        teacher_tokenizer = _tokenizer_of(teacher, student, tokenizer)
    else:
        kwargs = {"dtype": "float32", "revision": revision or "main"} | current_names(init_kwargs)
        teacher_tokenizer = load_tokenizer(teacher, revision=kwargs["revision"])
        if quantization is not None:
            kwargs["quantization_config"] = quantization_config(quantization, kwargs["dtype"])
        teacher = load_model(teacher, **kwargs)
        check_layers(teacher)
        _TOKENIZERS[teacher] = teacher_tokenizer
    vocab_size = shared_vocabulary(
        tokenizer,
        teacher_tokenizer,
        head_rows(student.config),
        head_rows(teacher.config),
        cut_renamed_control_tokens=cut_renamed_control_tokens,
    )
    trained = {id(weight) for weight in student.parameters() if weight.requires_grad}
    if trained & {id(weight) for weight in teacher.parameters()}:
        raise ConfigError(
            "teacher and student share weights that train: load the teacher a second time"
        )
    merge_head_adapter(teacher)
    # An object may come from training: dropout would be part of the teacher.
    return teacher.eval().requires_grad_(False), vocab_size


def refuse_loading_options(
    teacher: Any, init_kwargs: dict[str, Any] | None, quantization: str | None = None
) -> None:
    """Refuse options of loading beside a teacher that is loaded already.

    Raises:
        ConfigError: both are given.
    """
    if teacher is None or isinstance(teacher, str):
        return
    if init_kwargs is not None:
        raise ConfigError(
            "teacher_model_init_kwargs: the teacher is loaded already; pass its path, or leave them out"
        )
    if quantization is not None and quantized_kind(teacher) != quantization:
        raise ConfigError(
            f"teacher_quantization={quantization!r}: the teacher is loaded already, and not so; pass its "
            "path, or leave it out"
        )


def tokenizer_loaded_with(teacher: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a teacher that `load_teacher` has loaded; None of any other object."""
    return _TOKENIZERS.get(teacher) if isinstance(teacher, PreTrainedModel) else None


def _tokenizer_of(
    teacher: PreTrainedModel, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """The tokenizer of a teacher that is a model already, or the student's where it cannot be known.

    Raises:
        DataError: the teacher has fewer ids than the student's tokenizer has tokens.
    """
    if (known := tokenizer_loaded_with(teacher)) is not None:
        return known
    name = str(getattr(teacher.config, "_name_or_path", "") or "")
    if name and name == student.config._name_or_path:
        return tokenizer
    try:
        if name:
            return load_tokenizer(name, revision=getattr(teacher.config, "_commit_hash", None))
    except DataError as error:
        logger.info("no tokenizer at the teacher's name_or_path: %s", error)
    rows = head_rows(teacher.config)
    if rows < len(tokenizer):
        raise DataError(
            f"the teacher knows {rows} ids, the student's tokenizer has {len(tokenizer)}: the teacher has "
            "another tokenizer. Choose two models that share one"
        )
    logger.warning(
        "the teacher's tokenizer cannot be known (name_or_path is %r, %d ids; the student's tokenizer has "
        "%d): it is taken to be the student's. Pass the teacher as a path to have them compared",
        name,
        rows,
        len(tokenizer),
    )
    return tokenizer
