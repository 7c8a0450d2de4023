"""Training with a teacher that is asked. Oracle: the same run with the teacher's model in this process."""

import json
import threading
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from taopd.errors import ConfigError, DataError, TeacherError, TeacherUnavailable
from taopd.models.prompts import load_prompts
from taopd.teachers import LocalTeacher, transport
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.trainer import TeachabilityTrainer
from tests.conftest import make_model, make_tokenizer
from tests.e2e.test_trainer import CPU, OURS, weights_of
from tests.scripted_server import ScriptedServer, status
from tests.unit.test_own_forward import recurrent

SAMPLED = {"loss": "sampled_reverse_kl", "budget": 0.3, "max_steps": 3}
SAMPLED |= {"optim": "sgd", "learning_rate": 1.0}  # Adam would make rounding as large as a step.


def make_trainer(micro_lab, tmp_path, teacher=None, **settings):
    base = (
        CPU | OURS | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2} | SAMPLED
    )
    return TeachabilityTrainer(
        model=str(micro_lab.student),
        teacher_model=teacher,
        args=TeachabilityConfig(output_dir=str(tmp_path / "run"), **(base | settings)),
        train_dataset=load_prompts(str(micro_lab.prompts), split="train"),
    )


@pytest.fixture(scope="module")
def teacher_model(micro_lab):
    return AutoModelForCausalLM.from_pretrained(micro_lab.teacher, dtype=torch.float32).eval()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(transport, "FIRST_WAIT_S", 0.01)


def trained(trainer, **options):
    """Kept positions of every step, and the final weights."""
    kept = []
    trainer.observers.append(lambda seen: kept.append(seen.choice.selection.kept.clone()))
    trainer.train(**options)
    return kept, weights_of(trainer)


def assert_same_run(one, other):
    assert len(one[0]) == len(other[0]) > 0
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    for name, value in one[1].items():
        torch.testing.assert_close(value, other[1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("signals", ["exact", "topk_lists"])
def test_a_teacher_object_trains_as_the_model_does(micro_lab, tmp_path, teacher_model, signals):
    local = trained(
        make_trainer(micro_lab, tmp_path / "a", str(micro_lab.teacher), signals=signals)
    )
    asked = make_trainer(
        micro_lab, tmp_path / "b", LocalTeacher(teacher_model, 40), signals=signals
    )
    assert asked.teacher_model is None
    assert_same_run(trained(asked), local)
    about = json.loads((tmp_path / "b/run/teacher.json").read_text())
    assert about["compatibility"] == "exact" and about["kind"] == "local"


@pytest.mark.parametrize("kind", ["vllm exact", "sglang", "vllm"])
def test_a_server_trains_as_its_model_does(micro_lab, tmp_path, teacher_model, kind, caplog):
    """With bounds: as the model with signals of two lists, C the bound, and the paper's rules."""
    with ScriptedServer(teacher_model, kind.partition(" ")[0], exact="exact" in kind) as server:
        found = trained(make_trainer(micro_lab, tmp_path / "a", teacher_url=server.url))
    about = json.loads((tmp_path / "a/run/teacher.json").read_text())
    assert about["url"] == server.url
    bound = kind == "vllm"
    assert about["compatibility"] == ("lower bound" if bound else "exact")
    assert ("C is a lower bound" in caplog.text) == bound
    if bound:
        teacher = _Listing(teacher_model, 40)
        other = make_trainer(micro_lab, tmp_path / "b", teacher)
    else:
        other = make_trainer(micro_lab, tmp_path / "b", str(micro_lab.teacher))
    assert_same_run(found, trained(other))


class _Listing(LocalTeacher):
    """Sends its own list only."""

    def describe(self):
        return super().describe() | {"exact": False, "why": "by design"}

    def score(self, *args):
        return replace(super().score(*args), want_logprobs=None)


def test_a_rank_that_got_less_makes_all_ranks_take_the_bound(micro_lab, tmp_path, teacher_model):
    """Another rank, played by the gathered states, has a bound: this one selects as one that has it too."""
    asked = make_trainer(micro_lab, tmp_path / "a", LocalTeacher(teacher_model, 40))
    gather = asked.accelerator.gather

    def with_a_poorer_rank(state):
        return torch.cat([gather(state), torch.tensor([[1, 0]])])

    asked._teacher._agreed = True  # Not compared: that asks all ranks too.
    asked._teacher._accelerator = SimpleNamespace(
        gather=with_a_poorer_rank, device=torch.device("cpu"), is_main_process=True
    )
    found = trained(asked)
    bound = trained(make_trainer(micro_lab, tmp_path / "b", _Listing(teacher_model, 40)))
    assert_same_run(found, bound)
    about = json.loads((tmp_path / "a/run/teacher.json").read_text())
    assert about["compatibility"] == "lower bound"


def test_a_failure_on_another_rank_stops_this_one(micro_lab, tmp_path, teacher_model):
    trainer = make_trainer(micro_lab, tmp_path, LocalTeacher(teacher_model, 40))
    gather = trainer.accelerator.gather
    trainer._teacher._agreed = True
    trainer._teacher._accelerator = SimpleNamespace(
        gather=lambda state: torch.cat([gather(state), torch.tensor([[0, 0]])]),
        device=torch.device("cpu"),
    )
    with pytest.raises(TeacherError, match="failed on another process"):
        trainer.train()


def test_a_server_that_comes_back_costs_no_step(micro_lab, tmp_path, teacher_model, quick):
    """Killed after its 12th answer and back 0.3 s later: the run equals one without the outage."""
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    with ScriptedServer(teacher_model, exact=True) as server:
        steady = trained(
            make_trainer(micro_lab, tmp_path / "a", teacher_url=server.url, **settings)
        )
        trainer = make_trainer(
            micro_lab, tmp_path / "b", teacher_url=server.url, teacher_patience_s=60, **settings
        )
        server.script.extend([None] * 12 + [_kill(server, back_after=0.3)])
        assert_same_run(trained(trainer), steady)
    assert server.killed == 1
    steps = [
        json.loads(line) for line in (tmp_path / "b/run/metrics.jsonl").read_text().splitlines()
    ]
    assert [entry["step"] for entry in steps if "loss" in entry] == [1, 2, 3]


def _kill(server, back_after):
    server.killed = 0

    def behave(handler, answer):
        handler.close_connection = True
        server.killed += 1

        def away():
            server.stop()
            threading.Timer(back_after, server.start).start()

        threading.Thread(target=away).start()

    return behave


def test_a_server_that_stays_away_leaves_a_checkpoint_that_resumes_to_the_same_run(
    micro_lab, tmp_path, teacher_model, quick
):
    """Away in step 3 of 4, after its completions were sampled; resuming samples the same ones again."""
    settings = {"max_steps": 4, "anchor_coef": 0.5, "gradient_window": 2}
    settings |= {"teacher_patience_s": 0.1}
    with ScriptedServer(teacher_model, exact=True) as server:
        settings["teacher_url"] = server.url
        whole = trained(make_trainer(micro_lab, tmp_path / "a", **settings))
        trainer = make_trainer(micro_lab, tmp_path / "b", **settings)
        server.script.extend([None] * 20)
        server.always = status(503)
        with pytest.raises(
            TeacherUnavailable, match=r"2 steps are saved in .*checkpoint-2.*resume_from_checkpoint"
        ):
            trainer.train()
        server.always = None
        checkpoint = tmp_path / "b/run/checkpoint-2"
        again = trained(
            make_trainer(micro_lab, tmp_path / "b", **settings),
            resume_from_checkpoint=str(checkpoint),
        )
    assert [torch.equal(a, b) for a, b in zip(again[0], whole[0][2:], strict=True)] == [True, True]
    assert all(torch.equal(value, whole[1][name]) for name, value in again[1].items())


def test_a_stop_before_the_first_step_saves_nothing(micro_lab, tmp_path, teacher_model, quick):
    with ScriptedServer(teacher_model) as server:
        trainer = make_trainer(micro_lab, tmp_path, teacher_url=server.url, teacher_patience_s=0.0)
        server.always = status(503)
        with pytest.raises(TeacherUnavailable) as caught:
            trainer.train()
    assert "saved" not in str(caught.value)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


REFUSED = [
    (
        {"loss": "reverse_kl"},
        "loss='reverse_kl' reads the teacher's full distribution.*'sampled_reverse_kl'",
    ),
    ({"loss": "topk_reverse_kl"}, "full distribution"),
    ({"temperature": 0.7}, "a server scores at temperature 1"),
    ({"stop_tokens": "merge", "stop_token_ids": [2, 3]}, "set stop_tokens='exclude'"),
    ({"selector": "fire"}, "sends no teacher_entropy.*choose among .*teachability"),
    ({"shadow_selectors": ["reverse_kl"]}, "sends no reverse_kl"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_no_server_sends_is_refused_at_the_start(
    micro_lab, tmp_path, teacher_model, settings, message
):
    with pytest.raises(ConfigError, match=message):
        make_trainer(micro_lab, tmp_path, LocalTeacher(teacher_model, 40), **settings)


@pytest.mark.parametrize("selector", ["corrective", "ier"])
def test_what_a_bound_lacks_is_refused_at_the_start(micro_lab, tmp_path, teacher_model, selector):
    make_trainer(micro_lab, tmp_path, LocalTeacher(teacher_model, 40), selector=selector)
    with pytest.raises(ConfigError, match=r"its own top list only.*choose among .*teachability"):
        make_trainer(micro_lab, tmp_path, _Listing(teacher_model, 40), selector=selector)


@pytest.mark.parametrize(
    ("who", "size", "refused"), [("teacher", 4, True), ("teacher", 1, False), ("student", 1, True)]
)
def test_a_model_that_reads_padding_is_refused_before_a_prompt_is_padded(
    micro_lab, tmp_path, who, size, refused
):
    """Prompts of one length: no batch has padding. One by one only a teacher is right: sampling pads."""
    models = {"student": make_model(seed=0), "teacher": make_model(seed=1)} | {who: recurrent()}
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
    trainer = TeachabilityTrainer(
        models["student"],
        models["teacher"],
        TeachabilityConfig(
            output_dir=str(tmp_path / "run"), **(CPU | OURS | settings), max_steps=1
        ),
        train_dataset=Dataset.from_list([{"prompt": f"w1 {i % 5} + 3 ="} for i in range(8)]),
        processing_class=make_tokenizer(),
    )
    expected = pytest.raises(DataError, match=f"the {who} Rwkv.* change with padding on the left")
    with expected if refused else nullcontext():
        trainer.train(check=False)


def test_two_teachers_and_none_are_refused(micro_lab, tmp_path, teacher_model):
    with pytest.raises(ConfigError, match="one of them is the teacher"):
        make_trainer(micro_lab, tmp_path, teacher_model, teacher_url="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="no teacher: pass teacher_model"):
        make_trainer(micro_lab, tmp_path)


def test_nobody_at_the_url_is_one_message_before_anything_is_written(micro_lab, tmp_path):
    with pytest.raises(TeacherError, match=r"127\.0\.0\.1:9.*Is the server of teacher_url="):
        make_trainer(micro_lab, tmp_path, teacher_url="http://127.0.0.1:9")
    assert not list(tmp_path.rglob("teacher.json"))
