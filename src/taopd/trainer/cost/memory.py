"""Memory of one optimizer step on one device, by part and by phase, in bytes.

Activations are what autograd saves in transformers' decoder layers with sdpa attention, counted tensor by
tensor (the tests compare with `torch.autograd.graph.saved_tensors_hooks`, exactly). c: bytes of the compute
dtype, s: bytes of the residual stream (that of the weights), D width, A all query heads, G all key heads,
F feed-forward, T length of the row; per token and layer:

    two norms of the width   2 x (input in float32, normalized in s, output in c);
                             under autocast each linear layer keeps its own cast: 5 outputs, not 2
    query, key norms         input in float32, normalized in c, each of A and G (Qwen3)
    attention                query A, output A, key G, value G, in c; the log-sum-exp of every head
    ... with padding         keys and values repeated to A, and a row of the mask, T
    feed-forward             gate, its activation, up, product: 4 F, in c

and under autocast once a copy of every linear weight in c. Gradient checkpointing keeps every layer's input
and one layer's activations.

On a CPU the process itself counts too. Not counted: the allocator's fragmentation and the CUDA context,
buffers of kernels, the forward's temporary tensors (about one layer's feed-forward), transients of
generation, LoRA's own activations.

Several ranks: FSDP2 and ZeRO-3 hold a part of the student's weights, gradients and optimizer states each, and
gather for a moment two layers (one computes, one comes) and the head; teacher and reference are whole under
FSDP2. Under ZeRO-3 they are in parts, the student has weights of its own to compute in beside the float32
ones, and is put together to sample. DDP holds all of it, and the gradients once more in its buckets.
"""

from dataclasses import dataclass, replace

from taopd.kernels.tiles import TILES, chunk_elements_on, positions_per_chunk
from taopd.trainer.cost.communication import tail_parameters, trained_parameters
from taopd.trainer.cost.settings import BYTES, PlanSettings, gradient_share
from taopd.trainer.cost.shapes import ModelShape
from taopd.trainer.cost.teacher_weights import held_bytes, moving_bytes

FLOAT32, INT64 = 4, 8
SCORE_LOGIT_TENSORS, LOSS_LOGIT_TENSORS = 6, 7
"""Float32 tensors alive at once: in `exact_signals` of one tile of logits, both models' raw and scaled, and
what is folded from them; in `head_loss` of [chunk, vocabulary], raw logits, log-probs, the
teacher's, two that the divergence saves, and two gradients (measured with reverse_kl: 6.2)."""
REACH_LOGIT_TENSORS = 6
"""In `reach_from_logprobs` of [chunk, vocabulary]: raw logits of one model, log-probs of both, what counts,
and two products; counted in the code, not measured."""
SCORE_COLUMNS = 11
"""Numbers per position in `TokenSignals` beside the two top-K lists."""
PROCESS = 510 * 2**20
"""Bytes of the interpreter and the libraries, which a process on a CPU holds beside its tensors: the peak of
a run on models of 20 kB (torch 2.13, transformers 5.23)."""
SAMPLING_LOGIT_TENSORS = 3
"""Float32 [rows, vocabulary] per sampled token: logits, scores, probabilities."""

Parts = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes by part, and the peak of every phase of a step."""

    parts: Parts
    phases: Parts
    """sample, score, train, optimizer_step: sums of the parts that are alive together."""

    @property
    def peak(self) -> float:
        return max(self.phases.values())


def layer_bytes_per_token(shape: ModelShape, settings: PlanSettings, *, packed: bool) -> float:
    """What autograd keeps of one decoder layer, bytes per token.

    Args:
        packed: active positions of a gradient window in one row: neither mask nor repeated keys.
    """
    compute, stream = BYTES[settings.dtype], BYTES[settings.student_dtype]
    query, key = shape.query_size, shape.key_size
    # Under autocast a matmul's output is kept in the compute dtype beside the float32 stream.
    outputs = 5 if settings.autocast else 2
    masked = settings.padded and not packed
    total = shape.hidden_size * (2 * FLOAT32 + 2 * stream + outputs * compute) + 2 * FLOAT32
    if shape.qk_norm:
        total += (query + key) * (FLOAT32 + compute)
        total += FLOAT32 * (shape.num_heads + shape.num_kv_heads)
    # sdpa with a mask has no kernel for grouped heads: keys and values are repeated.
    repeated = query if masked and shape.num_heads != shape.num_kv_heads else key
    total += compute * (2 * query + 2 * repeated)
    if not packed:
        total += FLOAT32 * shape.num_heads
    # The additive mask, one row of it a token.
    if masked:
        total += compute * settings.length
    return total + compute * 4 * shape.intermediate_size


def activation_bytes(
    shape: ModelShape, settings: PlanSettings, *, share: float | None = None
) -> float:
    """What autograd keeps of the student's training forward of one micro-batch, below the head.

    Args:
        share: positions that carry gradient over all, under a gradient window; None: the full forward.
    """
    stream = BYTES[settings.student_dtype]
    tokens = settings.batch * settings.length * (1.0 if share is None else share)
    layer = layer_bytes_per_token(shape, settings, packed=share is not None)
    layers = shape.num_layers * layer
    if settings.gradient_checkpointing:
        # Each layer's input, and one layer at a time recomputed in full.
        layers = shape.num_layers * shape.hidden_size * stream + layer
    norm = shape.hidden_size * (FLOAT32 + stream) + FLOAT32
    rotation = 2 * shape.head_dim * stream * settings.length
    # Sharded weights are gathered in the compute dtype, and let go after each layer.
    cast = settings.autocast and settings.shards == 1
    casts = BYTES[settings.dtype] * shape.linear_weights if cast else 0
    return tokens * (layers + norm + INT64) + rotation + casts


def cache_bytes(shape: ModelShape, settings: PlanSettings, num_rows: float, dtype: str) -> float:
    """Keys and values of every layer for `num_rows` full rows."""
    return float(num_rows * shape.cached_entries(settings.length) * BYTES[dtype])


def prefix_bytes(shape: ModelShape, settings: PlanSettings, num_rows: float) -> float:
    """Keys, values and states that a scoring pass leaves of `num_rows` rows for a gradient window."""
    # All of them, also of layers whose own cache slides.
    whole = replace(shape, num_sliding_layers=0)
    states = num_rows * settings.length * shape.hidden_size * BYTES[settings.student_dtype]
    return cache_bytes(whole, settings, num_rows, settings.dtype) + states


def prefix_share(shape: ModelShape, settings: PlanSettings) -> float:
    """Share of the generation batch of which they are held until the training forward."""
    most = settings.prefix_memory_mib * 2.0**20
    held = min(1.0, most / prefix_bytes(shape, settings, settings.num_rows))
    return held if settings.keep_prefix else 0.0


def sampling_dtype(settings: PlanSettings) -> str:
    """Dtype of the keys and values that transformers' cache holds while completions are sampled.

    Autocast leaves rotated keys in that of the weights, and the cache holds values in that of its keys.
    Sharded weights are gathered in the compute dtype, without autocast.
    """
    return settings.student_dtype if settings.shards == 1 else settings.dtype


def _gathered(shape: ModelShape) -> float:
    """Weights of a model in parts that are whole at a time."""
    return 2 * shape.body_parameters / shape.num_layers + tail_parameters(shape)


def _weights(student: ModelShape, teacher: ModelShape, settings: PlanSettings) -> Parts:
    stored = BYTES[settings.student_dtype]
    trained, shards = trained_parameters(student, settings), settings.shards
    adapters = 0 if settings.lora_rank is None else trained
    each = BYTES[settings.trained_dtype]
    # DDP copies gradients into buckets to send them while the backward goes on.
    buckets = settings.sharding == "ddp" and settings.num_ranks > 1
    compute, zero3 = BYTES[settings.dtype], settings.sharding == "zero3"
    second = compute if zero3 and settings.autocast else 0
    gathered = [student] if not zero3 or settings.teacher_elsewhere else [student, teacher]
    # FSDP2 leaves a model without gradient whole: it is not wrapped.
    frozen = shards if zero3 else 1
    of_teacher = held_bytes(teacher, settings) / frozen
    of_copy = (compute if zero3 else stored) * student.num_parameters / frozen
    return {
        "process": float(PROCESS if settings.device == "cpu" else 0),
        "student_weights": ((stored + second) * student.num_parameters + (each + second) * adapters)
        / shards,
        "gathered_weights": compute * max(map(_gathered, gathered)) if shards > 1 else 0.0,
        "gathered_to_sample": float(compute * student.num_parameters)
        if zero3 and shards > 1
        else 0.0,
        "teacher_weights": _teacher_weights(of_teacher, adapters, settings)
        + settings.other_teacher_bytes / frozen,
        "teacher_layers": moving_bytes(teacher, settings),
        "reference_weights": of_copy if settings.holds_reference else 0.0,
        "gradients": each * trained / shards,
        "gradient_buckets": float(each * trained) if buckets else 0.0,
        "optimizer_states": each * settings.optimizer_states * trained / shards,
        "update_norm_copy": each * trained / shards if settings.update_norm else 0.0,
        # The change of the largest matrix, which an adapter leaves frozen.
        "update_norm_change": float(stored * student.embedding_parameters / shards)
        if settings.update_norm and settings.lora_rank is None
        else 0.0,
    }


def _teacher_weights(whole: float, adapters: int, settings: PlanSettings) -> float:
    """Of a teacher that is the student with an adapter, the adapter: as it was, or in float32 as averaged."""
    if settings.teacher_elsewhere:
        return 0.0
    return float(FLOAT32 * adapters) if settings.own_teacher and settings.lora_rank else whole


def _hidden_states(student: ModelShape, teacher: ModelShape, settings: PlanSettings) -> Parts:
    own = student.hidden_size * BYTES[settings.dtype]
    other = 0 if settings.teacher_elsewhere else teacher.hidden_size * BYTES[settings.dtype]
    scored = settings.num_completion_tokens
    read = settings.length * own + settings.teacher_length * other
    # By reach every loss is in part an exact one.
    kept = other if settings.needs_teacher_distribution or settings.reach else 0
    lists = settings.top_k * (INT64 + FLOAT32) * 2
    # A server's answer is compared with the student's states, which wait for it.
    waiting = scored * own if settings.teacher_elsewhere or settings.several_teachers else 0
    return {
        "scoring_hidden": float(settings.batch * read + waiting),
        "scoring_outputs": float(scored * (lists + SCORE_COLUMNS * FLOAT32)),
        "teacher_hidden_scored": float(scored * kept),
        "teacher_hidden_kept": scored * kept * settings.taught_share,
        "reference_hidden_scored": float(scored * own * settings.reach),
        "reference_hidden_kept": scored * own * settings.anchored_share,
    }


def _logits(student: ModelShape, teacher: ModelShape, settings: PlanSettings) -> Parts:
    vocab_size = min(student.vocab_size, teacher.vocab_size)
    chunk = positions_per_chunk(vocab_size, chunk_elements_on(settings.device))
    tile = TILES["cpu" if settings.device == "cpu" else "other"].elements
    scored = settings.batch * settings.completion_length
    # The anchor's terms and the loss's run one after the other: the larger of the two counts.
    trained = max(1.0, scored * max(settings.taught_share, settings.anchored_share))
    row = FLOAT32 * vocab_size
    # One float32 gradient of the head, folded from all chunks; an adapter leaves the head frozen.
    head = row * student.hidden_size if settings.lora_rank is None else 0
    casts = BYTES[settings.dtype] * vocab_size * student.hidden_size if settings.autocast else 0
    reached = REACH_LOGIT_TENSORS * row * min(chunk, settings.num_completion_tokens)
    return {
        "reach_logits": float(reached * settings.reach),
        "scoring_logits": float(SCORE_LOGIT_TENSORS * min(FLOAT32 * tile, row * scored)),
        "loss_logits": LOSS_LOGIT_TENSORS * row * min(chunk, trained),
        "head_gradient": float(head + casts),
        "sampling_logits": float(
            SAMPLING_LOGIT_TENSORS * FLOAT32 * student.vocab_size * settings.num_rows
        ),
    }


def step_memory(student: ModelShape, teacher: ModelShape, settings: PlanSettings) -> Memory:
    """Parts and phase peaks of one step."""
    window = settings.window
    share = None if window is None else gradient_share(settings, window)
    # Of rows beyond the limit one micro-batch after the other has its own.
    held = max(settings.batch, settings.num_rows * prefix_share(student, settings))
    stream = BYTES[settings.student_dtype]
    training_hidden = settings.batch * settings.length * student.hidden_size * stream
    parts = (
        _weights(student, teacher, settings)
        | _hidden_states(student, teacher, settings)
        | _logits(student, teacher, settings)
        | {
            "activations": activation_bytes(student, settings, share=share),
            "training_hidden": training_hidden * (1.0 if share is None else share),
            "key_value_prefix": 0.0 if window is None else prefix_bytes(student, settings, held),
            "generation_cache": cache_bytes(
                student, settings, settings.num_rows, sampling_dtype(settings)
            ),
        }
    )
    return Memory(parts=parts, phases=_phases(parts, settings))


def _phases(parts: Parts, settings: PlanSettings) -> Parts:
    def total(*names: str) -> float:
        return sum(parts[name] for name in names)

    held = "process", "student_weights", "teacher_weights", "reference_weights", "optimizer_states"
    weights = total(*held, "gradient_buckets")
    gathered = parts["gathered_weights"]
    kept = total("teacher_hidden_kept", "reference_hidden_kept", "key_value_prefix")
    # The lists of chunks and what they are joined into exist together for a moment.
    scored = total("scoring_outputs", "teacher_hidden_scored")
    chunk = total("scoring_hidden", "scoring_logits")
    forward = total("activations", "training_hidden", "loss_logits", "head_gradient")
    gradients = parts["gradients"]
    # The head's gradient exists once as computed and once scaled, with every activation still there.
    forward += max(0.0, parts["head_gradient"] - parts["loss_logits"])
    # The first backward of a step makes gradients while it frees activations; later ones find them there.
    train = forward + gradients if settings.micro_batches > 1 else max(forward, gradients)
    # The parts of the reference's states and what they are joined into, likewise.
    reach = 2 * parts["reference_hidden_scored"] + parts["reach_logits"]
    score = scored + max(scored, chunk, reach)
    shared = settings.shared_forward and settings.window is None
    recorded = total("activations", "training_hidden") if shared else 0.0
    return {
        "sample": weights
        + max(gathered, parts["gathered_to_sample"])
        + total("generation_cache", "sampling_logits"),
        "score": weights
        + gathered
        + parts["teacher_layers"]
        + score
        + recorded
        + (parts["key_value_prefix"] if settings.keep_prefix else 0.0),
        "train": weights + gathered + kept + train,
        "optimizer_step": weights
        + kept
        + total("gradients", "update_norm_copy", "update_norm_change"),
    }
