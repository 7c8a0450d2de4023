"""Training with several teachers.

Oracle: every row's logits from its own teacher's forward on the unpadded sequence; signals, selection, loss
and gradient written out here.
"""

import json
import logging
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from taopd import cli
from taopd.errors import ConfigError, DataError
from taopd.models.prompts import load_prompts
from taopd.teachers import LocalTeacher
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.trainer import TeachabilityTrainer
from tests.conftest import WORDS, make_model, make_tokenizer, write_config
from tests.e2e.test_trainer import CPU, OURS, weights_of
from tests.scripted_server import ScriptedServer

NAMES = ("code", "math")
BASE = CPU | OURS | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
BASE |= {"budget": 0.3, "max_steps": 1, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
BASE |= {"anchor_coef": 0.0, "collapse_guard": "off"}
SAMPLED = {"loss": "sampled_reverse_kl"}
SEES_MORE = {"teacher_prompt_template": "w3 {answer} w4 {prompt} w5 ="}


def two_teachers(micro_lab, folder):
    """Paths of teachers of different widths and depths; one is made in the folder."""
    make_model(seed=7, hidden_size=24, layers=1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return {"code": str(folder), "math": str(micro_lab.teacher)}


@pytest.fixture(scope="module")
def paths(micro_lab, tmp_path_factory):
    return two_teachers(micro_lab, tmp_path_factory.mktemp("other") / "other")


@pytest.fixture(scope="module")
def models(paths):
    return {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for name, path in paths.items()
    }


def rows_of(micro_lab, names=None):
    """The lab's prompts, each with a teacher: two of three are math's."""
    rows = load_prompts(str(micro_lab.prompts), split="train")
    names = names or [NAMES[index % 3 > 0] for index in range(len(rows))]
    return rows.add_column("teacher", names)


def make_trainer(micro_lab, folder, teacher, rows=None, **settings):
    return TeachabilityTrainer(
        model=str(micro_lab.student),
        teacher_model=teacher,
        args=TeachabilityConfig(output_dir=str(folder), **(BASE | settings)),
        train_dataset=rows_of(micro_lab) if rows is None else rows,
    )


def trained(trainer, **options):
    seen = []
    trainer.observers.append(seen.append)
    trainer.train(check=False, **options)
    return seen


def logprobs_at(model, scored, row, who="student"):
    """[T, V]: the distributions that predict a completion's tokens, from the bare sequence."""
    batch = scored.batch
    own = "teacher_prompt" if who == "teacher" and "teacher_prompt_ids" in batch else "prompt"
    prompt = batch[f"{own}_ids"][row][batch[f"{own}_mask"][row].bool()]
    completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
    logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1), completion


def signals_of(student, teacher, k=4):
    """D, C and H at one position, from both distributions."""
    mine, theirs = (set(p.topk(k).indices.tolist()) for p in (student, teacher))
    union = sorted(mine | theirs)
    p, q = student[union].log_softmax(-1), teacher[union].log_softmax(-1)
    c = float(teacher[sorted(mine)].exp().sum())
    return float((q.exp() * (q - p)).sum()), c, float(-(student.exp() * student).sum())


def normalized(values):
    values = torch.as_tensor(values, dtype=torch.float64)
    low, high = torch.quantile(values, 0.05), torch.quantile(values, 0.95)
    return ((values - low) / (high - low + 1e-12)).clamp(0, 1)


def counted(budget, number):
    return max(1, math.ceil(budget * number))


def by_hand(student, models, scored, *, loss="reverse_kl", weights=None, per_teacher=False):
    """Kept flags of all positions, and the loss with its graph."""
    d, c, terms, of = [], [], [], []
    for row in range(len(scored.batch["prompt_ids"])):
        name = scored.teachers[int(scored.batch["teacher_index"][row])]
        mine, completion = logprobs_at(student, scored, row)
        with torch.no_grad():
            theirs, _ = logprobs_at(models[name], scored, row, "teacher")
        for p, q, token in zip(mine, theirs, completion.tolist(), strict=True):
            found = signals_of(p.detach(), q)
            d.append(found[0])
            c.append(found[1])
            kl = (p.exp() * (p - q)).sum()
            # The published gradient: a detached advantage times the log-prob.
            sampled = (p[token] - q[token]).detach() * p[token]
            terms.append(kl if loss == "reverse_kl" else sampled)
            of.append(name)
    score, kept = normalized(d) * normalized(c), torch.zeros(len(d), dtype=torch.bool)
    for group in NAMES if per_teacher else (NAMES,):
        own = [index for index, name in enumerate(of) if name in group]
        order = sorted(own, key=lambda index: -score[index])
        kept[order[: counted(0.3, len(own))]] = True
    factors = torch.tensor([(weights or {}).get(name, 1.0) for name in of])
    return kept, (torch.stack(terms) * factors * kept).sum() / kept.sum(), of


CASES = {
    "plain": {},
    "weights": {"teacher_weights": {"code": 0.5}},
    "a share each": {"budget_scope": "teacher"},
    "sampled loss": SAMPLED,
    "one micro-batch": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    "window": {"gradient_window": 64},
    "a prompt of the teachers' own": SEES_MORE,
}


@pytest.mark.parametrize("case", CASES)
def test_selection_loss_and_gradient_are_those_of_each_rows_own_teacher(
    micro_lab, tmp_path, paths, models, case
):
    settings = CASES[case]
    trainer = make_trainer(micro_lab, tmp_path / "run", paths, **settings)
    (scored,) = trained(trainer)
    student = AutoModelForCausalLM.from_pretrained(micro_lab.student, dtype=torch.float32).eval()
    kept, loss, of = by_hand(
        student,
        models,
        scored,
        loss=settings.get("loss", "reverse_kl"),
        weights=settings.get("teacher_weights"),
        per_teacher="budget_scope" in settings,
    )
    assert {name: of.count(name) > 3 for name in NAMES} == {"code": True, "math": True}
    assert torch.equal(scored.choice.selection.kept, kept)
    assert {of[index] for index in kept.nonzero()[:, 0].tolist()} == set(NAMES), "vacuous"
    log = trainer.state.log_history[0]
    if "loss" not in settings:
        assert log["loss/selected_nats"] == pytest.approx(float(loss.detach()), rel=1e-5)
    loss.backward()
    after = weights_of(trainer)
    for name, weight in student.named_parameters():
        expected = weight.detach() - 0.5 * weight.grad
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-5, msg=name)
    for name in NAMES:
        own = torch.tensor([one == name for one in of])
        assert log[f"teacher/valid_tokens/{name}"] == int(own.sum())
        assert log[f"teacher/kept_fraction/{name}"] == pytest.approx(
            float(kept[own].double().mean())
        )
        d = scored.signals.disagreement[own].double().mean()
        assert log[f"teacher/disagreement_nats/{name}"] == pytest.approx(float(d), rel=1e-6)
    about = json.loads((tmp_path / "run/teacher.json").read_text())
    assert about["compatibility"] == "exact" and set(about["teachers"]) == set(NAMES)
    lines = [json.loads(line) for line in (tmp_path / "run/rollouts.jsonl").open()]
    assert [line["teacher"] for line in lines] == [
        NAMES[index] for index in scored.batch["teacher_index"][: len(lines)].tolist()
    ]


def test_the_student_runs_once_over_every_row(micro_lab, tmp_path, paths):
    """One forward for each of two micro-batches to score, and one for each to train, as with one teacher."""
    counts = {}
    for name, teachers in (("two", paths), ("one", paths["math"])):
        trainer = make_trainer(micro_lab, tmp_path / name, teachers, **SAMPLED)
        trainer._teacher._agreed = True
        for source in getattr(trainer._teacher, "sources", {}).values():
            source._agreed = True
        calls = []
        trainer.model.model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer._generate_single_turn = _without_counting(trainer._generate_single_turn, calls)
        trained(trainer)
        counts[name] = len(calls)
    assert counts["two"] == counts["one"] == 4


def _without_counting(sample, calls):
    def quiet(*args, **kwargs):
        found = sample(*args, **kwargs)
        calls.clear()
        return found

    return quiet


def test_a_run_with_two_teachers_resumes_to_the_bit(micro_lab, tmp_path, paths):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2}
    settings |= {"log_selection": True, "anchor_coef": 0.5}
    whole = make_trainer(micro_lab, tmp_path / "run", paths, **settings)
    trained(whole)
    expected = weights_of(whole)
    for step in (1, 2):  # within a generation batch, and between two
        part = make_trainer(micro_lab, tmp_path / "run", paths, **settings)
        trained(part, resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{step}"))
        assert all(torch.equal(value, expected[name]) for name, value in weights_of(part).items())


@pytest.mark.parametrize(
    ("exact", "more"),
    [(True, {}), (True, SEES_MORE), (False, {})],
    ids=["exact", "prompt", "bound"],
)
def test_a_local_one_and_a_server(micro_lab, tmp_path, paths, models, exact, more, caplog):
    """Exact: the run of two local ones. A bound: that of both, so that no normalization mixes two kinds."""
    caplog.set_level(logging.WARNING)
    with ScriptedServer(models["code"], exact=exact) as server:
        teachers = {"code": {"url": server.url}, "math": {"model": paths["math"]}}
        settings = SAMPLED | more
        trainer = make_trainer(micro_lab, tmp_path / "a", None, teachers=teachers, **settings)
        (scored,) = trained(trainer)
    signals, about = scored.signals, json.loads((tmp_path / "a/teacher.json").read_text())
    assert signals.compatibility_is_exact == exact
    assert about["compatibility"] == ("exact" if exact else "lower bound")
    assert caplog.text.count("C of all teachers is the bound") == (not exact)
    if exact:
        local = make_trainer(micro_lab, tmp_path / "b", paths, **settings)
        (other,) = trained(local)
        assert bool(more) == ("teacher_prompt_ids" in other.batch)
        assert torch.equal(scored.choice.selection.kept, other.choice.selection.kept)
        for name, value in weights_of(local).items():
            torch.testing.assert_close(weights_of(trainer)[name], value, rtol=1e-4, atol=1e-6)
        return
    student, at = AutoModelForCausalLM.from_pretrained(micro_lab.student).eval(), 0
    for row in range(8):
        name = scored.teachers[int(scored.batch["teacher_index"][row])]
        with torch.no_grad():
            mine, theirs = (logprobs_at(m, scored, row)[0] for m in (student, models[name]))
        for p, q in zip(mine, theirs, strict=True):
            both = set(p.topk(4).indices.tolist()) & set(q.topk(4).indices.tolist())
            bound = float(q[sorted(both)].exp().sum())
            assert float(signals.compatibility[at]) == pytest.approx(bound, abs=1e-5)
            at += 1
    assert at == len(signals)


def test_one_teacher_by_name_is_the_same_run_as_without(micro_lab, tmp_path, paths):
    rows = rows_of(micro_lab, ["math"] * 24)
    runs = {}
    for name, teacher in (("named", {"math": paths["math"]}), ("plain", paths["math"])):
        # One after the other: both draw from the random stream that a trainer begins with.
        trainer = make_trainer(micro_lab, tmp_path / name, teacher, rows, max_steps=2)
        runs[name] = [one.choice.selection.kept for one in trained(trainer)], weights_of(trainer)
    assert all(torch.equal(a, b) for a, b in zip(runs["named"][0], runs["plain"][0], strict=True))
    for name, value in runs["plain"][1].items():
        torch.testing.assert_close(runs["named"][1][name], value, rtol=1e-5, atol=1e-7)


REFUSED = [
    (
        {"rows": ["math"] * 23 + ["maths"]},
        DataError,
        r"row 23 of the training set.*'maths'.*'math'",
    ),
    (
        {"rows": ["math"] * 22 + [None, "code"]},
        DataError,
        "row 22 of the training set names no teacher",
    ),
    ({"teacher_column": "domain"}, DataError, r"row 0 .*names no teacher.*'domain'"),
    ({"teachers": {}}, ConfigError, "teachers is empty"),
    (
        {"teacher_url": "http://127.0.0.1:9"} | SAMPLED,
        ConfigError,
        "several teachers and teacher_url",
    ),
    ({"teacher_model_name_or_path": "x"}, ConfigError, "several teachers and teacher_model_name"),
    (
        {"teacher_weights": {"maths": 2.0}},
        ConfigError,
        "teacher_weights: no teacher is called 'maths'",
    ),
    ({"teacher_weights": {1: 2.0}}, ConfigError, "no teacher is called 1. Known: code, math"),
    *(
        (
            {"teacher_weights": {"math": weight}},
            ConfigError,
            "teacher_weights: math=.*: must be above 0",
        )
        for weight in (0, -1.0, math.nan, math.inf, 1e-300, 1e300, True, "2", None)
    ),
    ({"swap": {"math": 3}}, ConfigError, "teacher 'math' is a int"),
    ({"swap": {"math": {"modle": "x"}}}, ConfigError, r"math: the setting='modle'.*'model'"),
    ({"swap": {"math": {"revision": "x"}}}, ConfigError, "math has neither model nor url"),
    *(
        ({"swap": {name: "x"}}, ConfigError, f"'{name}' is no name: use ASCII letters")
        for name in ("m/x", "é", "mathé", "a²", "_m")
    ),
    (
        {"swap": {"math": "http://127.0.0.1:9"}},
        ConfigError,
        "teacher 'math': the default loss, reverse_kl,",
    ),
    ({"swap": {"math": "nowhere/at-all"}}, DataError, "teacher 'math': "),
    ({"swap": {"math": "self"}}, ConfigError, "math: the student cannot be one of several"),
    ({"swap": {"math": {"model": "self_ema"}}}, ConfigError, "cannot be one of several.*self_ema"),
]


@pytest.mark.parametrize(("settings", "kind", "message"), REFUSED)
def test_what_does_not_fit_is_one_message(micro_lab, tmp_path, paths, settings, kind, message):
    settings = dict(settings)
    names, swap = settings.pop("rows", None), settings.pop("swap", {})
    teachers = settings.pop("teachers", paths | swap)
    with pytest.raises(kind, match=message):
        make_trainer(micro_lab, tmp_path, teachers, rows_of(micro_lab, names), **settings)


def test_beside_teachers_in_a_config_a_single_one_is_refused(tmp_path):
    for name in ("teacher_url", "teacher_model_name_or_path"):
        with pytest.raises(ConfigError, match=f"teachers and {name}: one of them"):
            TeachabilityConfig(str(tmp_path), **CPU, teachers={"a": {"model": "x"}}, **{name: "y"})
    for setting in ({"teacher_weights": {"a": 1.0}}, {"budget_scope": "teacher"}):
        config = TeachabilityConfig(str(tmp_path), **CPU, **setting)
        assert config.teachers is None


@pytest.mark.parametrize("command", ["check", "plan"])
@pytest.mark.parametrize(
    "settings",
    [{"teachers": {"a": {"model": name}}} for name in ("self", "self_ema")],
    ids=str,
)
def test_commands_refuse_it_in_one_line(micro_lab, tmp_path, capsys, command, settings):
    """Before anything is loaded, and whatever the command is."""
    several = {
        "teachers": {"a": {"model": str(micro_lab.teacher)}},
        "teacher_model_name_or_path": None,
    }
    path = write_config(micro_lab, tmp_path, **CPU | several | settings)
    argv = [str(path)] if command == "check" else ["--config", str(path)]
    assert cli.main([command, *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be one of several" in line


@pytest.mark.parametrize("setting", [{"teacher_weights": {"a": 1.0}}, {"budget_scope": "teacher"}])
def test_settings_of_several_are_refused_with_one(micro_lab, tmp_path, paths, setting):
    with pytest.raises(ConfigError, match="is for several teachers, and there is one"):
        make_trainer(micro_lab, tmp_path, paths["math"], **setting)


def test_a_teacher_with_another_vocabulary_is_named(micro_lab, tmp_path, paths):
    words = (*WORDS[:10], *reversed(WORDS[10:]))
    make_model(seed=1).save_pretrained(tmp_path / "odd")
    make_tokenizer(words).save_pretrained(tmp_path / "odd")
    with pytest.raises(DataError, match=r"teacher 'code': .*token"):
        make_trainer(micro_lab, tmp_path / "run", paths | {"code": str(tmp_path / "odd")})


def test_a_teacher_that_no_row_has_is_said_once(micro_lab, tmp_path, paths, caplog):
    rows = rows_of(micro_lab, ["math"] * 24)
    trained(make_trainer(micro_lab, tmp_path / "run", paths, rows, max_steps=2))
    assert caplog.text.count("no row of the training set has the teacher code") == 1
    assert "there is already one" not in caplog.text, "a library's warning about our callbacks"


def test_a_failure_of_one_teacher_is_told_with_its_name(micro_lab, tmp_path, models):
    """math's weights are lost in mid-run; code goes on as before."""
    lost = make_model(seed=3, hidden_size=32)
    for parameter in lost.parameters():
        parameter.data.zero_()
    lost.name_or_path = ""
    teachers = {"code": models["code"], "math": lost}
    trained(make_trainer(micro_lab, tmp_path / "run", teachers, max_steps=3))
    warned = (tmp_path / "run/warnings.jsonl").read_text()
    assert "teacher 'math': the teacher gives every token the same probability" in warned
    assert "teacher 'code'" not in warned


def test_an_object_that_scores_can_be_one_of_several(micro_lab, tmp_path, paths, models):
    asked = {"code": LocalTeacher(models["code"], 40), "math": paths["math"]}
    (scored,) = trained(make_trainer(micro_lab, tmp_path / "a", asked, **SAMPLED))
    (other,) = trained(make_trainer(micro_lab, tmp_path / "b", paths, **SAMPLED))
    assert torch.equal(scored.choice.selection.kept, other.choice.selection.kept)
