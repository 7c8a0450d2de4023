"""What must not change a step: the order of rows, padding, numbers of ids, where a factor of the logits is.

Oracle: the same step before the change. Models in float64: a difference is no rounding.
"""

import copy
import itertools

import pytest
import torch
from datasets import Dataset
from transformers import PhiConfig, PhiForCausalLM

from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.trainer import TeachabilityTrainer
from tests.conftest import WORDS, make_model, make_rows, make_tokenizer
from tests.e2e.test_trainer import CPU, relative_error

NUM_ROWS = 8
SETTINGS = {
    "score_top_k": 4,
    "logging_steps": 1,
    "max_steps": 2,
    "budget": 0.3,
    "collapse_guard": "off",
}
SETTINGS |= {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "shuffle_dataset": False}
SETTINGS |= {"per_device_train_batch_size": NUM_ROWS, "gradient_accumulation_steps": 1}
# Everything is held: which tokens are drawn depends on the order of the rows.
EVERYWHERE = {"anchor_fraction": 1.0, "anchor_responses": 1.0}
CASES = {
    "published": {"method": "published", "loss": "sampled_reverse_kl"},
    "anchored": {"method": "anchored", "reduction": "sample_mean", "loss": "jsd"} | EVERYWHERE,
    "reach": {"method": "reach", "loss": "sampled_reverse_kl"} | EVERYWHERE,
}
LOGGED = ("loss", "select/", "signal/")


def sharp(model):
    """Distributions of a trained model and not nearly uniform ones; float64."""
    with torch.no_grad():
        model.get_output_embeddings().weight *= 25.0
    return model.double()


def phi(seed):
    """A model with a bias in its head."""
    config = PhiConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = sharp(PhiForCausalLM(config))
    torch.nn.init.normal_(model.lm_head.bias, generator=torch.Generator().manual_seed(seed))
    return model


@pytest.fixture(scope="module")
def pair():
    return sharp(make_model(seed=0)), sharp(make_model(seed=1, hidden_size=32))


def completion_of(prompt):
    """Depends on the prompt alone; a third have the length limit, some the end token alone."""
    generator = torch.Generator().manual_seed(sum(i * t for i, t in enumerate(prompt, start=1)))
    length = int(torch.randint(0, 8, (1,), generator=generator))
    ids = torch.randint(4, len(WORDS), (min(6, length),), generator=generator).tolist()
    return ids if length > 5 else [*ids, 2]


def steps(
    tmp_path, student, teacher, *, prompts=None, tokenizer=None, generate=completion_of, **settings
):
    """Logs and gradients of all steps; the models given stay as they are."""
    folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
    given = [row["prompt"] for row in make_rows(2 * NUM_ROWS, "train")]
    trainer = TeachabilityTrainer(
        copy.deepcopy(student),
        teacher,
        TeachabilityConfig(output_dir=str(folder), **(CPU | SETTINGS | settings)),
        train_dataset=Dataset.from_dict({"prompt": prompts or given}),
        processing_class=tokenizer or make_tokenizer(),
    )
    trainer._generate_single_turn = lambda rows, *_, **__: [generate(row) for row in rows]
    gradients, end = [], trainer.nonfinite.end_of_backward

    def note(model, step):
        end(model, step)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})

    trainer.nonfinite.end_of_backward = note
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], gradients


def assert_same(found, truth):
    """Losses, metrics and gradients of all steps."""
    (logs, gradients), (true_logs, true_gradients) = found, truth
    assert len(logs) == len(true_logs) == len(true_gradients) > 0
    for log, expected in zip(logs, true_logs, strict=True):
        known = {key: value for key, value in expected.items() if key.startswith(LOGGED)}
        assert {key: log[key] for key in known} == pytest.approx(known, rel=1e-4, abs=1e-6)
    for grads, expected in zip(gradients, true_gradients, strict=True):
        assert grads.keys() == expected.keys()
        for name, gradient in expected.items():
            assert relative_error(grads[name], gradient) < 1e-5, name


@pytest.mark.parametrize("case", CASES)
def test_the_order_of_the_rows_changes_nothing(pair, tmp_path, case):
    prompts = [row["prompt"] for row in make_rows(2 * NUM_ROWS, "train")]
    mixed = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(0)).tolist()
    other = [prompts[start + row] for start in (0, NUM_ROWS) for row in mixed]
    truth = steps(tmp_path, *pair, prompts=prompts, **CASES[case])
    assert_same(steps(tmp_path, *pair, prompts=other, **CASES[case]), truth)


@pytest.mark.parametrize("case", CASES)
def test_padding_changes_nothing(pair, tmp_path, case):
    settings = CASES[case] | {"gradient_window": 1, "per_device_train_batch_size": 4}
    settings |= {"gradient_accumulation_steps": 2}
    truth = steps(tmp_path, *pair, **settings)
    assert_same(steps(tmp_path, *pair, pad_to_multiple_of=16, **settings), truth)


@pytest.mark.parametrize("case", CASES)
def test_other_numbers_for_the_same_ids_change_nothing(pair, tmp_path, case):
    """Id v is called new[v] in both models, the tokenizer, the completions and the settings."""
    num = len(WORDS)
    new = torch.randperm(num, generator=torch.Generator().manual_seed(1))
    old = new.argsort()
    words = [WORDS[index] for index in old.tolist()]

    def renamed(model):
        model = copy.deepcopy(model)
        for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            matrix.data = matrix.data[old]
        for config in (model.config, model.generation_config):
            config.pad_token_id, config.bos_token_id, config.eos_token_id = new[:3].tolist()
        model.get_input_embeddings().padding_idx = int(new[0])  # A row without a gradient.
        return model

    def generate(prompt):
        return new[torch.tensor(completion_of(old[torch.tensor(prompt)].tolist()))].tolist()

    stops = torch.tensor([2, 7, 9])
    settings = CASES[case] | {"stop_tokens": "merge", "stop_token_ids": stops.tolist()}
    truth = steps(tmp_path, *pair, **settings)
    settings |= {"stop_token_ids": new[stops].tolist()}
    logs, gradients = steps(
        tmp_path,
        *map(renamed, pair),
        tokenizer=make_tokenizer(words),
        generate=generate,
        **settings,
    )
    for grads, name in itertools.product(
        gradients, ("model.embed_tokens.weight", "lm_head.weight")
    ):
        grads[name] = grads[name][new]
    assert_same((logs, gradients), truth)


@pytest.mark.parametrize("case", CASES)
def test_a_constant_on_all_logits_of_a_model_changes_nothing(tmp_path, case):
    student, teacher = phi(0), phi(1)
    truth = steps(tmp_path, student, teacher, **CASES[case])
    with torch.no_grad():
        student.lm_head.bias += 7.0
        teacher.lm_head.bias -= 11.0
    assert_same(steps(tmp_path, student, teacher, **CASES[case]), truth)


@pytest.mark.parametrize("case", ["published", "anchored"])
def test_a_temperature_is_a_factor_of_both_models_logits(pair, tmp_path, case):
    """Not under `method: reach`, which reads the initial student at temperature 1."""
    temperature, settings = 0.6, CASES[case] | {"max_steps": 1}
    truth = steps(tmp_path, *pair, temperature=temperature, **settings)
    models = [copy.deepcopy(model) for model in pair]
    with torch.no_grad():
        for model in models:
            model.lm_head.weight /= temperature
    logs, gradients = steps(tmp_path, *models, **settings)
    gradients[0]["lm_head.weight"] /= temperature
    assert_same((logs, gradients), truth)


@pytest.mark.parametrize("case", CASES)
def test_rows_of_a_head_that_are_no_tokens_change_nothing(tmp_path, case):
    """The vocabulary of either model padded by rows with large logits; those of the student do not train."""
    pairs = (phi(0), phi(1)), [phi(seed) for seed in (0, 1)]
    for number, model in enumerate(pairs[1]):
        model.resize_token_embeddings(len(WORDS) + 8 * (number + 1), mean_resizing=False)
        with torch.no_grad():
            model.lm_head.bias[len(WORDS) :] = 9.0
    truth, (logs, gradients) = (steps(tmp_path, *models, **CASES[case]) for models in pairs)
    padded = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
    for grads, name in itertools.product(gradients, padded):
        assert not bool(grads[name][len(WORDS) :].any())
        grads[name] = grads[name][: len(WORDS)]
    assert_same((logs, gradients), truth)
