"""One real micro-batch of a trainer that has not begun: sampled, scored, and nothing moved.

Uses the trainer's own sampler and forward, so that what is measured is what will run: the autocast, the
adapters, the inference engine. The random stream and the models' modes are as before afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from typing import Any

from taopd.errors import DataError
from taopd.models.batch import Rollouts
from taopd.models.generation import undisturbed
from taopd.preflight.measure import Measured, measure, run_passes
from taopd.preflight.teacher_error import measure_error
from taopd.trainer.build.training_set import first_rows

MOST_COMPLETIONS = 32
LEAST_COMPLETIONS = 4
"""Below it a stop audit is a guess (`rollout_checks.FEW_ENDS`)."""
CPU_WORK = 5e10
"""Parameters times completion tokens, on a CPU: about 0.1 TFLOP a forward of both models."""
SHARDED = (
    "Sharded models are put together when training begins: check on one device, or watch rollout/drift_nats "
    "and completions/clipped_ratio in the first steps."
)


def measure_micro_batch(
    trainer: Any,
    *,
    max_tokens: int | None = None,
    compare: str | None = None,
    teacher: str = "",
    rows: Any = None,
) -> Measured:
    """Sample for the first prompts of the training set and score the completions with both models.

    Args:
        trainer: a `TeachabilityTrainer`, whole on this device (its `layout` is "replicated").
        max_tokens: cut completions here, if it is less than `max_completion_length`.
        compare: what is done to the teacher, see `teacher_error.kind_of`: it is compared with the full one.
        teacher: of several; rows: its prompts; default those of the training set.

    Raises:
        DataError: no completion has a token that both models have, or a prompt has one that the teacher
            lacks.
        NumericsError: NaN or infinite logits.
        TeacherError: a remote teacher does not answer.
    """
    args, tokenizer = trainer.args, trainer.text_tokenizer
    tokens = min(trainer.max_completion_length, max_tokens or trainer.max_completion_length)
    source = trainer.teacher_source(teacher)
    # With an evaluation in 16 bits transformers moves the student only when training begins.
    if args.bf16_full_eval or args.fp16_full_eval:
        trainer.model.to(trainer.accelerator.device)
    models = [trainer.model, *([source.model] if source.remote is None else [])]
    size = _num_completions(models, tokens, args.per_device_train_batch_size, trainer.accelerator)
    with undisturbed(trainer.model, tokenizer, args.seed), _unreported(args):
        rows = first_rows(trainer.train_dataset if rows is None else rows, size)
        prompts, sampled = trainer.sample(rows, tokens)
        shared = [_shared(ids, trainer.vocab_size) for ids in sampled]
        used = [number for number, ids in enumerate(shared) if ids]
        if not used:
            raise DataError(
                f"every completion begins with an id that one of the models lacks (both have 0 to "
                f"{trainer.vocab_size - 1}): the student samples rows of its head that no text has trained"
            )
        completions, prompts = ([ids[number] for number in used] for ids in (shared, prompts))
        own = trainer.encode_for_teacher(rows)
        own = own and [own[number] for number in used]
        pairs = Rollouts(prompt_ids=prompts, completion_ids=completions, teacher_prompt_ids=own)
        batch = pairs.batch(pad_id=tokenizer.pad_token_id, device=trainer.accelerator.device)
        source.check_prompts(batch)
        passes = run_passes(
            trainer.forward_states, trainer.model_wrapped, source.model, batch, size
        )
        measured = measure(trainer, source, batch, passes, micro_batch_size=size, max_tokens=tokens)
        if compare is None:
            return measured
        error = measure_error(trainer, compare, batch, measured.positions, passes, teacher=teacher)
        return replace(measured, teacher_error=error)


def _num_completions(models: list[Any], tokens: int, batch: int, accelerator: Any) -> int:
    """A micro-batch; of large models on a CPU fewer, as what is measured are means over tokens."""
    size = min(batch, MOST_COMPLETIONS)
    if accelerator.device.type != "cpu":
        return size
    numbers = sum(weight.numel() for model in models for weight in model.parameters())
    return min(size, max(LEAST_COMPLETIONS, int(CPU_WORK / max(1, numbers * tokens))))


def _shared(ids: list[int], vocab_size: int) -> list[int]:
    """A completion up to the first id that only the student's output layer has, which cannot be scored."""
    return list(takewhile(lambda index: index < vocab_size, ids))


@contextmanager
def _unreported(args: Any) -> Iterator[None]:
    """No tracker hears of the block: TRL logs how long its methods take, before training has begun."""
    trackers, args.report_to = args.report_to, []
    try:
        yield
    finally:
        args.report_to = trackers
