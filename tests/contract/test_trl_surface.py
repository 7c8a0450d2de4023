"""Everything private of TRL and transformers that the package leans on, in one list.

A failure here means: TRL or transformers moved. Look at the named method, compare it with our override, then
move this test and the range in pyproject.toml. Oracles: the source of both, read with `ast`.
"""

import ast
import inspect
import textwrap
from pathlib import Path

import pytest
import transformers
import trl
from packaging.version import Version
from trl import DistillationTrainer

import taopd

SOURCE = Path(taopd.__file__).parent
TRAINERS = {
    "trainer/trainer.py": "TeachabilityTrainer",
    "trainer/base.py": "BaseTrainer",
    "trainer/run_record.py": "RecordedRuns",
    "trainer/prompting.py": "PromptTrainer",
    "trainer/checkpoint/mixin.py": "AtomicCheckpoints",
}
OVERRIDES = {
    # Sampling, scoring and loss: TRL's.
    "__init__": "model teacher_model args train_dataset eval_dataset processing_class",
    "_compute_loss": "unwrapped_student inputs num_items_in_batch",
    "_generate_and_score_completions": "inputs",
    "_generate_single_turn": "prompt_ids images multimodal_fields has_tool_images",
    "_get_dataloader": "dataset description batch_size",
    "_get_last_hidden_state": "unwrapped_model input_ids attention_mask logits_to_keep",
    "_get_train_sampler": "dataset",
    "_prepare_inputs": "generation_batch",
    "_set_signature_columns_if_needed": "",
    "_tokenize_prompts": "prompts",
    "create_model_card": "model_name dataset_name tags",
    "compute_loss": "model inputs return_outputs num_items_in_batch",
    "prediction_step": "model inputs prediction_loss_only",
    "training_step": "model inputs num_items_in_batch",
    # transformers' evaluation, wrapping, and batches that do not fit.
    "evaluation_loop": "dataloader description prediction_loss_only ignore_keys metric_key_prefix",
    "create_accelerator_and_postprocess": "",
    "_inner_training_loop": "batch_size",
    "create_optimizer": "model",
    "create_scheduler": "num_training_steps optimizer",
    # Checkpoints: transformers'.
    "train": "resume_from_checkpoint trial ignore_keys_for_eval",
    "save_model": "output_dir _internal_call",
    "_get_output_dir": "trial",
    "_load_best_model": "",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_load_rng_state": "checkpoint",
    "_load_scaler": "checkpoint",
    "_maybe_log_save_evaluate": "tr_loss grad_norm model trial epoch ignore_keys_for_eval start_time "
    "learning_rate",
    "_push_from_checkpoint": "checkpoint_folder",
    "_run_epoch": "model epoch",
    "_save": "output_dir state_dict",
    "_save_checkpoint": "model trial",
    "_save_optimizer_and_scheduler": "output_dir",
    "_save_rng_state": "output_dir",
    "_save_scaler": "output_dir",
}
"""Methods that we override, with the parameters that are passed on, in order."""
PRIVATE = {
    "_buffered_inputs",
    "_forward_redirection",
    "_generate_and_score_completions",
    "_generate_single_turn",
    "_get_dataloader",
    "_get_last_hidden_state",
    "_get_output_dir",
    "_globalstep_last_logged",
    "_inner_training_loop",
    "_load_best_model",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_scaler",
    "_maybe_log_save_evaluate",
    "_metrics",
    "_name",
    "_paper",
    "_prepare_inputs",
    "_push_from_checkpoint",
    "_run_epoch",
    "_save",
    "_save_checkpoint",
    "_save_optimizer_and_scheduler",
    "_save_scaler",
    "_signature_columns",
    "_step",
    "_tokenizer",
    "_tr_loss",
}
"""Their private names that we call, read or set."""
ONLY_IN = "trainer/"


def test_trl_and_transformers_are_the_versions_that_were_read():
    assert Version("1.16") <= Version(trl.__version__) < Version("1.17")
    assert Version("5.13") <= Version(transformers.__version__) < Version("6")


def their_names() -> set[str]:
    """Methods of TRL's trainer and its parents, and every attribute that they set or read on themselves."""
    names: set[str] = set()
    for parent in DistillationTrainer.__mro__[:-1]:
        names |= set(vars(parent))
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(parent)))
        except (OSError, TypeError):  # a class of the standard library without Python source
            continue
        names |= {node.attr for node in ast.walk(tree) if is_on(node, {"self"})}
    return names


def is_on(node: ast.AST, owners: set[str]) -> bool:
    """Whether a node reads an attribute of one of these variables, or of an attribute named so."""
    if not isinstance(node, ast.Attribute):
        return False
    owner = node.value
    if isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name):
        return owner.func.id in owners
    return getattr(owner, "id", getattr(owner, "attr", None)) in owners


def our_classes() -> dict[str, ast.ClassDef]:
    found = {}
    for file, name in TRAINERS.items():
        for node in ast.parse((SOURCE / file).read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                found[name] = node
    return found


def touched() -> dict[str, set[str]]:
    """Their private names by the file of ours that uses them on a trainer."""
    theirs, found = their_names(), {}
    for path in sorted(SOURCE.rglob("*.py")):
        file = str(path.relative_to(SOURCE))
        tree = ast.parse(path.read_text())
        nodes = [node for node in ast.walk(tree) if is_on(node, {"trainer", "_trainer"})]
        if file in TRAINERS:
            nodes += [node for node in ast.walk(tree) if is_on(node, {"self", "super"})]
        names = {node.attr for node in nodes if node.attr.startswith("_")}
        ours = {name for name in names & theirs if not name.startswith("__")}
        if ours:
            found[file] = ours
    return found


def test_every_override_is_listed_and_no_other():
    theirs, classes = their_names(), our_classes()
    assert len(classes) == len(TRAINERS)
    ours = {
        item.name
        for node in classes.values()
        for item in node.body
        if isinstance(item, ast.FunctionDef) and item.name in theirs
    }
    assert ours == set(OVERRIDES)


@pytest.mark.parametrize("name", sorted(OVERRIDES))
def test_overridden_methods_have_the_parameters_we_pass(name):
    method = getattr(DistillationTrainer, name, None)
    assert method is not None, f"DistillationTrainer has no {name} any more"
    found = [parameter for parameter in inspect.signature(method).parameters if parameter != "self"]
    expected = OVERRIDES[name].split()
    assert found[: len(expected)] == expected


def test_every_private_name_that_we_touch_is_listed_and_no_other():
    assert set().union(*touched().values()) == PRIVATE
    assert their_names() >= PRIVATE


def test_private_names_are_touched_in_one_room():
    assert [file for file in touched() if not file.startswith(ONLY_IN)] == []


def test_nothing_private_is_imported():
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                library, *rest = node.module.split(".")
                if library in ("trl", "transformers", "accelerate"):
                    names = [*rest, *(alias.name for alias in node.names)]
                    assert not any(name.startswith("_") for name in names), f"{path}: {names}"


@pytest.mark.parametrize(
    ("method", "words"),
    [
        # Attributes and batch keys that the overrides read or return.
        (
            "__init__",
            [
                "self._forward_redirection",
                "self._tokenizer",
                "self.temperature",
                "self._step",
                "self.eos_token_ids = eos_token_ids",
            ],
        ),
        ("_generate", ["self._tokenize_prompts(prompts)"]),
        (
            "_generate_and_score_completions",
            ['x["prompt"] for x in inputs', '"completion_mask"', '"prompt_mask"', '"tool_mask"'],
        ),
        (
            "_prepare_inputs",
            ["self._buffered_inputs", "shuffle_sequence_dict", "split_tensor_dict"],
        ),
        ("compute_loss", ["self._compute_loss", "entropy_sum", "num_valid_tokens"]),
        ("log", ["self._metrics"]),
        ("training_step", ["self.current_gradient_accumulation_steps"]),
    ],
)
def test_names_that_the_overrides_rely_on_are_still_there(method, words):
    source = inspect.getsource(getattr(DistillationTrainer, method))
    for word in words:
        assert word in source, f"DistillationTrainer.{method} no longer has {word}"
