"""What ranks send each other in one optimizer step, in bytes.

Two numbers for each purpose. `moved`: the size of what is gathered or reduced, as a count of tensors. `sent`:
what one rank puts on the wire with the ring algorithms that NCCL and gloo use for large messages, of a
message of M bytes among R ranks

    all-gather, reduce-scatter    (R - 1) / R  M              all-reduce   2 (R - 1) / R  M

    gradients     ddp: one all-reduce a step. fsdp2: one reduce-scatter a step, at its last backward. zero3:
                  one a backward.
    parameters    the student's for every forward (scoring, training) and again for the backward. fsdp2: last
                  norm and head stay once they are there, until the next backward. zero3: also those of the
                  teacher and of the reference, once for every forward.
    selection     up to gather_limit tokens their rows, `ROW_BYTES` each (and `REACH_BYTES`); above it counts
                  (`taopd.distributed.collectives`)

Under ddp and fsdp2 teacher and reference student are whole on every rank and move nothing. Not counted:
generation (an fsdp2 student is gathered once a token, a zero3 student once a batch, unless vLLM samples), the
weights at the start, evaluation, TRL's own metrics (some hundred bytes).
"""

from dataclasses import dataclass

from taopd.distributed.radix import BYTES_PER_PLACE
from taopd.trainer.cost.settings import BYTES, PlanSettings
from taopd.trainer.cost.shapes import ModelShape

ROW_BYTES = 20
"""A token of the selection table: completion, position and validity in 8, D, C and H in 4 each."""
REACH_BYTES = 16
"""More with `method: reach`: r, and the sampled token's log-probs by initial student, student and teacher."""
SPREAD_PLACES = 37
"""Order statistics of a spread selection with its metrics: two for each of 2 quantiles of 4 columns (16) and
of 2 medians (4), the cut, a tie, three percentiles of 5 columns (15)."""

Volume = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Communication:
    """Bytes of one step."""

    moved: Volume
    """gradients, parameters, selection."""
    sent: Volume
    """By one rank."""


def step_communication(
    student: ModelShape, teacher: ModelShape, settings: PlanSettings
) -> Communication:
    """Volume of one step of `settings.num_ranks` ranks under `settings.sharding`.

    Example:
        >>> from taopd.trainer.cost import SHAPES
        >>> settings = PlanSettings(batch=1, prompt_length=9, completion_length=9, num_ranks=8)
        >>> step_communication(SHAPES["Qwen3-1.7B"], SHAPES["Qwen3-4B"], settings).moved["parameters"]
        0.0
    """
    ranks = settings.num_ranks
    share = (ranks - 1) / ranks
    tokens = settings.num_completion_tokens * ranks
    spread = tokens > settings.gather_limit
    row = ROW_BYTES + REACH_BYTES * settings.reach
    moved = {
        "gradients": _gradients(student, settings),
        "parameters": _parameters(student, teacher, settings),
        "selection": float(SPREAD_PLACES * BYTES_PER_PLACE if spread else row * tokens),
    }
    reduced = 2 * share
    sent = {
        "gradients": moved["gradients"] * (reduced if settings.sharding == "ddp" else share),
        "parameters": moved["parameters"] * share,
        "selection": moved["selection"] * (reduced if spread else share),
    }
    return Communication(moved=moved, sent=sent)


def trained_parameters(student: ModelShape, settings: PlanSettings) -> int:
    """Of the student, or of its adapter."""
    if settings.lora_rank is None:
        return student.num_parameters
    return student.adapter_parameters(settings.lora_rank, settings.lora_targets)


def tail_parameters(student: ModelShape) -> int:
    """Last norm and head, with the embedding if that is the head: FSDP2 gathers them as one."""
    return student.hidden_size + student.embedding_parameters


def _gradients(student: ModelShape, settings: PlanSettings) -> float:
    # FSDP2 reduces in its compute dtype, DDP in that of what trains.
    dtype = settings.trained_dtype if settings.sharding == "ddp" else settings.dtype
    backwards = settings.micro_batches if settings.sharding == "zero3" else 1
    return float(BYTES[dtype] * trained_parameters(student, settings) * backwards)


def _parameters(student: ModelShape, teacher: ModelShape, settings: PlanSettings) -> float:
    if settings.sharding == "ddp":
        return 0.0
    passes, tail = settings.micro_batches, tail_parameters(student)
    gathered = 3 * passes * student.num_parameters
    if settings.sharding == "fsdp2":
        gathered -= (3 * passes - (passes + 1)) * tail
        return float(BYTES[settings.dtype] * gathered)
    if not settings.teacher_elsewhere:
        gathered += passes * teacher.num_parameters
    if settings.holds_reference:
        gathered += passes * student.num_parameters
    return float(BYTES[settings.dtype] * gathered)
