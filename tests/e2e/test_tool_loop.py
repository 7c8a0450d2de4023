"""A tool loop from end to end: a student that has learned to call, TRL's loop, selection, log and inspector.

Oracle: the texts that the student has learned, whose tokens are bytes, and a forward of the teacher alone.
"""

import json
import math
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from transformers.utils import get_json_schema

from taopd import cli
from taopd.errors import ConfigError
from taopd.report.folders import read_folders
from taopd.report.pack import pack
from taopd.report.rollouts import read_rollouts
from taopd.trainer.build import from_settings
from taopd.trainer.build.tools import given_tools
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.settings_file import parse_settings
from taopd.trainer.trainer import TeachabilityTrainer
from tests.contract.test_trl_behaviours import byte_tokenizer, make_model
from tests.tool_functions import NAMELESS, TOOLS

PATH = "tests.tool_functions:TOOLS"
QUESTION = [{"role": "user", "content": "3 times 4 ?"}]
CALL = '<tool_call>\n{"name": "multiply", "arguments": {"a": 3, "b": 4}}\n</tool_call><|im_end|>'
ANSWER = "It is 12<|im_end|>"
BUDGET = 0.1
SETTINGS = {
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 2,
    "max_completion_length": 400,
    "max_steps": 1,
    "save_strategy": "no",
    "budget": BUDGET,
    "score_top_k": 4,
    "logging_steps": 1,
    "log_selection": True,
    # What it has learned, and no slip of the draw.
    "top_k": 1,
}


def told(tokenizer) -> str:
    """What the loop puts between the call and the answer, by the template."""
    call = {"type": "function", "function": {"name": "multiply", "arguments": {"a": 3, "b": 4}}}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "multiply", "content": "12"},
    ]
    text = tokenizer.apply_chat_template(
        messages, tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    return text.rpartition(CALL)[2]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A student that knows one call and one answer, a teacher that knows nothing, and two prompts."""
    root, tokenizer = tmp_path_factory.mktemp("tools"), byte_tokenizer()
    for name, seed, width in (("student", 0, 64), ("teacher", 1, 32)):
        make_model(seed, width, len(tokenizer)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    student = make_model(0, 64, len(tokenizer))
    prompt = tokenizer.apply_chat_template(
        QUESTION, tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    pieces = [tokenizer(text)["input_ids"] for text in (prompt, CALL, told(tokenizer), ANSWER)]
    ids = torch.tensor([[*chain.from_iterable(pieces)]])
    labels = ids.clone()
    ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0).tolist()
    labels[0, : ends[0]] = labels[0, ends[1] : ends[2]] = -100
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
    for _ in range(400):
        loss = student(input_ids=ids, labels=labels).loss
        if loss < 1e-2:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05, f"the student has not learned the call: {loss:.2g} nats a token"
    student.save_pretrained(root / "student")
    pd.DataFrame({"prompt": [QUESTION] * 2}).to_parquet(root / "prompts.parquet")
    return root


@pytest.fixture(scope="module")
def run(lab):
    """A run that took its tools by their path; the trainer, what it selected, and its folder."""
    config = {
        "model_name_or_path": lab / "student",
        "teacher_model_name_or_path": lab / "teacher",
        "dataset_name": lab / "prompts.parquet",
        "output_dir": lab / "run",
        "tools": PATH,
        **SETTINGS,
    }
    settings = parse_settings(None, [str(x) for key, v in config.items() for x in (f"--{key}", v)])
    trainer = from_settings.make_trainer(settings, from_settings.load_inputs(settings))
    seen = []
    trainer.observers.append(seen.append)
    trainer.train()
    return trainer, seen[0], lab / "run"


def test_the_loop_runs_and_calls_are_counted(run):
    log = next(entry for entry in run[0].state.log_history if "loss" in entry)
    assert log["tools/call_frequency"] == 1.0 and log["tools/failure_frequency"] == 0.0
    assert math.isfinite(log["loss"]) and "rollout/drift_nats/mean" not in log
    own = len(byte_tokenizer()(CALL + ANSWER)["input_ids"])
    assert log["completions/mean_length"] == own


def test_results_are_neither_scored_nor_selected_nor_counted(run):
    trainer, seen, folder = run
    tokenizer = trainer.text_tokenizer
    lengths = [len(tokenizer(text)["input_ids"]) for text in (CALL, told(tokenizer), ANSWER)]
    columns = [*range(lengths[0]), *range(sum(lengths[:2]), sum(lengths))]
    for row in range(2):
        ids = seen.batch["completion_ids"][row][seen.batch["completion_mask"][row].bool()]
        assert tokenizer.decode(ids) == CALL + told(tokenizer) + ANSWER
        assert seen.positions.column[seen.positions.row == row].tolist() == columns
    selection = seen.choice.selection
    assert selection.num_valid == 2 * len(columns)
    assert int(selection.kept.sum()) == math.ceil(BUDGET * 2 * len(columns))
    written = pd.read_parquet(next((folder / "selection").glob("*.parquet")))
    assert sorted(set(written["position"])) == columns and len(written) == 2 * len(columns)


@torch.no_grad()
def test_what_follows_a_result_is_scored_after_it(run):
    trainer, seen, _ = run
    batch, place = seen.batch, (seen.positions.row, seen.positions.column)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    logits = trainer.teacher_model(input_ids=ids, attention_mask=mask).logits
    width = batch["completion_ids"].shape[1]
    own = logits[:, -width - 1 : -1, : trainer.vocab_size].double().log_softmax(-1)[place]
    expected = own.gather(1, seen.token_ids[:, None]).squeeze(1)
    torch.testing.assert_close(seen.signals.teacher_logprobs.double(), expected, rtol=0, atol=1e-4)


def test_log_inspector_and_page_show_the_result_in_its_place(run, capsys):
    trainer, _, folder = run
    tokenizer = trainer.text_tokenizer
    line = json.loads((folder / "rollouts.jsonl").read_text().splitlines()[0])
    after = len(tokenizer(CALL)["input_ids"])
    assert line["tool_results"] == [[after, told(tokenizer)]]
    assert tokenizer.decode(line["token_ids"]) == CALL + ANSWER and not line["truncated"]
    assert "# Tools" in line["prompt"]
    assert cli.main(["inspect", str(folder), "--limit", "1"]) == 0
    shown = "".join(capsys.readouterr().out.split()).replace("[", "").replace("]", "")
    assert shown.index("<tool_response>") < shown.index("Itis12")
    (rollout, *_) = read_rollouts(read_folders([folder]).runs, limit=4)
    described, _ = pack([rollout])
    ((place, text),) = described["rollouts"][0]["toolResults"]
    assert place == after and "<tool_response>" in text


def make_trainer(lab, tmp_path, **settings):
    tools = settings.pop("given", None)
    return TeachabilityTrainer(
        model=str(lab / "student"),
        teacher_model=str(lab / "teacher"),
        args=TeachabilityConfig(output_dir=str(tmp_path), **(SETTINGS | settings)),
        train_dataset=settings.pop("rows", None) or [{"prompt": QUESTION}] * 2,
        tools=tools,
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tools": PATH, "given": TOOLS}, "keep one of them"),
        ({"tools": PATH, "stop_tokens": "merge", "stop_token_ids": [256, 258]}, "different things"),
        (
            {"given": TOOLS, "stop_tokens": "merge", "stop_token_ids": [256, 258]},
            "different things",
        ),
        ({"tools": "tests.tool_functions:TOLS"}, "has no 'TOLS'. Did you mean 'TOOLS'"),
        ({"tools": "tests.no_such:TOOLS"}, "tools 'tests.no_such:TOOLS': cannot import"),
        ({"tools": "tests.tool_functions:NUMBERS"}, "expected a list of functions"),
        ({"tools": "tests.tool_functions:UNDOCUMENTED"}, "undocumented needs type hints"),
        ({"tools": "tests.tool_functions:ASYNC"}, "waits is an async function"),
        ({"tools": "tests.tool_functions:TWICE"}, "two tools are called multiply"),
        ({"given": NAMELESS}, "a tool is a partial without a name"),
    ],
)
def test_tools_that_cannot_be(lab, tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        make_trainer(lab, tmp_path, **settings)


def test_one_function_is_a_list_of_one():
    found = given_tools(SimpleNamespace(tools=None, stop_tokens="train"), TOOLS[0])
    assert [tool.__name__ for tool in found] == [TOOLS[0].__name__]


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (12, "12"),
        (None, "None"),
        ("", ""),
        ([1, "a"], "[1, 'a']"),
        ([{"type": "text", "text": "x"}, {"type": "text", "text": "y"}], "xy"),
        ("a\ud800b", "a?b"),
        (ValueError("bad"), "{'error': 'bad'}"),
        (SystemExit(3), "{'error': 'exit 3'}"),
        ([{"type": "image", "image": 0}], "with 'image': taopd trains on text alone"),
    ],
)
def test_whatever_a_tool_answers_is_shown_as_text_and_never_scored(lab, tmp_path, answer, shown):
    """Oracle: TRL's loop for an answer that is text."""

    def multiply(a: int, b: int) -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    multiply.__doc__ = TOOLS[0].__doc__
    trainer = make_trainer(lab, tmp_path, given=[multiply])
    assert get_json_schema(trainer.tools[0])["function"]["name"] == "multiply"
    turns, seen = iter((CALL, "done<|im_end|>")), []
    tokenizer = trainer.text_tokenizer

    def generated(prompt_ids, *_args, **_kwargs):
        return [tokenizer(text)["input_ids"] for text in [next(turns)] * len(prompt_ids)]

    trainer._generate_single_turn = generated
    trainer.observers.append(seen.append)
    trainer.train()
    batch, own = seen[0].batch, seen[0].positions.row == 0
    whole = tokenizer.decode(batch["completion_ids"][0][batch["completion_mask"][0].bool()])
    response = whole.partition("<tool_response>\n")[2].partition("\n</tool_response>")[0]
    assert response == shown or (shown and shown in response and "error" in response)
    assert tokenizer.decode(seen[0].token_ids[own]) == CALL + "done<|im_end|>"


def test_merged_stops_beside_a_rows_own_tools_are_refused(lab, tmp_path):
    schema = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    args = TeachabilityConfig(
        output_dir=str(tmp_path), stop_tokens="merge", stop_token_ids=[256, 258], **SETTINGS
    )
    with pytest.raises(ConfigError, match="row 1 has tools: the id that ends a message"):
        TeachabilityTrainer(
            model=str(lab / "student"),
            teacher_model=str(lab / "teacher"),
            args=args,
            train_dataset=[{"prompt": QUESTION}, {"prompt": QUESTION, "tools": [schema]}],
        )


def test_the_recipe_trains(lab, tmp_path, monkeypatch):
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    settings = {
        "model_name_or_path": lab / "student",
        "teacher_model_name_or_path": lab / "teacher",
        "dataset_name": lab / "prompts.parquet",
        "output_dir": tmp_path / "run",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "max_completion_length": 16,
        "bf16": "false",
        "use_cpu": "true",
        "gradient_checkpointing": "false",
    }
    flags = [str(x) for key, value in settings.items() for x in (f"--{key}", value)]
    recipe = Path(__file__).parents[2] / "recipes/tools.yaml"
    assert cli.main(["train", "--config", str(recipe), "--skip-check", *flags]) == 0
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert line["tools/failure_frequency"] == 0.0
    assert (
        '"name": "multiply"'
        in json.loads((tmp_path / "run/rollouts.jsonl").read_text().splitlines()[0])["prompt"]
    )
