"""A teacher behind a real vLLM against the same teacher in this process.

What is compared is of one kind: this vLLM sends its own list only, so the local teacher does too (`Listing`).
"""

import json
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from taopd import cli
from taopd.errors import TeacherUnavailable
from taopd.models.batch import Positions, Rollouts
from taopd.models.prompts import load_prompts
from taopd.selectors import select
from taopd.signals import signal_table
from taopd.teachers import LocalTeacher, connect, score_remote
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.trainer import TeachabilityTrainer
from tests.e2e.test_trainer import CPU, weights_of
from tests.scripted_server import ScriptedServer
from tests.unit.test_teacher_servers import forward

VOCAB, K, TIE = 48, 4, 1e-4
NUM_TOKENS = 10_000


class Listing(LocalTeacher):
    """Sends its own list only."""

    def describe(self):
        return super().describe() | {"exact": False, "why": "by design"}

    def score(self, *args):
        return replace(super().score(*args), want_logprobs=None)


@pytest.fixture(scope="session")
def rollouts(lab, models):
    """At least 10,000 tokens that the student samples for the lab's prompts, as a padded batch."""
    tokenizer = AutoTokenizer.from_pretrained(lab.student)
    prompts = load_prompts(str(lab.prompts), split="train")["prompt"][:1400]
    ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    assert len({len(each) for each in ids}) == 1
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    made = models[0].generate(
        torch.tensor(ids),
        attention_mask=torch.ones(len(ids), len(ids[0]), dtype=torch.long),
        do_sample=True,
        top_k=0,
        max_new_tokens=9,
    )
    torch.set_rng_state(generator_state)
    end = tokenizer.eos_token_id
    rows = [row[len(ids[0]) :].tolist() for row in made]
    rows = [row[: row.index(end) + 1] if end in row else row for row in rows]
    return Rollouts(prompt_ids=ids, completion_ids=rows).batch(
        pad_id=tokenizer.pad_token_id, device=torch.device("cpu")
    )


def test_numbers_equal_the_local_teachers(vllm, models, rollouts):
    teacher = connect(vllm.url, vocab_size=VOCAB, top_k=16)
    sequences = [
        [*prompt.tolist(), *ids[mask.bool()].tolist()]
        for prompt, ids, mask in zip(
            rollouts["prompt_ids"][:100],
            rollouts["completion_ids"][:100],
            rollouts["completion_mask"][:100],
            strict=True,
        )
    ]
    starts = [rollouts["prompt_ids"].shape[1]] * len(sequences)
    found = teacher.score(sequences, starts, None, 16)
    truth = LocalTeacher(models[1], VOCAB).score(sequences, starts, None, 16)
    close = {"rtol": 0.0, "atol": TIE}
    torch.testing.assert_close(found.logprobs, truth.logprobs, **close)
    torch.testing.assert_close(found.topk_logprobs, truth.topk_logprobs, **close)
    other = found.topk_ids != truth.topk_ids
    assert other.float().mean() < 0.001, "more than ties"
    teacher.close()


def test_the_probe_says_what_the_server_says(vllm):
    """Without Triton there is no second model runner, and so no log-probs of wanted ids."""
    about = connect(vllm.url, vocab_size=VOCAB, top_k=K).describe()
    assert about["kind"] == "vllm" and about["version"].startswith("0.32") and not about["exact"]
    assert "V2 model runner" in about["why"] and "status 400" in about["why"]


def test_the_scripted_server_answers_in_this_shape(vllm, models):
    """Oracle of the unit tests' server: every key that it sends is there, with the same numbers."""
    import httpx2 as httpx

    asked = {"prompt": [5, 6, 7, 8, 30], "prompt_logprobs": 4, "return_token_ids": True}
    asked |= {"model": "tiny", "max_tokens": 1, "temperature": 0.0}
    real = httpx.post(f"{vllm.url}/v1/completions", json=asked).json()
    with ScriptedServer(models[1]) as scripted:
        ours = httpx.post(f"{scripted.url}/v1/completions", json=asked).json()
    assert set(ours) <= set(real) and set(ours["choices"][0]) <= set(real["choices"][0])
    pairs = zip(
        real["choices"][0]["prompt_logprobs"], ours["choices"][0]["prompt_logprobs"], strict=True
    )
    for row, own in list(pairs)[1:]:
        assert {k: v["rank"] for k, v in row.items()} == {k: v["rank"] for k, v in own.items()}
        for token, entry in row.items():
            assert set(entry) == set(own[token])
            assert entry["logprob"] == pytest.approx(own[token]["logprob"], abs=TIE)
    assert real["choices"][0]["prompt_token_ids"] == ours["choices"][0]["prompt_token_ids"]


def table_of(teacher, models, batch, positions):
    signals = score_remote(
        partial(forward, VOCAB),
        models[0],
        teacher,
        batch,
        positions,
        micro_batch_size=64,
        vocab_size=VOCAB,
        k=K,
        when="",
    ).signals
    valid = torch.ones_like(positions.row, dtype=torch.bool)
    return signal_table(signals, completion=positions.row, position=positions.column, valid=valid)


@torch.no_grad()
def test_the_same_positions_of_10000_tokens_are_selected(vllm, models, rollouts, record_property):
    """At four budgets and with three selectors; whatever differs lies within 1e-4 of the cut."""
    positions = Positions.of(rollouts["completion_mask"].bool())
    assert len(positions) >= NUM_TOKENS
    teacher = connect(vllm.url, vocab_size=VOCAB, top_k=K)
    server = table_of(teacher, models, rollouts, positions)
    local = table_of(Listing(models[1], VOCAB), models, rollouts, positions)
    shares = {}
    for selector in ("teachability", "compatibility", "divergence"):
        for budget in (0.01, 0.05, 0.1, 0.3):
            one, other = (
                select(table, selector=selector, budget=budget, seed=0, step=0)
                for table in (server, local)
            )
            differs = one.kept != other.kept
            cut = other.scores[other.kept].min()
            assert ((other.scores[differs] - cut).abs() <= TIE).all(), (selector, budget)
            shares[f"{selector} {budget}"] = 1.0 - float(differs.double().mean())
    print(json.dumps({"tokens": len(positions), "identical": shares}))
    assert min(shares.values()) >= 0.999
    teacher.close()


def make_trainer(lab, folder, teacher=None, rows=None, **settings):
    base = CPU | {"max_completion_length": 9, "score_top_k": K, "logging_steps": 1, "budget": 0.1}
    base |= {"loss": "sampled_reverse_kl", "max_steps": 4, "per_device_train_batch_size": 16}
    base |= {"gradient_accumulation_steps": 2, "learning_rate": 0.1, "optim": "sgd"}
    return TeachabilityTrainer(
        model=str(lab.student),
        teacher_model=teacher,
        args=TeachabilityConfig(output_dir=str(folder / "run"), **(base | settings)),
        train_dataset=rows or load_prompts(str(lab.prompts), split="train"),
    )


def kept_of(trainer, before_step=None, **options):
    """(kept, scores, cut) of every step, and the weights."""
    steps = []

    def observe(seen):
        choice = seen.choice.selection
        steps.append((choice.kept.clone(), choice.scores.clone()))
        if before_step is not None:
            before_step(seen.step)

    trainer.observers.append(observe)
    trainer.train(**options)
    return steps, weights_of(trainer)


def assert_same_up_to_ties(steps, expected):
    assert len(steps) == len(expected)
    for (kept, _), (truth, scores) in zip(steps, expected, strict=True):
        differs = kept != truth
        assert ((scores[differs] - scores[truth].min()).abs() <= TIE).all()
        if differs.any():  # From here on the two runs are of different weights.
            return


@pytest.fixture(scope="module")
def local_run(lab, models, tmp_path_factory):
    """The run with the teacher in this process."""
    folder = tmp_path_factory.mktemp("local")
    return kept_of(make_trainer(lab, folder, Listing(models[1], VOCAB)))


def test_training_through_the_server_selects_what_the_local_teacher_selects(
    vllm, lab, local_run, tmp_path
):
    steps, _ = kept_of(make_trainer(lab, tmp_path, teacher_url=vllm.url))
    assert_same_up_to_ties(steps, local_run[0])
    about = json.loads((tmp_path / "run/teacher.json").read_text())
    assert about["compatibility"] == "lower bound" and "V2 model runner" in about["why"]


def test_check_looks_at_the_server(vllm, lab, tmp_path, capsys):
    settings = CPU | {"loss": "sampled_reverse_kl", "score_top_k": K, "max_completion_length": 9}
    settings |= {"model_name_or_path": str(lab.student), "dataset_name": str(lab.prompts)}
    settings |= {"teacher_model_name_or_path": str(lab.teacher), "teacher_url": vllm.url}
    settings |= {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 1,
        "per_device_train_batch_size": 32,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert cli.main(["check", str(path), "--json"]) == 0
    found = {item["item"]: item for item in json.loads(capsys.readouterr().out)["items"]}
    assert "V2 model runner" in found["teacher server"]["advice"]
    assert (
        found["server tokens"]["level"] == "pass"
        and "8 prompts" in found["server tokens"]["measured"]
    )
    assert found["context"]["level"] == found["tokenizers"]["level"] == "pass"


def test_a_server_killed_in_mid_run_and_back_later_costs_no_step(vllm, lab, local_run, tmp_path):
    """Killed after the second step's scoring; the third waits for the restart and is no other."""
    restarts = []

    def kill(step):
        if step == 1:
            vllm.kill()
            restarts.append(threading.Thread(target=vllm.start))
            threading.Timer(1.0, restarts[0].start).start()

    trainer = make_trainer(lab, tmp_path, teacher_url=vllm.url, teacher_patience_s=240)
    steps, _ = kept_of(trainer, before_step=kill)
    restarts[0].join()
    assert_same_up_to_ties(steps, local_run[0])
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    assert [entry["step"] for entry in logged if "loss" in entry] == [1, 2, 3, 4]


def test_a_server_that_stays_away_leaves_a_checkpoint_to_resume(vllm, lab, local_run, tmp_path):
    """Killed after the second step; later, with a new server, the run ends as if nothing had been."""
    settings = {"teacher_url": vllm.url, "teacher_patience_s": 3}
    trainer = make_trainer(lab, tmp_path, **settings)
    with pytest.raises(TeacherUnavailable, match=r"2 steps are saved in .*checkpoint-2"):
        kept_of(trainer, before_step=lambda step: vllm.kill() if step == 1 else None)
    vllm.start()
    again, weights = kept_of(
        make_trainer(lab, tmp_path, **settings),
        resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"),
    )
    assert_same_up_to_ties(again, local_run[0][2:])
    for name, value in weights.items():
        torch.testing.assert_close(value, local_run[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_two_teachers_one_of_them_served(vllm, lab, models, tmp_path):
    """One in this process and the server, each with every second prompt: as with the served one here."""
    rows = load_prompts(str(lab.prompts), split="train")
    rows = rows.add_column("teacher", ["here" if n % 2 else "served" for n in range(len(rows))])
    settings = {"budget_scope": "teacher", "per_device_train_batch_size": 8}
    runs = []
    for name, served in (("a", vllm.url), ("b", Listing(models[1], VOCAB))):
        teachers = {"here": str(lab.student), "served": served}
        trainer = make_trainer(lab, tmp_path / name, teachers, rows, **settings)
        runs.append(kept_of(trainer)[0])
    assert_same_up_to_ties(*runs)
    about = json.loads((tmp_path / "a/run/teacher.json").read_text())
    assert about["compatibility"] == "lower bound" and set(about["teachers"]) == {"here", "served"}
