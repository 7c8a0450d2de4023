"""What the trainer leans on in TRL. A failure here means: TRL moved, look at the named method."""

import inspect

import pytest
import trl
from packaging.version import Version
from trl import DistillationTrainer

SURFACE = {
    "__init__": [
        "model",
        "teacher_model",
        "args",
        "train_dataset",
        "eval_dataset",
        "processing_class",
    ],
    "_compute_loss": ["unwrapped_student", "inputs", "num_items_in_batch"],
    "_generate_and_score_completions": ["inputs"],
    "_generate_single_turn": ["prompt_ids", "images", "multimodal_fields", "has_tool_images"],
    "_get_last_hidden_state": ["unwrapped_model", "input_ids", "attention_mask", "logits_to_keep"],
    "_get_train_sampler": ["dataset"],
    "_prepare_inputs": ["generation_batch"],
    "prediction_step": ["model", "inputs", "prediction_loss_only"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
}


def test_trl_is_the_version_that_was_read():
    assert Version("1.16") <= Version(trl.__version__) < Version("1.17"), (
        f"TRL {trl.__version__}: compare DistillationTrainer with the overrides in taopd/trainer.py, then "
        "move this test and the range in pyproject.toml"
    )


@pytest.mark.parametrize("name", sorted(SURFACE))
def test_overridden_methods_have_the_parameters_we_pass(name):
    method = getattr(DistillationTrainer, name, None)
    assert method is not None, f"TRL's DistillationTrainer has no {name} any more"
    found = [parameter for parameter in inspect.signature(method).parameters if parameter != "self"]
    assert found[: len(SURFACE[name])] == SURFACE[name]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        # Attributes and batch keys that trainer.py reads or returns.
        (
            "__init__",
            ["self._forward_redirection", "self._tokenizer", "self.temperature", "self._step"],
        ),
        ("_generate_and_score_completions", ['"completion_mask"', '"prompt_mask"', '"tool_mask"']),
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
