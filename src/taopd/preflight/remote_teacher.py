"""The same micro-batch with a teacher that is asked: what its numbers hold, and what they leave open.

Its divergence over the full vocabulary is not sent: KL(student || teacher) is estimated from the sampled
tokens. Its mass on stop ids is exact where it scores wanted ids; else it is what its list holds, and no more
than the list's last probability for each id that is missing there.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from taopd.models.batch import Forward, Positions
from taopd.models.sampler_drift import drift
from taopd.preflight.measure import Ends, Measured, read_ends, stop_masses
from taopd.preflight.verdict import Problem, Verdict, judge
from taopd.teachers import Teacher, score_remote

TEXTS = 8
"""Prompts whose tokens are compared."""
ONE_MODEL = 1e-4
"""Nats between the log-probs of one model here and on a server."""


@torch.no_grad()
def measure_asked(
    forward: Forward,
    student,
    teacher: Teacher,
    batch: Mapping[str, Tensor],
    *,
    sampling_logprobs: Float[Tensor, "B S"] | None,
    stops: dict[int, str],
    candidates: dict[int, str],
    micro_batch_size: int,
    vocab_size: int,
    k: int,
    max_tokens: int,
) -> Measured:
    """As `measure`, the teacher asked for its part.

    Raises:
        TeacherError: see `Teacher.score`. NumericsError: on NaN or infinite logits of the student.
    """
    ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
    positions = Positions.of(mask & (ids < vocab_size))
    scored = score_remote(
        forward,
        student,
        teacher,
        batch,
        positions,
        micro_batch_size=micro_batch_size,
        vocab_size=vocab_size,
        k=k,
        when="taopd check",
    )
    found = read_ends(batch, stops)
    wanted = [token for token in candidates if token < vocab_size]
    recomputed = scored.signals.student_logprobs
    compared = None
    if sampling_logprobs is not None and recomputed is not None:
        compared = drift(sampling_logprobs, ids, positions, recomputed)
    own = stop_masses(forward, student, batch, found.positions, micro_batch_size, wanted, 1.0)
    masses, unknown = _teacher_masses(teacher, batch, found, wanted, k)
    return Measured(
        signals=scored.signals,
        lengths=found.lengths,
        ended=found.ended,
        drift=compared,
        stops=stops,
        candidates={token: candidates[token] for token in wanted},
        student_stops=own,
        teacher_stops=masses,
        teacher_stops_unknown=unknown,
        max_tokens=max_tokens,
    )


def _teacher_masses(
    teacher: Teacher, batch: Mapping[str, Tensor], found: Ends, wanted: list[int], k: int
) -> tuple[Float[Tensor, "E M"], float]:
    """Probability of the wanted ids at the ends, and the mean mass at most that it misses."""
    sequences = []
    for row in found.positions.row.tolist():
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        sequences.append([*prompt.tolist(), *completion.tolist()])
    if not sequences:
        return torch.zeros(0, len(wanted)), 0.0
    starts, parts, unknown = [len(tokens) - 1 for tokens in sequences], [], 0.0
    for first in range(0, len(wanted), k):  # servers limit the ids of one request
        ids = torch.tensor(wanted[first : first + k]).expand(len(sequences), -1)
        scores = teacher.score(sequences, starts, ids, k)
        if scores.want_logprobs is not None:
            parts.append(scores.want_logprobs.exp().float().cpu())
            continue
        same = ids.unsqueeze(2) == scores.topk_ids.cpu().unsqueeze(1)
        listed = scores.topk_logprobs.cpu().exp()
        parts.append((same * listed.unsqueeze(1)).sum(2))
        missing = (~same.any(2)).sum(1)
        unknown += float((missing * listed.min(1).values).mean())
    return torch.cat(parts, dim=1), unknown


def check_sampled_divergence(measured: Measured, *, vocab_size: int) -> Verdict:
    """KL(student || teacher) in nats per token, an estimate from the sampled tokens and its error."""
    signals = measured.signals
    assert signals.student_logprobs is not None and signals.teacher_logprobs is not None
    ratio = (signals.student_logprobs - signals.teacher_logprobs).double()
    mean, surprise = float(ratio.mean()), -float(signals.teacher_logprobs.double().mean())
    error = float(ratio.std() / math.sqrt(len(ratio))) if len(ratio) > 1 else math.inf
    problems: list[Problem] = []
    if float(ratio.abs().max()) < ONE_MODEL:
        problems.append(
            ("fail", "Teacher and student are one model: check the server and both paths.")
        )
    elif surprise > math.log(vocab_size):
        problems.append(
            (
                "warn",
                "The teacher does worse on the rollouts than guessing would: another tokenizer or chat "
                "template, another model on the server, or two models with little in common.",
            )
        )
    elif mean + 3 * error < 0:
        problems.append(
            (
                "warn",
                "The estimate is negative, which a KL cannot be: the rollouts are not drawn from the "
                "student at temperature 1 (top_p, top_k, a stale sampler), so the loss is biased.",
            )
        )
    figures = {"reverse_nats": mean, "standard_error_nats": error, "tokens": len(ratio)}
    figures["teacher_nll_nats"] = surprise
    text = (
        f"KL(student || teacher) {mean:.2f} +- {error:.2f} nats per token from {len(ratio)} sampled tokens; "
        "KL(teacher || student) is not sent"
    )
    return judge("teacher KL", text, problems, figures=figures)


def check_server(about: Mapping[str, object], *, longest: int, context: int | None) -> Verdict:
    """Who answers at `teacher_url`, and whether C is exact or a lower bound.

    Args:
        about: `Teacher.describe()`.
        longest: tokens of the longest sequence that will be scored; context: what the server takes.
    """
    problems: list[Problem] = []
    if not about["exact"]:
        problems.append(
            (
                "warn",
                f"C is a lower bound from the teacher's own list, for the whole run ({about['why']}). Raise "
                "score_top_k, or see docs/teachers.md for servers that score the student's ids.",
            )
        )
    if context is not None and longest + 1 > context:
        problems.append(
            (
                "fail",
                f"Sequences of {longest} tokens and the one that it adds do not fit the server's {context}: "
                "start it with a longer --max-model-len, or lower max_completion_length.",
            )
        )
    name = " ".join(str(about[key]) for key in ("kind", "version") if key in about)
    kind = "exact" if about["exact"] else "a lower bound"
    measured = f"{name} at {about.get('url', 'no url')}, model {about['model']}; C is {kind}"
    return judge("teacher server", measured, problems, figures=dict(about))


def check_tokens(
    tokenize: Callable[[str], list[int] | None], student, texts: Sequence[str]
) -> Verdict:
    """The server's own tokenizer and the student's on the first prompts."""
    item = "server tokens"
    for text in texts[:TEXTS]:
        theirs = tokenize(text)
        if theirs is None:
            problem = (
                "Compare them by hand: a teacher with other ids gives numbers without meaning."
            )
            return judge(item, "not compared: the server does not tokenize", [("warn", problem)])
        ours = student(text, add_special_tokens=False)["input_ids"]
        if list(ours) != theirs:
            place = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                min(len(ours), len(theirs)),
            )
            advice = (
                f"The server makes other ids of a prompt, from token {place} on: {theirs[place : place + 3]} "
                f"where the student has {list(ours[place : place + 3])}. It is another tokenizer: serve a "
                "teacher of the student's family."
            )
            return judge(item, "they differ", [("fail", advice)])
    return judge(item, f"the same ids for {len(texts[:TEXTS])} prompts", [])
