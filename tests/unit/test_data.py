"""Prompts, models and tokenizers.

Oracles: the files as written, transformers itself, and the message.
"""

import json
import shutil

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from taopd.errors import DataError, ResourceError
from taopd.models.damage import root_cause
from taopd.models.prompt_lengths import check_prompt_lengths
from taopd.models.prompts import (
    context_length,
    encode_prompts,
    load_model,
    load_prompts,
    load_tokenizer,
)
from tests.conftest import make_model, make_rows, make_tokenizer

ROWS = [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "2 + 2 =", "answer": "4"}]


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows):
    kind = path.suffix
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == ".json":
        path.write_text(json.dumps(rows))
    else:
        dataset = datasets.Dataset.from_list(rows)
        dataset.to_csv(path) if kind == ".csv" else dataset.to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_every_file_format_gives_the_rows_as_written(tmp_path, suffix):
    rows = load_prompts(write(tmp_path / f"x{suffix}", ROWS), require_answer=True)
    assert [(r["prompt"], str(r["answer"])) for r in rows] == [
        (r["prompt"], r["answer"]) for r in ROWS
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize(
    "answers",
    [
        ("2020-05-10", "2020-05-11T10:00:00"),  # read as times
        ("007", "12"),
        ("1.50", "2"),
        ("NA", "None"),
        (str(10**25), "1"),
    ],
)
def test_an_answer_of_digits_is_the_text_of_the_file(tmp_path, suffix, answers):
    rows = [{"prompt": f"{i}", "answer": answer} for i, answer in enumerate(answers)]
    read = load_prompts(write(tmp_path / f"x{suffix}", rows), require_answer=True)
    assert [(row["prompt"], row["answer"]) for row in read] == [
        (row["prompt"], row["answer"]) for row in rows
    ]


@pytest.mark.parametrize(
    "written", ['{"answer": 1}\n{"answer": 2.50}\n', '[{"answer": 1},\r\n {"answer": "2.50"}]']
)
def test_a_number_in_json_is_the_text_of_the_file(tmp_path, written):
    text = written.replace("{", '{"prompt": "a", ')
    (tmp_path / "x.json").write_text(text, encoding="utf-8-sig")
    read = load_prompts(tmp_path / "x.json", require_answer=True)
    assert read["answer"][:] == ["1", "2.50"]


@pytest.mark.parametrize(
    "held",
    [
        {"prompt": ["a", "b"], "answer": ["1", "2"]},
        {"prompt": {"0": "a", "1": "b"}},  # pandas, if it is not told otherwise
        {"0": {"prompt": "a"}, "1": {"prompt": "b"}},
        {"data": [{"prompt": "a"}, {"prompt": "b"}]},
        {"columns": ["prompt"], "index": [0], "data": [["a"]]},
    ],
)
def test_json_that_is_one_object_of_columns_is_refused(tmp_path, held):
    """Its reader takes it for a single row."""
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "x.json").write_text(json.dumps(held))
    for place in (folder / "x.json", folder):
        with pytest.raises(DataError, match=r"^\S+x\.json is one object with .*a list of objects"):
            load_prompts(place)


@pytest.mark.parametrize(
    "held",
    [
        {"prompt": "a", "answer": "1"},
        {"prompt": [{"role": "user", "content": "a"}], "tools": []},
        {"messages": [{"role": "user", "content": "a"}]},
    ],
)
def test_json_that_is_a_single_row_is_read(tmp_path, held):
    (tmp_path / "x.json").write_text(json.dumps(held))
    assert len(load_prompts(tmp_path / "x.json")) == 1


@pytest.mark.parametrize("other", ["false", '"no"'])
def test_true_in_json_is_the_text_of_the_file(tmp_path, other):
    """Python writes it with a capital letter, and no completion of "true" would be right."""
    text = f'{{"prompt": "a", "answer": true}}\n{{"prompt": "b", "answer": {other}}}\n'
    (tmp_path / "x.jsonl").write_text(text)
    read = load_prompts(tmp_path / "x.jsonl", require_answer=True)
    assert read["answer"][:] == ["true", other.strip('"')]


@pytest.mark.parametrize("last", ["2.50", '"two"'])
def test_json_lines_whose_answers_change_in_kind_after_many_rows_are_read(tmp_path, last):
    """The reader takes the kind of a column from the first 10 MB."""
    lines = [
        f'{{"prompt": "{"x" * 900}", "answer": {number}, "n": 1.5}}' for number in range(12_000)
    ]
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join([*lines, f'{{"prompt": "y", "answer": {last}, "n": 2}}']))
    rows = load_prompts(file)
    assert rows[7]["answer"] == "7" and rows[12_000]["answer"] == last.strip('"')
    assert rows[12_000]["n"] == 2.0 and len(rows) == 12_001


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"prompt": "a", "prompt": "b"}\n', "twice"),
        (b'{"prompt": "a\xff", "answer": "x"}\n', "UTF-?8"),
    ],
)
def test_json_lines_that_change_in_kind_are_read_no_less_strictly(tmp_path, line, told):
    """The second value of a key would win, and a byte that is no text become another character."""
    lines = b"".join(b'{"prompt": "%s", "answer": 1}\n' % (b"x" * 900) for _ in range(12_000))
    (tmp_path / "x.jsonl").write_bytes(line)
    with pytest.raises(DataError, match=told):
        load_prompts(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_bytes(lines + line)
    with pytest.raises(DataError, match=r"cannot read .*x\.jsonl|UTF-?8"):
        load_prompts(tmp_path / "x.jsonl")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_cache_that_cannot_be_written_is_told_as_one(tmp_path, monkeypatch, kind):
    (tmp_path / "cache").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache" / "in a file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.jsonl").write_text('{"prompt": "a", "answer": "1"}\n')
    path = tmp_path / "folder" / "x.jsonl"
    with pytest.raises(
        ResourceError, match=r"copied to the cache .*in a file, which cannot be written"
    ):
        load_prompts(path if kind == "file" else path.parent)


def test_a_csv_whose_answers_change_in_kind_after_many_rows_is_read(tmp_path):
    rows = [{"prompt": "a", "answer": "1"}] * 10_001 + [{"prompt": "a", "answer": "yes"}]
    read = load_prompts(write(tmp_path / "x.csv", rows), require_answer=True)
    assert (len(read), read[-1]["answer"]) == (10_002, "yes")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.csv", [{"prompt": "a", "answer": "007"}])
    assert load_prompts(tmp_path / "folder")["answer"][:] == ["007"]
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.jsonl").write_text('{"prompt": "a", "answer": 2.50}\n')
    (tmp_path / "lines" / "test.jsonl").write_text('{"prompt": "a", "answer": "2020-05-10"}\n')
    assert load_prompts(tmp_path / "lines")["answer"][:] == ["2.50"]
    assert load_prompts(tmp_path / "lines", split="test")["answer"][:] == ["2020-05-10"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_file_with_a_pattern_in_its_name_is_that_file(tmp_path, suffix):
    write(tmp_path / f"x1{suffix}", [{"prompt": "other", "answer": "1"}])
    path = write(tmp_path / f"x[1]{suffix}", [{"prompt": "named", "answer": "1"}])
    assert load_prompts(path)["prompt"][:] == ["named"]
    (tmp_path / "[1]").mkdir()
    write(tmp_path / "[1]" / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"\[1\] has one of \*, \? and \[ in its path"):
        load_prompts(tmp_path / "[1]")


def test_split_column_filters_and_lists(micro_lab):
    train, test = load_prompts(micro_lab.prompts), load_prompts(micro_lab.prompts, split="test")
    assert (len(train), len(test)) == (24, 8)
    assert test["prompt"][:] == [row["prompt"] for row in make_rows(8, "test")]
    assert len(load_prompts(micro_lab.prompts, split=None)) == 8
    # The column may be about something else than train and test.
    with pytest.raises(DataError, match=r"no split 'valid': its column 'split' holds test, train;"):
        load_prompts(micro_lab.prompts, split="valid")


@pytest.mark.parametrize("form", ["file", "saved", "saved with splits", "folder"])
def test_a_split_column_is_followed_in_every_form_of_one_table(tmp_path, form):
    rows = [{"prompt": str(at), "split": "train" if at else "test"} for at in range(3)]
    path, table = tmp_path / "set", datasets.Dataset.from_list(rows)
    if form == "saved":
        table.save_to_disk(path)
    elif form == "saved with splits":
        datasets.DatasetDict(train=table).save_to_disk(path)
    else:
        path = path.with_suffix(".parquet") if form == "file" else path
        path.parent.joinpath("set").mkdir(exist_ok=True)
        table.to_parquet(path if form == "file" else path / "x.parquet")
    assert load_prompts(path)["prompt"][:] == ["1", "2"]
    assert load_prompts(path, split=None)["prompt"][:] == ["0"]
    with pytest.raises(DataError, match="its column 'split' holds test, train;"):
        load_prompts(path, split="valid")


def test_a_column_does_not_tell_apart_the_splits_of_several_tables(tmp_path):
    tables = {
        name: datasets.Dataset.from_list([{"prompt": name, "split": "x"}])
        for name in ("train", "test")
    }
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "set")
    assert load_prompts(tmp_path / "set")["prompt"][:] == ["train"]


@pytest.mark.parametrize("value", [["a"], {"name": "b"}, 3])
def test_a_split_column_of_another_kind_is_refused(tmp_path, value):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": "a", "split": value}) + "\n")
    with pytest.raises(DataError, match="its column 'split' holds "):
        load_prompts(path)


def test_prompts_that_are_numbers_may_stand_alone(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": 1.50}\n{"prompt": 2}\n')
    assert load_prompts(tmp_path / "x.jsonl")["prompt"][:] == ["1.50", "2"]


def test_local_folders(tmp_path):
    (tmp_path / "f").mkdir()
    write(tmp_path / "f" / "train.jsonl", ROWS)
    write(tmp_path / "f" / "test.jsonl", ROWS[:1])
    assert len(load_prompts(tmp_path / "f")) == 2
    assert len(load_prompts(tmp_path / "f", split=None)) == 1
    with pytest.raises(DataError, match=r"no split 'tset'. Did you mean 'test'"):
        load_prompts(tmp_path / "f", split="tset")
    (tmp_path / "g").mkdir()
    write(tmp_path / "g" / "train.parquet", ROWS)
    write(tmp_path / "g" / "test.parquet", [row | {"level": 1} for row in ROWS])
    with pytest.raises(DataError, match=r"level: int64 .*because column names don't match"):
        load_prompts(tmp_path / "g")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert len(load_prompts(tmp_path / "saved")) == 2
    with pytest.raises(DataError, match="without splits"):
        load_prompts(tmp_path / "saved", split="test")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="is empty"):
        load_prompts(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.parquet", b"PAR1garbage", "cannot read .*x.parquet as parquet"),
        ("x.jsonl", b"{not json\n", "cannot read .*x.jsonl as json"),
        ("x.jsonl", b"", "is empty"),
        ("x.txt", b"hello", "a dataset file ends in"),
        (
            "x.jsonl",
            b'{"question": "a", "answer": "b"}\n',
            "no 'prompt' column, only question, answer; rename",
        ),
        ("x.jsonl", b'{"prompt": "a"}\n', "no 'answer' column, only prompt"),
        ("x.csv", b"prompt,answer\n", r"x\.csv has no rows"),
        (
            "x.csv",
            b"prompt;answer\na;1\n",
            "has semicolons between its columns: save it with commas",
        ),
        (
            "x.csv",
            b"prompt,answer\na, b,1\n",
            r"more cells in a row than names in its header \(prompt",
        ),
        # Was a traceback of `taopd evaluate` and `diagnose`; `train` said that settings do not fit together.
        (
            "x.jsonl",
            b'{"prompt": "K\xf6ln", "answer": "b"}\n',
            r"x\.jsonl holds text that is not UTF-8",
        ),
        ("x.jsonl", b'{"question": "K\xf6ln"}\n', r"x\.jsonl holds text that is not UTF-8"),
    ],
)
def test_unreadable_datasets(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_prompts(tmp_path / name, require_answer=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt;answer\na;1\n", "has semicolons between its columns"),
        ("prompt,answer\na, b,1\n", "has more cells in a row than names in its header"),
    ],
)
def test_columns_that_are_not_told_apart_are_refused_in_a_folder_too(tmp_path, content, message):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "x.csv").write_text(content)
    for place in (folder / "x.csv", folder):
        with pytest.raises(DataError, match=rf"^\S+x\.csv {message}"):
            load_prompts(place)


@pytest.mark.parametrize("name", ["Split", " split", "Tools", "Teacher_Prompt", "Answer", "PROMPT"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_column_that_is_nearly_one_that_is_read_is_refused(tmp_path, name, suffix):
    """It was passed over: with "Split" the rows of test were trained on."""
    row = {"prompt": "a", name: "test"} if name != "PROMPT" else {"PROMPT": "a"}
    (tmp_path / "rows").mkdir()
    file = write(tmp_path / "rows" / f"x{suffix}", [row, row])
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "saved")
    for place in (file, file.parent, tmp_path / "saved"):
        with pytest.raises(
            DataError, match=f"has a column '{name}', and '{name.strip().lower()}' is"
        ):
            load_prompts(place)
    row[name.strip().lower()] = "train"
    assert len(load_prompts(write(tmp_path / f"y{suffix}", [row, row]))) == 2


@pytest.mark.parametrize("name", ["prompt", "answer", "split"])
def test_a_column_that_a_csv_file_has_twice_is_refused(tmp_path, name):
    """The second one was passed over; in JSON it is refused as well."""
    (tmp_path / "x.csv").write_text(f"prompt,answer,split,{name}\na,1,train,b\n")
    with pytest.raises(DataError, match=f"has two columns '{name}'"):
        load_prompts(tmp_path / "x.csv")


def test_missing_datasets(tmp_path):
    with pytest.raises(DataError, match="no such dataset"):
        load_prompts(tmp_path / "none.parquet")
    with pytest.raises(
        DataError, match=r"'nobody/nothing'.*no local file or folder, and the hub says"
    ):
        load_prompts("nobody/nothing")


def test_load_model_equals_transformers(micro_lab):
    ids = torch.tensor([[4, 5, 6]])
    ours = load_model(micro_lab.student, dtype="float32")(ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(micro_lab.student)(ids).logits
    assert torch.equal(ours, theirs)


def test_tokenizer_is_padded_left_and_has_a_pad_token(tmp_path, micro_lab):
    assert load_tokenizer(micro_lab.student).padding_side == "left"
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<eos>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "none")
    with pytest.raises(DataError, match="neither a pad nor an eos token"):
        load_tokenizer(tmp_path / "none")


@pytest.fixture
def broken(tmp_path, micro_lab):
    shutil.copytree(micro_lab.student, tmp_path / "m")
    return tmp_path / "m"


def test_model_folder_errors(tmp_path, broken):
    with pytest.raises(DataError, match="no such model folder"):
        load_model(tmp_path / "none")
    with pytest.raises(DataError, match="no such tokenizer folder"):
        load_tokenizer(tmp_path / "none")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(DataError, match="cannot load the model"):
        load_model(broken)
    (broken / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="cannot load the model"):
        load_model(broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(DataError, match="has no weights"):
        load_model(broken)
    (broken / "config.json").write_text("{")
    (broken / "model.safetensors").write_bytes(weights)
    with pytest.raises(DataError, match="cannot load the model"):
        load_model(broken)
    (broken / "config.json").unlink()
    with pytest.raises(DataError, match=r"has no config.json"):
        load_model(broken)
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot load a tokenizer"):
        load_tokenizer(broken)
    with pytest.raises(DataError, match="is a file"):
        load_model(broken / "tokenizer.json")


def test_a_tokenizer_folder_with_settings_alone_says_what_it_lacks(broken):
    (broken / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"it has no tokenizer.json, only settings; save"):
        load_tokenizer(broken)
    announced = ValueError("Couldn't make it from one of:\n(1) a file,\n(2) another.")
    assert root_cause(announced) == "ValueError: Couldn't make it from one of: (1) a file,"


def test_missing_tensors_are_an_error_not_random_numbers(broken):
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        DataError, match=r"incomplete: 1 tensors .*model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load_model(broken)


def test_hub_names_fail_with_one_line():
    with pytest.raises(DataError, match="cannot load the model nobody/nothing"):
        load_model("nobody/nothing")
    with pytest.raises(DataError, match="cannot load a tokenizer from nobody/nothing"):
        load_tokenizer("nobody/nothing")


def test_encode_prompts_equals_the_tokenizer():
    tokenizer = make_tokenizer()
    assert encode_prompts(tokenizer, ["1 + 1 =", "2"]) == [[5, 14, 5, 15], [6]]
    messages = [[{"role": "user", "content": "1 + 1"}]]
    with pytest.raises(DataError, match="no chat template"):
        encode_prompts(tokenizer, messages)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} "
        "{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    assert encode_prompts(tokenizer, messages) == [[5, 14, 5, 15]]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("  ", "row 1 is empty"),
        (None, "row 1 is empty"),
        ([], "row 1 is empty"),
        (7, "row 1 is int"),
    ],
)
def test_malformed_prompts_name_the_row(prompt, message):
    with pytest.raises(DataError, match=message):
        encode_prompts(make_tokenizer(), ["1", prompt])


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LONGROPE |= {"rope_theta": 10000.0, "original_max_position_embeddings": 16}


def test_the_context_of_longrope_is_that_in_which_rows_do_not_change_each_other(caplog):
    """Oracle: the model's own forward on each row alone."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "eos_token_id": 2,
    }
    sizes |= {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    config = Phi3Config(**sizes, rope_parameters=LONGROPE)
    model = Phi3ForCausalLM(config).double().eval()
    for weight in model.parameters():
        weight.data.add_(0.3 * torch.randn_like(weight))

    def difference(length):
        """Of a row of 10 tokens, beside one of `length` and alone."""
        ids = torch.randint(3, 40, (2, length), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        mask[0, 10:] = 0
        together = model(ids, attention_mask=mask).logits[0, :10]
        return float((together - model(ids[:1, :10]).logits[0]).abs().max().detach())

    context = context_length(model)
    assert context == 16 and difference(context) < 1e-9 and difference(context + 1) > 1e-3
    assert "phi3: the context is taken to be 16 tokens and not 64" in caplog.text
    model.config.rope_parameters = LONGROPE | {"rope_type": "yarn", "factor": 4.0}
    assert context_length(model) == 64, "factors that are always the same"


def test_prompt_lengths(micro_lab):
    tokenizer = make_tokenizer()
    rows = datasets.Dataset.from_list([{"prompt": " ".join(["1"] * n)} for n in (3, 10, 12, 60)])
    assert context_length(make_model(seed=0), load_model(micro_lab.student)) == 64
    check_prompt_lengths(rows, tokenizer, context_length=64, max_completion_length=4)
    check_prompt_lengths(rows, tokenizer, context_length=None, max_completion_length=4)
    with pytest.raises(DataError, match=r"row 2 has 12 tokens.*room for 11"):
        check_prompt_lengths(rows, tokenizer, context_length=16, max_completion_length=5)
    with pytest.raises(DataError, match="leaves no room for a prompt"):
        check_prompt_lengths(rows, tokenizer, context_length=16, max_completion_length=16)
    empty = datasets.Dataset.from_list([{"prompt": "1"}, {"prompt": ""}])
    with pytest.raises(DataError, match="row 1 is empty"):
        check_prompt_lengths(empty, tokenizer, context_length=16, max_completion_length=4)


@pytest.mark.parametrize("first", [["text"], []])
def test_what_a_template_adds_is_counted_also_in_rows_after_plain_text(first):
    """A first row of text shows nothing of it."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        " ".join(["1"] * 250) + "{% for m in messages %} {{ m.content }}{% endfor %}"
    )
    rows = ["1" for _ in first] + [[{"role": "user", "content": "2"}]]
    with pytest.raises(DataError, match=rf"row {len(first)} has 251 tokens.*room for 236"):
        check_prompt_lengths(rows, tokenizer, context_length=240, max_completion_length=4)


def test_class_labels_are_read_by_their_names(tmp_path):
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "answer": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {"prompt": ["a", "b", "c"], "answer": [1, 0, -1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    assert load_prompts(tmp_path / "set")["answer"][:] == ["yes", "no", None]


def test_a_folder_of_two_kinds_of_files_says_which_are_not_read(tmp_path, caplog):
    (folder := tmp_path / "set").mkdir()
    write(folder / "a.jsonl", ROWS)
    (folder / "dataset_infos.json").write_text("{}")
    load_prompts(folder, split=None)
    assert not caplog.records
    write(folder / "b.csv", ROWS)
    load_prompts(folder, split=None)
    assert "only its .jsonl files are read, not b.csv" in caplog.text
