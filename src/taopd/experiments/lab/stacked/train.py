"""The training step of many arms of one tiny lab at once, on a stack of students.

    sample -> score with both models -> `choose` -> loss at the chosen positions -> clip -> AdamW

The same functions as in `TeachabilityTrainer` decide (`signal_table`, `choose`, the losses); only the
models are stacked, and the scoring pass is the training forward. A test compares one step with the
trainer's. Arms with the same seed see the same prompts and draw from their distributions with the same
uniform numbers. Settings that this loop does not follow are refused.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taopd.experiments.arm_settings import Arm
from taopd.experiments.lab.stacked.model import (
    Shape,
    Weights,
    generate,
    hidden_states,
    logits,
    stack,
)
from taopd.experiments.lab.stacked.problems import encoded
from taopd.experiments.lab.stacked.settings import stack_settings
from taopd.experiments.lab.stacked.start_memories import Memories
from taopd.experiments.lab.stacked.tables import rows_by_arm, tables_by_arm, with_initial
from taopd.experiments.lab.task import EOS_ID, PAD_ID
from taopd.kernels import Head
from taopd.losses import Targets, needs_teacher_distribution, resolve_loss
from taopd.models.batch import Positions
from taopd.models.prompts import load_model, load_prompts
from taopd.models.stop_tokens import foreign_ends
from taopd.signals import SignalTable, TokenSignals, signals_from_logprobs
from taopd.trainer.build.named_optimizer import make_schedule
from taopd.trainer.loss import loss_of_run
from taopd.trainer.selection import Choice, choose, reads_initial, signal_needs


@dataclass(frozen=True, kw_only=True)
class StackStep:
    """One step of a stack as observers see it."""

    step: int
    targets: Int[Tensor, " N"]
    """The tokens at every valid position, arm by arm."""
    rows: list[slice]
    """The positions of every arm."""
    signals: TokenSignals
    tables: list[SignalTable]
    choices: list[Choice]
    student_logprobs: Float[Tensor, "N V"]
    """At every valid position, without gradient, arm by arm."""
    teacher_logprobs: Float[Tensor, "N V"]
    reference_logprobs: Callable[[], Float[Tensor, "N V"]]
    """The initial student's; computed when asked for."""
    after_logprobs: Callable[[], Float[Tensor, "N V"]]
    """The student's on the same contexts after the update; computed when asked for, during the step."""
    update_norms: Float[Tensor, " S"]
    """L2 norm of every arm's parameter change in this step, as the optimizer made it."""
    gradient_norms: Float[Tensor, " S"]
    """Before clipping."""


Observer = Callable[[StackStep], None]


class Stack:
    """The arms of one lab with their stacked weights and optimizers.

    Args:
        arms: same student, teacher, prompts and `SHARED` settings; any seeds, and any values of the `OWN`
            settings.

    Raises:
        ConfigError: for arms that do not fit together, or a setting that only the trainer follows.
    """

    def __init__(self, arms: list[Arm], *, output_dir: str) -> None:
        self.arms = arms
        self.settings = stack_settings(arms, output_dir)
        first = self.settings[0]
        student, teacher = (
            load_model(path, dtype=torch.float32) for path in (arms[0].student, arms[0].teacher)
        )
        self.shape, self.weights = stack(student, len(arms))
        self._initial = stack(student, 1)[1]
        self._teacher_shape, self._teacher = stack(teacher, 1)
        self._foreign_ends = [
            # The sampler of the labs stops at this id alone.
            foreign_ends(args.stop_tokens, args.stop_token_ids, [EOS_ID], teacher)
            for args in self.settings
        ]
        for weight in self.weights.values():
            weight.requires_grad_()
        self._optimizer = torch.optim.AdamW(
            self.weights.values(),
            lr=first.learning_rate,
            betas=(first.adam_beta1, first.adam_beta2),
            eps=first.adam_epsilon,
            weight_decay=0.0,
            fused=True,
        )
        self._schedule = make_schedule(first, self._optimizer, first.max_steps)
        self._needs = {name for args in self.settings for name in signal_needs(args).signals}
        self._reads_initial = any(map(reads_initial, self.settings))
        self._memories = Memories(self.settings, self._foreign_ends)
        self._anchor = resolve_loss(first.anchor_loss)
        self._losses = [
            loss_of_run(args, (), ends, [EOS_ID], teacher.config.vocab_size)
            for args, ends in zip(self.settings, self._foreign_ends, strict=True)
        ]
        self._prompts = encoded(arms[0], load_prompts(arms[0].prompts, split="train"))
        self._orders = {arm.seed: self._order(arm.seed) for arm in arms}
        self._generators = {
            arm.seed: torch.Generator().manual_seed(arm.seed * 2 + 1) for arm in arms
        }

    def _order(self, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed * 2)
        size, count = self.settings[0].per_device_train_batch_size, len(self._prompts)
        while True:
            order = torch.randperm(count, generator=generator)
            yield from order[: count // size * size].split(size)

    def _rollout(self) -> Int[Tensor, "S B L"]:
        """Prompts and sampled completions of every arm."""
        args = self.settings[0]
        shape = args.per_device_train_batch_size, args.max_completion_length
        rows = {seed: next(order) for seed, order in self._orders.items()}
        noise = {seed: torch.rand(shape, generator=g) for seed, g in self._generators.items()}
        prompts = torch.stack([self._prompts[rows[arm.seed]] for arm in self.arms])
        completions = generate(
            self.shape,
            self.weights,
            prompts,
            max_new_tokens=args.max_completion_length,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            uniforms=torch.stack([noise[arm.seed] for arm in self.arms]),
        )
        return torch.cat([prompts, completions], dim=-1)

    # -- one step ---------------------------------------------------------------------------------

    def step(self, number: int, observers: tuple[Observer, ...] = ()) -> list[Choice]:
        """One optimizer step of every arm on new rollouts; returns what was chosen."""
        return self.update(self._rollout(), number, observers)

    def update(
        self, ids: Int[Tensor, "S B L"], number: int, observers: tuple[Observer, ...] = ()
    ) -> list[Choice]:
        """Score given prompts and completions, choose, and take one optimizer step."""
        completions = ids[..., self._prompts.shape[1] :].flatten(0, 1)
        ended = (completions == EOS_ID).long().cumsum(1) - (completions == EOS_ID).long()
        positions = Positions.of(ended == 0)
        student = self._student_logprobs(ids, positions)
        teacher_hidden, teacher = self._frozen(self._teacher_shape, self._teacher, ids, positions)
        targets = completions[positions.row, positions.column]
        signals = signals_from_logprobs(
            student.detach(),
            teacher,
            targets,
            k=self.settings[0].score_top_k,
            full_kl=not {"forward_kl", "reverse_kl"}.isdisjoint(self._needs),
        )
        # Read by reach, by the anchor and by observers: computed once, and only if one of them asks.
        initial = cache(partial(self._frozen, self.shape, self._initial, ids, positions))
        rows = rows_by_arm(positions, len(self.arms))
        if self._reads_initial:
            signals = self._with_initial(signals, initial()[1], teacher, rows)
            signals = self._memories(signals, initial()[1], teacher, positions.row, rows, number)
        tables = tables_by_arm(signals, positions, rows, self.settings, self._needs)
        choices = [self._choose(arm, table, number) for arm, table in enumerate(tables)]
        losses = self._loss(student, teacher_hidden, signals, targets, choices, rows)
        losses = losses + self._anchor_loss(student, choices, targets, ids, positions, initial)
        self._optimizer.zero_grad()
        losses.backward()
        gradient_norms = self._clip()
        update_norms = self._move(measured=bool(observers))
        self._schedule.step()
        if observers:
            seen = StackStep(
                step=number,
                targets=targets,
                rows=rows,
                signals=signals,
                tables=tables,
                choices=choices,
                student_logprobs=student.detach(),
                teacher_logprobs=teacher,
                reference_logprobs=lambda: initial()[1],
                after_logprobs=torch.no_grad()(partial(self._student_logprobs, ids, positions)),
                update_norms=update_norms,
                gradient_norms=gradient_norms,
            )
            for observer in observers:
                observer(seen)
        return choices

    def _with_initial(
        self, signals: TokenSignals, initial: Tensor, teacher: Tensor, rows: list[slice]
    ) -> TokenSignals:
        """The signals with those that the log-probs of the initial student and of the teacher give."""
        of_arms = rows, self.settings, self._foreign_ends
        return with_initial(signals, initial, teacher, *of_arms, needs=self._needs)

    def _choose(self, arm: int, table: SignalTable, step: int) -> Choice:
        """What one arm trains on in this step."""
        args = self.settings[arm]
        return choose(table, args, step=step, training=True, num_steps=args.max_steps)

    def _student_logprobs(
        self, ids: Int[Tensor, "S B L"], positions: Positions
    ) -> Float[Tensor, "N V"]:
        hidden = hidden_states(self.shape, self.weights, ids)[:, :, self._prompts.shape[1] - 1 : -1]
        everywhere = logits(self.weights, hidden.reshape(len(self.arms), -1, hidden.shape[-1]))
        everywhere = everywhere.reshape(*positions.shape, -1)
        return everywhere[positions.row, positions.column].log_softmax(-1)

    @torch.no_grad()
    def _frozen(
        self, shape: Shape, weights: Weights, ids: Tensor, positions: Positions
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N V"]]:
        """States and log-probs of one model that does not train, at the given positions."""
        num_prompt = self._prompts.shape[1]
        parts = [hidden_states(shape, weights, arm.unsqueeze(0))[0] for arm in ids]
        hidden = torch.cat(parts)[:, num_prompt - 1 : -1][positions.row, positions.column]
        return hidden, logits(weights, hidden.unsqueeze(0))[0].log_softmax(-1)

    def _loss(
        self,
        student: Tensor,
        teacher_hidden: Tensor,
        signals: TokenSignals,
        targets: Tensor,
        choices: list[Choice],
        rows: list[slice],
    ) -> Float[Tensor, ""]:
        teacher_head = Head(weight=self._teacher["head"][0].T)
        sampled = signals.teacher_logprobs
        assert sampled is not None
        total = student.new_zeros(())
        parts = zip(choices, self.settings, self._losses, rows, strict=True)
        for choice, args, function, own in parts:
            chosen = choice.loss_weights != 0
            at = torch.arange(own.start, own.stop)[chosen]
            exact = needs_teacher_distribution(args.loss) or choice.reach is not None
            reach, held = choice.divided()
            values = function(
                student[at],
                Targets(
                    token_ids=targets[at],
                    teacher_hidden=teacher_hidden[at] if exact else None,
                    teacher_head=teacher_head if exact else None,
                    teacher_logprobs=sampled[at],
                    reach=None if reach is None else reach[chosen],
                    held=None if held is None else held[chosen],
                ),
            )
            total = total + (values * choice.loss_weights[chosen].float()).sum()
        return total

    def _anchor_loss(self, student, choices, targets, ids, positions, initial) -> Tensor:
        anchored = torch.cat([choice.anchor_weights for choice in choices])
        at = anchored.nonzero().squeeze(1)
        if not len(at):
            return student.new_zeros(())
        if self._reads_initial:
            hidden = initial()[0][at]
        else:
            rows, index = positions.row[at].unique(return_inverse=True)
            with torch.no_grad():
                drawn = ids.flatten(0, 1)[rows].unsqueeze(0)
                states = hidden_states(self.shape, self._initial, drawn)[0]
            hidden = states[index, self._prompts.shape[1] - 1 + positions.column[at]]
        against = Targets(
            token_ids=targets[at],
            teacher_hidden=hidden,
            teacher_head=Head(weight=self._initial["head"][0].T),
        )
        return (self._anchor(student[at], against) * anchored[at].float()).sum()

    @torch.no_grad()
    def _move(self, measured: bool) -> Float[Tensor, " S"]:
        """The optimizer's step, scaled as `UpdateNorm` scales it; norms are zeros if nobody needs them."""
        limits = [(args.match_update_norm, args.max_update_norm) for args in self.settings]
        if not measured and all(limit == (None, None) for limit in limits):
            self._optimizer.step()
            return torch.zeros(len(self.arms))
        before = [weight.clone() for weight in self.weights.values()]
        self._optimizer.step()
        pairs = list(zip(self.weights.values(), before, strict=True))
        changes = [(weight - old).flatten(1).square().sum(1) for weight, old in pairs]
        norms = torch.stack(changes).sum(0).sqrt()
        goals = [
            match or min(float(norm), float("inf") if most is None else most)
            for norm, (match, most) in zip(norms, limits, strict=True)
        ]
        factors = torch.tensor(goals) / norms.clamp_min(1e-30)
        for arm in (factors != 1.0).nonzero().flatten().tolist():
            for weight, old in pairs:
                weight[arm] = old[arm] + (weight[arm] - old[arm]) * factors[arm]
        return norms

    def _clip(self) -> Float[Tensor, " S"]:
        """Clip every arm's gradient by its own norm, as `torch.nn.utils.clip_grad_norm_` does."""
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        most = self.settings[0].max_grad_norm
        if not most:  # transformers clips nothing either
            return norms
        factors = (most / (norms + 1e-6)).clamp_max(1.0)
        for gradient in gradients:
            gradient.mul_(factors.reshape(-1, *[1] * (gradient.ndim - 1)))
        return norms
