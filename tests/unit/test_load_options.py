"""Options of loading by their older names, wherever a default of ours stands beside them."""

from types import SimpleNamespace

import pytest
import torch

from taopd.models.load_options import current_names, safe_options
from taopd.teachers import load_teacher
from taopd.trainer.build.loaded_teacher import weights_of
from taopd.trainer.cost.settings import _dtype
from tests.conftest import make_model, make_tokenizer


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_both_names_of_the_dtype_count_beside_the_default(micro_lab, name):
    student, tokenizer = make_model(seed=0), make_tokenizer()
    given = {name: "bfloat16"}
    teacher, _ = load_teacher(str(micro_lab.teacher), student, tokenizer, init_kwargs=given)
    assert teacher.dtype == torch.bfloat16
    assert _dtype(given, "float32", None) == "bfloat16"
    assert safe_options(given)["dtype"] == "bfloat16"
    of = [
        weights_of(
            SimpleNamespace(
                teacher_url=None,
                teacher_model_name_or_path="x",
                teacher_model_revision=None,
                teacher_model_init_kwargs=options,
                teacher_quantization=None,
                teacher_offload=None,
            )
        )
        for options in (given, {"dtype": "bfloat16"}, None)
    ]
    assert of[0] == of[1] != of[2]


def test_the_newer_name_wins_and_the_options_given_stay_as_they_are():
    given = {"torch_dtype": "float16", "dtype": "bfloat16"}
    assert current_names(given) == {"dtype": "bfloat16"}
    assert given == {"torch_dtype": "float16", "dtype": "bfloat16"}
    assert current_names({"torch_dtype": None}) == current_names(None) == {}
