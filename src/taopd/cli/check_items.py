"""The items of `taopd check`, in order: from settings, models and one micro-batch to verdicts.

Everything is loaded when the first item asks for it. What cannot be loaded is a fail of that item; the items
after it that need the same say so in a few words.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from taopd import data
from taopd import preflight as look
from taopd.cli import train
from taopd.cli.plan import plan_settings
from taopd.cli.train_config import TrainSettings
from taopd.errors import ConfigError
from taopd.micro_batch import SHARDED, is_sharded, measure_micro_batch
from taopd.plan import MIB, ModelShape, PlanSettings, plan
from taopd.preflight import Measured, Precision, Verdict, guarded, id_list, judge
from taopd.stops import stop_ids

MOST_PROMPTS = 2000
"""Prompts whose length is looked at for the figures, evenly over the dataset; `train` looks at all."""


_PARTS = {
    "inputs": "both models",
    "trainer": "a trainer with these settings",
    "measured": "a sampled micro-batch",
}


class _Missing(Exception):
    """Something that an earlier item has already reported."""


@dataclass(kw_only=True)
class Subject:
    """What is checked; every part is made on first use."""

    settings: TrainSettings
    max_tokens: int | None = None
    """Completions of the micro-batch are cut here; None: at `max_completion_length`."""

    @cached_property
    def tokenizers(self) -> tuple[Any, Any]:
        """Of student and teacher."""
        args, model = self.settings.training, self.settings.model
        return (
            data.load_tokenizer(str(model.model_name_or_path), revision=model.model_revision),
            data.load_tokenizer(
                str(args.teacher_model_name_or_path), revision=args.teacher_model_revision or "main"
            ),
        )

    @cached_property
    def prompts(self) -> Any:
        """The training set."""
        script = self.settings.script
        return data.load_prompts(
            str(script.dataset_name), config=script.dataset_config, split=script.dataset_train_split
        )

    @cached_property
    def configs(self) -> tuple[Any, Any]:
        """Of the models if they load, else from the files: a mismatch must not hide the next one."""
        if self.has("inputs"):
            return self.inputs.student.config, self.inputs.teacher.config
        return self._from_files(AutoConfig)

    @cached_property
    def generation_configs(self) -> tuple[Any, Any]:
        """Likewise."""
        if self.has("inputs"):
            return self.inputs.student.generation_config, self.inputs.teacher.generation_config
        return self._from_files(GenerationConfig)

    @cached_property
    def inputs(self) -> Any:
        """Models, tokenizer and data, as `taopd train` loads them."""
        return train.load_inputs(self.settings)

    @cached_property
    def trainer(self) -> Any:
        """A trainer that never trains."""
        self.need("inputs")
        return train.make_trainer(self.settings, self.inputs)

    @cached_property
    def measured(self) -> Measured:
        """One scored micro-batch."""
        self.need("trainer")
        return measure_micro_batch(self.trainer, max_tokens=self.max_tokens)

    def has(self, name: str) -> bool:
        """Whether a part can be made; tried once, and the error is kept for the first item in need of it."""
        if name not in self._errors:
            try:
                getattr(self, name)
            except Exception as error:
                self._errors[name] = error
        return name not in self._errors

    def need(self, name: str) -> None:
        """Make a part, or raise what prevents it: the error to the first who asks, `_Missing` afterwards."""
        if not self.has(name):
            error = self._errors[name]
            self._errors[name] = _Missing(f"Needs {_PARTS[name]}: see above.")
            raise error

    @cached_property
    def _errors(self) -> dict[str, Exception]:
        return {}

    def _from_files(self, kind: Any) -> tuple[Any, Any]:
        names = (
            self.settings.model.model_name_or_path,
            self.settings.training.teacher_model_name_or_path,
        )
        student, teacher = (kind.from_pretrained(name) for name in names)
        return student, teacher

    @property
    def template_options(self) -> dict[str, Any]:
        return dict(self.settings.training.chat_template_kwargs or {})

    @cached_property
    def handled_stops(self) -> tuple[int, ...]:
        """Ids that `stop_tokens` merges or excludes."""
        student, teacher = self.generation_configs
        holders = [_Stops(config) for config in (student, teacher)]
        return stop_ids(self.settings.training, self.tokenizers[0], *holders)

    @property
    def merged(self) -> bool:
        return self.settings.training.stop_tokens == "merge"


class _Stops:
    """A model as far as `stop_ids` looks at it."""

    def __init__(self, generation_config: Any) -> None:
        self.generation_config = generation_config


def items(subject: Subject) -> Iterator[tuple[str, Callable[[], Verdict]]]:
    """Every item with the call that judges it, cheapest first."""
    for name, check in (
        ("tokenizers", _tokenizers),
        ("special tokens", _special_tokens),
        ("generation config", _generation_config),
        ("chat template", _chat_template),
        ("thinking mode", _thinking),
        ("context", _context),
        ("memory", _memory),
        ("precision", _precision),
    ):
        yield name, partial(check, subject)
    for name in _ON_ROLLOUTS:
        yield name, partial(_on_rollouts, name, subject)


def verdicts(subject: Subject) -> Iterator[Verdict]:
    """Judge item by item; an error is a fail of its own item."""
    for name, check in items(subject):
        yield guarded(name, partial(_or_missing, name, check))


def _or_missing(name: str, check: Callable[[], Verdict]) -> Verdict:
    try:
        return check()
    except _Missing as missing:
        return judge(name, "not run", [("fail", str(missing))])


def _tokenizers(subject: Subject) -> Verdict:
    student, teacher = subject.configs
    return look.check_tokenizers(
        *subject.tokenizers,
        student_rows=student.get_text_config().vocab_size,
        teacher_rows=teacher.get_text_config().vocab_size,
        cut_renamed_control_tokens=subject.settings.training.cut_renamed_control_tokens,
    )


def _special_tokens(subject: Subject) -> Verdict:
    return look.check_special_tokens(*subject.tokenizers, merged=subject.merged)


def _generation_config(subject: Subject) -> Verdict:
    (student, teacher), configs = subject.tokenizers, subject.generation_configs
    stops = [id_list(config.eos_token_id) for config in configs]
    return look.check_generation_config(student, stops[0], teacher, stops[1], merged=subject.merged)


def _chat_template(subject: Subject) -> Verdict:
    prompt, options = subject.prompts[0]["prompt"], subject.template_options
    return look.check_chat_template(*subject.tokenizers, prompt, options=options)


def _thinking(subject: Subject) -> Verdict:
    prompt, options = subject.prompts[0]["prompt"], subject.template_options
    return look.check_thinking(*subject.tokenizers, prompt, options=options)


def _longest_prompt(subject: Subject) -> int:
    rows = subject.prompts
    step = max(1, len(rows) // MOST_PROMPTS)
    some = rows.select(range(0, len(rows), step))["prompt"]
    encoded = data.encode_prompts(
        subject.tokenizers[0], list(some), chat_template_kwargs=subject.template_options
    )
    return max(map(len, encoded))


def _context(subject: Subject) -> Verdict:
    args = subject.settings.training
    limits = {
        owner: getattr(config.get_text_config(), "max_position_embeddings", None)
        for owner, config in zip(("student", "teacher"), subject.configs, strict=True)
    }
    if args.use_vllm:
        limits["vllm_max_model_length"] = args.vllm_max_model_length
    return look.check_context(_longest_prompt(subject), args.max_completion_length or 1, limits)


def _memory(subject: Subject) -> Verdict:
    args = subject.settings.training
    on_gpu = torch.cuda.is_available() and not args.use_cpu
    try:
        settings = replace(
            _plan_settings(subject),
            device="gpu" if on_gpu else "cpu",
            prompt_length=_longest_prompt(subject),
        )
        student, teacher = (ModelShape.from_config(config) for config in subject.configs)
        memory = plan(student, teacher, settings).memory
    except ConfigError as error:  # an architecture or optimizer that the plan does not know
        return judge("memory", "not planned", [("warn", f"{error}.")])
    return look.check_memory(
        memory.peak / MIB,
        _machine_bytes(on_gpu) / MIB,
        device="GPU" if on_gpu else "CPU",
        phase=max(memory.phases, key=lambda name: memory.phases[name]).replace("_", " "),
        sharded=bool(args.fsdp or args.deepspeed),
    )


def _plan_settings(subject: Subject) -> PlanSettings:
    """With the dtypes of the loaded weights: once they are loaded the settings no longer say."""
    if not subject.has("inputs"):
        return plan_settings(subject.settings)
    student, teacher = subject.inputs.student, subject.inputs.teacher
    return plan_settings(
        subject.settings, student_dtype=_dtype(student), teacher_dtype=_dtype(teacher)
    )


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _machine_bytes(on_gpu: bool) -> int:
    """What the device has, whoever uses it now."""
    if on_gpu:
        return int(torch.cuda.mem_get_info()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _precision(subject: Subject) -> Verdict:
    subject.need("inputs")
    args = subject.settings.training
    held = [
        Precision(
            dtype=_dtype(model),
            attention=str(getattr(model.config, "_attn_implementation", None) or "eager"),
        )
        for model in (subject.inputs.student, subject.inputs.teacher)
    ]
    return look.check_precision(
        *held,
        autocast="bfloat16" if args.bf16 else "float16" if args.fp16 else None,
        trains_weights=not subject.settings.model.use_peft,
    )


def _kept(subject: Subject, measured: Measured) -> Verdict:
    args, limit = subject.settings.training, subject.trainer.max_completion_length
    budget = 1.0 if args.selector == "full" else args.budget
    return look.check_kept(
        measured, budget=budget, min_keep=args.min_keep, max_completion_length=limit
    )


_ON_ROLLOUTS: dict[str, Callable[[Subject, Measured], Verdict]] = {
    "drift": lambda subject, found: look.check_drift(found, sampler=subject.trainer.watch.sampler),
    "stop audit": lambda subject, found: look.check_stops(found, handled=subject.handled_stops),
    "truncation": lambda subject, found: look.check_truncation(
        found, max_completion_length=subject.trainer.max_completion_length
    ),
    "teacher KL": lambda _, found: look.check_divergence(found),
    "off support": lambda subject, found: look.check_support(
        found, k=subject.settings.training.score_top_k
    ),
    "kept tokens": _kept,
}


def _on_rollouts(name: str, subject: Subject) -> Verdict:
    subject.need("trainer")
    if is_sharded(subject.trainer):
        return judge(name, "not measured", [("warn", SHARDED)])
    subject.need("measured")
    return _ON_ROLLOUTS[name](subject, subject.measured)
