"""Training with `method: reach`. Oracles: full distributions of the three models, each by its own forward."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GenerationConfig

from taopd.models.stop_tokens import declared_ids
from taopd.teachers import LocalTeacher
from tests.e2e.test_teacher_training import make_trainer as remote_trainer
from tests.e2e.test_trainer import make_trainer, weights_of

THRESHOLD, TEMPERATURE = 0.01, 0.05
"""Of models whose logits differ by a tenth: at temperature 1 their distributions are all but uniform."""
SETTINGS = {"method": "reach", "budget": 0.2, "anchor_fraction": 0.4}
SETTINGS |= {"reach_threshold": THRESHOLD, "temperature": TEMPERATURE}
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "max_steps": 3}
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def full_logprobs(model, batch, temperature=TEMPERATURE):
    """float64 [B, T, V] by the model's own forward, the prompt's padding left out row by row."""
    rows = []
    for row in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        ids = torch.cat([prompt, batch["completion_ids"][row]]).unsqueeze(0)
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        rows.append((logits.double() / temperature).log_softmax(-1))
    return torch.stack(rows)


def watched(trainer):
    """Trains; every step's batch with a copy of the student that it was scored by."""
    seen = []

    def look(scored):
        seen.append((scored, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}))

    trainer.observers.append(look)
    trainer.train()
    return seen


def models_of(micro_lab, weights):
    names = micro_lab.student, micro_lab.teacher, micro_lab.student
    initial, teacher, student = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval() for name in names
    )
    student.load_state_dict(weights, strict=False)
    return initial, teacher, student


def at(scored, logprobs):
    return logprobs[scored.positions.row, scored.positions.column]


def start_and_teacher(scored, initial, teacher, temperature=TEMPERATURE):
    """What reach reads: the start at temperature 1, the teacher at that of sampling."""
    kinds = (initial, 1.0), (teacher, temperature)
    return [at(scored, full_logprobs(model, scored.batch, t)) for model, t in kinds]


def reach_of(initial, teacher, threshold=THRESHOLD, foreign_ends=()):
    return torch.tensor(
        [
            sum(
                q * p / (p + threshold)
                for v, (p, q) in enumerate(zip(*row, strict=True))
                if v not in foreign_ends
            )
            for row in zip(initial.exp().tolist(), teacher.exp().tolist(), strict=True)
        ]
    ).double()


def ends_otherwise(micro_lab, folder):
    """The lab with a teacher whose files declare one more end, id 5."""
    student, teacher = (Path(each) for each in (micro_lab.student, micro_lab.teacher))
    shutil.copytree(teacher, folder / "teacher")
    config = GenerationConfig.from_pretrained(student)
    config.eos_token_id = [5, *declared_ids(config.eos_token_id)]
    config.save_pretrained(folder / "teacher")
    return SimpleNamespace(student=student, teacher=folder / "teacher", prompts=micro_lab.prompts)


def ends_as_one(student, teacher, own, foreign):
    """The reverse KL with all ends as one token, and what says which of them the student gives."""
    ends = [*own, *foreign]
    others = [v for v in range(teacher.shape[1]) if v not in ends]
    merged = [
        torch.cat([m[:, others], m[:, ends].logsumexp(1, True)], 1) for m in (student, teacher)
    ]
    p, q = merged
    share = (student[:, own].logsumexp(1) - p[:, -1]).neg()
    return (p.exp() * (p - q)).sum(1) + q[:, -1].exp() * share


def after_new(row, is_new):
    """Positions after a new token of the same row."""
    return torch.tensor([bool(is_new[:i][row[:i] == row[i]].any()) for i in range(len(row))])


def later(early, after, within):
    """lambda: `early`, or more where `within` is larger after a new token."""
    if not after.any() or after.all():
        return early
    worse = float(within[after].mean() - within[~after].mean())
    known = float((~after).double().mean())
    return max(early, min(1.0, max(0.0, worse) / 0.2) * min(1.0, max(0.0, 4.0 * known - 1.0)))


@pytest.mark.parametrize("ends", [(), (5,)])
@pytest.mark.parametrize("loss_name", ["reverse_kl", "sampled_reverse_kl"])
def test_three_steps_are_the_formula(micro_lab, tmp_path, loss_name, ends):
    """r from the student as it was given, also after it moved; the loss is the written sum.

    The hold is exact whatever the loss of the selected tokens. `ends`: of the teacher alone.
    """
    lab = ends_otherwise(micro_lab, tmp_path) if ends else micro_lab
    trainer = make_trainer(lab, tmp_path, **SETTINGS, **SGD, loss=loss_name)
    own_ends = trainer.eos_token_ids
    seen = watched(trainer)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    moved = max((seen[2][1][name] - p).abs().max() for name, p in seen[0][1].items())
    assert moved > 1e-3, "vacuous"
    # A short run lets go of the start over 100 steps.
    for (scored, weights), loss, early in zip(seen, logged, (1.0, 0.99, 0.98), strict=True):
        models = models_of(micro_lab, weights)
        initial, teacher, student = (at(scored, full_logprobs(m, scored.batch)) for m in models)
        r = reach_of(*start_and_teacher(scored, *models[:2]), foreign_ends=ends)
        foreign = teacher[:, list(ends)].exp().sum(1)
        others = [v for v in range(teacher.shape[1]) if v not in ends]
        assert 0.03 < r.mean() < 0.97
        torch.testing.assert_close(scored.signals.reach.double(), r, atol=1e-4, rtol=0)
        choice = scored.choice
        kept, drawn = choice.selection.kept, choice.reference_mask
        assert bool(kept.any()) and bool(drawn.any())
        n, num = math.ceil(0.2 * len(r)), len(r)
        p = student.exp()
        disagreement = (p * (student - teacher)).sum(-1)
        to_teacher = ends_as_one(student, teacher, own_ends, ends) if ends else disagreement
        to_start = (p * (student - initial)).sum(-1)
        within = disagreement
        sampled = scored.token_ids.unsqueeze(1)
        if loss_name == "sampled_reverse_kl":
            within = (student - teacher).gather(1, sampled).squeeze(1)
        rest = teacher[:, others] - (1.0 - foreign).log()[:, None]
        forward = (rest.exp() * (rest - student[:, others])).sum(-1)
        taught = r * within + (1.0 - r - foreign).clamp_min(0.0) * forward
        expected = taught[kept].sum() / n
        first, own, wanted = (
            each.gather(1, sampled).squeeze(1) for each in (initial, student, teacher)
        )
        torch.testing.assert_close(
            scored.signals.initial_logprobs.double(), first, atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            scored.signals.teacher_logprobs.double(), wanted, atol=1e-4, rtol=0
        )
        both = torch.minimum(own, wanted)
        new = after_new(scored.positions.row, first < both + math.log(0.1))
        reachable = later(early, new, disagreement * (r >= 0.5))
        # The start is no judge in a context that is new to it.
        let_go = torch.where(r < 0.01, early, reachable)
        at_start = let_go * (1.0 - r - foreign) * ~new
        hold = (1.0 - at_start) * to_teacher + 3.0 * at_start * to_start
        expected = expected + hold[drawn].sum() / (0.4 * num)
        assert loss == pytest.approx(float(expected), rel=1e-4)


def test_a_start_that_runs_on_half_of_the_completions_is_remembered_in_the_others(
    micro_lab, tmp_path
):
    """Oracle: the means by token id from full distributions, in float64, of known contexts alone."""
    lab = ends_otherwise(micro_lab, tmp_path)
    more = {"anchor_responses": 0.5, "per_device_train_batch_size": 8}
    trainer = make_trainer(lab, tmp_path, **SETTINGS | more, **SGD)
    num_rows = []
    trainer._anchor._reference.copy.model.register_forward_pre_hook(
        lambda module, args, given: num_rows.append(len(given["input_ids"])), with_kwargs=True
    )
    seen = watched(trainer)
    assert num_rows == [8, 4, 4]
    sums, changed = torch.zeros(4, trainer.vocab_size, dtype=torch.float64), 0
    for step, (scored, weights) in enumerate(seen):
        models = models_of(micro_lab, weights)
        start, teacher = start_and_teacher(scored, *models[:2])
        initial, student = (at(scored, full_logprobs(models[i], scored.batch)) for i in (0, 2))
        exact = reach_of(start, teacher, foreign_ends=(5,))
        sampled = scored.token_ids.unsqueeze(1)
        first, wanted, own = (
            each.gather(1, sampled).squeeze(1) for each in (initial, teacher, student)
        )
        row, drawn = scored.positions.row, scored.choice.reference_mask
        here = torch.isin(row, row[drawn]) if step else torch.ones_like(drawn)
        assert step == 0 or len(row[here].unique()) <= 4 < len(row.unique())
        new = after_new(row, first < torch.minimum(own, wanted) + math.log(0.1))
        sums *= 0.98
        for i in (here & ~new).nonzero().flatten().tolist():
            counted = start[i].exp() / (start[i].exp() + THRESHOLD)
            counted[5] = 0.0
            token = int(scored.token_ids[i])
            sums[0] += teacher[i].exp()
            sums[1] += teacher[i].exp() * counted
            sums[2, token] += 1.0
            sums[3, token] += first[i]
        remembered = teacher.exp() @ (sums[1] / sums[0])
        said = torch.where(sums[2] > 0, sums[3] / sums[2], torch.nan)[scored.token_ids]
        said = torch.where(said.isnan(), own, said)
        found = scored.signals
        expected = torch.where(here, exact, remembered)
        torch.testing.assert_close(found.reach.double(), expected, atol=1e-4, rtol=0)
        expected = torch.where(here, first, said)
        torch.testing.assert_close(found.initial_logprobs.double(), expected, atol=1e-4, rtol=0)
        changed += int(((remembered - exact).abs() > 0.01)[~here].sum())
    assert changed, "vacuous"


def test_what_is_held_is_logged_as_held_also_where_all_of_it_is_within_reach(micro_lab, tmp_path):
    """Threshold 0: the drawn tokens are held to the teacher alone."""
    settings = SETTINGS | SGD | {"reach_threshold": 0.0, "log_rollouts": 8, "max_steps": 1}
    trainer = make_trainer(micro_lab, tmp_path, **settings)
    ((scored, _),) = watched(trainer)
    assert not bool(scored.choice.anchor_weights.any())
    lines = (tmp_path / "run/rollouts.jsonl").read_text().splitlines()
    found = [mark for line in lines for mark in json.loads(line)["anchored"]]
    assert found == scored.choice.reference_mask.tolist() and any(found)


@pytest.mark.parametrize("loss", ["reverse_kl", "sampled_reverse_kl"])
def test_micro_batches_and_steps_without_them_take_the_same_gradient(micro_lab, tmp_path, loss):
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    # Small steps: three large ones double the rounding of the first.
    settings = SETTINGS | SGD | {"learning_rate": 0.01, "loss": loss}
    ends = []
    for name, more in (("a", {}), ("b", split)):
        trainer = make_trainer(micro_lab, tmp_path / name, **settings, **more)
        trainer.train()
        ends.append(weights_of(trainer))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "more",
    [
        {"loss": "sampled_reverse_kl"},
        {"loss": "forward_kl", "signals": "topk_lists"},
        {"loss": "jsd", "gradient_window": 1, "gradient_accumulation_steps": 2},
        {"loss": "topk_reverse_kl", "stop_tokens": "merge", "stop_token_ids": [2, 3]},
        {"loss": "routed_kl", "num_iterations": 2, "anchor_coef": 0.0},
        {"method": "published", "compatibility": "reach", "collapse_guard": "off"},
        {"method": "anchored", "compatibility": "reach", "guard_every": 1},
    ],
    ids=lambda more: more.get("loss", more.get("method")),
)
def test_it_trains_with_every_kind_of_loss_and_gradient(micro_lab, tmp_path, more):
    if "method" in more:
        more = more | {"anchor_responses": 1.0}
    trainer = make_trainer(micro_lab, tmp_path, **(SETTINGS | SGD | more))
    before = weights_of(trainer)
    seen = watched(trainer)
    r = torch.cat([scored.signals.reach for scored, _ in seen])
    assert bool(((r >= 0) & (r <= 1)).all()) and len(r.unique()) > 3
    assert any(not torch.equal(value, before[name]) for name, value in weights_of(trainer).items())
    assert all(math.isfinite(e["loss"]) for e in trainer.state.log_history if "loss" in e)
    if more.get("collapse_guard") != "off":
        assert any("guard/idle_drift_nats" in entry for entry in trainer.state.log_history)


def test_with_lora_the_start_is_the_base_model(micro_lab, tmp_path):
    settings = SETTINGS | SGD | {"learning_rate": 1.0}
    trainer = make_trainer(micro_lab, tmp_path, peft_config=LORA, **settings)
    assert trainer._anchor._reference.copy is None, "a second model where a second adapter will do"
    seen = watched(trainer)
    initial, teacher, _ = models_of(micro_lab, {})
    scored, weights = seen[-1]
    assert any(
        bool(value.abs().max() > 1e-3) for name, value in weights.items() if "lora_B" in name
    )
    both = start_and_teacher(scored, initial, teacher)
    torch.testing.assert_close(scored.signals.reach.double(), reach_of(*both), atol=1e-4, rtol=0)


def test_the_teachers_own_end_is_never_within_reach(micro_lab, tmp_path):
    """An id that the teacher's files declare, and at which the sampler goes on."""
    lab = ends_otherwise(micro_lab, tmp_path)
    trainer = make_trainer(lab, tmp_path, **SETTINGS, **SGD)
    assert trainer.foreign_ends == (5,) and 5 not in trainer.eos_token_ids
    scored, _ = watched(trainer)[0]
    initial, teacher, _ = models_of(lab, {})
    both = start_and_teacher(scored, initial, teacher)
    r = reach_of(*both, foreign_ends=(5,))
    torch.testing.assert_close(scored.signals.reach.double(), r, atol=1e-4, rtol=0)
    assert float((reach_of(*both) - r).max()) > 0.1, "vacuous"


@pytest.mark.parametrize("exact", [True, False])
def test_a_teacher_elsewhere_gives_a_lower_bound_of_reach(micro_lab, tmp_path, exact):
    model = AutoModelForCausalLM.from_pretrained(micro_lab.teacher, dtype=torch.float32).eval()
    asked = LocalTeacher(model, 40)
    if not exact:
        asked = Lists(asked)
    settings = {"method": "reach", "reach_threshold": 0.025, "collapse_guard": "off"}
    settings |= {"max_steps": 2}
    trainer = remote_trainer(micro_lab, tmp_path, asked, **settings)
    for scored, _ in watched(trainer):
        initial, teacher, _ = models_of(micro_lab, {})
        both = start_and_teacher(scored, initial, teacher, 1.0)
        truth, bound = reach_of(*both, 0.025), scored.signals.reach.double()
        assert bool((bound <= truth + 1e-5).all()) and bool((bound > 0).any())
        assert scored.signals.compatibility_is_exact == exact


class Lists:
    """A teacher that gives its own list alone."""

    def __init__(self, inner):
        self._inner = inner

    def score(self, token_ids, completion_start, want_ids, top_k):
        from dataclasses import replace

        scores = self._inner.score(token_ids, completion_start, want_ids, top_k)
        return replace(scores, want_logprobs=None)

    def describe(self):
        return self._inner.describe() | {"exact": False}
