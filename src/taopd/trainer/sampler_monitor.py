"""Watches the sampler of a run: drift of its log-probs, truncation, and one warning with the likely cause.

The sampler's log-probs are those at the configured temperature: from vLLM as the engine returns them (TRL
does not ask for them in distillation), from transformers through a logits processor that sees what the
sampling loop saw. They are compared with the scoring pass of the same step, so that the figure costs no
forward; with transformers one [completions, vocabulary] float32 tensor is held while sampling.

Not compared: completions with tool calls, which are sampled in several turns, and those of a sampler that
does not write one token after the other (beams, drafts that are taken back). Figures are those of the main
process; the share of truncated completions is TRL's, of all ranks.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TrainerCallback

from taopd.losses import needs_own_samples
from taopd.models.generation import effective, sampling_changes, without_router_logits
from taopd.models.output_head import inside_peft
from taopd.models.sampler_drift import drift
from taopd.models.stop_tokens import merged_ids
from taopd.runs.limits import DRIFT_WARN, TRUNCATED, drift_cause, truncation_cause
from taopd.runs.shares import per_cent
from taopd.trainer.scored_batch import ScoredBatch
from taopd.trainer.settings.generation_checks import DECODING, check_decoding, check_returned

logger = logging.getLogger(__name__)

_FILE = "the student's generation_config.json"
RISE = 0.3
"""Truncated share, in a run that began below `TRUNCATED`, that is called unlearning."""


class SamplerMonitor(TrainerCallback):
    """Hears what a trainer's sampler says of its own tokens; observer and callback.

    Args:
        trainer: a `TeachabilityTrainer`, made far enough to sample when `listening` is entered.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._warned: set[str] = set()
        self._began_truncated: bool | None = None
        self.logprobs: Float[Tensor, "B S"] | None = None
        """Of the last call, NaN where the sampler gave none."""

    @property
    def sampler(self) -> str:
        """Which library samples."""
        return "vLLM" if self._trainer.use_vllm else "transformers"

    @property
    def _sources(self) -> list[Mapping[str, Any]]:
        """Generation settings, the first one wins."""
        trainer, args = self._trainer, self._trainer.args
        if trainer.use_vllm:
            return [args.generation_kwargs or {}, vars(args)]
        return [vars(trainer.generation_config), vars(inside_peft(trainer.model).generation_config)]

    @property
    def suspects(self) -> list[str]:
        """What is known to draw the sampler's log-probs away from those of scoring."""
        trainer = self._trainer
        # vLLM's log-probs are those that it sampled from; the processor here comes before the cuts.
        found = sampling_changes(self._sources, trainer.temperature, cuts=trainer.use_vllm)
        takes = inspect.signature(inside_peft(trainer.model).base_model.forward).parameters
        if (
            not found
            and "position_ids" not in takes
            and trainer.args.per_device_train_batch_size > 1
        ):
            found = ["padding on the left (the model takes no position_ids)"]
        return found

    @property
    def bias(self) -> str | None:
        """What is wrong with a loss on tokens that the student did not draw as it is; None if nothing."""
        trainer = self._trainer
        changes = sampling_changes(self._sources, trainer.temperature, cuts=True)
        if not changes or not needs_own_samples(trainer.args.loss):
            return None
        return (
            f"loss {trainer.args.loss!r} estimates a divergence from tokens that the student draws, and "
            f"{', '.join(changes)} changes the draw: the gradient is biased. Take it out, or choose a loss "
            "on the full distribution."
        )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the log-probs of everything that is sampled in the block."""
        self.logprobs = None
        trainer = self._trainer
        engine = (
            trainer.vllm_generation
            if trainer.use_vllm
            else trainer.accelerator.unwrap_model(trainer.model_wrapped)
        )
        sample = engine.generate
        # Someone else may have put a method there already (a test, another wrapper): it comes back as it was.
        replaced = vars(engine).get("generate")
        engine.generate = self._ask_vllm if trainer.use_vllm else self._ask_transformers
        self._sample = sample
        try:
            yield
        finally:
            if replaced is None:
                del engine.generate
            else:
                engine.generate = replaced

    def _ask_vllm(self, *args: Any, **kwargs: Any) -> Any:
        engine = self._trainer.vllm_generation
        # TRL asks vLLM for no log-probs in distillation; the sampled token's costs nothing.
        asked, engine.logprobs = engine.logprobs, 0  # the sampled token's alone
        try:
            result = self._sample(*args, **kwargs)
        finally:
            engine.logprobs = asked
        if result[2] is not None:
            rows = [[_number(tokens[0]) for tokens in row] for row in result[2]]
            # One number a token, or it is not known what they belong to.
            if [len(row) for row in rows] != [len(ids) for ids in result[1]]:
                return result
            width = max(map(len, rows), default=0)
            self.logprobs = torch.tensor(
                [row + [float("nan")] * (width - len(row)) for row in rows]
            )
        return result

    def _ask_transformers(self, *args: Any, **kwargs: Any) -> Any:
        sources = self._sources
        # What the student's own generation config asks for, of which the settings know nothing.
        own = {name: value for name, value in sources[1].items() if name in DECODING}
        num_rows = len(kwargs["input_ids"]) if "input_ids" in kwargs else 1
        check_decoding(own, num_rows, _FILE)
        check_returned(sources[1], _FILE)
        # The sampler's own temperature: generation_kwargs may set another than the one that is scored at.
        tap = LogprobRecorder(effective("temperature", sources) or 1.0)
        with without_router_logits(inside_peft(self._trainer.model)):
            result = self._sample(*args, logits_processor=LogitsProcessorList([tap]), **kwargs)
        self.logprobs = tap.finish(result)
        if self.logprobs is None:
            how = "it does not write one token after the other"
            self._warn("unfollowed", f"rollout/drift_nats is not measured for this sampler: {how}")
        return result

    def __call__(self, scored: ScoredBatch) -> None:
        """Record the drift of a generation batch."""
        recomputed, args = scored.signals.student_logprobs, self._trainer.args
        batch = scored.batch
        # Tool calls are sampled in several turns, of which the last alone was heard.
        if self.logprobs is None or recomputed is None or "tool_mask" in batch:
            return
        merged = merged_ids(args.stop_tokens, self._trainer.stop_ids)
        found = drift(
            self.logprobs, batch["completion_ids"], scored.positions, recomputed, merged_ids=merged
        )
        if found is not None:
            self._trainer._recorder.add("rollout/drift_nats/mean", found.mean)
            self._trainer._recorder.add("rollout/drift_nats/max", found.largest)

    def checkpoint_state(self) -> dict[str, Any]:
        """What was warned about, and how the run began."""
        return {"warned": sorted(self._warned), "began_truncated": self._began_truncated}

    def load_checkpoint_state(self, state: dict[str, Any]) -> None:
        self._warned = set(state["warned"])
        self._began_truncated = state["began_truncated"]

    def on_train_begin(self, args, state, control, **kwargs):
        self._warned, self._began_truncated = set(), None
        if state.is_world_process_zero and (bias := self.bias):
            self._warn("bias", bias)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        mean = logs.get("rollout/drift_nats/mean")
        if mean is not None and mean > DRIFT_WARN:
            suspects = self.suspects
            if not suspects and logs.get("rollout/outside_vocabulary"):
                suspects = ["ids of the student's output layer that the shared vocabulary lacks"]
            cause = drift_cause(self.sampler, suspects)
            self._warn(
                "drift", f"drift of {mean:.2g} nats a token at step {state.global_step}: {cause}"
            )
        share = logs.get("completions/clipped_ratio")
        if share is None:
            return
        # A run that begins truncated has its limit too low; one that becomes so is unlearning its end.
        if self._began_truncated is None:
            self._began_truncated = share > TRUNCATED
        rising = not self._began_truncated
        if share > (RISE if rising else TRUNCATED):
            what = f"{per_cent(share, 0)}% of the completions truncated at step {state.global_step}"
            self._warn("truncation", f"{what}: {truncation_cause(rising=rising)}")

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("%s", message)


class LogprobRecorder(LogitsProcessor):
    """Changes no logit; remembers what the sampled tokens had, if they are written one after the other."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._last: Tensor | None = None
        self._length = 0
        self._columns: list[Tensor] = []
        self._tokens: list[Tensor] = []
        self._lost = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Look up the newest token in the row before, and keep this row."""
        self._look_up(input_ids)
        if not self._lost:
            # Sampled from after this processor: the token is known when the next row comes.
            self._last = (scores.float() / self._temperature).log_softmax(-1)
            self._length = input_ids.shape[1]
        return scores

    def finish(self, output_ids: Tensor) -> Float[Tensor, "B S"] | None:
        """All columns, the last token's included; None where the sampler could not be followed."""
        self._look_up(output_ids)
        self._last = None
        if self._lost or not self._columns:
            return None
        # Beams change places, and drafts are taken back: what was looked up must be what came out.
        tokens = torch.cat(self._tokens, dim=1)
        same = torch.equal(tokens, output_ids[:, -tokens.shape[1] :])
        return torch.stack(self._columns, dim=1) if same else None

    def _look_up(self, ids: Tensor) -> None:
        if self._last is None or self._lost:
            return
        self._lost = ids.shape != (len(self._last), self._length + 1)
        if self._lost:
            self._last = None
            return
        self._tokens.append(ids[:, -1:])
        self._columns.append(self._last.gather(1, ids[:, -1:]).squeeze(1))


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
