"""FLOPs of one optimizer step, by stage, here and in TRL's full on-policy distillation.

Counted: matmuls, 2 FLOP per multiply and add, as `torch.utils.flop_counter` counts them in eager attention,
and the passes over the logits (softmax, top-K, divergence), which no counter sees and which outweigh the
matmuls of a narrow model's head: as the FLOP of a matmul that takes as long, so that ratios are of time.
Attention is the full square of queries and keys; a causal kernel without padding skips up to half of it,
and a fused one computes the scores again in its backward: neither is counted. Not counted: norms,
activations, selection, the optimizer. Rows without a selected token and columns after the last one are
skipped in training but counted here.
"""

from dataclasses import asdict, dataclass

from taopd.trainer.cost.memory import prefix_share
from taopd.trainer.cost.settings import PlanSettings, gradient_share
from taopd.trainer.cost.shapes import ModelShape

TERA = 1e12
STUDENT_LOSS_MATMULS, TEACHER_LOSS_MATMULS = 3, 1
"""`head_loss`: logits, gradient of the states, gradient of the weight; the teacher's logits."""
TRL_STUDENT_MATMULS, TRL_TEACHER_MATMULS = 4, 2
"""TRL 1.16 `ChunkedDivergenceFunction`: both models are projected in the forward and in the backward."""
SCORE_LOGIT_FLOPS, LOSS_LOGIT_FLOPS, TRL_LOGIT_FLOPS = 900.0, 2700.0, 4500.0
"""What the passes over one pair of logits (the student's and the teacher's) cost, in FLOP of a float32
matmul that takes as long: scoring, `head_loss`, TRL's loss. Measured on a CPU: benchmarks/bench_head_loss.py
(where TRL's loss is dearer still, up to 7,000) and bench_plan.py. An accelerator does more FLOP per byte, so
that these passes weigh more there, not less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """TFLOP of one step of the whole generation batch, by stage; of several steps on it, of a mean one."""

    sample: float
    """Prefill and one token at a time with its head; bound by memory traffic, so slower than it looks."""
    score_student: float = 0.0
    """Backbone, forward; with gradient where it is the training forward as well."""
    score_teacher: float
    score_heads: float = 0.0
    train_forward: float
    """Backbone passes of the student beyond the scoring pass."""
    train_backward: float
    loss_heads: float
    anchor: float = 0.0
    """Reference forward on the drawn completions and the heads at the anchored positions; for reach both
    heads once more, and where some completions are not drawn a second time in those that are."""
    logit_passes: float
    """Passes over the logits, as matmuls that take as long."""
    select: float = 0.0
    """Sorting, no matmul."""

    @property
    def update(self) -> float:
        """Student update: all but sampling and the teacher's backbone."""
        return self.total - self.sample - self.score_teacher

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def forward_flops(shape: ModelShape, num_queries: float, num_keys: float) -> float:
    """FLOP of a backbone's forward at `num_queries` positions that each look at `num_keys`."""
    return num_queries * (2.0 * shape.active_weights + _attention(shape, num_keys))


def backward_flops(
    shape: ModelShape,
    num_queries: float,
    num_keys: float,
    *,
    fresh_share: float = 1.0,
    frozen: bool = False,
) -> float:
    """FLOP of its backward.

    Args:
        fresh_share: share of the keys that carry gradient.
        frozen: weights get no gradient (LoRA; the adapters themselves are not counted).
    """
    # Two matmuls of the backward: by the input, and by the weight unless it is frozen.
    per_weight = 2.0 if frozen else 4.0
    attention = _attention(shape, num_keys) * (1.0 + fresh_share)
    return num_queries * (per_weight * shape.active_weights + attention)


def _attention(shape: ModelShape, num_keys: float) -> float:
    return 4.0 * shape.num_layers * shape.query_size * num_keys


def head_flops(shape: ModelShape, vocab_size: int, num_positions: float) -> float:
    """FLOP of one matmul of states or logits with the head over `vocab_size` ids."""
    return 2.0 * vocab_size * shape.hidden_size * num_positions


def sample_flops(shape: ModelShape, settings: PlanSettings) -> float:
    """FLOP of sampling the generation batch with a key/value cache."""
    prompt, completion = settings.prompt_length, settings.completion_length
    prefill = forward_flops(shape, prompt, prompt)
    # A token in the middle of the completion sees the prompt and half of the completion.
    decode = forward_flops(shape, completion, prompt + (completion + 1) / 2)
    head = head_flops(shape, shape.vocab_size, completion)
    return settings.num_rows * (prefill + decode + head)


def step_cost(
    student: ModelShape,
    teacher: ModelShape,
    settings: PlanSettings,
    *,
    shared_forward: bool,
) -> StepCost:
    """Cost of one step of `TeachabilityTrainer`.

    Args:
        shared_forward: the generation batch is one micro-batch, so the scoring pass of the student is its
            training forward too (without a window) or the key/value prefix (with one).
    """
    tokens, length, window = settings.num_tokens, settings.length, settings.window
    read = settings.num_teacher_tokens, settings.teacher_length
    vocab_size = min(student.vocab_size, teacher.vocab_size)
    frozen = settings.lora_rank is not None
    share = gradient_share(settings, window)
    full = forward_flops(student, tokens, length)
    # The scoring pass is the training forward, or has left the keys and values of one.
    left = 0.0 if window is None else prefix_share(student, settings)
    passes = 0.0 if shared_forward else full * (1.0 - left)
    sparse = forward_flops(student, share * tokens, length)
    backward = backward_flops(student, share * tokens, length, fresh_share=share, frozen=frozen) + (
        sparse if settings.gradient_checkpointing else 0.0
    )
    scored = settings.num_completion_tokens
    student_head = head_flops(student, vocab_size, scored)
    here = not settings.teacher_elsewhere
    teacher_head = here * head_flops(teacher, vocab_size, scored)
    matmuls = STUDENT_LOSS_MATMULS - frozen
    loss_heads = matmuls * student_head
    if settings.needs_teacher_distribution or settings.reach:
        loss_heads += TEACHER_LOSS_MATMULS * teacher_head
    # One more matmul: the reference model's own head at these tokens.
    anchor = settings.anchored_share * (matmuls + 1) * student_head
    # What is sampled and scored once serves all steps on the generation batch.
    each = 1.0 / settings.num_iterations
    # A server's answer is compared with the reference model's lists at every token.
    run = 1.0 if settings.reach and settings.teacher_elsewhere else settings.anchor_responses
    if settings.anchored_share or settings.reach:
        anchor += each * full * run
    again = run if run < 1.0 else 0.0
    heads = run * student_head + teacher_head + again * (student_head + teacher_head)
    anchor += each * settings.reach * heads
    # By reach two divergences at each taught token, from one pass of each head.
    trained = (1 + settings.reach) * settings.taught_share + settings.anchored_share
    passes_over_logits = (
        each * SCORE_LOGIT_FLOPS * (1 + settings.reach) + trained * LOSS_LOGIT_FLOPS
    )
    return StepCost(
        sample=each * sample_flops(student, settings) / TERA,
        score_student=each * full / TERA,
        score_teacher=each * here * forward_flops(teacher, *read) / TERA,
        score_heads=each * (student_head + teacher_head) / TERA,
        train_forward=(passes + (0.0 if window is None else sparse)) / TERA,
        train_backward=backward / TERA,
        loss_heads=settings.taught_share * loss_heads / TERA,
        anchor=anchor / TERA,
        logit_passes=scored * vocab_size * passes_over_logits / TERA,
    )


def trl_cost(student: ModelShape, teacher: ModelShape, settings: PlanSettings) -> StepCost:
    """Cost of the same step in `trl.DistillationTrainer`: every position forward, backward and projected.

    Of the teacher's prompt as well, which TRL does not know.
    """
    tokens, length = settings.num_tokens, settings.length
    read = settings.num_teacher_tokens, settings.teacher_length
    vocab_size = min(student.vocab_size, teacher.vocab_size)
    frozen = settings.lora_rank is not None
    full = forward_flops(student, tokens, length)
    backward = backward_flops(student, tokens, length, frozen=frozen)
    scored = settings.num_completion_tokens
    # TRL projects every completion token, whatever the budget.
    heads = (TRL_STUDENT_MATMULS - frozen) * head_flops(student, vocab_size, scored)
    heads += TRL_TEACHER_MATMULS * head_flops(teacher, vocab_size, scored)
    return StepCost(
        sample=sample_flops(student, settings) / TERA,
        score_teacher=forward_flops(teacher, *read) / TERA,
        train_forward=full / TERA,
        train_backward=(backward + (full if settings.gradient_checkpointing else 0.0)) / TERA,
        loss_heads=heads / TERA,
        logit_passes=scored * vocab_size * TRL_LOGIT_FLOPS / TERA,
    )
