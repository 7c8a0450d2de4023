"""The trainer's teacher: a model that runs here, or a `Teacher` that is asked."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from taopd.checkpoints import load_tokenizer
from taopd.choose import needed_signals, signal_options
from taopd.config import TeachabilityConfig
from taopd.errors import ConfigError, TeacherError, TeacherUnavailable
from taopd.losses import needs_teacher_distribution
from taopd.records import write_json
from taopd.scoring import Forward, Positions, Reuse, Scored, score_positions
from taopd.signals import lists_from_exact
from taopd.teachers import Teacher, as_bound, ask_positions, connect, load_teacher
from taopd.vocabulary import shared_vocabulary

logger = logging.getLogger(__name__)
FILE = "teacher.json"
"""In the run folder: what was asked, and whether C is exact or a lower bound."""
UNSERVED = frozenset({"teacher_entropy", "forward_kl", "reverse_kl"})
"""Signals over the teacher's full distribution."""


class TeacherSource:
    """Scores generation batches, whoever the teacher is.

    Args:
        teacher: path, hub id or model for a teacher here; for one that is asked a `Teacher`, or None
            with `args.teacher_url`.
        student: its vocabulary is what both must share.

    Raises:
        ConfigError: a loss, signal or setting that an asked teacher cannot serve, or no teacher at all.
        DataError: see `load_teacher`. TeacherError, TeacherUnavailable: see `connect`.
    """

    def __init__(
        self,
        teacher: Any,
        args: TeachabilityConfig,
        student: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
    ) -> None:
        self._args, self._accelerator = args, accelerator
        self._asked: Teacher | None = None
        self.plain: PreTrainedModel | None = None
        """The model as it was loaded, if it runs here."""
        self.model: Any = None
        """The same, prepared for this device."""
        self._said: bool | None = None
        if isinstance(teacher, PreTrainedModel) and args.teacher_url:
            raise ConfigError("teacher_url and a teacher_model: one of them is the teacher")
        if args.teacher_url or isinstance(teacher, Teacher):
            args.check_teacher(asked=True)
            self.vocab_size, known = _vocabularies(teacher, args, student, tokenizer)
            self._asked = teacher if isinstance(teacher, Teacher) else _connect(args, known)
            self._check_signals()
            return
        teacher = args.teacher_model_name_or_path if teacher is None else teacher
        if teacher is None:
            raise ConfigError(
                "no teacher: pass teacher_model, or set teacher_model_name_or_path or teacher_url"
            )
        self.plain, self.vocab_size = load_teacher(
            teacher,
            student,
            tokenizer,
            revision=args.teacher_model_revision,
            init_kwargs=args.teacher_model_init_kwargs,
            cut_renamed_control_tokens=args.cut_renamed_control_tokens,
        )
        self.model = accelerator.prepare_model(self.plain, evaluation_mode=True)

    def score(
        self,
        forward: Forward,
        student: Any,
        batch: Mapping[str, Tensor],
        positions: Positions,
        *,
        stop_ids: Sequence[int],
        temperature: float,
        when: str,
        reuse: Reuse,
    ) -> Scored:
        """Signals of every position of a padded batch, as the settings ask for them."""
        args = self._args
        options = signal_options(args, stop_ids)
        size = args.per_device_train_batch_size
        if self._asked is not None:
            return self._ask(forward, student, batch, positions, size, when, reuse)
        scored = score_positions(
            forward,
            student,
            self.model,
            batch,
            positions,
            micro_batch_size=size,
            temperature=temperature,
            keep_teacher_hidden=needs_teacher_distribution(args.loss),
            when=when,
            reuse=reuse,
            **options,
        )
        return _with(scored, lists_from_exact) if args.signals == "topk_lists" else scored

    def _ask(
        self,
        forward: Forward,
        student: Any,
        batch: Mapping[str, Tensor],
        positions: Positions,
        size: int,
        when: str,
        reuse: Reuse,
    ) -> Scored:
        scored, error = None, None
        assert self._asked is not None
        try:
            scored = ask_positions(
                forward,
                student,
                self._asked,
                batch,
                positions,
                micro_batch_size=size,
                vocab_size=self.vocab_size,
                k=self._args.score_top_k,
                when=when,
                reuse=reuse,
            )
        except TeacherError as problem:
            error = problem
        # A rank that stops, or got less than the others, must not leave them waiting or mix two kinds of C.
        exact = scored is not None and scored.signals.compatibility_is_exact
        state = torch.tensor([[error is None, exact]], device=self._accelerator.device)
        fine, exact = self._accelerator.gather(state).all(0).tolist()
        if error is not None:
            raise error
        if not fine:
            raise TeacherUnavailable("the teacher failed on another process; its message says how")
        assert scored is not None
        self._say(exact)
        if not exact:
            return _with(scored, as_bound) if scored.signals.compatibility_is_exact else scored
        return _with(scored, lists_from_exact) if self._args.signals == "topk_lists" else scored

    def _say(self, exact: bool) -> None:
        """Log and write down what C is, when it is known and whenever it changes."""
        if exact == self._said or not self._accelerator.is_main_process:
            return
        self._said = exact
        assert self._asked is not None
        about = self._asked.describe() | {"compatibility": "exact" if exact else "lower bound"}
        logger.info("teacher: %s", about)
        if not exact:
            logger.warning(
                "the teacher gives its own top %d only: signals are of two lists, C is a lower bound (%s)",
                self._args.score_top_k,
                about.get("why") or "not said why",
            )
        write_json(Path(self._args.output_dir) / FILE, about)

    def _check_signals(self) -> None:
        """Refuse what the asked teacher's numbers do not hold, before the first step."""
        assert self._asked is not None
        args, about = self._args, self._asked.describe()
        if not about["exact"]:
            args.check_selection(
                signals="topk_lists",
                selector=args.selector,
                max_steps=args.max_steps,
                min_keep=max(0, args.min_keep),
            )
            return
        missing = sorted(UNSERVED.intersection(needed_signals(args)))
        if missing:
            raise ConfigError(
                f"selector={args.selector!r} reads {', '.join(missing)}, over the teacher's full "
                "distribution, which no server sends: choose another, or load the teacher in this process"
            )


def _with(scored: Scored, change: Any) -> Scored:
    return Scored(
        signals=change(scored.signals),
        teacher_hidden=scored.teacher_hidden,
        student_hidden=scored.student_hidden,
    )


def _connect(args: TeachabilityConfig, vocab_size: int) -> Teacher:
    assert args.teacher_url is not None
    return connect(
        args.teacher_url,
        vocab_size=vocab_size,
        top_k=args.score_top_k,
        kind=args.teacher_server,
        concurrency=args.teacher_concurrency,
        timeout_s=args.teacher_timeout_s,
        patience_s=args.teacher_patience_s,
    )


def _vocabularies(
    teacher: Any,
    args: TeachabilityConfig,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[int, int]:
    """(ids that both share, ids that the teacher knows)."""
    own = student.config.get_text_config().vocab_size
    name = teacher if isinstance(teacher, str) else args.teacher_model_name_or_path
    if name is None:
        logger.warning(
            "the tokenizers are not compared: teacher_model_name_or_path could name the teacher's"
        )
        return own, own
    revision = args.teacher_model_revision or "main"
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    known = config.get_text_config().vocab_size
    shared = shared_vocabulary(
        tokenizer,
        load_tokenizer(name, revision=revision),
        own,
        known,
        cut_renamed_control_tokens=args.cut_renamed_control_tokens,
    )
    return shared, known
