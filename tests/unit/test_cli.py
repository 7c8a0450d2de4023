"""The command line. Oracles: exit codes, what is on disk afterwards, and the message's wording."""

import json
import sys
import types
from pathlib import Path

import pytest
import yaml

from taopd import __version__, cli, report  # noqa: F401 (`fake` finds report in sys.modules)
from taopd.errors import ConfigError, DataError
from taopd.trainer.settings_file import known_names, parse_settings
from tests.conftest import WORDS, make_checkpoint, make_tokenizer, write_config

TINY = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_steps": 2,
    "save_steps": 1,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "max_completion_length": 4,
    "score_top_k": 4,
    "budget": 0.5,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture
def config(tmp_path, micro_lab):
    """A YAML file of a two-step run; returns (path, settings)."""
    path = write_config(micro_lab, tmp_path, **TINY)
    return path, yaml.safe_load(path.read_text())


def fails(capsys, *argv):
    """Run a command that must fail; return its one line on stderr."""
    assert cli.main(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("taopd")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help_fits_a_screen_and_holds_an_example(capsys, argv):
    assert cli.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    assert "example:" in lines and any(line.startswith("  taopd ") for line in lines)


def test_every_command_has_a_module_and_every_flag_is_in_the_help(capsys):
    from taopd.cli import evaluate

    modules = {path.stem for path in Path(cli.__file__).parent.glob("*.py")}
    assert set(cli.COMMANDS) <= modules
    flags = {flag for action in evaluate._parser()._actions for flag in action.option_strings}
    assert cli.main(["evaluate", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in flags if flag.startswith("--") and flag != "--help")


def test_a_help_page_is_made_from_the_parser():
    """Oracle: the page by hand; defaults are the parser's, and two short flags share a line."""
    parser = cli.Parser(
        prog="taopd x", description="What it does.", epilog="example:\n  taopd x RUN"
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--k", type=int, nargs="+", default=[8, 16], metavar="K", help="sizes")
    parser.add_argument("--order", choices=("up", "down"), default="up", help="of the rows" * 3)
    parser.add_argument("--into", required=True, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="less")
    page = [
        "usage: taopd x RUN --into FILE [options]",
        "What it does.",
        f"  RUN {' ' * 18}run folder {' ' * 17}--k K ...             sizes (8 16)",
        f"  --order NAME {' ' * 9}up, down; {'of the rows' * 3} (up)",
        f"  --into FILE {' ' * 38}--quick               less",
        "example:",
        "  taopd x RUN",
    ]
    assert [line for line in parser.format_help().splitlines() if line] == page


def test_train_help_all_lists_every_setting(capsys):
    assert cli.main(["train", "--help-all"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in known_names() if f"--{name}" not in shown] == []


def test_version_and_unknown_command(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"taopd {__version__}\n"
    assert fails(capsys, "trian") == (
        "taopd: error: unknown command 'trian'. Did you mean 'train'? See `taopd --help`."
    )


def test_yaml_and_flags_reach_the_dataclasses(config):
    path, _ = config
    settings = parse_settings(
        str(path), ["--budget", "0.25", "--use_peft", "--lora_r=8", "--selector", "random"]
    )
    assert (settings.training.budget, settings.model.lora_r) == (0.25, 8)
    assert settings.training.max_steps == 2 and settings.training.selector == "random"
    assert settings.resolved()["dataset_train_split"] == "train"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgt": 0.1}, "unknown key in .*: 'budgt'. Did you mean 'budget'"),
        ({"student": "x"}, "'student'. Did you mean 'model_name_or_path'"),
        ({"lr": 1e-4}, "'lr'. Did you mean 'learning_rate'"),
        ({"prompts": "x"}, "'prompts'. Did you mean 'dataset_name'"),
        ({"budget": 1.5}, "budget=1.5"),
        ({"budget": [0.1]}, "budget=.0.1. is of the wrong type; expected a number"),
        ({"max_steps": "many"}, "max_steps.*'many'"),
        ({"max_steps": True}, "max_steps=True is of the wrong type; expected a whole number"),
        ({"max_steps": 1.5}, "max_steps=1.5 is of the wrong type"),
        ({"seed": None}, "seed=None is of the wrong type"),
        ({"selector": "teachabilty"}, "teachabilty.*teachability"),
        ({"loss": "reverse"}, "reverse.*reverse_kl"),
        ({"num_generations": 0}, "num_generations=0"),
        ({"lr_scheduler_type": "wavy"}, "wavy"),
        ({"dtype": "float7"}, "float7"),
        ({"output_dir": ...}, "missing: output_dir"),
        ({"output_dir": None}, "missing: output_dir"),
        ({"teacher_model_name_or_path": ...}, "missing: teacher_model_name_or_path"),
        ({"push_to_hub": True}, "push_to_hub is not supported.*<output_dir>/model"),
        ({"dataset_streaming": True}, "dataset_streaming is not supported"),
        ({"env": 3}, "env must be a mapping"),
    ],
)
def test_bad_settings(capsys, tmp_path, config, change, message):
    path, settings = config
    merged = {key: value for key, value in (settings | change).items() if value is not ...}
    path.write_text(yaml.safe_dump(merged))
    import re

    line = fails(capsys, "train", "--config", str(path))
    assert line.startswith("taopd train: error: ") and re.search(message, line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the config file"),
        ("a: [", "is not YAML"),
        ("- 1", "must hold a YAML mapping"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
        ("", "must hold a YAML mapping"),
    ],
)
def test_bad_yaml_files(capsys, tmp_path, content, message):
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_text(content)
    assert message in fails(capsys, "train", "--config", str(path))


def test_unknown_flags_are_named_and_not_abbreviated(capsys, config):
    path, _ = config
    assert "unknown flag: 'budgt'. Did you mean 'budget'" in fails(
        capsys, "train", "--config", str(path), "--budgt", "0.2"
    )
    for word, meant in (("teacher", "teacher_model_name_or_path"), ("batch-size", "per_device_tr")):
        told = fails(capsys, "train", "--config", str(path), f"--{word}", "1")
        assert f"Did you mean '{meant}" in told
    assert "unknown flag: 'budg'" in fails(capsys, "train", "--config", str(path), "--budg", "0.2")
    assert "unexpected argument" in fails(capsys, "train", "--config", str(path), "stray")
    assert "budget" in fails(capsys, "train", "--config", str(path), "--budget", "lots")


def test_bad_inputs_leave_nothing_behind(capsys, tmp_path, config, micro_lab):
    path, _ = config
    make_tokenizer([*WORDS[:9], "other", *WORDS[10:]]).save_pretrained(tmp_path / "teacher")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / "teacher" / name).write_bytes((micro_lab.teacher / name).read_bytes())
    cases = [
        (
            ["--teacher_model_name_or_path", str(tmp_path / "teacher")],
            "id 9 is '5' for the student, 'other'",
        ),
        (["--model_name_or_path", str(tmp_path / "none")], "no such tokenizer folder"),
        (["--dataset_name", str(tmp_path / "none.jsonl")], "no such dataset"),
        (["--dataset_train_split", "trian"], "no split 'trian'. Did you mean 'train'"),
        (["--max_completion_length", "61"], "the prompt of row 0 of the training set has 4 tokens"),
        (["--num_generations", "3"], "num_generations=3 does not divide"),
        (["--use_peft", "--lora_target_modules", "lm_head"], "do not fit together"),
        (["--resume"], "has no complete checkpoint; start without --resume"),
        (["--resume", "--overwrite"], "exclude each other"),
    ]
    for flags, message in cases:
        assert message in fails(capsys, "train", "--config", str(path), *flags), flags
        assert not (tmp_path / "run").exists()


def test_train_resume_and_evaluate(capsys, tmp_path, config, micro_lab):
    """Oracle of the saved student: transformers loads it, and evaluation of it is reproducible."""
    pytest.importorskip("taopd.trainer.trainer")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, settings = config
    run = tmp_path / "run"
    assert cli.main(["train", "--config", str(path)]) == 0
    assert str(run / "model") in capsys.readouterr().out
    recorded = json.loads((run / "config.json").read_text())
    assert {key: recorded[key] for key in settings if key not in ("report_to",)} == {
        key: value for key, value in settings.items() if key not in ("report_to",)
    }
    assert json.loads((run / "results.json").read_text())["steps"] == 2
    assert json.loads((run / "env.json").read_text())["seeds"]["seed"] == recorded["seed"]
    assert AutoModelForCausalLM.from_pretrained(run / "model").config.vocab_size == len(WORDS)
    assert len(AutoTokenizer.from_pretrained(run / "model")) == len(WORDS)
    assert "holds another run" in fails(capsys, "train", "--config", str(path))
    assert cli.main(["train", "--config", str(path), "--resume", "--max_steps", "3"]) == 0
    results = json.loads((run / "results.json").read_text())
    assert (results["steps"], results["resumed_from"]) == (3, "checkpoint-2")
    assert cli.main(["train", "--config", str(path), "--resume", "--max_steps", "3"]) == 0
    assert "has done its 3 steps" in capsys.readouterr().out
    told = fails(capsys, "train", "--config", str(path), "--resume", "--max_steps", "2")
    assert "max_steps=2: the run has done 3 already" in told

    found = []
    for name in ("a", "b"):
        argv = [
            "evaluate",
            str(run / "model"),
            "--dataset",
            str(micro_lab.prompts),
            "--max-new-tokens",
            "4",
        ]
        assert (
            cli.main(
                [*argv, "--num-samples", "2", "--limit", "5", "--output", str(tmp_path / name)]
            )
            == 0
        )
        found.append((tmp_path / name / "transcripts.jsonl").read_text())
    assert found[0] == found[1] and len(found[0].splitlines()) == 10
    assert "5 x 2" in capsys.readouterr().out
    again = [
        "evaluate",
        str(run / "model"),
        "--dataset",
        str(micro_lab.prompts),
        "--output",
        str(tmp_path / "a"),
    ]
    assert "holds another run" in fails(capsys, *again)


def test_evaluate_bad_input(capsys, tmp_path, micro_lab):
    model, data = str(micro_lab.student), str(micro_lab.prompts)
    assert "--dataset" in fails(capsys, "evaluate", model)
    assert "no such dataset" in fails(
        capsys, "evaluate", model, "--dataset", str(tmp_path / "x.csv")
    )
    assert "match='exat'" in fails(capsys, "evaluate", model, "--dataset", data, "--match", "exat")
    (tmp_path / "model").mkdir()  # in which nothing is: settings are read before it is
    empty = ("evaluate", str(tmp_path / "model"), "--dataset", data)
    assert "match='exat'" in fails(capsys, *empty, "--match", "exat")
    assert "--num-samples: must" in fails(capsys, *empty, "--num-samples", "0")
    assert "--max-new-tokens: must" in fails(capsys, *empty, "--max-new-tokens", "0")
    assert "drop greedy" in fails(capsys, *empty, "--greedy", "--num-samples", "2")
    for name, value in (("temperature", "0.5"), ("top_p", "0.5"), ("top_k", "8")):
        told = fails(capsys, *empty, "--greedy", f"--{name.replace('_', '-')}", value)
        assert f"{name}={value} is of sampling" in told
    assert "exclude each other" in fails(capsys, *empty, "--suite", "lm-eval:x")
    assert "argument --limit: " in fails(
        capsys, "evaluate", model, "--dataset", data, "--limit", "0"
    )


def fake(monkeypatch, name, **functions):
    """Put a stand-in for a heavy module in place, also as the package's attribute."""
    module = types.ModuleType(f"taopd.{name}")
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, f"taopd.{name}", module)
    parent, _, child = f"taopd.{name}".rpartition(".")
    monkeypatch.setattr(sys.modules[parent], child, module, raising=False)


def test_demo_passes_its_flags_and_shows_the_results(monkeypatch, capsys, tmp_path):
    seen = {}

    def run_demo(*, progress, **settings):
        progress("arms", 1, 2)
        seen.update(settings)
        return {"best_student": "teachability"}

    import taopd.experiments.lab.demo
    import taopd.report.figures.demo  # noqa: F401

    fake(monkeypatch, "experiments.lab.demo", run_demo=run_demo)
    fake(
        monkeypatch,
        "report.figures.demo",
        table=lambda results: f"table of {results['best_student']}",
        draw=lambda results, folder: [folder / "accuracy.png"],
        markdown=lambda results: f"summary of {results['best_student']}",
    )
    argv = ["demo", "--all", "--steps", "7", "--variant", "reversal", "--output", str(tmp_path)]
    assert cli.main(argv) == 0
    assert seen == {
        "all_arms": True,
        "output_dir": tmp_path,
        "overwrite": False,
        "resume": False,
        "steps": 7,
        "variant": "reversal",
    }
    shown = capsys.readouterr().out
    assert (tmp_path / "summary.md").read_text() == "summary of teachability"
    assert "table of teachability" in shown and str(tmp_path / "accuracy.png") in shown
    assert "must be a whole number" in fails(capsys, "demo", "--steps", "0")
    assert "invalid choice" in fails(capsys, "demo", "--variant", "x")
    assert cli.main(["demo", "--output", str(tmp_path)]) == 0
    assert (seen["variant"], seen["all_arms"]) == ("dialect", False)
    for flag in (["--variant", "dialect"], ["--all"]):
        told = fails(capsys, "demo", "--real", "--output", str(tmp_path), *flag)
        assert f"{flag[0]} is for the tiny lab, and would do nothing with --real" in told


def test_conformance_passes_files_and_exit_code(monkeypatch, capsys):
    seen: list[Path] = []

    def run(paths):
        seen.extend(paths)
        return 1

    monkeypatch.setattr("taopd.cli.conformance.show", run)
    assert cli.main(["conformance", "a.json", "b.json"]) == 1
    assert seen == [Path("a.json"), Path("b.json")]
    assert "required" in fails(capsys, "conformance")


def raiser(error):
    def run(_):
        raise error

    return run


def test_errors_become_exit_codes_and_bugs_keep_their_traceback(monkeypatch, capsys):
    monkeypatch.setattr("taopd.cli.conformance.show", raiser(DataError("two\nlines")))
    assert fails(capsys, "conformance", "x") == "taopd conformance: error: two lines"
    monkeypatch.setattr("taopd.cli.conformance.show", raiser(KeyboardInterrupt()))
    assert cli.main(["conformance", "x"]) == 130
    monkeypatch.setattr("taopd.cli.conformance.show", raiser(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["conformance", "x"])


def test_an_interrupted_run_says_where_its_state_is(monkeypatch, capsys, config, tmp_path):
    from taopd.cli import train

    def interrupt(trainer, folder, checkpoint):
        make_checkpoint(folder.path, 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_run", interrupt)
    assert cli.main(["train", "--config", str(config[0])]) == 130
    assert f"{tmp_path / 'run' / 'checkpoint-1'}; go on with --resume" in capsys.readouterr().err


def test_settings_errors_are_config_errors():
    with pytest.raises(ConfigError):
        parse_settings(None, [])


def test_the_demos_help_has_the_steps_of_both_demos(capsys):
    from taopd.experiments.lab.demo import STEPS
    from taopd.experiments.smollm2.real import STEPS as STEPS_OF_REAL

    assert cli.main(["demo", "--help"]) == 0
    assert f"(default: {STEPS}; with --real {STEPS_OF_REAL})" in capsys.readouterr().out
