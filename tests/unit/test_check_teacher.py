"""`taopd check`, `plan` and `train` with `teacher_url`, against a scripted server with the micro teacher.

Oracle: the same command with the teacher in this process, and both models' whole softmaxes.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from taopd import cli
from taopd.preflight.subject import Subject
from taopd.selectors import select
from taopd.trainer.selection import local_table
from taopd.trainer.settings_file import parse_settings
from tests.conftest import write_config
from tests.e2e.test_trainer import CPU, OURS
from tests.scripted_server import ScriptedServer, status


@pytest.fixture(scope="module")
def model(micro_lab):
    """Sharper than random weights are."""
    model = AutoModelForCausalLM.from_pretrained(micro_lab.teacher, dtype=torch.float32)
    model.lm_head.weight.data *= 20.0
    return model.eval()


class Served(ScriptedServer):
    """Tokenizes as well, with the tokenizer of a folder."""

    def __init__(self, model, folder, kind="vllm", **options):
        super().__init__(model, kind, **options)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def post(self, path, body):
        if path == "/tokenize" and self.kind == "vllm":
            return 200, {"tokens": self.tokenizer(body["prompt"])["input_ids"]}
        return super().post(path, body)


@pytest.fixture(params=["vllm exact", "vllm", "sglang"])
def server(request, model, micro_lab):
    kind, _, exact = request.param.partition(" ")
    with Served(model, micro_lab.teacher, kind, exact=bool(exact)) as running:
        yield running


@pytest.fixture
def vllm(model, micro_lab):
    with Served(model, micro_lab.teacher) as running:
        yield running


@pytest.fixture
def write(micro_lab, tmp_path):
    """Writes a config and returns its path."""

    def make(**settings):
        base = CPU | OURS | {"loss": "sampled_reverse_kl", "per_device_train_batch_size": 8}
        return write_config(micro_lab, tmp_path, **base | {"max_steps": 2} | settings)

    return make


def check(capsys, path, *flags):
    code = cli.main(["check", str(path), "--json", *flags])
    return code, {item["item"]: item for item in json.loads(capsys.readouterr().out)["items"]}


def test_a_server_is_looked_at_as_far_as_it_serves(capsys, write, server, model, micro_lab):
    code, found = check(capsys, write(teacher_url=server.url))
    exact = server.exact or server.kind == "sglang"
    assert code == 0
    assert len(found) == 21
    head = found["teacher server"]
    assert (
        server.url in head["measured"]
        and ("tiny-teacher" if server.kind == "vllm" else "teacher") in head["measured"]
    )
    assert (head["level"] == "pass") == exact and ("lower bound" in head["measured"]) == (not exact)
    assert found["server tokens"]["level"] == ("pass" if server.kind == "vllm" else "warn")
    assert "sampled tokens" in found["teacher KL"]["measured"]
    assert "does not say its own" in found["precision"]["measured"]
    assert ("at most" in found["off support"]["measured"]) == (not exact)
    assert not (micro_lab.root / "run").exists()


def test_figures_are_those_of_the_teacher_in_this_process(capsys, write, server, model, tmp_path):
    """Same seed, same rollouts: mass off the support, ends and the KL's sampled estimate."""
    folder = tmp_path / "teacher"  # the name under which the server has it
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model.name_or_path).save_pretrained(folder)
    _, local = check(capsys, write(teacher_model_name_or_path=str(folder)))
    _, asked = check(capsys, write(teacher_model_name_or_path=str(folder), teacher_url=server.url))
    off = [found["off support"]["figures"]["off_support_mass"] for found in (local, asked)]
    audits = [found["stop audit"]["figures"] for found in (local, asked)]
    if server.exact or server.kind == "sglang":
        assert off[1] == pytest.approx(off[0], abs=1e-5)
        assert "unknown_mass" not in audits[1]
        for name, masses in audits[0].get("mass", {}).items():
            assert audits[1]["mass"][name]["teacher"] == pytest.approx(masses["teacher"], abs=1e-5)
    else:
        assert off[1] > off[0] + 1e-3
        for name, masses in audits[0].get("mass", {}).items():
            given = audits[1]["mass"][name]["teacher"]
            unknown = audits[1].get("unknown_mass", 0.0)
            assert given - 1e-5 <= masses["teacher"] <= given + unknown + 1e-5
    kl = asked["teacher KL"]["figures"]
    truth = local["teacher KL"]["figures"]["reverse_nats"]
    assert abs(kl["reverse_nats"] - truth) < 5 * kl["standard_error_nats"]
    assert kl["tokens"] == local["teacher KL"]["figures"]["tokens"]


def test_unnamed_files_are_said_item_by_item(capsys, write, vllm):
    code, found = check(capsys, write(teacher_url=vllm.url, teacher_model_name_or_path=None))
    assert code == 0
    for name in ("tokenizers", "special tokens", "generation config", "chat template"):
        assert found[name]["level"] == "warn" and found[name]["measured"] == "not compared"
        assert "teacher_model_name_or_path" in found[name]["advice"]
    assert found["context"]["level"] == found["memory"]["level"] == "pass"


def test_a_server_with_another_tokenizer_fails(capsys, write, model, micro_lab):
    with Served(model, micro_lab.teacher) as server:
        server.tokenizer = lambda text: {"input_ids": [3, 3, 3, 3]}
        code, found = check(capsys, write(teacher_url=server.url))
    assert code == 1
    assert found["server tokens"]["level"] == "fail"
    assert "another tokenizer" in found["server tokens"]["advice"]


def test_a_server_of_the_student_itself_fails(capsys, write, micro_lab):
    student = AutoModelForCausalLM.from_pretrained(micro_lab.student, dtype=torch.float32)
    with Served(student, micro_lab.student) as server:
        same = {"teacher_model_name_or_path": str(micro_lab.student)}
        code, found = check(capsys, write(teacher_url=server.url, **same))
        refused = write(teacher_url=server.url)
        assert cli.main(["train", "--config", str(refused)]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert (
        f"serves 'tiny-teacher' = '{micro_lab.student}'" in told and str(micro_lab.teacher) in told
    )
    assert code == 1 and found["teacher KL"]["level"] == "fail"
    assert "one model" in found["teacher KL"]["advice"]


def test_a_server_that_finds_the_rollouts_implausible_is_a_warning(capsys, write, micro_lab):
    """Worse than guessing on the student's own tokens, as with another model's vocabulary."""
    student = AutoModelForCausalLM.from_pretrained(micro_lab.student, dtype=torch.float32)
    student.lm_head.weight.data *= -200.0
    with Served(student, micro_lab.student) as server:
        same = {"teacher_model_name_or_path": str(micro_lab.student)}
        _, found = check(capsys, write(teacher_url=server.url, **same))
    assert found["teacher KL"]["level"] == "warn"
    assert "worse on the rollouts than guessing" in found["teacher KL"]["advice"]


@pytest.fixture
def related(micro_lab, tmp_path):
    """A student of the teacher's family: the teacher with a little noise; and the sharp teacher itself."""
    models = [
        AutoModelForCausalLM.from_pretrained(micro_lab.teacher, dtype=torch.float32) for _ in "ab"
    ]
    torch.manual_seed(3)
    for model in models:
        model.lm_head.weight.data *= 20.0
    for parameter in models[1].parameters():
        parameter.data += 0.1 * parameter.data.std() * torch.randn_like(parameter)
    models[1].save_pretrained(tmp_path / "related")
    AutoTokenizer.from_pretrained(micro_lab.teacher).save_pretrained(tmp_path / "related")
    return models[0].eval(), tmp_path / "related"


class Wrong(Served):
    """Shifts its log-probs by some tokens, or answers at another temperature."""

    offset, temperature = 0, 1.0

    def logprobs(self, tokens):
        rows = super().logprobs(tokens)
        shifted = torch.cat([rows[:1], rows[1:].roll(self.offset, 0)])
        return (shifted / self.temperature).log_softmax(-1)


WRONG = [((1, 1.0), "shifted by"), ((-1, 1.0), "shifted by"), ((0, 2.0), "temperature of about 2")]
WRONG += [((0, 0.5), "temperature of about 0.5"), ((0, 1.0), None)]


@pytest.mark.parametrize(("how", "told"), WRONG)
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_shifted_answers_and_another_temperature_are_named(
    capsys, write, micro_lab, related, kind, how, told
):
    teacher, student = related
    with Wrong(teacher, micro_lab.teacher, kind) as server:
        server.offset, server.temperature = how
        path = write(
            teacher_url=server.url, model_name_or_path=str(student), max_completion_length=12
        )
        code, found = check(capsys, path)
        item = found["server answers"]
        assert (code, item["level"]) == ((1, "fail") if told else (0, "pass"))
        assert told is None or told in item["advice"]
        if "shifted" in (told or ""):
            assert cli.main(["train", "--config", str(path), "--quiet", "--skip-check"]) == 2
            assert "shifted by" in capsys.readouterr().err


@pytest.mark.parametrize("how", [(1, 1.0), (0, 1.5), (0, 0.7), "another model"])
def test_a_server_that_changes_while_the_run_goes_on_stops_it(
    capsys, write, micro_lab, related, model, how
):
    teacher, student = related
    with Wrong(teacher, micro_lab.teacher) as server:
        path = write(teacher_url=server.url, model_name_or_path=str(student), max_steps=4)

        def change():
            if how == "another model":
                server.model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
                server.model.lm_head.weight.data.copy_(server.model.lm_head.weight.roll(3, 0))
            else:
                server.offset, server.temperature = how

        def answer(handler, text):
            change()
            handler.send_bytes(503, b"{}")

        # Two requests to connect, eight rows and a probe: the change comes with the second batch.
        server.script.extend([None] * 11 + [answer])
        assert cli.main(["train", "--config", str(path), "--quiet", "--skip-check"]) == 2
    told = capsys.readouterr().err
    cause = {(1, 1.0): "shifted", (0, 1.5): "of about 1.5", (0, 0.7): "of about 0.7"}
    assert cause.get(how, "another model") in told and "1 steps are saved" in told


def test_a_server_with_a_short_context_fails(capsys, write, model, micro_lab):
    with Served(model, micro_lab.teacher) as server:
        served = server.get("/v1/models")["data"][0] | {"max_model_len": 8}
        server.get = lambda path, get=server.get: (
            {"data": [served]} if "models" in path else get(path)
        )
        code, found = check(capsys, write(teacher_url=server.url))
    assert code == 1 and "--max-model-len" in found["teacher server"]["advice"]


def test_what_is_no_address_is_refused_before_anything_loads(capsys, write):
    assert cli.main(["check", str(write(teacher_url="ftp://x")), "--json"]) == 2
    printed = capsys.readouterr()
    assert not printed.out and "teacher_url" in printed.err and "ftp://x" in printed.err


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://no-such-host.invalid:8000"])
def test_nobody_there_is_one_clear_fail_and_no_crash(capsys, write, url):
    code, found = check(capsys, write(teacher_url=url, teacher_timeout_s=5.0))
    assert code == 1
    assert found["teacher server"]["level"] == "fail" and url in found["teacher server"]["advice"]
    assert found["tokenizers"]["level"] == found["context"]["level"] == "pass"
    assert not any("itself broke" in item["measured"] for item in found.values())


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "localhost:8000"])
def test_train_says_it_in_one_line_and_leaves_nothing(capsys, write, tmp_path, url):
    assert cli.main(["train", "--config", str(write(teacher_url=url))]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "taopd train:" in line]
    assert len(lines) == 1 and "teacher_url" in lines[0] and url in lines[0]
    assert not (tmp_path / "run").exists()


def test_train_trains_and_writes_down_who_the_teacher_was(write, vllm, tmp_path):
    assert cli.main(["train", "--config", str(write(teacher_url=vllm.url)), "--quiet"]) == 0
    about = json.loads((tmp_path / "run/teacher.json").read_text())
    assert about["url"] == vllm.url and about["model"] == "tiny-teacher"
    settings = json.loads((tmp_path / "run/config.json").read_text())
    assert settings["changed"]["teacher_url"] == vllm.url


def test_train_stops_with_a_checkpoint_and_goes_on(capsys, write, model, micro_lab, tmp_path):
    """Through the command line: away in step 2, `--resume` does the rest."""
    with Served(model, micro_lab.teacher, exact=True) as server:
        path = write(teacher_url=server.url, teacher_patience_s=0.2)
        server.script.extend([None] * 11)
        server.always = status(503)
        assert cli.main(["train", "--config", str(path), "--quiet", "--skip-check"]) == 2
        assert "1 steps are saved" in capsys.readouterr().err
        server.always = None
        assert cli.main(["train", "--config", str(path), "--quiet", "--resume"]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert (results["steps"], results["resumed_from"]) == (2, "checkpoint-1")


def test_a_plan_counts_no_teacher_here(capsys, write):
    plans = []
    for settings in ({}, {"teacher_url": "http://127.0.0.1:9"}):
        assert cli.main(["plan", "--config", str(write(**settings)), "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    local, asked = plans
    assert local["memory_mib"]["teacher_weights"] > 0 == asked["memory_mib"]["teacher_weights"]
    assert local["tflop"]["score_teacher"] > 0 == asked["tflop"]["score_teacher"]
    assert local["full_tflop"] == asked["full_tflop"]
    path = write(teacher_url="http://127.0.0.1:9", teacher_model_name_or_path=None)
    assert cli.main(["plan", "--config", str(path)]) == 2
    assert "teacher_model_name_or_path" in capsys.readouterr().err


def test_what_a_bound_changes_is_measured_with_a_copy(capsys, write, micro_lab, tmp_path):
    """Oracle: the selections of two checks of the same micro-batch, one with the teacher in this process."""
    model = AutoModelForCausalLM.from_pretrained(micro_lab.teacher, dtype=torch.float32)
    kept = []
    with Served(model, micro_lab.teacher) as server:
        for settings in ({"teacher_url": server.url}, {}):
            path = write(budget=0.3, **settings)
            subject = Subject(settings=parse_settings(str(path), []))
            found = subject.measured
            table = local_table(
                *(found.signals, subject.settings.training),
                *(found.positions.row, found.positions.column),
            )
            kept.append(select(table, budget=0.3).kept)
        item = check(capsys, write(budget=0.3, teacher_url=server.url))[1]["bounded C"]
        bare = check(capsys, write(teacher_url=server.url, teacher_model_name_or_path=None))[1]
    bounded, exact = kept
    changed = int((exact & ~bounded).sum())
    assert item["figures"]["kept"] == int(exact.sum()) > 3
    assert item["figures"]["changed"] == pytest.approx(changed / int(exact.sum()))
    assert item["figures"]["mean_gap"] > 0 and item["level"] == "pass"
    assert "no copy of the teacher's weights" in bare["bounded C"]["measured"]
