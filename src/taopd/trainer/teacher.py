"""The trainer's teacher: a model that runs here, or a `Teacher` elsewhere."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taopd.errors import ConfigError, DataError, NumericsError, TeacherError
from taopd.losses import needs_teacher_distribution
from taopd.models.batch import Forward, Positions, teacher_side, used_rows
from taopd.models.offload import LayerOffload
from taopd.models.output_head import require_backbone
from taopd.models.own_forward import Agreement, compare_with_own_forward, require_agreement
from taopd.models.scoring import Given, Reuse, Scored, check_readable, score_positions
from taopd.runs.jsonl import write_json
from taopd.selectors import SELECTORS
from taopd.signals import BOUND_GIVES, INITIAL_GIVES, LISTS_GIVE, SERVER_GIVES, lists_from_exact
from taopd.teachers import AskedOnce, Teacher, as_bound, score_remote
from taopd.teachers.local import refuse_loading_options
from taopd.trainer.build.loaded_teacher import LoadedTeachers
from taopd.trainer.build.own_teacher import OwnTeacher
from taopd.trainer.build.teacher_connection import connect_teacher, own_vocabulary, vocabularies
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.selection import reads_initial, signal_needs, signal_options
from taopd.trainer.settings.config_checks import check_remote_teacher
from taopd.trainer.teacher_column import OneTeacher
from taopd.trainer.watches.teacher_probe import TeacherProbe
from taopd.trainer.watches.teacher_watch import TeacherWatch

logger = logging.getLogger(__name__)
FILE = "teacher.json"
"""In the run folder: the teacher, and whether C is exact or a lower bound."""


class TeacherSource(OneTeacher):
    """Scores generation batches, whoever the teacher is.

    Args:
        teacher: path, hub id or model for a teacher here; for one elsewhere a `Teacher`, or None
            with `args.teacher_url`; or the student as its own.
        student: its vocabulary is what both must share.
        name: among several teachers; "": the only one.
        loaded: the models that the teachers of this run share.

    Raises:
        ConfigError: a loss, signal or setting that a remote teacher cannot serve, no teacher at all, or a
            model without a backbone of its own.
        DataError: see `load_teacher`. TeacherError, TeacherUnavailable: see `connect`.
    """

    def __init__(
        self,
        teacher: Any,
        args: TeachabilityConfig,
        student: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
        *,
        name: str = "",
        loaded: LoadedTeachers | None = None,
    ) -> None:
        # Before anything is loaded or asked; also for a `Teacher`, which `load_teacher` never sees.
        refuse_loading_options(teacher, args.teacher_model_init_kwargs, args.teacher_quantization)
        self.args, self._accelerator, self._name = args, accelerator, name
        require_backbone("student", student)
        self._needs = signal_needs(args)
        self._options: dict[str, Any] | None = None
        # Where reach or a frozen score alone reads these states, they are dropped before the loss.
        self._reads_hidden = needs_teacher_distribution(args.loss) or reads_initial(args)
        self.remote: Teacher | None = None
        """The teacher, if it is not a model in this process."""
        self.plain: PreTrainedModel | None = None
        """The model as it was loaded, if it runs here."""
        self.model: Any = None
        """The same, prepared for this device."""
        self.offload: LayerOffload | None = None
        """Moves its layers, if they stay in host memory."""
        # Whether C is exact, as last written down: a server may change what it offers while the run goes on.
        self._said: bool | None = None
        self._agreed = False
        """The scoring path was compared with both models' own forward."""
        if isinstance(teacher, torch.nn.Module) and args.teacher_url:
            raise ConfigError("teacher_url and a teacher_model: one of them is the teacher")
        # An object of the user's may answer otherwise by design, and is asked as often as it was.
        own = isinstance(teacher, Teacher)
        if args.teacher_url or own:
            check_remote_teacher(args)
            self.vocab_size, known = vocabularies(args, student, tokenizer)
            self.tokens = None if args.cut_renamed_control_tokens else self.vocab_size
            remote = teacher if own else connect_teacher(args, known)
            self.remote = remote
            self.check_signals(self.offers_exact)
            self._asked: Teacher = remote if own else AskedOnce(remote)
            self.probe = TeacherProbe(remote, self.vocab_size, args.score_top_k)
            # A process that waits for the server holds up a collective of all the others.
            if accelerator.num_processes > 1 and args.teacher_patience_s >= args.ddp_timeout:
                raise ConfigError(
                    f"teacher_patience_s={args.teacher_patience_s:g} must be less than ddp_timeout="
                    f"{args.ddp_timeout}, after which the other processes give up waiting"
                )
            return
        if isinstance(teacher, OwnTeacher):
            self.plain, self.model = teacher.plain, teacher.model
            self.vocab_size = own_vocabulary(student, tokenizer)
            return
        teacher = args.teacher_model_name_or_path if teacher is None else teacher
        if isinstance(teacher, list | tuple):
            raise ConfigError(
                f"teacher_model holds {len(teacher)} teachers: name them, {{'math': ..., 'code': ...}}"
            )
        if teacher is None:
            raise ConfigError(
                "no teacher: pass teacher_model, or set teacher_model_name_or_path or teacher_url"
            )
        loaded = loaded or LoadedTeachers(student, tokenizer, accelerator)
        found = loaded.of(teacher, args)
        self.plain, self.model, self.vocab_size = found.plain, found.model, found.vocab_size
        self.offload, self.samples, self._in_parts = found.offload, found.samples, found.in_parts
        self.tokens = None if args.cut_renamed_control_tokens else found.vocab_size

    @property
    def offers_exact(self) -> bool:
        """Whether it said at the start that C will be exact."""
        return self.remote is None or bool(self.remote.describe()["exact"])

    def describe(self) -> dict[str, Any]:
        """Kind and model; for a teacher elsewhere what it says of itself."""
        if self.remote is not None:
            return self.remote.describe()
        assert self.plain is not None
        return {"kind": "local", "model": str(self.plain.name_or_path), "exact": True, "why": ""}

    def watch(self, warn: Callable[[int, str, str], None]) -> TeacherWatch:
        """The watch of this teacher in training."""
        return TeacherWatch(self.vocab_size, warn)

    def score(
        self,
        forward: Forward,
        student: Any,
        batch: Mapping[str, Tensor],
        positions: Positions,
        *,
        stop_ids: Sequence[int],
        when: str,
        reuse: Reuse,
    ) -> Scored:
        """Signals of every position of a padded batch, as the settings ask for them.

        Raises:
            DataError: a prompt with a token that the teacher lacks; in the first batch, a model that is
                scored otherwise than its own forward computes.
        """
        args = self.args
        if self.plain is not None:
            self.plain.eval()  # A callback may have put it into training mode.
        used = used_rows(batch, positions) if len(positions) else batch
        self.check_prompts(used)
        if not self._agreed:
            self._require_agreement(self.compare(forward, student, used))
        if self.remote is not None:
            scored = self._score_remote(forward, student, batch, positions, when, reuse)
        else:
            # The same for every batch of a run.
            if self._options is None:
                self._options = signal_options(args, stop_ids)
            scored = score_positions(
                forward,
                student,
                self.model,
                batch,
                positions,
                micro_batch_size=args.per_device_train_batch_size,
                temperature=args.temperature,
                keep_teacher_hidden=self._reads_hidden,
                when=when,
                reuse=reuse,
                skip_empty=isinstance(reuse, Given) and not self._in_parts,
                **self._options,
            )
        if args.signals == "topk_lists" and scored.signals.compatibility_is_exact:
            scored = replace(scored, signals=lists_from_exact(scored.signals))
        return scored

    @torch.no_grad()
    def compare(
        self,
        forward: Forward,
        student: Any,
        batch: Mapping[str, Tensor],
    ) -> dict[str, Agreement]:
        """The scoring path of each model here against its own forward; the student is left as it was."""
        inner, side = self._accelerator.unwrap_model(student), teacher_side(batch)
        args, padded = self.args, self.args.per_device_train_batch_size > 1
        # The prompts of a whole generation batch are sampled from at once.
        sampled = padded or (args.gradient_accumulation_steps > 1 and not args.use_vllm)
        models = {"student": (student, inner, batch, sampled)}
        if self.plain is not None:
            # A lookup beyond the embedding has no message of its own.
            check_readable(side, self.plain)
            own = self._accelerator.unwrap_model(self.model)
            models["teacher"] = self.model, own, side, padded
        training = inner.training
        inner.eval()
        try:
            return {
                name: compare_with_own_forward(
                    forward, wrapped, model, read, self.vocab_size, padded=several
                )
                for name, (wrapped, model, read, several) in models.items()
            }
        finally:
            inner.train(training)

    def _require_agreement(self, found: Mapping[str, Agreement]) -> None:
        self._agreed = True
        fine = torch.tensor(
            [not any(agreement.problem for agreement in found.values())],
            device=self._accelerator.device,
        )
        # Every process stops where one does: the others would wait for it in the next collective.
        if bool(self._accelerator.gather(fine).all()):
            return
        for name, agreement in found.items():
            require_agreement(name, agreement)
        raise DataError(
            "on another process a model's scored log-probs are not its own; the message of that process "
            "says which"
        )

    def _score_remote(
        self,
        forward: Forward,
        student: Any,
        batch: Mapping[str, Tensor],
        positions: Positions,
        when: str,
        reuse: Reuse,
    ) -> Scored:
        scored, error = None, None
        assert self.remote is not None
        try:
            scored = score_remote(
                forward,
                student,
                self._asked,
                batch,
                positions,
                micro_batch_size=self.args.per_device_train_batch_size,
                vocab_size=self.vocab_size,
                k=self.args.score_top_k,
                when=when,
                reuse=reuse,
            )
            self.probe.look(teacher_side(batch), positions, scored.signals)
        except (TeacherError, NumericsError) as problem:
            error = problem
        # A rank that stops, or got less than the others, must not leave them waiting or mix two kinds of C.
        # Bad numbers are told to the others later, and say nothing about the teacher.
        failed = isinstance(error, TeacherError)
        exact = not failed and (scored is None or scored.signals.compatibility_is_exact)
        state = torch.tensor([[int(not failed), int(exact)]], device=self._accelerator.device)
        fine, exact = self._accelerator.gather(state).bool().all(0).tolist()
        if error is not None:
            raise error
        if not fine:
            raise TeacherError("the teacher failed on another process, whose message says how")
        assert scored is not None
        self._say(exact)
        if not exact:
            self.check_signals(exact)
            # This process got exact values, another did not: one selection must not mix the two.
            if scored.signals.compatibility_is_exact:
                scored = replace(scored, signals=as_bound(scored.signals))
        return scored

    def _say(self, exact: bool) -> None:
        """Log and write down what C is, when it is known and whenever it changes."""
        if exact == self._said or not self._accelerator.is_main_process:
            return
        self._said = exact
        assert self.remote is not None
        about = self.remote.describe() | {"compatibility": "exact" if exact else "lower bound"}
        logger.info("teacher: %s", about)
        if not exact:
            logger.warning(
                "the teacher%s gives its own top %d only: signals are of two lists, C is a lower bound (%s)",
                f" {self._name}" if self._name else "",
                self.args.score_top_k,
                about.get("why") or "not said why",
            )
        if not self._name:  # Else the file is about all of them.
            write_json(Path(self.args.output_dir) / FILE, about)

    def check_signals(self, exact: bool) -> None:
        """Refuse settings that read what the teacher's numbers do not hold."""
        args = self.args
        # Checked again whenever C turns into a bound: a server may stop sending what it sent before.
        given = BOUND_GIVES if not exact else SERVER_GIVES
        if exact and args.signals == "topk_lists":
            given = LISTS_GIVE
        missing = sorted(set(self._needs.signals) - given - INITIAL_GIVES)
        if missing:
            enough = sorted(name for name, rule in SELECTORS.items() if set(rule.needs) <= given)
            which = "" if exact else " gives its own top list only, and so"
            raise ConfigError(
                f"the teacher{which} sends no {', '.join(missing)}, which selector, weighting or "
                f"shadow_selectors read: choose among {', '.join(enough)}, or load the teacher in this "
                "process"
            )
