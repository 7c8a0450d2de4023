"""`taopd plan`. Oracles: exit codes, the JSON against `taopd.trainer.cost`, the wording of errors."""

import json
import shutil
from pathlib import Path

import pytest

from taopd import cli
from taopd.trainer.cost import SHAPES, PlanSettings, plan
from tests.conftest import write_config

RECIPES = Path(__file__).parents[2] / "recipes"
PAIR = ("--student", "Qwen3-1.7B", "--teacher", "Qwen/Qwen3-4B")


def as_json(capsys, *argv):
    assert cli.main(["plan", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_flags_arrive_in_the_plan(capsys):
    found = as_json(
        capsys,
        *PAIR,
        *("--batch", "2", "--micro-batches", "3", "--prompt-length", "100"),
        *("--completion-length", "900", "--budget", "0.1", "--window", "6", "--top-k", "8"),
        *("--dtype", "float32", "--student-dtype", "float32", "--teacher-dtype", "float16"),
        *("--anchor-fraction", "0.2", "--lora-rank", "4", "--no-gradient-checkpointing"),
        *("--recompute-prefix", "--no-padding", "--num-ranks", "8", "--sharding", "fsdp2"),
    )
    settings = PlanSettings(
        batch=2,
        micro_batches=3,
        prompt_length=100,
        completion_length=900,
        budget=0.1,
        window=6,
        top_k=8,
        dtype="float32",
        teacher_dtype="float16",
        anchor_fraction=0.2,
        reach=True,
        guard=True,
        lora_rank=4,
        gradient_checkpointing=False,
        keep_prefix=False,
        padded=False,
        num_ranks=8,
        sharding="fsdp2",
    )
    expected = plan(SHAPES["Qwen3-1.7B"], SHAPES["Qwen3-4B"], settings).as_dict()
    assert found == json.loads(json.dumps(expected))
    assert [row["window"] for row in found["windows"]] == [None, 0, 4, 6, 8, 32]


def test_the_defaults_on_the_help_page_are_those_of_the_plan(capsys):
    """The page cannot read them: it imports no torch."""
    assert cli.main(["plan", "--help"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    settings = as_json(capsys, *PAIR)["settings"]
    for name in (
        *("batch", "micro_batches", "prompt_length", "completion_length", "top_k", "num_ranks"),
        *("budget", "dtype", "student_dtype", "teacher_dtype", "device", "sharding"),
    ):
        _, _, words = page.partition(f"--{name.replace('_', '-')} ")
        assert words.partition(")")[0].rpartition("(")[2] == str(settings[name]), name


def test_a_recipe_and_flags_over_it(capsys):
    recipe = RECIPES / "qwen3-14b-to-4b.yaml"
    found = as_json(
        capsys, "--config", str(recipe), "--prompt-length", "64", "--anchor_coef", "1.0"
    )
    settings = found["settings"]
    assert (found["student"]["name"], found["teacher"]["name"]) == ("Qwen3-4B", "Qwen3-14B")
    assert (settings["batch"], settings["micro_batches"]) == (2, 4)
    assert (settings["prompt_length"], settings["completion_length"]) == (64, 64)
    assert (settings["dtype"], settings["student_dtype"]) == ("bfloat16", "float32")
    assert settings["teacher_dtype"] == "bfloat16" and settings["gradient_checkpointing"]
    assert (settings["anchor_fraction"], settings["anchor_responses"]) == (0.05, 0.25)
    assert settings["guard"] and not settings["needs_teacher_distribution"]


def test_the_table_has_every_part(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["plan", *PAIR, "--window", "4", "--num-ranks", "8"]) == 0
    out = capsys.readouterr().out
    for words in (
        "student weights",
        "key value prefix",
        "score teacher",
        "student update",
        "MiB",
        "sent by one",
    ):
        assert words in out
    assert max(map(len, out.splitlines())) <= 80


LORA = ("--config", str(RECIPES / "qwen3-14b-to-4b.yaml"), "--use_peft", "true")


def test_an_adapter_is_counted_where_it_lies(capsys):
    states = [
        as_json(capsys, *LORA, *more)["peak_mib"]
        for more in (
            [],
            ["--lora_target_modules", "q_proj", "v_proj"],
            ["--lora_target_modules", "all-linear"],
        )
    ]
    assert states[0] == states[1] < states[2]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "--student and --teacher"),
        ((*PAIR, "--bugdet", "1"), "'--bugdet'"),
        ((*PAIR, "--sharding", "fsdp1"), "sharding='fsdp1': must be ddp or fsdp2 or zero3"),
        ((*PAIR, "--budget", "7"), "budget=7.0: must be in (0, 1]"),
        ((*PAIR, "--sharding", "fsdp2"), "--sharding fsdp2 does nothing with one process"),
        ((*PAIR, "--recompute-prefix"), "drop it or add --window N"),
        ((*PAIR, "--batch", "x"), "invalid int value"),
        (("--student", "nothing", "--teacher", "Qwen3-4B"), "built-in table"),
        (("--config", "no.yaml"), "cannot read the config file"),
        (
            ("--config", str(RECIPES / "qwen3-14b-to-4b.yaml"), "--optim", "adafactor"),
            "optim='adafactor'",
        ),
        (
            (*LORA, "--lora_modules_to_save", "lm_head"),
            "does not know the memory of lora_modules_to_save",
        ),
    ],
)
def test_bad_input_is_one_line(capsys, argv, words):
    assert cli.main(["plan", *argv]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("taopd")]
    assert line.startswith("taopd plan: error: ") and words in line


def test_of_several_teachers_it_says_what_it_assumes(micro_lab, tmp_path, capsys):
    """Oracle: the plan of the larger one alone, which takes no fewer rows."""
    path = tmp_path / "c.yaml"
    base = f"model_name_or_path: {micro_lab.student}\ndataset_name: no-such\noutput_dir: {tmp_path}/r\n"
    base += "use_cpu: true\n"
    small = {"model": str(micro_lab.student)}
    path.write_text(
        f"{base}teachers: {json.dumps({'a': small, 'b': {'model': str(micro_lab.teacher)}})}\n"
    )
    assert cli.main(["plan", "--config", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"Several teachers: {micro_lab.teacher}, the largest here, is taken to score every" in said
    )
    several = as_json(capsys, "--config", str(path))
    path.write_text(f"{base}teacher_model_name_or_path: {micro_lab.teacher}\n")
    alone = as_json(capsys, "--config", str(path))
    assert several["tflop"]["score_teacher"] == alone["tflop"]["score_teacher"]
    assert cli.main(["plan", "--config", str(path)]) == 0
    assert "Several teachers" not in capsys.readouterr().out


def test_plan_and_check_agree_and_read_the_prompts(micro_lab, tmp_path, capsys):
    """Oracle: each other; and the tokens of the longest prompt."""
    path = tmp_path / "c.yaml"
    path.write_text(
        f"model_name_or_path: {micro_lab.student}\nteacher_model_name_or_path: {micro_lab.teacher}\n"
        f"dataset_name: {micro_lab.prompts}\noutput_dir: {tmp_path}/run\nuse_cpu: true\nbf16: false\n"
        "max_completion_length: 6\nscore_top_k: 4\nreport_to: none\ndtype: auto\n"
    )
    planned = as_json(capsys, "--config", str(path))
    cli.main(["check", str(path), "--json"])
    items = json.loads(capsys.readouterr().out)["items"]
    (memory,) = [item for item in items if item["item"] == "memory"]
    assert memory["figures"]["peak_mib"] == pytest.approx(planned["peak_mib"], abs=0.1)
    assert (planned["settings"]["device"], planned["settings"]["prompt_length"]) == ("cpu", 5)
    told = as_json(capsys, "--config", str(path), "--prompt-length", "50", "--device", "gpu")
    assert (told["settings"]["device"], told["settings"]["prompt_length"]) == ("gpu", 50)
    assert "process" not in [name for name, size in told["memory_mib"].items() if size]
    # A hub id is not fetched: the length is assumed, and said to be.
    cli.main(["plan", "--config", str(RECIPES / "qwen3-4b-to-1.7b.yaml")])
    assert "prompts of 256 tokens are assumed" in capsys.readouterr().err


@pytest.mark.parametrize("setting", [[], ["--adam_beta2", "0.9"]])
def test_a_prompt_length_that_is_given_is_not_called_assumed(capsys, setting):
    """With a plain config and with one that is read in full: the length came from the user."""
    recipe = str(RECIPES / "qwen3-4b-to-1.7b.yaml")
    assert cli.main(["plan", "--config", recipe, "--prompt-length", "128", *setting]) == 0
    said = capsys.readouterr()
    assert "128 + 64 tokens" in said.out and "assumed" not in said.err


@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_files_that_hold_quantized_weights_are_not_planned(micro_lab, tmp_path, capsys, family):
    """They were counted as if they were not: a teacher in 4 bits four times too large."""
    folder = shutil.copytree(micro_lab.teacher, tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    packed = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config | packed | {"model_type": family}))
    said = f"the weights of {folder} are quantized (gptq), and a plan does not know their bytes"
    assert cli.main(["plan", "--student", str(micro_lab.student), "--teacher", str(folder)]) == 2
    assert said in capsys.readouterr().err
    assert cli.main(["plan", "--student", str(folder), "--teacher", str(micro_lab.teacher)]) == 2
    assert said in capsys.readouterr().err
    file = write_config(micro_lab, tmp_path, teacher_model_name_or_path=str(folder))
    assert cli.main(["plan", "--config", str(file)]) == 2
    assert said in capsys.readouterr().err
    cli.main(["check", str(file), "--json"])
    items = {item["item"]: item for item in json.loads(capsys.readouterr().out)["items"]}
    assert items["memory"]["measured"] == "not planned"
    assert "the teacher are quantized (gptq)" in items["memory"]["advice"]
    served = {"teacher_url": "http://127.0.0.1:9", "loss": "sampled_reverse_kl"}
    file = write_config(micro_lab, tmp_path, teacher_model_name_or_path=str(folder), **served)
    assert as_json(capsys, "--config", str(file))["memory_mib"]["teacher_weights"] == 0
    cli.main(["check", str(file), "--json"])
    items = {item["item"]: item for item in json.loads(capsys.readouterr().out)["items"]}
    assert items["memory"]["level"] == "pass"


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--budget", "0.3", "--completion-length", "99"],
        ["--budget", "1"],
        ["--anchor-fraction", "0.3", "--batch", "3"],
        ["--anchor-fraction", "0"],
        ["--anchor-fraction", "0.3", "--budget", "1"],
        ["--lora-rank", "4", "--window", "8"],
    ],
    ids=" ".join,
)
def test_names_alone_are_planned_as_a_config_of_these_names(flags, tmp_path, capsys):
    """The first plan of a user is that of the run: the default method keeps the initial student."""
    path = tmp_path / "c.yaml"
    path.write_text(
        "model_name_or_path: Qwen3-1.7B\nteacher_model_name_or_path: Qwen3-4B\n"
        "dataset_name: no-such\noutput_dir: o\n"
    )
    told = []
    for argv in (PAIR, ("--config", str(path))):
        code = cli.main(["plan", *argv, *flags, "--json"])
        said = capsys.readouterr()
        errors = [line for line in said.err.splitlines() if "error" in line]
        told.append((code, errors, said.out.replace("Qwen/Qwen3-4B", "Qwen3-4B")))
    assert told[0] == told[1]
    if not flags:
        memory = json.loads(told[0][2])["memory_mib"]
        assert memory["reference_weights"] == memory["student_weights"]


def test_a_budget_decides_the_method_that_is_planned(capsys):
    """Oracle: the setting in the file's place. With every token the initial student judges none."""
    recipe = ("--config", str(RECIPES / "qwen3-14b-to-4b.yaml"), "--method", "reach")
    part, whole = (as_json(capsys, *recipe, f"--budget={budget}") for budget in (0.1, 1))
    assert part["settings"]["reach"] and not whole["settings"]["reach"]
    assert whole["tflop"]["anchor"] == 0 < part["tflop"]["anchor"]


def test_a_held_share_where_nothing_is_held_is_refused(capsys):
    published = ("--config", str(RECIPES / "qwen3-14b-to-4b.yaml"), "--anchor-fraction", "0.2")
    assert cli.main(["plan", *published]) == 2
    assert "this run holds none" in capsys.readouterr().err
    assert as_json(capsys, *published, "--method", "anchored")["settings"]["anchor_fraction"] == 0.2
