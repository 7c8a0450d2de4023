"""The trainer's arguments given as another kind: refused by name before anything is loaded or trained."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from test_trainer import CPU

from taopd.errors import ConfigError, TaopdError, TeacherError
from taopd.trainer.build.given_arguments import given_models
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.trainer import TeachabilityTrainer
from tests.conftest import make_model, make_rows, make_tokenizer
from tests.scripted_server import ScriptedServer

ROWS = Dataset.from_list(make_rows(16, "train"))
KINDLESS = [3, "x", True, object(), ["x"], [3], {"a": 1}, b"x"]
ARGUMENTS = {
    "model": "model",
    "teacher_model": "(the )?teacher",
    "args": "args",
    "train_dataset": "the training set",
    "eval_dataset": "the evaluation set",
    "processing_class": ".*processing_class",
    "callbacks": "callbacks: must be",
    "optimizers": "optimizers: must be",
    "quantization_config": "quantization_config: must be",
    "peft_config": ".*(peft_config|PeftConfig)",
    "tools": "tools: must be",
}
"""By argument, how its refusal begins; TRL refuses `processing_class` and `peft_config`."""
FITS = {"model": ["x"], "teacher_model": ["x"], "quantization_config": [{"a": 1}]}
"""Names of models and a mapping are of the right kind."""


def trainer(folder, **given):
    settings = TeachabilityConfig(output_dir=str(folder / "run"), **CPU | {"max_steps": 1})
    return TeachabilityTrainer(
        **{
            "model": make_model(seed=0, hidden_size=16),
            "teacher_model": make_model(seed=1, hidden_size=16),
            "args": settings,
            "train_dataset": ROWS,
            "processing_class": make_tokenizer(),
            **given,
        }
    )


def test_float16_weights_are_refused_where_their_optimizer_would_wreck_them(tmp_path):
    """Measured with adamw_torch_fused: an update of norm 448 in place of 0.06, at a finite loss."""
    half = {"model": make_model(seed=0).half(), "teacher_model": make_model(seed=1).half()}
    with pytest.raises(
        ConfigError, match=r"weights are float16.*adamw_torch_fused.*dtype: float32"
    ):
        trainer(tmp_path, **half)
    adam = torch.optim.Adam(half["model"].parameters())
    with pytest.raises(ConfigError, match=r"weights are float16.* Adam keeps"):
        trainer(tmp_path, **half, optimizers=(adam, None))


def test_float16_weights_train_where_no_square_is_kept_in_float16(tmp_path):
    """Squares in float32 (adafactor), none (SGD), and an adapter, whose weights peft makes float32."""
    norms = {}
    for dtype in (torch.float16, torch.float32):
        half = {
            "model": make_model(seed=0).to(dtype),
            "teacher_model": make_model(seed=1).to(dtype),
        }
        settings = CPU | {
            "max_steps": 2,
            "logging_steps": 1,
            "optim": "adafactor",
            "learning_rate": 1e-3,
        }
        args = TeachabilityConfig(
            output_dir=str(tmp_path / str(dtype)), selector="full", **settings
        )
        made = trainer(tmp_path, **half, args=args)
        made.train(check=False)
        norms[dtype] = [log["update/norm"] for log in made.state.log_history if "loss" in log]
    assert norms[torch.float16] == pytest.approx(norms[torch.float32], rel=0.05)
    model = make_model(seed=0).half()
    trainer(tmp_path, model=model, optimizers=(torch.optim.SGD(model.parameters()), None))
    trainer(
        tmp_path, model=make_model(seed=0).half(), peft_config=LoraConfig(task_type="CAUSAL_LM")
    )


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_of_another_kind_is_named(name, tmp_path):
    for wrong in KINDLESS:
        if wrong in FITS.get(name, []):
            continue
        with pytest.raises((TaopdError, TypeError), match=f"^{ARGUMENTS[name]}"):
            trainer(tmp_path, **{name: wrong})
    for mapping in ({"prompt": ["a"]}, DatasetDict(train=ROWS)):
        if name == "train_dataset":
            with pytest.raises(TaopdError, match=r"^the training set is a"):
                trainer(tmp_path, train_dataset=mapping)


def test_optimizers_that_are_no_pair_or_not_the_students_are_refused(tmp_path):
    model, other = make_model(seed=0, hidden_size=16), make_model(seed=1, hidden_size=16)
    mine, others = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, other))
    schedules = [torch.optim.lr_scheduler.ConstantLR(each) for each in (mine, others)]
    wrong = [None, (), (mine,), (mine, None, None), mine, (torch.optim.SGD, {"lr": 1}), (3, None)]
    # A schedule of nothing that trains.
    wrong += [(None, schedules[0]), (mine, schedules[1]), (schedules[0], mine), (mine, "linear")]
    for pair in wrong:
        with pytest.raises(ConfigError, match=r"^optimizers: must be .*, not a "):
            trainer(tmp_path, model=model, optimizers=pair)
    with pytest.raises(ConfigError, match=r"^optimizers: .* no parameter of the student"):
        trainer(tmp_path, model=model, optimizers=(others, None))
    # TRL puts an adapter of its own into the model: its weights are in no group of this optimizer.
    with pytest.raises(
        ConfigError, match=r"^optimizers: .* no parameter of the student that trains"
    ):
        adapter = LoraConfig(target_modules=["q_proj"])
        trainer(tmp_path, model=model, optimizers=(mine, None), peft_config=adapter)
    model = make_model(seed=0, hidden_size=16)
    mine = torch.optim.SGD(model.parameters(), lr=0.1)
    schedules = [torch.optim.lr_scheduler.ConstantLR(mine)]
    for pair in ((mine, schedules[0]), [mine, None], (None, None)):
        made = trainer(tmp_path, model=model, optimizers=pair)
        assert (made.optimizer, made.lr_scheduler) == tuple(pair)


def trainer_with(folder, **settings):
    return trainer(folder, args=TeachabilityConfig(output_dir=str(folder), **(CPU | settings)))


def test_a_named_optimizer_that_cannot_be_made_is_told_before_the_run_folder(tmp_path, monkeypatch):
    with pytest.raises(ImportError, match="lomo"):
        trainer_with(tmp_path / "run", optim="lomo")
    with pytest.raises(ConfigError, match=r"^optim='sgd', optim_args='momentum'"):
        trainer_with(tmp_path / "run", optim="sgd", optim_args="momentum")
    # As if the package were there.
    adam = (torch.optim.AdamW, {"lr": 1.0})
    monkeypatch.setattr(transformers.Trainer, "get_optimizer_cls_and_kwargs", lambda *_: adam)
    with pytest.raises(ConfigError, match=r"^optim='grokadamw' keeps its state where"):
        trainer_with(tmp_path / "run", optim="grokadamw", save_strategy="epoch")
    trainer_with(tmp_path / "run", optim="grokadamw", save_strategy="no")


@pytest.mark.parametrize(
    ("optim", "read", "unread"),
    [
        ("adamw_torch", "", "amsgrad=True"),
        ("adafactor", "", "scale_parameter=True"),
        ("sgd", "momentum=0.9, nesterov=true", "momentun=0.9"),
        ("adagrad", "lr_decay=0", "momentum=0.9"),
        ("rmsprop", "alpha=0.9,centered=no,eps=1e-8", "centred=yes"),
    ],
)
def test_an_optimizers_argument_that_it_does_not_read_is_refused(optim, read, unread, tmp_path):
    """transformers drops it: the run would be that of the default."""
    trainer_with(tmp_path, optim=optim, optim_args=read)
    told = rf"{optim} does not read '{unread.partition('=')[0]}'"
    with pytest.raises(ConfigError, match=told):
        trainer_with(tmp_path, optim=optim, optim_args=f"{read},{unread}".strip(","))


class Keyed(torch.optim.SGD):
    """Keeps something by the parameter itself, as grokadamw does."""

    def step(self, closure=None):
        self.param_groups[0]["own"] = {self.param_groups[0]["params"][0]: 1}
        return super().step(closure)


def test_a_compiled_student_is_saved_as_what_it_is(tmp_path, caplog):
    """Its weights were saved under other names, in checkpoints too: no folder was loaded again."""
    model, teacher = (make_model(seed=seed, hidden_size=16) for seed in (0, 1))
    compiled = [torch.compile(each, backend="eager") for each in (model, teacher)]
    made = trainer(tmp_path, model=compiled[0], teacher_model=compiled[1])
    assert made.model is model and made.teacher_model is teacher
    assert "torch.compile has no effect" in caplog.text
    several = given_models(model, {"math": compiled[1], "code": Path("x"), "all": teacher})[1]
    assert several == {"math": teacher, "code": "x", "all": teacher}


def test_a_schedule_that_cannot_be_made_is_told_before_the_run_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"^lr_scheduler_type='cosine_with_min_lr'"):
        trainer_with(tmp_path, lr_scheduler_type="cosine_with_min_lr")
    trainer_with(
        tmp_path, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-5}
    )


def test_names_of_an_adapter_that_no_module_has_are_told(tmp_path, caplog):
    """peft passes over them as long as another one fits."""
    config = LoraConfig(
        target_modules=["q_proj", "k_project"],
        modules_to_save=["lm_head", "lm_haed"],
        task_type="CAUSAL_LM",
    )
    trainer(tmp_path, peft_config=config)
    told = [line for line in caplog.messages if "no module of the model is called" in line]
    assert [line.rpartition(" ")[2] for line in told] == ["'k_project'", "'lm_haed'"]


def test_an_optimizer_whose_state_no_checkpoint_holds_is_told_after_one_step(tmp_path):
    for saving in ("steps", "no"):
        model = make_model(seed=0, hidden_size=16)
        args = {"max_steps": 2, "save_strategy": saving, "save_steps": 50}
        args = TeachabilityConfig(output_dir=str(tmp_path / saving), **(CPU | args))
        pair = Keyed(model.parameters(), lr=0.1), None
        made = trainer(tmp_path, model=model, args=args, optimizers=pair)
        if saving == "no":
            made.train(check=False)
        else:
            with pytest.raises(ConfigError, match=r"no checkpoint .* optimizer Keyed .*pickle"):
                made.train(check=False)
        assert made.state.global_step == (1 if saving == "steps" else 2)


def test_a_checkpoint_of_another_optimizer_is_told_as_such(tmp_path):
    trainer_with(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train(check=False)
    model = make_model(seed=0, hidden_size=16)
    pair = torch.optim.SGD([{"params": [each]} for each in model.parameters()], lr=0.1), None
    args = TeachabilityConfig(output_dir=str(tmp_path), **(CPU | {"max_steps": 2}))
    made = trainer(tmp_path, model=model, args=args, optimizers=pair)
    with pytest.raises(ConfigError, match=r"checkpoint-1 is of another optimizer, or of other"):
        made.train(resume_from_checkpoint=True, check=False)


@pytest.mark.parametrize("name", ["model", "teacher_model"])
@pytest.mark.parametrize(
    ("value", "told"),
    [("", "must be text that is not empty"), ("/nowhere/x", "no such .* folder: /nowhere/x")],
)
def test_a_model_that_is_nowhere_is_named(name, value, told, tmp_path):
    with pytest.raises(TaopdError, match=told):
        trainer(tmp_path, **{name: value})


def by_name(micro_lab, folder, teacher, args=None, **settings):
    """A trainer, and what its log warns of; the teacher is an argument."""
    where = str(folder / "run")
    args = args or TeachabilityConfig(where, **CPU | {"max_steps": 1, "score_top_k": 4} | settings)
    return TeachabilityTrainer(str(micro_lab.student), teacher, args, train_dataset=ROWS)


@pytest.mark.parametrize("named", [None, "student"])
def test_the_run_folder_names_the_teacher_that_was_given_and_the_next_trainer_may_have_another(
    micro_lab, tmp_path, named, caplog
):
    other = named and str(micro_lab.student)
    made = by_name(micro_lab, tmp_path, str(micro_lab.teacher), teacher_model_name_or_path=other)
    made.train(check=False)
    settings = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert settings["teacher_model_name_or_path"] == str(micro_lab.teacher)
    assert ("is not read" in caplog.text) == bool(other)
    # The settings are the caller's: a name that was filled in is nobody's with another teacher.
    by_name(micro_lab, tmp_path, make_model(seed=1, hidden_size=16), made.args)
    assert made.args.teacher_model_name_or_path is None


def test_a_served_teacher_that_is_named_as_an_argument_is_compared_with_the_server(
    micro_lab, tmp_path
):
    asked = {"loss": "sampled_reverse_kl"}
    with (
        ScriptedServer(make_model(seed=1, hidden_size=16)) as server,
        pytest.raises(TeacherError, match=r"serves 'tiny-teacher', and .*'.*/teacher'"),
    ):
        by_name(micro_lab, tmp_path, micro_lab.teacher, teacher_url=server.url, **asked)


@pytest.mark.parametrize("where", ["argument", "setting"])
def test_an_address_in_place_of_the_teachers_name_is_told_where_it_belongs(
    micro_lab, tmp_path, where
):
    address = "http://localhost:8000"
    with pytest.raises(ConfigError, match=r"is an address.*teacher_url"):
        if where == "argument":
            by_name(micro_lab, tmp_path, address)
        by_name(micro_lab, tmp_path, None, teacher_model_name_or_path=address)


def test_the_student_as_its_own_teacher_beside_another_is_refused(micro_lab, tmp_path):
    own = {"teacher_model_name_or_path": "self"}
    with pytest.raises(ConfigError, match=r"'self' and a teacher_model: one of them"):
        by_name(micro_lab, tmp_path, make_model(seed=1, hidden_size=16), **own)
    with pytest.raises(ConfigError, match=r"teacher_url beside .*'self'"):
        by_name(micro_lab, tmp_path, "self", teacher_url="http://localhost:9", loss="sampled_tv")
