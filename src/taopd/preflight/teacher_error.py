"""The item of `taopd check` about a teacher that is packed, read from GGUF or moved: what that changes.

The full-precision teacher is loaded beside it and both read the rollouts of the check. Where there is a GPU
the full one stays in host memory and its layers visit the device, so that only host memory must be free.

    8bit, 4bit    the same files without quantization
    GGUF          the model folder that the file lies in, where there is one (config.json, safetensors)
    offload       the same weights, all on the device
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from taopd.errors import DataError
from taopd.models.batch import Positions, teacher_side
from taopd.models.forward import State
from taopd.models.gguf import gguf_file
from taopd.models.loading import load_model
from taopd.models.offload import LayerOffload
from taopd.models.output_head import merge_head_adapter
from taopd.models.scoring import Given, Reuse
from taopd.preflight.verdict import Problems, Verdict, judge
from taopd.runs.host_memory import free_bytes
from taopd.runs.shares import per_cent
from taopd.signals import TokenSignals, exact_signals, lists_from_exact, reach_from_states
from taopd.signals.situation import own_reach
from taopd.trainer.build.loaded_teacher import NO_EFFECT
from taopd.trainer.cost import ModelShape
from taopd.trainer.selection import choose, local_table, reads_initial, signal_options

if TYPE_CHECKING:
    from taopd.preflight.measure import Measured
    from taopd.preflight.subject import Subject

ITEM = "teacher error"
LARGE = 0.1
"""Of the divergence between teacher and student, above which the teacher's own error is a warning."""
GIB = 2.0**30
_SPARE = 1.1
"""Free memory over the size of the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherError:
    """The teacher of the run against the full-precision one, at the N tokens of the rollouts."""

    kind: str
    """"8bit", "4bit", "gguf" or "offload"."""
    forward_nats: float
    """Mean of KL(full || used)."""
    reverse_nats: float
    """Mean of KL(used || full)."""
    student_nats: float
    """Mean of KL(student || full)."""
    kept: int
    """Tokens that the run would keep of these."""
    changed: int
    """Of them, those that it would not keep with the full-precision teacher."""
    tokens: int


class NotMeasured(Exception):
    """Why there is no full-precision teacher to compare with."""


def kind_of(settings: Any, name: str | None = None) -> str | None:
    """What is done to the teacher that a run's settings name; None: nothing.

    Args:
        settings: a `TrainSettings`.
        name: file or folder of a teacher that the settings do not name.
    """
    args = settings.training
    if args.teacher_url is not None:
        return None
    if args.teacher_quantization is not None:
        return str(args.teacher_quantization)
    try:
        if gguf_file(str(args.teacher_model_name_or_path or name)):
            return "gguf"
    except DataError:  # which the loading of it says
        return None
    return None if args.teacher_offload is None else "offload"


@torch.no_grad()
def measure_error(
    trainer: Any,
    kind: str,
    batch: Mapping[str, Tensor],
    positions: Positions,
    passes: Mapping[str, Given],
    *,
    teacher: str = "",
) -> TeacherError | str:
    """Both teachers on a scored micro-batch, or why they cannot be compared.

    Args:
        trainer: a `TeachabilityTrainer`, whole on this device.
        kind: see `kind_of`.
        passes: of both models over this batch, see `measure.run_passes`.
        teacher: of several.
    """
    source = trainer.teacher_source(teacher)

    used, student = (passes[name].at(positions) for name in ("teacher", "student"))
    try:
        with _full_teacher(trainer, source, kind) as whole:
            with source.offload.whole() if kind == "offload" else nullcontext():
                size = trainer.args.per_device_train_batch_size
                # The teacher may read prompts of its own.
                read = teacher_side(batch)
                full = Given.of(
                    Reuse(), trainer.forward_states, whole, read, positions, micro_batch_size=size
                ).at(positions)
            ids = batch["completion_ids"][positions.row, positions.column]
            own, exact, between = (
                exact_of(trainer, *pair, ids)
                for pair in ((student, used), (student, full), (used, full))
            )
    except NotMeasured as reason:
        return str(reason)
    kept = [kept_tokens(trainer, positions, one) for one in (own, exact)]
    return TeacherError(
        kind=kind,
        forward_nats=_mean(between.forward_kl),
        reverse_nats=_mean(between.reverse_kl),
        student_nats=_mean(exact.reverse_kl),
        kept=int(kept[0].sum()),
        changed=int((kept[0] & ~kept[1]).sum()),
        tokens=len(positions),
    )


def check_teacher_error(_subject: "Subject", measured: "Measured") -> Verdict:
    """How far the teacher of the run is from the full-precision one."""
    found = measured.teacher_error
    if found is None or isinstance(found, str):
        return judge(ITEM, "not measured", [("warn", found or "The rollouts were not scored.")])
    problems = Problems()
    worst = max(found.forward_nats, found.reverse_nats)
    if worst > LARGE * found.student_nats:
        problems.warn(
            f"The teacher's own error is {worst / max(found.student_nats, 1e-12):.0%} of what the student is "
            "to learn: take 8bit in place of 4bit, a GGUF file with more bits, or teacher_offload, which "
            "changes no number."
        )
    share = found.changed / max(1, found.kept)
    text = (
        f"{found.kind}: KL(full || used) {found.forward_nats:.2g}, KL(used || full) {found.reverse_nats:.2g} "
        f"nats per token; {found.changed} of {found.kept} kept tokens ({per_cent(share, 0)}%) would be others"
    )
    figures = {
        "forward_nats": found.forward_nats,
        "reverse_nats": found.reverse_nats,
        "student_nats": found.student_nats,
        "kept": found.kept,
        "changed_share": share,
        "tokens": found.tokens,
    }
    return judge(ITEM, text, problems, figures=figures)


def _mean(values: Tensor | None) -> float:
    assert values is not None
    return float(values.double().mean())


def exact_of(
    trainer: Any,
    student: State,
    teacher: State,
    ids: Tensor,
    locate: Callable[[int], str] = "row {}".format,
) -> TokenSignals:
    """As the run computes them, with both divergences, and reach: before training the student is the initial
    one."""
    args, temperature = trainer.args, trainer.temperature
    options = signal_options(args, trainer.stop_ids) | {"full_kl": True}
    signals = exact_signals(
        *student, *teacher, ids, temperature=temperature, locate=locate, **options
    )
    reach, _ = reach_from_states(
        student,
        teacher,
        ids,
        threshold=args.reach_threshold,
        temperature=temperature,
        stop_ids=options["stop_ids"],
        foreign_ends=trainer.foreign_ends,
    )
    return replace(signals, reach=reach)


def _with_initial(trainer: Any, signals: TokenSignals) -> TokenSignals:
    """The signals with those of the initial student where a setting reads them: before training it is the
    student."""
    args = trainer.args
    if not reads_initial(args):
        return signals
    reach = signals.reach
    if reach is None:
        reach = own_reach(
            signals, threshold=args.reach_threshold, foreign_ends=trainer.foreign_ends
        )
    return replace(
        signals,
        reach=reach,
        initial_logprobs=signals.student_logprobs,
        initial_disagreement=signals.disagreement,
        initial_compatibility=signals.compatibility,
    )


def kept_tokens(trainer: Any, positions: Positions, signals: TokenSignals) -> Tensor:
    """What the run would keep of a micro-batch in its first step, bool [N]."""
    args, place = trainer.args, (positions.row, positions.column)
    # All of them are rows of one teacher, whose share `budget_scope: teacher` is about.
    one = torch.zeros_like(positions.row)
    if args.signals == "topk_lists" and signals.compatibility_is_exact:
        signals = replace(lists_from_exact(signals), reach=signals.reach)
    signals = _with_initial(trainer, signals)
    table = local_table(signals, args, *place, trainer.stop_ids, teacher=one)
    return choose(table, args, step=0, training=True).selection.kept


@contextmanager
def _full_teacher(trainer: Any, source: Any, kind: str) -> Iterator[Any]:
    """The full-precision teacher while it is compared; for an offloaded one the teacher itself.

    Args:
        source: the `TeacherSource` of the run.

    Raises:
        NotMeasured: there is none, or no room for it.
    """
    used, device = source.model, trainer.accelerator.device
    inner = trainer.accelerator.unwrap_model(used)
    if kind == "offload":
        offload = source.offload
        if offload is None:
            raise NotMeasured(f"{NO_EFFECT[0].upper()}{NO_EFFECT[1:]}.")
        if torch.cuda.mem_get_info(device)[0] < _SPARE * offload.layer_bytes:
            raise NotMeasured(
                "The device has no room for the whole teacher to compare with; the numbers are the same by "
                "construction."
            )
        yield used
        return
    name = str(inner.config.name_or_path)
    if kind == "gguf":
        name = _original(Path(name))
    needed = _SPARE * inner.dtype.itemsize * ModelShape.from_config(inner.config).num_parameters
    free = free_bytes()
    if needed > free:
        raise NotMeasured(
            f"The full-precision teacher takes {needed / GIB:.1f} GiB of memory and {free / GIB:.1f} are "
            "free: it is not compared. Check on a machine with more."
        )
    options = {"dtype": inner.dtype, "attn_implementation": inner.config._attn_implementation}
    revision = source.args.teacher_model_revision or "main"
    full = load_model(name, revision=revision, **options).eval().requires_grad_(False)
    merge_head_adapter(full)
    if device.type != "cpu":
        LayerOffload(full, device)
    yield full


def _original(file: Path) -> str:
    """The model folder that a GGUF file lies in.

    Raises:
        NotMeasured: it lies in none.
    """
    folder = file.parent
    if not ((folder / "config.json").is_file() and list(folder.glob("*.safetensors"))):
        raise NotMeasured(
            f"{file.name} is all there is of the teacher: with the model that it was made from in the same "
            "folder (config.json, safetensors) its error is measured."
        )
    return str(folder)
