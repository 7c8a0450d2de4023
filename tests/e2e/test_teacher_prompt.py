"""A teacher with a prompt of its own, and the student as its own teacher.

Oracle: forwards of the teacher over its unpadded prompt and completion, written out here; runs without such a
prompt, bit for bit; a frozen model loaded from the student's folder; an average kept here.
"""

import copy
import json
import shutil
from pathlib import Path

import datasets
import pandas as pd
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from taopd import cli
from taopd.diagnose.bank import FixedContextBank
from taopd.errors import ConfigError, DataError
from taopd.experiments.arm import run_arm
from taopd.experiments.arm_settings import write_arm
from taopd.experiments.study.file import parse_study_file
from taopd.experiments.study.run import plan_study
from taopd.models.prompts import load_prompts
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.trainer import TeachabilityTrainer
from tests.conftest import MicroLab, make_model, make_tokenizer
from tests.e2e.test_trainer import CPU, OURS, gradients_on_fixed_completions
from tests.scripted_server import ScriptedServer

ROOT = Path(__file__).parents[2]
TEMPLATE = "w3 {answer} w4 {prompt} w5 ="
LORA = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def micro_lab(micro_lab, tmp_path_factory):
    """The micro lab with models that look further back than random weights do."""
    root = shutil.copytree(micro_lab.root, tmp_path_factory.mktemp("sharper") / "lab")
    for name in ("student", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32)
        for weight in model.parameters():
            weight.data *= 6.0 if weight.ndim == 2 else 1.0
        model.save_pretrained(root / name)
    paths = {
        name: root / getattr(micro_lab, name).name for name in ("student", "teacher", "prompts")
    }
    return MicroLab(root=root, **paths)


def with_column(rows, make):
    return rows.add_column("teacher_prompt", [make(row) for row in rows])


def same(row):
    return row["prompt"]


def hinted(row):
    """What `TEMPLATE` makes of a row."""
    return f"w3 {row['answer']} w4 {row['prompt']} w5 ="


def make_trainer(
    micro_lab, tmp_path, *, column=None, teacher=None, eval_dataset=None, peft=False, **settings
):
    rows = load_prompts(str(micro_lab.prompts), split="train")
    base = CPU | OURS | {"per_device_train_batch_size": 8, "max_steps": 2, "learning_rate": 1e-2}
    return TeachabilityTrainer(
        model=str(micro_lab.student),
        teacher_model=None if "teacher_url" in settings else teacher or str(micro_lab.teacher),
        args=TeachabilityConfig(output_dir=str(tmp_path / "run"), **(base | settings)),
        train_dataset=rows if column is None else with_column(rows, column),
        eval_dataset=eval_dataset,
        peft_config=LoraConfig(**LORA) if peft else None,
    )


def trained(*args, **settings):
    trainer = make_trainer(*args, **settings)
    seen = []
    trainer.observers.append(seen.append)
    trainer.train()
    return trainer, seen


def weights_of(trainer):
    return {name: w.detach().clone() for name, w in trainer.model.named_parameters()}


def own_logprobs(model, prompt, completion):
    """Log-probs [T, V] of a completion's tokens after a prompt, alone and without padding."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].float()
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def rows_of(batch, name):
    pairs = zip(batch[f"{name}_ids"], batch[f"{name}_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


def largest_error(scored, teacher):
    """Of the teacher's log-probs of all scored tokens, against `own_logprobs`; nats."""
    prompts, completions = (rows_of(scored.batch, n) for n in ("teacher_prompt", "completion"))
    alone = [own_logprobs(teacher, *pair) for pair in zip(prompts, completions, strict=True)]
    places = zip(scored.positions.row.tolist(), scored.positions.column.tolist(), strict=True)
    truth = [alone[row][column, completions[row][column]] for row, column in places]
    return float((scored.signals.teacher_logprobs - torch.stack(truth)).abs().max())


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "reverse_kl"},  # the scoring pass is the training forward
        {"loss": "reverse_kl", "gradient_accumulation_steps": 2, "anchor_coef": 0.5},
        {"loss": "sampled_reverse_kl", "gradient_window": 1, "num_iterations": 2},
    ],
)
def test_a_teacher_prompt_that_is_the_prompt_changes_no_bit(micro_lab, tmp_path, settings):
    plain = weights_of(trained(micro_lab, tmp_path / "a", **settings)[0])
    for name, given in (("b", {"column": same}), ("c", {"teacher_prompt_template": "{prompt}"})):
        trainer, seen = trained(micro_lab, tmp_path / name, **settings, **given)
        assert torch.equal(seen[0].batch["teacher_prompt_ids"], seen[0].batch["prompt_ids"])
        assert all(torch.equal(w, plain[key]) for key, w in weights_of(trainer).items())


@pytest.mark.parametrize("given", [{"column": hinted}, {"teacher_prompt_template": TEMPLATE}])
def test_the_teacher_reads_its_prompt_and_the_student_its_own(micro_lab, tmp_path, given):
    trainer, seen = trained(micro_lab, tmp_path, **given)
    assert len(seen) == 2
    teacher = AutoModelForCausalLM.from_pretrained(micro_lab.teacher, dtype=torch.float32)
    tokenizer = trainer.text_tokenizer
    for scored in seen:
        prompts = [tokenizer.decode(ids) for ids in rows_of(scored.batch, "prompt")]
        assert all(
            w.endswith(f"w4 {p} w5 =")
            for w, p in zip(
                map(tokenizer.decode, rows_of(scored.batch, "teacher_prompt")), prompts, strict=True
            )
        )
        assert largest_error(scored, teacher) < 1e-5


def test_a_longer_teacher_prompt_costs_its_own_tokens_alone(micro_lab, tmp_path):
    """Tokens that each model reads in a step whose completions are given; counted at the backbones."""
    read = {}
    for name, given in (("plain", {}), ("hinted", {"column": hinted})):
        settings = given | {"gradient_accumulation_steps": 2, "selector": "full"}
        trainer = make_trainer(micro_lab, tmp_path / name, **settings)
        trainer._teacher._agreed = True  # a comparison once a run
        counts = read[name] = {"student": [], "teacher": [], "prompts": 0}
        for whose, model in (("student", trainer.model), ("teacher", trainer.teacher_model)):

            def count(_model, _args, inputs, counts=counts, whose=whose):
                counts[whose].append(inputs["input_ids"].shape)

            model.model.register_forward_pre_hook(count, with_kwargs=True)
        seen = []
        trainer.observers.append(seen.append)
        gradients_on_fixed_completions(trainer)
        side = "teacher_prompt_mask" if given else "prompt_mask"
        counts["prompts"] = [int(half.any(0).sum()) for half in seen[0].batch[side].split(8)]
    assert read["plain"]["student"] == read["hinted"]["student"]
    longer = [
        b - a for a, b in zip(*(read[n]["prompts"] for n in ("plain", "hinted")), strict=True)
    ]
    assert all(more > 0 for more in longer)
    grown = [
        (rows, width + more)
        for (rows, width), more in zip(read["plain"]["teacher"], longer, strict=True)
    ]
    assert grown == read["hinted"]["teacher"]


@pytest.mark.parametrize("kind", ["vllm exact", "sglang", "vllm"])
def test_a_server_is_sent_the_teachers_prompt(micro_lab, tmp_path, kind):
    teacher = AutoModelForCausalLM.from_pretrained(micro_lab.teacher, dtype=torch.float32)
    asked = []

    class Listening(ScriptedServer):
        def logprobs(self, tokens):
            asked.append(tokens)
            return super().logprobs(tokens)

    with Listening(teacher, kind.partition(" ")[0], exact="exact" in kind) as server:
        settings = {
            "loss": "sampled_reverse_kl",
            "teacher_prompt_template": TEMPLATE,
            "max_steps": 1,
        }
        _, seen = trained(micro_lab, tmp_path, teacher_url=server.url, **settings)
    pairs = zip(
        rows_of(seen[0].batch, "teacher_prompt"), rows_of(seen[0].batch, "completion"), strict=True
    )
    assert all([*prompt, *completion] in asked for prompt, completion in pairs)
    assert largest_error(seen[0], teacher) < 1e-4


# -- the student as its own teacher -----------------------------------------------------------------


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("loss", ["reverse_kl", "sampled_reverse_kl"])
def test_self_is_a_frozen_copy_of_the_student(micro_lab, tmp_path, peft, loss):
    settings = {"teacher_prompt_template": TEMPLATE, "peft": peft, "loss": loss, "anchor_coef": 1.0}
    settings |= {"max_steps": 3, "budget": 0.5}
    own, seen = trained(micro_lab, tmp_path / "a", teacher="self", **settings)
    other, _ = trained(micro_lab, tmp_path / "b", teacher=str(micro_lab.student), **settings)
    start = AutoModelForCausalLM.from_pretrained(micro_lab.student, dtype=torch.float32)
    assert all(largest_error(scored, start) < 1e-5 for scored in seen)
    expected = weights_of(other)
    for name, weight in weights_of(own).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0 if not peft else 1e-6)
    assert not torch.equal(own_logprobs(own.model, [5], [6, 7]), own_logprobs(start, [5], [6, 7]))
    if not peft:  # one copy for teacher and anchor
        assert own._anchor._reference.copy is own.teacher_model


@pytest.mark.parametrize("teacher", ["self", "self_ema", "vllm", "sglang"])
def test_the_padding_of_a_head_is_no_token_whoever_teaches(micro_lab, tmp_path, teacher):
    """Oracle: the ids that count with the same folder as teacher, whose tokenizer is compared."""
    padded = make_model(seed=0, vocab_size=48)
    # Likelier than any token.
    padded.lm_head.weight.data[40:] = 5.0 * padded.lm_head.weight.data[:8]
    padded.save_pretrained(tmp_path / "padded")
    make_tokenizer().save_pretrained(tmp_path / "padded")
    lab = MicroLab(
        root=tmp_path, student=tmp_path / "padded", teacher=tmp_path, prompts=micro_lab.prompts
    )
    more = {"teacher_prompt_template": TEMPLATE, "max_steps": 1}
    named, _ = trained(lab, tmp_path / "a", teacher=str(tmp_path / "padded"), **more)
    with ScriptedServer(padded, "vllm" if teacher == "vllm" else "sglang", exact=True) as server:
        if teacher.startswith("self"):
            given = {"teacher": teacher}
        else:
            given = {"teacher_url": server.url, "loss": "sampled_reverse_kl"}
        trainer, seen = trained(lab, tmp_path / "b", **given, **more)
    assert trainer.vocab_size == named.vocab_size == 40
    assert int(seen[0].signals.student_topk_ids.max()) < 40


class Following(TrainerCallback):
    """The moving average by its definition, in float64, in a copy of the student."""

    def __init__(self, decay, model):
        self.decay, self.model = decay, copy.deepcopy(model)
        self.average = {name: w.detach().double() for name, w in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, weight in model.named_parameters():
            old = self.average[name]
            self.average[name] = self.decay * old + (1 - self.decay) * weight.detach().double()

    @torch.no_grad()
    def current(self):
        for name, weight in self.model.named_parameters():
            weight.copy_(self.average[name])
        return self.model.eval()


@pytest.mark.parametrize(
    ("peft", "more"),
    [(False, {}), (True, {}), (False, {"torch_compile": True, "torch_compile_backend": "eager"})],
    ids=["whole", "adapter", "torch_compile"],
)
def test_self_ema_follows_the_student(micro_lab, tmp_path, peft, more):
    settings = {"teacher_prompt_template": TEMPLATE, "teacher_ema_decay": 0.5, "max_steps": 4}
    settings |= more
    trainer = make_trainer(micro_lab, tmp_path, teacher="self_ema", peft=peft, **settings)
    follower = Following(0.5, trainer.model)
    trainer.add_callback(follower)
    errors, moved = [], []
    start = copy.deepcopy(follower.model).eval()

    def look(scored):
        errors.append(largest_error(scored, follower.current()))
        moved.append(largest_error(scored, start))

    trainer.observers.append(look)
    trainer.train()
    assert len(errors) == 4 and max(errors) < 1e-5
    assert moved[0] < 1e-5 and moved[3] > 1e-4, "the average never moved"


@pytest.mark.parametrize("peft", [False, True])
def test_a_resumed_average_is_the_same_to_the_bit(micro_lab, tmp_path, peft):
    settings = {"teacher_prompt_template": TEMPLATE, "teacher_ema_decay": 0.5, "max_steps": 4}
    settings |= {"save_strategy": "steps", "save_steps": 2, "teacher": "self_ema", "peft": peft}
    whole, _ = trained(micro_lab, tmp_path, **settings)
    part = make_trainer(micro_lab, tmp_path, **settings)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (checkpoint / "teacher_ema.safetensors").is_file()
    part.train(resume_from_checkpoint=str(checkpoint))
    expected = weights_of(whole)
    assert all(torch.equal(w, expected[name]) for name, w in weights_of(part).items())
    averages = [trainer.average._average for trainer in (whole, part)]
    assert averages[0] and all(torch.equal(w, averages[1][name]) for name, w in averages[0].items())


# -- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"teacher": "self"}, ConfigError, "without a prompt of the teacher's own"),
        ({"teacher": "self_ema"}, ConfigError, "without a prompt of the teacher's own"),
        ({"teacher_prompt_template": 5}, ConfigError, "=5: must be text"),
        ({"teacher_prompt_template": "{answer}"}, ConfigError, r"has no \{prompt\}"),
        ({"teacher_prompt_template": "{prompt} {answr}"}, DataError, "no column 'answr'.*'answer'"),
        (
            {"teacher_prompt_template": "{prompt}", "column": same},
            ConfigError,
            "one of them is the teacher's prompt",
        ),
        (
            {"column": lambda row: None},
            DataError,
            "row 0 has no teacher_prompt, its column is null",
        ),
        ({"column": lambda row: " "}, DataError, "the teacher_prompt of row 0 is empty"),
        (
            {
                "column": lambda row: [
                    {"role": "user", "content": "1"},
                    {"role": "assistant", "content": "2"},
                ]
            },
            DataError,
            "row 0 ends with an assistant message: the teacher would score",
        ),
    ],
)
def test_a_teacher_prompt_that_cannot_be_is_refused(micro_lab, tmp_path, given, error, words):
    with pytest.raises(error, match=words):
        make_trainer(micro_lab, tmp_path, **given)


def test_an_evaluation_set_without_the_column_is_refused(micro_lab, tmp_path):
    rows = load_prompts(str(micro_lab.prompts), split="test")
    with pytest.raises(DataError, match="evaluation set has no column 'teacher_prompt'"):
        make_trainer(micro_lab, tmp_path, column=hinted, eval_dataset=rows)


@pytest.mark.parametrize("where", ["training", "evaluation"])
@pytest.mark.parametrize(
    ("template", "column"), [(None, "teacher_prompt"), ("{answer} {prompt}", "answer")]
)
def test_a_gap_far_behind_is_found_before_training(micro_lab, tmp_path, template, column, where):
    """Behind the first rows, which are all that is encoded."""
    row = {"prompt": "1 + 1 =", "answer": "2"} | ({} if template else {"teacher_prompt": "2"})
    whole, gap = [row] * 40, [row] * 39 + [row | {column: None}]
    sets = [datasets.Dataset.from_list(rows) for rows in (gap, whole)]
    train, evaluation = sets if where == "training" else sets[::-1]
    with pytest.raises(DataError, match=f"row 39 of the {where} set .*{column}|{column}.*row 39"):
        TeachabilityTrainer(
            model=str(micro_lab.student),
            teacher_model=str(micro_lab.teacher),
            args=TeachabilityConfig(
                str(tmp_path), **(CPU | OURS), teacher_prompt_template=template
            ),
            train_dataset=train,
            eval_dataset=evaluation,
        )


# -- check ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["self", "self_ema"])
@pytest.mark.parametrize("peft", [False, True])
def test_the_check_measures_a_student_that_is_its_own_teacher(micro_lab, tmp_path, kind, peft):
    """Before training the teacher without its prompt is the student: two items are one divergence."""
    trainer = make_trainer(micro_lab, tmp_path, column=hinted, teacher=kind, peft=peft, max_steps=1)
    trainer.train(check=True)
    items = json.loads((tmp_path / "run" / "check.json").read_text())["items"]
    assert not [each["item"] for each in items if each["level"] == "fail"]
    figures = {each["item"]: each["figures"] for each in items}
    # Held once or twice, the teacher is here and its numbers are the student's.
    (precision,) = [each["measured"] for each in items if each["item"] == "precision"]
    assert "weights float32 / float32" in precision and "does not say" not in precision
    context, plain = figures["teacher context"], figures["teacher KL"]
    assert context["with_without_nats"] > 0.01
    assert figures["teacher prompt"]["teacher"] == "w3 0 w4 0 + 0 = w5 ="
    for one, other in (("with_without", "forward"), ("without_with", "reverse")):
        assert context[f"{one}_nats"] == pytest.approx(plain[f"{other}_nats"], rel=1e-4)


def test_an_item_that_breaks_stops_no_run(micro_lab, tmp_path, monkeypatch):
    """Nor do those that needed what it should have made."""

    def break_down(*args, **kwargs):
        raise AttributeError("a fault of the check")

    monkeypatch.setattr("taopd.preflight.subject.measure_micro_batch", break_down)
    make_trainer(micro_lab, tmp_path, column=hinted, max_steps=1).train(check=True)
    items = json.loads((tmp_path / "run" / "check.json").read_text())["items"]
    broke = [each for each in items if each["measured"] == "not looked at: the check itself broke"]
    assert {"scoring path", "teacher KL", "teacher context"} <= {each["item"] for each in broke}
    assert {each["level"] for each in broke} == {"warn"}


# -- commands ---------------------------------------------------------------------------------------


def test_the_recipe_checks_plans_and_trains(micro_lab, tmp_path, monkeypatch, capsys):
    """As it is, but on the micro models: `build_lab` is the only thing replaced."""
    import taopd.experiments.lab

    class Lab:
        student, teacher, prompts = micro_lab.student, micro_lab.teacher, micro_lab.prompts

    monkeypatch.setattr(taopd.experiments.lab, "build_lab", lambda *args, **options: Lab)
    recipe = str(ROOT / "recipes" / "teacher-prompt.yaml")
    flags = ["--output_dir", str(tmp_path / "run"), "--per_device_train_batch_size", "8"]
    flags += ["--max_steps", "2", "--save_steps", "2"]
    assert cli.main(["check", recipe, "--json", *flags]) == 0
    items = {item["item"]: item for item in json.loads(capsys.readouterr().out)["items"]}
    prompt, context = items["teacher prompt"], items["teacher context"]
    assert prompt["figures"]["student"] == "0 + 0 =" and prompt["figures"]["teacher"] == "0 0 + 0 ="
    assert ["teacher", "0 "] in prompt["difference"] or ["teacher", " 0"] in prompt["difference"]
    assert context["level"] == "pass" and context["figures"]["with_without_nats"] > 1e-3
    assert cli.main(["plan", "--config", recipe, "--json", *flags]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["settings"]["prompt_length"], planned["settings"]["teacher_prompt_length"]) == (
        5,
        6,
    )
    assert planned["memory_mib"]["reference_weights"] == 0  # the teacher is that copy
    assert planned["teacher"] == planned["student"] and planned["memory_mib"]["teacher_weights"] > 0
    assert cli.main(["train", "--config", recipe, "--quiet", *flags]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 2
    line = json.loads((tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()[0])
    hint, _, rest = line["teacher_prompt"].partition(" ")
    assert (hint, rest) == (line["answer"], line["prompt"])
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "run")]) == 0
    assert f"the teacher reads: {line['teacher_prompt']}" in capsys.readouterr().out


def test_a_study_takes_the_student_as_its_teacher(micro_lab, tmp_path):
    study = parse_study_file(
        {
            "student": str(micro_lab.student),
            "teacher": "self",
            "prompts": str(micro_lab.prompts),
            "config": {
                "max_steps": 1,
                "max_completion_length": 4,
                "per_device_train_batch_size": 4,
                "score_top_k": 4,
                "logging_steps": 1,
                "gradient_checkpointing": False,
                "teacher_prompt_template": TEMPLATE,
            },
            "arms": [{"name": "full", "selector": "full"}],
            "seeds": [0],
            "num_test_prompts": 4,
        }
    )
    plan = plan_study(study)
    write_arm(plan.runs[0], tmp_path / "arm")
    assert run_arm(plan.runs[0], tmp_path / "arm")["steps"] == 1
    # Of one arm alone, too: it would be told when the arms before it have run.
    study.arms.append({"name": "late", "teacher_prompt_template": "{prompt} {none}"})
    with pytest.raises(DataError, match="no column 'none'"):
        plan_study(study)


def test_a_bank_is_frozen_and_measured_with_the_teachers_prompt(micro_lab, tmp_path, capsys):
    folder = tmp_path / "bank"
    command = ["--student", str(micro_lab.student), "--teacher", "self", "--max-tokens", "5"]
    command += [
        "--prompts",
        str(micro_lab.prompts),
        "--num-completions",
        "6",
        "--output",
        str(folder),
    ]
    command += ["--teacher-prompt-template", TEMPLATE]
    assert cli.main(["diagnose", "freeze", *command]) == 0
    bank = FixedContextBank.open(folder)
    start = AutoModelForCausalLM.from_pretrained(micro_lab.student, dtype=torch.float32)
    teachers = bank.rollouts.teacher_prompt_ids
    assert teachers is not None and teachers != bank.rollouts.prompt_ids
    for name, prompts in (("teacher", teachers), ("student", bank.rollouts.prompt_ids)):
        truth = []
        for prompt, completion in zip(prompts, bank.rollouts.completion_ids, strict=True):
            logprobs = own_logprobs(start, prompt, completion)
            truth += logprobs[torch.arange(len(completion)), torch.tensor(completion)].tolist()
        assert abs(bank.tokens[f"{name}_logprob"] - truth).max() < 1e-5
    # The student itself gained nothing, which it would not measure against a teacher without the prompt.
    after = ["--after", str(micro_lab.student)]
    assert cli.main(["diagnose", "gain", str(folder), *after]) == 0
    gains = pd.read_parquet(next((tmp_path / "bank-gain").glob("gain-*.parquet")))
    assert gains["gain_forward"].abs().max() < 1e-6
