"""The scoring path against the model's own forward, on a few rows of a real batch.

Scoring reads a model as backbone states times a head, with a scale and a soft cap from the config, on rows
that are padded on the left. A model whose forward does something else would be scored wrongly without a
word: an adapter on its head, a further layer, another soft cap, positions that count padding. So would one
that reads in both directions: it would see the token that it predicts.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from taopd.errors import DataError
from taopd.kernels import Head, topk_score
from taopd.models.batch import SEQUENCE, Forward, Trimmed, trim
from taopd.models.forward import states_of
from taopd.models.output_head import inside_peft

BOUND = 1e-2
"""Nats between the two in float32, the largest at the sampled tokens and the likeliest ids."""
BOUND_16_BIT = 0.1
"""Likewise in 16-bit numbers or TF32, but the mean: a bfloat16 logit of 32 is rounded by up to 0.06."""
MOST_TOKENS = 64
"""Completion tokens of a row that are compared."""
MOST_IDS = 16
NUM_ROWS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far a model's scoring path is from its own forward."""

    model: str
    """Class, for messages."""
    error: float
    """Nats."""
    bound: float
    tokens: int
    only_padded: bool
    """The two agree on a row without padding: what differs is the padding."""
    change_by_later: float
    """Nats by which tokens change the log-probs before them; 0 with causal attention."""

    @property
    def problem(self) -> str | None:
        """What is wrong and what to do; None if they agree."""
        if self.change_by_later > self.bound:
            return (
                f"{self.model} reads in both directions: later tokens change the log-probs before them by "
                f"{self.change_by_later:.2g} nats. Choose a causal language model; where the weights are of "
                "one, its config is wrong (is_decoder: true, use_bidirectional_attention: false)."
            )
        # A NaN in the weights is found, and named with its place, by the scoring pass.
        if not self.error > self.bound:
            return None
        if self.only_padded:
            cause = (
                "Its numbers change with padding on the left or right: positions or recurrent states count "
                "it, or sparse attention takes other keys of equal score. Choose another model; a teacher "
                "may also be scored with per_device_train_batch_size: 1"
            )
        else:
            cause = (
                "Its forward does more than head times last state with the scale and soft cap of its config "
                "(an adapter on the head, a further layer, another soft cap): merge adapters and save it "
                "again, or choose another model"
            )
        return f"{self.model} is scored {self.error:.2g} nats off its own forward. {cause}."


@torch.no_grad()
def compare_with_own_forward(
    forward: Forward,
    wrapped: Any,
    model: Any,
    batch: Mapping[str, Tensor],
    vocab_size: int,
    *,
    padded: bool = True,
) -> Agreement:
    """Compare the scoring path of a model in evaluation mode with its own forward on unpadded rows.

    The number of forwards does not depend on the rows: processes that share a model stay in step.

    Args:
        forward: of the scoring path.
        wrapped: the model as it runs here, `model` inside its wrapper.
        batch: padded prompts and completions; see `batch.SEQUENCE`.
        padded: rows are scored several at a time, and so with padding; False: one by one.
    """
    # LLM.int8 takes outlier columns from the whole batch: only a row alone has the same numbers.
    in_8_bits = getattr(model, "is_loaded_in_8bit", False)
    padded = padded and not in_8_bits
    chosen, mask = _rows(batch, vocab_size, padded=padded)
    at_once = NUM_ROWS if padded else 1
    states, errors, errors_unpadded = [], list[Tensor](), list[Tensor]()
    moved = torch.empty(0)
    for first in range(0, NUM_ROWS, at_once):
        rows = slice(first, first + at_once)
        hidden, head = states_of(forward, wrapped, chosen, rows, mask[rows])
        states += hidden.split(mask[rows].sum(1).tolist())
    for row, found in enumerate(states):
        alone = {name: value[row : row + 1] for name, value in chosen.items()}
        part = trim(alone, mask[row : row + 1])
        active = mask[row, : part.num_completion]
        own = _own_logprobs(wrapped, model, part, vocab_size)[0][active]
        targets = chosen["completion_ids"][row, : part.num_completion][active]
        want = torch.cat([targets[:, None], own.topk(min(MOST_IDS, vocab_size)).indices], dim=1)
        wanted = own.gather(1, want)
        errors.append(_off(found, head, targets, want, wanted))
        if not padded:
            errors_unpadded.append(errors[-1])
        elif row == 0:
            # Beside another row the longest prompt may have padding on the right; alone it has none.
            lone, lone_head = states_of(forward, wrapped, alone, slice(0, 1), mask[:1])
            errors_unpadded.append(_off(lone, lone_head, targets, want, wanted))
        if row == 0 and not in_8_bits:
            other = trim(_with_other_tokens_later(alone, mask[:1], vocab_size), mask[:1])
            changed = _own_logprobs(wrapped, model, other, vocab_size)[0][active].gather(1, want)
            # The first of the other tokens is predicted from what comes before it.
            moved = (changed - wanted).abs()[: len(targets) // 2 + 1].flatten()
    exact = hidden.dtype in (torch.float32, torch.float64) and hidden.dtype == model.dtype
    exact = exact and torch.get_float32_matmul_precision() == "highest"
    # Packed weights compute in 16 bits whatever the model's dtype.
    exact = exact and not getattr(model, "is_quantized", False)
    bound, reduce = (BOUND, torch.amax) if exact else (BOUND_16_BIT, torch.mean)

    def total(found: list[Tensor]) -> float:
        together = torch.cat(found).float()
        return float(reduce(together)) if together.numel() else 0.0

    change_by_later = total([moved])
    return Agreement(
        model=type(model).__name__,
        error=total(errors),
        bound=bound,
        tokens=int(mask.sum()),
        only_padded=change_by_later <= bound and total(errors_unpadded) <= bound,
        change_by_later=change_by_later,
    )


def _off(
    states: Float[Tensor, "n D"], head: Head, targets: Tensor, want: Tensor, own: Tensor
) -> Float[Tensor, " m"]:
    """How far scored log-probs of wanted ids are from a model's own, nats."""
    scores = topk_score(states, head, targets, k=1, want_ids=want)
    assert scores.want_logprobs is not None
    return (scores.want_logprobs - own).abs().flatten()


def require_agreement(name: str, found: Agreement) -> None:
    """Refuse a model that is scored otherwise than it computes.

    Raises:
        DataError: names the model, the difference and the likely cause.
    """
    if found.problem:
        raise DataError(f"the {name} {found.problem}")


def _with_other_tokens_later(
    row: Mapping[str, Tensor], mask: Bool[Tensor, "1 T"], vocab_size: int
) -> dict[str, Tensor]:
    """The row with another id at each token of the later half of the mask."""
    ids, later = row["completion_ids"], mask & (mask.cumsum(1) > int(mask.sum()) // 2)
    return {**row, "completion_ids": torch.where(later, (ids + 1) % vocab_size, ids)}


def _rows(
    batch: Mapping[str, Tensor], vocab_size: int, *, padded: bool
) -> tuple[dict[str, Tensor], Bool[Tensor, "2 T"]]:
    """The longest and the shortest prompt with a completion, and the tokens of it that are compared.

    Args:
        padded: the shortest loses the first half of its prompt. Whether a batch has padding is chance: a
            fault of padding must not wait for one that has.
    """
    ids = batch["completion_ids"]
    mask = batch["completion_mask"].bool() & (ids < vocab_size).long().cummin(1).values.bool()
    mask[:, MOST_TOKENS:] = False
    lengths = batch["prompt_mask"].sum(1)
    # Rows without a token come last, and are taken where there is no other.
    order = lengths.masked_fill(~mask.any(1), -1).argsort(descending=True, stable=True)
    last = max(1, int(mask.any(1).sum())) - 1
    rows = order[[0, last]]
    chosen = {name: batch[name][rows] for name in SEQUENCE}
    if padded:
        prompt = chosen["prompt_mask"][1].nonzero()[:, 0]
        chosen["prompt_mask"][1, prompt[: len(prompt) // 2]] = 0
    return chosen, mask[rows]


def _own_logprobs(
    wrapped: Any, model: Any, part: Trimmed, vocab_size: int
) -> Float[Tensor, "b n V"]:
    """Log-probs of the completion tokens' positions from the model's forward, cut to the shared ids."""
    kept = part.num_completion + 1
    # Logits of a long prompt would take as much memory as a training step.
    options = (
        {"logits_to_keep": kept}
        if "logits_to_keep" in inspect.signature(inside_peft(model).forward).parameters
        else {}
    )
    out = wrapped(input_ids=part.input_ids, attention_mask=part.attention_mask, **options)
    logits = out.logits[:, -kept:-1, :vocab_size]
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
