"""Nothing that is read is executed, nothing that is written leaves its folder, no secret is written.

Oracles: a file that a payload would make and that is not there; audit events of the interpreter (PEP 578:
unpickling, connections, processes); the bytes on disk.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from scripts.fuzz.fence import Escaped, fence
from taopd import cli
from taopd.errors import ConfigError, DataError, TaopdError
from taopd.experiments.study.expand import expand
from taopd.experiments.study.file import parse_study_file
from taopd.models.load_options import safe_options
from taopd.models.loading import load_model, load_tokenizer
from taopd.models.prompts import encode_prompts, load_prompts
from taopd.runs.folder import RunFolder
from taopd.runs.jsonl import append_jsonl
from taopd.runs.redaction import redact, redact_command, redact_document
from taopd.runs.validation import read_yaml
from taopd.trainer.environment import environment
from taopd.trainer.settings_file import parse_settings
from tests.conftest import make_model, make_tokenizer, write_config

TOKEN = "hf_" + "aBcD1234" * 4
SECRETS = (TOKEN, "s3cretpw", "wandbsecret0123456789")


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, sentinel: Path) -> None:
        self._sentinel = str(sentinel)

    def __reduce__(self):
        return os.mkdir, (self._sentinel,)


@pytest.fixture
def sentinel(tmp_path) -> Path:
    return tmp_path / "executed"


def test_the_payload_works(sentinel, tmp_path):
    """Else the tests below would prove nothing."""
    torch.save(Payload(sentinel), tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert sentinel.exists()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.bin", "adapter_model.bin", "model.pt"]
)
def test_pickled_weights_are_refused_and_not_opened(name, sentinel, tmp_path):
    folder = tmp_path / "model"
    make_model(seed=0).config.save_pretrained(folder)
    torch.save(Payload(sentinel), folder / name)
    with pytest.raises(DataError, match=r"pickles .* are never read"):
        load_model(folder)
    assert not sentinel.exists()


@pytest.mark.parametrize("shard", ["evil.bin", "../evil.safetensors", "/evil.safetensors"])
def test_an_index_names_only_safetensors_of_its_own_folder(shard, sentinel, tmp_path):
    folder = tmp_path / "model"
    make_model(seed=0).config.save_pretrained(folder)
    torch.save(Payload(sentinel), folder / "evil.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="no safetensors file of this folder"):
        load_model(folder)
    assert not sentinel.exists()


def test_pickles_beside_safetensors_are_ignored(sentinel, tmp_path):
    folder = tmp_path / "model"
    make_model(seed=0).save_pretrained(folder)
    for name in ("pytorch_model.bin", "optimizer.pt", "rng_state.pth", "training_args.bin"):
        torch.save(Payload(sentinel), folder / name)
    with fence(tmp_path):
        load_model(folder)
    assert not sentinel.exists()


def remote_code(folder: Path, sentinel: Path, file: str, auto_map: dict) -> None:
    """Point a folder's JSON to a Python file beside it."""
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(sentinel)!r})\n")
    document = json.loads((folder / file).read_text())
    for name in ("model_type", "tokenizer_class"):
        if name in document:
            document[name] = "Evil"
    (folder / file).write_text(json.dumps(document | {"auto_map": auto_map}))


def test_remote_code_of_model_and_tokenizer_is_never_run(sentinel, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # Nobody is asked either.
    folder = tmp_path / "model"
    make_model(seed=0).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    remote_code(
        folder,
        sentinel,
        "config.json",
        {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
    )
    remote_code(
        folder, sentinel, "tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    )
    with pytest.raises(DataError, match="cannot load the model"):
        load_model(folder)
    with pytest.raises(DataError, match="cannot load a tokenizer"):
        load_tokenizer(folder)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "options",
    [
        {"trust_remote_code": True},
        {"use_safetensors": False},
        {"attn_implementation": "somebody/kernels"},
        {"use_kernels": True},
    ],
)
def test_options_that_would_run_code_are_refused(options, micro_lab):
    with pytest.raises(DataError, match=r"never run|runs no code"):
        safe_options(options)
    with pytest.raises(DataError, match=r"never run|runs no code"):
        load_model(micro_lab.student, **options)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{% for a in range(999999999) %}x{% endfor %}",
        "{{ 1/0 }}",
        "{% import 'os' as os %}",
        "{{ raise_exception('no') }}",
        "{{",
    ],
)
def test_chat_templates_stay_in_their_sandbox(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    try:
        ids = encode_prompts(tokenizer, [[{"role": "user", "content": "3 + 4"}]])
    except DataError as error:
        assert "chat template" in str(error)
    else:  # An undefined name is empty text, no way out.
        assert set(ids[0]) <= {tokenizer.unk_token_id}


def test_a_dataset_folder_with_a_loading_script_runs_nothing(sentinel, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(f"import os\nos.mkdir({str(sentinel)!r})\n")
    for place in (folder, folder / "data.py"):
        with pytest.raises(DataError):
            load_prompts(place)
    assert not sentinel.exists()


# Nine lists of nine aliases each: 387 million values.
BOMB = "a: &a [x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.mkdir ['SENTINEL']",
        "a: !!python/name:os.system",
        "a: !!python/object/new:os.mkdir {args: ['SENTINEL']}",
        "a: &a [*a, *a]",
        BOMB,
        "a: " + "[" * 5000,
        "a: 2001-99-99",
        'a: "x\\0y"',
        "1: x",
        "a: 1" + "0" * 400,
    ],
)
def test_yaml_makes_no_objects_and_does_not_explode(text, sentinel, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text.replace("SENTINEL", str(sentinel)))
    with pytest.raises(ConfigError):
        read_yaml(path, "the file")
    assert not sentinel.exists()


NAMES = [
    "../x",
    "/x",
    "..",
    ".",
    ".x",
    "a/b",
    "a\\b",
    "a\0b",
    "x" * 300,
    "é" * 150,
    "a b",
    "a\n",
    "",
]


@pytest.mark.parametrize("name", NAMES)
def test_arm_names_are_folders_inside_the_study(name, tmp_path):
    study = {"lab": "dialect", "seeds": [0], "arms": [{"name": name, "selector": "entropy"}]}
    try:
        arms = expand(parse_study_file(study), {"max_steps": 1, "max_completion_length": 4})
    except ConfigError as error:
        assert "name" in str(error) or "NUL" in str(error)
        return
    for arm in arms:  # An empty name is derived from the settings.
        assert name == "" and (tmp_path / arm.name).resolve().parent == tmp_path.resolve()


def test_arms_that_differ_in_case_alone_are_refused():
    arms = [{"name": "Mine", "selector": "entropy"}, {"name": "mine", "selector": "tip"}]
    study = parse_study_file({"lab": "dialect", "seeds": [0], "arms": arms})
    with pytest.raises(ConfigError, match="case alone"):
        expand(study, {"max_steps": 1, "max_completion_length": 4})


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "/proc/nope/x", "file"])
def test_an_output_folder_that_cannot_be_is_one_message(name, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TaopdError):
        RunFolder.create(tmp_path / name if name != "/proc/nope/x" else name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_link_in_a_run_folder_is_not_followed(tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("mine\n")
    folder = RunFolder.create(tmp_path / "run")
    (folder.path / "metrics.jsonl").symlink_to(outside)
    (folder.path / "model").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("")
    with pytest.raises(DataError, match="symbolic link"):
        append_jsonl(folder.path / "metrics.jsonl", {"step": 1})
    RunFolder.create(folder.path, overwrite=True)
    assert outside.read_text() == "mine\n" and (tmp_path / "elsewhere" / "kept").exists()


@pytest.mark.parametrize("name", ["run/metrics.jsonl", "run", "page", "run/config.json"])
def test_the_page_overwrites_nothing_but_a_page(name, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for file in ("metrics.jsonl", "config.json"):
        (run / file).write_text("{}\n")
    assert cli.main(["report", str(run), "-o", str(tmp_path / name)]) == 2
    assert {path.read_text() for path in run.iterdir()} == {"{}\n"}


def test_secrets_are_masked_and_ordinary_settings_are_not():
    document = {
        "teacher_url": "http://me:s3cretpw@localhost:8000",
        "model_init_kwargs": {"token": "plain", "dtype": "float32"},
        "api_key": "k",
        "eos_token": "<eos>",
        "stop_tokens": "merge",
        "max_tokens": 5,
        "note": f"use {TOKEN}",
    }
    assert redact_document(document) == {
        "teacher_url": "http://***@localhost:8000",
        "model_init_kwargs": {"token": "***", "dtype": "float32"},
        "api_key": "***",
        "eos_token": "<eos>",
        "stop_tokens": "merge",
        "max_tokens": 5,
        "note": "use ***",
    }
    words = ["--stop_tokens", "merge", "--hub_token", "x", f"--teacher_url=http://{TOKEN}@h/v1"]
    assert redact_command(words)[:3] == words[:3]
    assert redact_command(words)[3:] == ["***", "--teacher_url=http://***@h/v1"]
    assert redact("http://localhost:8000/v1 and a@b.c") == "http://localhost:8000/v1 and a@b.c"


def test_no_secret_is_written_shown_or_logged(micro_lab, tmp_path, monkeypatch, capfd):
    """The whole of `taopd train` up to the teacher that is not there, every file and line searched."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", SECRETS[2])
    folder, config = tmp_path / "run", tmp_path / "x.yaml"
    settings = {
        "model_name_or_path": str(micro_lab.student),
        "teacher_model_name_or_path": str(micro_lab.teacher),
        "dataset_name": str(micro_lab.prompts),
        "output_dir": str(folder),
        "teacher_url": f"http://me:{SECRETS[1]}@127.0.0.1:9/v1",
        "teacher_patience_s": 0,
        "loss": "sampled_reverse_kl",
        "max_completion_length": 4,
        "score_top_k": 4,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    # The address with a password is refused before any run: in a folder it is only what was typed.
    config.write_text(yaml.safe_dump(settings | {"teacher_url": "http://127.0.0.1:9/v1"}))
    parsed = parse_settings(str(config), [])
    config.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(sys, "argv", ["taopd", "train", "--teacher_url", settings["teacher_url"]])
    folder.mkdir()
    for name, value in (
        ("config.json", {"changed": parsed.changed()} | parsed.resolved()),
        ("env.json", environment()),
    ):
        (folder / name).write_text(json.dumps(value, default=str))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "step_time": 0.1}\n')
    assert cli.main(["report", str(folder), "-o", str(folder / "x.html")]) == 0
    (folder / "metrics.jsonl").unlink()
    (folder / "config.json").rename(folder / "old.json")
    assert cli.main(["train", "--config", str(config)]) == 2
    assert cli.main(["report", f"nowhere-{TOKEN}"]) == 2
    out, err = capfd.readouterr()
    written = "".join(path.read_text(errors="replace") for path in folder.iterdir())
    assert "***@127.0.0.1:9" in written and "no such folder: nowhere-***" in err
    for secret in SECRETS:
        assert secret not in written and secret not in out and secret not in err


def test_a_study_file_may_not_hold_a_secret():
    for config in ({"hub_token": "x"}, {"teacher_url": "http://me:pw@h"}, {"push_to_hub": True}):
        study = {"lab": "dialect", "seeds": [0], "arms": [{"selector": "full"} | config]}
        with pytest.raises(ConfigError, match="none may hold a token"):
            expand(parse_study_file(study), {"max_steps": 1, "max_completion_length": 4})


ALONE = """
import sys
seen = []
def hook(event, args):
    if event in ("socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "pickle.find_class"):
        seen.append(f"{event} {args[1:]}")
    elif event == "socket.connect":
        seen.append(f"{event} {args[1]}")
sys.addaudithook(hook)
from taopd.cli import main
codes = [main(command.split("\\t")) for command in sys.argv[1:]]
print("codes", codes)
print("seen", [one for one in seen if "pickle" not in one or "numpy" not in one])
"""


def test_train_resume_and_report_open_no_connection_and_unpickle_nothing(micro_lab, tmp_path):
    """With the hub allowed, local paths alone: no look-up, no connection, no server, no telemetry."""
    sizes = {"per_device_train_batch_size": 4, "max_completion_length": 4, "score_top_k": 4}
    run = tmp_path / "run"
    config = write_config(micro_lab, tmp_path, **sizes, max_steps=2, save_steps=1)
    commands = [
        f"train\t--config\t{config}\t--skip-check\t--max_steps\t1",
        f"train\t--config\t{config}\t--resume\t--quiet",
        f"report\t{run}\t-o\t{tmp_path / 'x.html'}",
    ]
    environment_ = {k: v for k, v in os.environ.items() if "OFFLINE" not in k}
    environment_ |= {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *commands], capture_output=True, text=True, env=environment_
    )
    lines = dict(
        line.split(" ", 1) for line in done.stdout.splitlines() if line[:5] in ("codes", "seen ")
    )
    assert json.loads(lines["codes"]) == [0, 0, 0], done.stdout[-2000:] + done.stderr[-2000:]
    assert lines["seen"] == "[]"


def test_the_fence_of_these_tests_holds(tmp_path):
    (tmp_path / "in").mkdir()
    with fence(tmp_path / "in"):
        (tmp_path / "in" / "x").write_text("")
    with pytest.raises(Escaped, match="open"), fence(tmp_path / "in"):
        (tmp_path / "out").write_text("")
    torch.save(Payload(tmp_path / "y"), tmp_path / "x.bin")
    with pytest.raises(Escaped, match=r"find_class|mkdir"), fence(tmp_path / "in"):
        torch.load(tmp_path / "x.bin", weights_only=False)


def test_remote_code_cannot_be_asked_for_in_python():
    """TRL would run the code of the student's tokenizer."""
    from taopd import TeachabilityConfig
    from taopd.errors import ConfigError

    asked = {"trust_remote_code": bool(1)}
    with pytest.raises(
        ConfigError, match="trust_remote_code: code from a model repository is never"
    ):
        TeachabilityConfig(output_dir="unused", use_cpu=True, bf16=False, **asked)
