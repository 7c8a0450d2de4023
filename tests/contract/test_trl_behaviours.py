"""What TRL promises of its distillation trainer, for both classes side by side.

Every behaviour runs with `trl.DistillationTrainer`, with ours and `selector="full"`, and with our defaults.
Where we differ on purpose, the guide says so: "Where this differs from TRL".
"""

import inspect
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch.nn.functional import log_softmax
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)
from trl import DistillationConfig, DistillationTrainer

from taopd import TeachabilityConfig, TeachabilityTrainer
from tests.conftest import make_tokenizer

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
CALLS = ("<tool_call>", "</tool_call>")
PROMPTS = [f"{i} + {i % 3} =" if i % 2 else f"what is {i} ?" for i in range(7)]
CPU = {
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 3,
    "max_completion_length": 8,
    "max_steps": 2,
    "save_strategy": "no",
    # Large: the gradients of a random model are small, and every parameter must be seen to move.
    "learning_rate": 0.1,
}


@dataclass(frozen=True)
class Subject:
    """One of the classes under test, with what is added to its settings."""

    trainer: Any
    config: Any
    settings: dict[str, Any]

    def make(self, lab, folder, *, args=None, model=None, teacher=None, train=None, **rest):
        """A trainer on the micro models; `args` are settings, the rest goes to the trainer."""
        settings = CPU | self.settings | (args or {})
        return self.trainer(
            model=str(lab.student) if model is None else model,
            teacher_model=str(lab.teacher) if teacher is None else teacher,
            args=self.config(output_dir=str(folder), **settings),
            train_dataset=prompts() if train is None else train,
            **rest,
        )


SUBJECTS = {
    "TRL": Subject(DistillationTrainer, DistillationConfig, {}),
    "full": Subject(TeachabilityTrainer, TeachabilityConfig, {"selector": "full"}),
    "defaults": Subject(TeachabilityTrainer, TeachabilityConfig, {}),
}
OURS = ("full", "defaults")


@pytest.fixture(params=SUBJECTS)
def subject(request) -> Subject:
    return SUBJECTS[request.param]


@dataclass(frozen=True)
class Lab:
    student: Path
    teacher: Path
    other: Path
    """A model with another tokenizer."""


def byte_tokenizer(*, pad: str | None = "<|endoftext|>"):
    """One token a byte, with the chat template of Qwen3 that TRL knows how to read tool calls from."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIALS))
    core.add_tokens(list(CALLS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token=pad, padding_side="left"
    )
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def make_model(seed: int, width: int, vocab_size: int):
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        eos_token_id=258,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    root = tmp_path_factory.mktemp("contract")
    for name, seed, width in (("student", 0, 16), ("teacher", 1, 32)):
        tokenizer = byte_tokenizer()
        make_model(seed, width, len(tokenizer)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    words = make_tokenizer()
    make_model(2, 16, len(words)).save_pretrained(root / "other")
    words.save_pretrained(root / "other")
    return Lab(root / "student", root / "teacher", root / "other")


def prompts(*, chat: bool = False) -> Dataset:
    rows = [[{"role": "user", "content": text}] for text in PROMPTS] if chat else PROMPTS
    return Dataset.from_dict({"prompt": rows})


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def is_trained(trainer) -> bool:
    """The run ended with a finite loss and finite weights."""
    loss = trainer.state.log_history[-1]["train_loss"]
    finite = all(torch.isfinite(value).all() for value in trainer.model.parameters())
    return finite and bool(torch.isfinite(torch.tensor(loss)))


def own_batch(trainer, *, seed: int = 5) -> dict[str, torch.Tensor]:
    """A batch as TRL's `_generate_and_score_completions` returns it: no column of ours."""
    generator = torch.Generator().manual_seed(seed)
    vocab = trainer.model.config.vocab_size
    mask = torch.ones(2, 3, dtype=torch.long)
    mask[1, -1] = 0
    return {
        "prompt_ids": torch.randint(0, vocab, (2, 4), generator=generator),
        "prompt_mask": torch.ones(2, 4, dtype=torch.long),
        "completion_ids": torch.randint(0, vocab, (2, 3), generator=generator),
        "completion_mask": mask,
    }


def divergence_by_definition(trainer, batch, beta: float) -> torch.Tensor:
    """Sum over completion tokens of the generalized JSD, from both models' logits, in float64."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    width = batch["completion_ids"].shape[1]
    p, q = (
        log_softmax(
            model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1].double(), -1
        ).exp()
        for model in (trainer.model, trainer.teacher_model)
    )

    def kl(a, b):
        return (a * (a.log() - b.log())).sum(-1)

    if beta in (0.0, 1.0):
        each = kl(q, p) if beta == 0.0 else kl(p, q)
    else:
        mixture = (1 - beta) * p + beta * q
        each = beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)
    return (each * batch["completion_mask"]).sum()


# -- construction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [DistillationTrainer, TeachabilityTrainer])
def test_args_may_be_left_out(lab, tmp_path, monkeypatch, cls):
    monkeypatch.chdir(tmp_path)
    # Where there is no GPU, transformers takes bf16, TRL's default, only with use_cpu.
    monkeypatch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: True)
    trainer = cls(model=str(lab.student), teacher_model=str(lab.teacher), train_dataset=prompts())
    assert trainer.args.output_dir == "student-Distillation"
    assert trainer.args.logging_steps == 10


@pytest.mark.parametrize("cls", [DistillationTrainer, TeachabilityTrainer])
def test_arguments_by_position_have_trls_order(lab, tmp_path, cls):
    seen = []

    class Seen(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            seen.append(True)

    train, test = prompts(), prompts().select(range(3))
    model = AutoModelForCausalLM.from_pretrained(lab.student)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    tokenizer = byte_tokenizer()
    args = DistillationConfig(str(tmp_path), **CPU)
    trainer = cls(
        *(model, str(lab.teacher), args, train, test, tokenizer, [Seen()]),
        *((optimizer, schedule), None, None, None),
    )
    assert trainer.train_dataset is train
    assert trainer.eval_dataset is test
    assert trainer.processing_class is tokenizer
    trainer.train()
    assert seen
    assert type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)) is torch.optim.SGD


def test_the_trainer_takes_every_parameter_of_trls():
    signature = inspect.signature(TeachabilityTrainer)
    names = list(inspect.signature(DistillationTrainer).parameters)
    signature.bind(*names)
    signature.bind(**dict.fromkeys(names))


def test_the_config_takes_every_field_of_trls_with_trls_default(tmp_path):
    theirs, ours = (kind(str(tmp_path), **CPU) for kind in (DistillationConfig, TeachabilityConfig))
    for entry in fields(DistillationConfig):
        mine, own = getattr(theirs, entry.name), getattr(ours, entry.name)
        assert own == mine or str(own) == str(mine), entry.name


def test_a_plain_config_of_trl_gets_our_defaults(lab, tmp_path):
    # First: transformers forgets the state of the processes with every config that is made.
    ours = TeachabilityConfig(str(tmp_path), beta=0.25, save_steps=7, **CPU | {"max_steps": 1})
    plain = DistillationConfig(str(tmp_path), beta=0.25, save_steps=7, **CPU | {"max_steps": 1})
    trainer = TeachabilityTrainer(str(lab.student), str(lab.teacher), plain, prompts())
    assert type(trainer.args) is TeachabilityConfig
    assert (trainer.args.loss, trainer.args.beta, trainer.args.save_steps) == ("jsd", 0.25, 7)
    loading = {"model_init_kwargs": trainer.args.model_init_kwargs}
    loading["teacher_model_name_or_path"] = str(lab.teacher)
    assert trainer.args.to_dict() == ours.to_dict() | loading
    trainer.train()
    assert is_trained(trainer)
    # The caller's object stays what it was.
    assert type(plain) is DistillationConfig
    assert not hasattr(plain, "budget")


@pytest.mark.parametrize(
    ("beta", "loss"), [(0.0, "forward_kl"), (0.25, "jsd"), (0.5, "jsd"), (1.0, "reverse_kl")]
)
def test_beta_alone_chooses_the_loss(tmp_path, beta, loss):
    config = TeachabilityConfig(str(tmp_path), beta=beta, **CPU)
    assert (config.loss, config.beta) == (loss, beta)


def test_a_model_of_a_path_is_float32_unless_told_otherwise(lab, tmp_path, subject):
    assert subject.make(lab, tmp_path).model.dtype == torch.float32
    told = {
        "model_init_kwargs": {"dtype": "bfloat16"},
        "teacher_model_init_kwargs": {"dtype": "bfloat16"},
    }
    trainer = subject.make(lab, tmp_path, args=told)
    assert trainer.model.dtype == trainer.teacher_model.dtype == torch.bfloat16


def test_pad_token_falls_back_to_the_end_token_in_every_config(lab, tmp_path, subject):
    tokenizer = byte_tokenizer(pad=None)
    trainer = subject.make(lab, tmp_path, processing_class=tokenizer)
    pad = trainer.processing_class.pad_token_id
    assert pad == tokenizer.eos_token_id
    assert trainer.model.config.pad_token_id == trainer.model.generation_config.pad_token_id == pad


def test_dropout_is_disabled_if_asked(lab, tmp_path, subject):
    class Dropped(Qwen3ForCausalLM):
        pass

    model = AutoModelForCausalLM.from_pretrained(lab.student)
    model.model.layers[0].mlp.dropout = torch.nn.Dropout(0.5)
    subject.make(lab, tmp_path, model=model, args={"disable_dropout": True})
    assert model.model.layers[0].mlp.dropout.p == 0.0


@pytest.mark.parametrize("kind", ["dataset", "iterable", "dict", "dict of iterable", "none"])
def test_eval_datasets_of_every_kind(lab, tmp_path, subject, kind):
    rows = prompts().select(range(3))
    rows = rows.to_iterable_dataset() if "iterable" in kind else rows
    given = None if kind == "none" else rows
    given = {"one": rows, "two": rows} if kind == "dict of iterable" else given
    given = DatasetDict({"one": rows, "two": rows}) if kind == "dict" else given
    trainer = subject.make(lab, tmp_path, eval_dataset=given)
    if "dict" in kind:
        assert set(trainer.eval_dataset) == {"one", "two"}
    else:
        assert trainer.eval_dataset is given


# -- refusals -------------------------------------------------------------------------------------


def refusals(lab) -> dict[str, tuple[type[Exception], str, dict[str, Any]]]:
    stream = prompts().to_iterable_dataset()
    return {
        "head adapter": (
            ValueError,
            "lm_head",
            {"peft_config": LoraConfig(target_modules=["q_proj", "lm_head"])},
        ),
        "prompt learning": (
            ValueError,
            "[Pp]rompt-learning",
            {"peft_config": PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")},
        ),
        "no peft config": (TypeError, "PeftConfig", {"peft_config": {"r": 8}}),
        "no tokenizer": (TypeError, "processing_class", {"processing_class": object()}),
        "dispatched stream": (
            ValueError,
            "dispatch_batches",
            {"train": stream, "args": {"accelerator_config": {"dispatch_batches": True}}},
        ),
        "quantization twice": (
            ValueError,
            "quantization_config",
            {
                "quantization_config": BitsAndBytesConfig(load_in_4bit=True),
                "args": {"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}},
            },
        ),
        "keywords for a teacher that is loaded": (
            ValueError,
            "teacher_model_init_kwargs",
            {
                "teacher": AutoModelForCausalLM.from_pretrained(lab.teacher),
                "args": {"teacher_model_init_kwargs": {"dtype": "float32"}},
            },
        ),
        "another vocabulary": (ValueError, "vocab_size", {"teacher": str(lab.other)}),
        "a template without tools": (
            ValueError,
            "tool",
            {"tools": [multiply], "processing_class": without_template()},
        ),
    }


def multiply(a: int, b: int) -> int:
    """
    Multiplies two numbers.

    Args:
        a: One number.
        b: The other.

    Returns:
        Their product.
    """
    return a * b


def without_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


REFUSALS = (
    "head adapter",
    "prompt learning",
    "no peft config",
    "no tokenizer",
    "dispatched stream",
    "quantization twice",
    "keywords for a teacher that is loaded",
    "another vocabulary",
    "a template without tools",
)


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(lab, tmp_path, subject, name):
    error, words, arguments = refusals(lab)[name]
    with pytest.raises(error, match=words):
        subject.make(lab, tmp_path, **arguments)


# -- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_moves_every_parameter(lab, tmp_path, subject, accumulation):
    trainer = subject.make(
        lab, tmp_path, args={"gradient_accumulation_steps": accumulation, "logging_steps": 1}
    )
    before = weights_of(trainer)
    trainer.train()
    assert is_trained(trainer)
    assert all(not torch.equal(before[name], now) for name, now in weights_of(trainer).items())
    for key in ("loss", "entropy", "num_tokens", "step_time", "completions/mean_length"):
        assert key in trainer.state.log_history[0], key


def settings_that_train() -> dict[str, dict[str, Any]]:
    sampling = {"top_p": 0.9, "top_k": 10, "min_p": 0.01, "repetition_penalty": 1.1}
    beams = {"do_sample": True, "top_k": 50, "num_beams": 2, "length_penalty": -0.1}
    return {
        "chat": {"train": prompts(chat=True)},
        "chat template keywords": {
            "train": prompts(chat=True),
            "args": {"chat_template_kwargs": {"enable_thinking": False}},
        },
        "stream": {"train": prompts().to_iterable_dataset()},
        "sampling": {"args": sampling},
        "beams": {"args": {"generation_kwargs": beams}},
        "padding": {"args": {"pad_to_multiple_of": 8}},
        "temperature": {"args": {"temperature": 0.7}},
        "beta between": {"args": {"beta": 0.5}},
        "beta 0": {"args": {"beta": 0.0}},
        "workers": {"args": {"dataloader_num_workers": 2}},
        "other columns": {
            "train": prompts().add_column("note", PROMPTS),
            "args": {"remove_unused_columns": True},
        },
        "no checkpointing": {"args": {"gradient_checkpointing": False}},
        "bfloat16": {"args": {"bf16": True}},
        "evaluation": {
            "eval_dataset": prompts().select(range(3)),
            "args": {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
        },
    }


SETTINGS = tuple(settings_that_train())


@pytest.mark.parametrize("name", SETTINGS)
def test_training_with(lab, tmp_path, subject, name):
    trainer = subject.make(lab, tmp_path, **settings_that_train()[name])
    trainer.train()
    assert is_trained(trainer)
    assert trainer.state.global_step == 2
    if name == "evaluation":
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert len(losses) == 3
        assert torch.isfinite(torch.tensor(losses)).all()


@pytest.mark.parametrize("as_object", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_of_an_adapter_leaves_the_base(lab, tmp_path, subject, as_object, checkpointing):
    model, config = AutoModelForCausalLM.from_pretrained(lab.student), LoraConfig()
    trainer = subject.make(
        lab,
        tmp_path,
        model=get_peft_model(model, config) if as_object else model,
        peft_config=None if as_object else config,
        args={"gradient_checkpointing": checkpointing},
    )
    before = weights_of(trainer)
    trainer.train()
    assert is_trained(trainer)
    for name, now in weights_of(trainer).items():
        assert torch.equal(before[name], now) != ("lora" in name), name


def test_a_new_adapter_follows_the_seed(lab, tmp_path, subject):
    made = []
    for state in (1, 2):
        torch.manual_seed(state)
        trainer = subject.make(lab, tmp_path, peft_config=LoraConfig())
        made.append(
            {name: value for name, value in weights_of(trainer).items() if "lora_A" in name}
        )
    assert made[0]
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())


def test_a_head_that_is_saved_whole_trains(lab, tmp_path, subject):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    trainer = subject.make(lab, tmp_path, peft_config=config)
    before = weights_of(trainer)
    trainer.train()
    moved = [
        name for name, now in weights_of(trainer).items() if not torch.equal(before[name], now)
    ]
    assert any("lm_head.modules_to_save" in name for name in moved)


def test_a_stream_needs_one_worker_and_no_dispatch(lab, tmp_path, subject):
    stream = prompts().to_iterable_dataset()
    trainer = subject.make(lab, tmp_path, train=stream, args={"dataloader_num_workers": 4})
    assert trainer.args.dataloader_num_workers == 0
    assert trainer.args.accelerator_config.dispatch_batches is False
    trainer = subject.make(lab, tmp_path, eval_dataset=stream, args={"dataloader_num_workers": 4})
    assert trainer.get_train_dataloader().num_workers == 4
    assert trainer.get_eval_dataloader().num_workers == 0
    assert trainer.args.dataloader_num_workers == 4


@pytest.mark.parametrize("kind", ["dataset", "stream", "dict", "dict of streams"])
def test_evaluate_takes_a_dataset(lab, tmp_path, subject, kind):
    rows = prompts().select(range(3))
    rows = rows.to_iterable_dataset() if "stream" in kind else rows
    trainer = subject.make(lab, tmp_path)
    given = {"one": rows, "two": rows} if "dict" in kind else rows
    names = ["one_", "two_"] if "dict" in kind else [""]
    metrics = trainer.evaluate(eval_dataset=given)
    assert all(metrics[f"eval_{name}loss"] > 0 for name in names)


def test_every_end_token_of_the_model_ends_a_completion(lab, tmp_path, subject):
    model = AutoModelForCausalLM.from_pretrained(lab.student)
    end, text = 256, 40
    model.generation_config.eos_token_id = [258, end]
    trainer = subject.make(lab, tmp_path, model=model, args={"logging_steps": 1})
    assert end in trainer.generation_config.eos_token_id
    sampled = torch.tensor([[text, end, text, text]])
    trainer.model.generate = lambda input_ids, **_: torch.cat(
        [input_ids, sampled.expand(len(input_ids), -1)], 1
    )
    trainer.train()
    assert trainer.state.log_history[0]["completions/mean_length"] == 2.0
    assert trainer.state.log_history[0]["completions/clipped_ratio"] == 0.0


def test_tools_are_called_and_their_results_do_not_train(lab, tmp_path, subject):
    tokenizer = byte_tokenizer()
    said = (
        '<tool_call>\n{"name": "multiply", "arguments": {"a": 3, "b": 4}}\n</tool_call><|im_end|>',
        '<tool_call>\n{"name": "multiply", "arguments": {"a": 3, "c": 4}}\n</tool_call><|im_end|>',
        "I know no tool<|im_end|>",
    )
    trainer = subject.make(
        lab,
        tmp_path,
        train=prompts(chat=True),
        tools=[multiply],
        args={"max_completion_length": 400, "max_steps": 1},
    )
    masks = []

    def generate(input_ids, **_):
        texts = said if len(input_ids) == 3 else ["Done<|im_end|>"] * len(input_ids)
        ids = tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
        return torch.cat([input_ids, ids["input_ids"]], 1)

    own = trainer._compute_loss

    def spy(student, inputs, *rest):
        masks.append(inputs["completion_mask"] * inputs["tool_mask"])
        return own(student, inputs, *rest)

    trainer.model.generate, trainer._compute_loss = generate, spy
    trainer.train()
    assert is_trained(trainer)
    log = trainer.state.log_history[-1]
    assert log["tools/call_frequency"] == pytest.approx(2 / 3)
    assert log["tools/failure_frequency"] == pytest.approx(1 / 2)
    # Bytes of what was sampled, over two turns; a tool's answer is longer.
    own_tokens = sum(len(tokenizer(text)["input_ids"]) for text in (*said, *["Done<|im_end|>"] * 2))
    assert int(masks[0].sum()) == own_tokens


def test_completions_are_logged_if_asked(lab, tmp_path, subject):
    args = {"log_completions": True, "logging_steps": 1, "max_steps": 1}
    subject.make(lab, tmp_path, args=args).train()
    assert (tmp_path / "completions" / "completions_00001.parquet").is_file()


def test_a_checkpoint_resumes_and_holds_a_model_card(lab, tmp_path, subject):
    args = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    subject.make(lab, tmp_path, args=args).train()
    card = (tmp_path / "README.md").read_text()
    assert "trl" in card
    # TRL's says that it is a fine-tuned version of None, where the student is a folder.
    assert ("version of `student`" in card) == (subject.trainer is TeachabilityTrainer)
    assert str(lab.student) not in card
    again = subject.make(lab, tmp_path, args=args)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == 2


# -- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
def test_compute_loss_takes_a_batch_of_trls(lab, tmp_path, subject, beta):
    trainer = subject.make(lab, tmp_path, args={"beta": beta, "gradient_checkpointing": False})
    batch = own_batch(trainer)
    number = batch["completion_mask"].sum()
    trainer.model.eval()
    with torch.no_grad():
        total = divergence_by_definition(trainer, batch, beta).item()
        mean = trainer.compute_loss(trainer.model, batch).item()
        told = trainer.compute_loss(trainer.model, batch, num_items_in_batch=number).item()
        half = trainer.compute_loss(trainer.model, batch, num_items_in_batch=2 * number).item()
        pair = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert total > 0.0
    assert mean == pytest.approx(total / number.item(), rel=1e-4)
    assert told == pytest.approx(mean, rel=1e-5)
    assert half == pytest.approx(mean / 2, rel=1e-5)
    assert pair[0].item() == pytest.approx(mean, rel=1e-6)
    assert len(pair) == 2


@pytest.mark.parametrize("name", ["TRL", "full"])
def test_the_loss_of_a_micro_batch_is_its_share_of_the_batch(lab, tmp_path, name):
    trainer = SUBJECTS[name].make(lab, tmp_path, args={"gradient_checkpointing": False})
    batch = own_batch(trainer) | {"num_items_in_batch": torch.tensor(20)}
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(
        divergence_by_definition(trainer, batch, 1.0).item() / 20, rel=1e-4
    )
    loss.backward()
    assert all(value.grad is not None for value in trainer.model.parameters())


def test_with_our_defaults_the_loss_of_trls_batch_is_of_the_budget(lab, tmp_path):
    args = {"gradient_checkpointing": False, "method": "published"}
    trainer = SUBJECTS["defaults"].make(lab, tmp_path, args=args)
    batch = own_batch(trainer)
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    # 5 % of five tokens is one token; later ids of its row, and the other row, cannot reach the loss.
    rows = trainer.model.model.embed_tokens.weight.grad.abs().sum(1).nonzero().squeeze(1)
    reached = set(rows.tolist())
    by_row = [
        set(ids.tolist()) for ids in torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    ]
    assert reached <= by_row[0] or reached <= by_row[1]


# -- intended differences -------------------------------------------------------------------------


def test_the_guide_has_one_list_of_intended_differences():
    text = GUIDE.read_text(encoding="utf-8")
    assert text.count("## Where this differs from TRL") == 1
    listed = text.split("## Where this differs from TRL")[1].split("\n## ")[0]
    for word in ("trust_remote_code", "images", "vocabulary", "compute_loss", "safetensors", "NaN"):
        assert word in listed, word


@pytest.mark.parametrize("name", OURS)
def test_pickled_weights_and_hub_kernels_are_not_read(lab, tmp_path, name):
    for options in ({"use_safetensors": False}, {"use_kernels": True}):
        with pytest.raises(ValueError, match=r"safetensors|kernels"):
            SUBJECTS[name].make(lab, tmp_path, args={"model_init_kwargs": options})


def test_a_padded_teacher_vocabulary_is_cut_to_the_shared_ids(lab, tmp_path):
    padded = make_model(4, 32, 384)
    size = AutoModelForCausalLM.from_pretrained(lab.student).config.vocab_size
    with pytest.raises(ValueError, match="vocab_size"):
        SUBJECTS["TRL"].make(lab, tmp_path, teacher=padded)
    trainer = SUBJECTS["full"].make(lab, tmp_path, teacher=padded)
    assert trainer.vocab_size == size < 384
