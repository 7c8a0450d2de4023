"""What the sampler's log-probs say of every way to sample, and models that count positions.

Oracles: the model's own forward on rows without padding, and the settings that were planted.
"""

import logging

import pytest
import torch
import transformers
from datasets import Dataset

from taopd.errors import ConfigError, DataError
from taopd.preflight.probe import measure_micro_batch
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.trainer import TeachabilityTrainer
from tests.conftest import WORDS, make_model, make_rows, make_tokenizer
from tests.e2e.test_trainer import CPU, OURS, gradients_on_fixed_completions, relative_error

SIZES = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ABSOLUTE = {
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "opt": (
        "OPT",
        {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "max_position_embeddings": 64},
    ),
    "gpt_neo": (
        "GPTNeo",
        {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 64}
        | {"attention_types": [[["global", "local"], 1]]},
    ),
}


def make_family(name, seed):
    kind, sizes = ABSOLUTE[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = getattr(transformers, f"{kind}Config")(**(SIZES | sizes))
        model = getattr(
            transformers, f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel"
        )(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    return model.eval()


def make_trainer(tmp_path, student=None, teacher=None, **settings):
    base = CPU | OURS | {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3}
    return TeachabilityTrainer(
        student if student is not None else make_model(seed=0),
        teacher if teacher is not None else make_model(seed=1),
        TeachabilityConfig(output_dir=str(tmp_path / "run"), **(base | settings)),
        train_dataset=Dataset.from_list(make_rows(8, "train")),
        processing_class=make_tokenizer(),
    )


def drifts(trainer):
    key = "rollout/drift_nats/max"
    return [log[key] for log in trainer.state.log_history if key in log]


@pytest.mark.parametrize("name", sorted(ABSOLUTE))
def test_models_with_absolute_positions_are_scored_as_without_padding(tmp_path, name):
    student, teacher = make_family(name, 0), make_family(name, 1)
    trainer = make_trainer(tmp_path, student, teacher, learning_rate=0.0)
    errors = []

    def compare(scored):
        ids, mask = scored.batch["prompt_ids"], scored.batch["prompt_mask"].bool()
        assert not mask.all(), "vacuous: no padding"
        training = student.training
        student.eval()
        for index, (row, column) in enumerate(
            zip(scored.positions.row.tolist(), scored.positions.column.tolist(), strict=True)
        ):
            written = scored.batch["completion_ids"][row, :column]
            text = torch.cat([ids[row][mask[row]], written])[None]
            token = scored.token_ids[index]
            for model, found in (
                (student, scored.signals.student_logprobs),
                (teacher, scored.signals.teacher_logprobs),
            ):
                own = model(text).logits[0, -1].log_softmax(-1)[token]
                errors.append(float((own - found[index]).abs()))
        student.train(training)

    trainer.observers.append(torch.no_grad()(compare))
    trainer.train()
    assert max(errors) < 1e-4
    assert max(drifts(trainer)) < 1e-4


def test_a_gradient_window_counts_positions_as_the_exact_step(tmp_path):
    pair = [make_family("gpt2", 0), make_family("gpt2", 1)]
    settings = {"selector": "full", "anchor_coef": 0.0, "collapse_guard": "off"}
    for model in pair:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    model_args = {"attn_pdrop": 0.0}
    for model in pair:
        model.config.update(model_args)
    loss, exact = gradients_on_fixed_completions(make_trainer(tmp_path / "a", *pair, **settings))
    exact = {name: gradient.clone() for name, gradient in exact.items()}
    pair[0].zero_grad()
    windowed = make_trainer(tmp_path / "b", *pair, **settings, gradient_window=64)
    again, found = gradients_on_fixed_completions(windowed)
    assert again == pytest.approx(loss, rel=1e-5)
    assert all(
        relative_error(found[name], exact[name]) < 1e-4 for name in exact if exact[name].norm()
    )


def student_with(**settings):
    model = make_model(seed=0)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.mark.parametrize(
    ("of_student", "of_run", "named"),
    [
        ({"suppress_tokens": [5, 6, 7]}, {}, "suppress_tokens=[5, 6, 7]"),
        ({"min_new_tokens": 3}, {}, "min_new_tokens=3"),
        ({}, {"repetition_penalty": 1.5}, "repetition_penalty=1.5"),
        ({}, {"generation_kwargs": {"temperature": 0.25}}, "temperature=0.25"),
        ({}, {"generation_kwargs": {"no_repeat_ngram_size": 1}}, "no_repeat_ngram_size=1"),
        ({}, {"generation_kwargs": {"bad_words_ids": [[4], [5]]}}, "bad_words_ids=[[4], [5]]"),
    ],
)
def test_a_drift_names_the_setting_that_makes_it(
    tmp_path, of_student, of_run, named, monkeypatch, caplog
):
    monkeypatch.setattr("taopd.trainer.sampler_monitor.DRIFT_WARN", 1e-3)
    trainer = make_trainer(tmp_path, student_with(**of_student), **of_run)
    with caplog.at_level(logging.WARNING, logger="taopd"):
        trainer.train()
    assert max(drifts(trainer)) > 1e-3
    assert f"sampling is changed by {named}, which scoring does not follow" in caplog.text


def test_neutral_settings_are_not_named(tmp_path):
    neutral = {"suppress_tokens": None, "repetition_penalty": 1.0, "top_k": 50, "top_p": 0.9}
    trainer = make_trainer(tmp_path, student_with(**neutral), generation_kwargs={"min_length": 0})
    assert (trainer.sampler_monitor.suspects, trainer.sampler_monitor.bias) == ([], None)


@pytest.mark.parametrize(
    ("of_run", "named"),
    [
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"top_k": 5}, "top_k=5"),
        ({"min_p": 0.1}, "min_p=0.1"),
        ({"generation_kwargs": {"do_sample": False}}, "do_sample=False"),
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams=2"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1"),
    ],
)
def test_a_sampled_loss_on_other_draws_is_called_biased(tmp_path, of_run, named, caplog):
    trainer = make_trainer(tmp_path, loss="sampled_reverse_kl", max_steps=1, **of_run)
    with caplog.at_level(logging.WARNING, logger="taopd"):
        trainer.train()
    assert f"{named} changes the draw: the gradient is biased" in caplog.text
    assert make_trainer(tmp_path / "x", loss="reverse_kl", **of_run).sampler_monitor.bias is None


@pytest.mark.parametrize(
    "sampler",
    [{"num_beams": 2}, {"num_beams": 3, "do_sample": False}, {"prompt_lookup_num_tokens": 3}],
)
def test_a_sampler_that_cannot_be_followed_is_not_measured(tmp_path, sampler, caplog):
    with caplog.at_level(logging.WARNING, logger="taopd"):
        # transformers takes drafts for one completion at a time.
        size = 4 if "num_beams" in sampler else 1
        settings = {"per_device_train_batch_size": size, "max_steps": 3}
        trainer = make_trainer(tmp_path, generation_kwargs=sampler, **settings)
        trainer.train()
    assert trainer.state.global_step == 3
    # A draft that is kept as a whole can be followed: then the number is right.
    assert all(drift < 1e-4 for drift in drifts(trainer))
    assert "is not measured for this sampler" in caplog.text or len(drifts(trainer)) == 3
    assert drifts(trainer) == [] or "num_beams" not in sampler


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_return_sequences": 2}, "num_return_sequences changes what sampling returns"),
        ('{"return_dict_in_generate": true}', "return_dict_in_generate changes what"),
        ({"eos_token_id": [3, 5]}, "eos_token_id is read by the sampler alone"),
        ({"stop_strings": ["a"]}, "stop_strings ends a completion at a token that is no end"),
        ({"num_beam": 2}, "'num_beam' is unknown. Did you mean 'num_beams'"),
    ],
)
def test_settings_that_sampling_cannot_take_are_refused(tmp_path, given, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, generation_kwargs=given)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"cache_implementation": "statik"}, "^cache_implementation='statik': Invalid"),
        ({"cache_implementation": "offloaded"}, "^cache_implementation='offloaded' moves keys"),
        (
            {"generation_kwargs": {"cache_implementation": "offloaded_static"}},
            "_static' moves keys",
        ),
        ({"generation_kwargs": {"disable_compile": True}}, "disable_compile is always true here"),
    ],
    ids=str,
)
def test_settings_that_make_no_generation_config_are_refused(tmp_path, settings, told):
    """Oracle: TRL fails with the same, on making the configuration or with the first batch."""
    with pytest.raises(ConfigError, match=told):
        make_trainer(tmp_path, **settings)


@pytest.mark.parametrize(
    "given",
    [
        {"bad_words_ids": []},
        {"suppress_tokens": ["a"]},
        {"num_beams": 0},
        {"guidance_scale": "x"},
        {"sequence_bias": 3},
    ],
    ids=str,
)
def test_values_that_fail_within_generate_are_named(tmp_path, given):
    for check in (True, False):
        with pytest.raises(
            ConfigError, match=r"generation_kwargs=\{.*\}: sampling failed: "
        ) as told:
            make_trainer(tmp_path / str(check), generation_kwargs=given).train(check=check)
        assert str(given) in str(told.value)


ALONE = [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}]
ON_A_HUB = [
    {"dola_layers": "low"},
    {"num_beams": 4, "num_beam_groups": 2, "do_sample": False},
    {"num_beams": 2, "force_words_ids": [[5]], "do_sample": False},
    {"penalty_alpha": 0.5, "top_k": 4, "do_sample": False},
]


@pytest.mark.parametrize("given", [*ALONE, *ON_A_HUB], ids=lambda given: " ".join(given))
def test_decoding_that_cannot_sample_a_batch_is_refused_at_the_start(tmp_path, given):
    """Oracle: transformers refuses it too, inside `generate`."""
    first = next(name for name in given if name not in ("num_beams", "do_sample", "top_k"))
    with pytest.raises(ConfigError, match=first) as told:
        make_trainer(tmp_path, generation_kwargs=given, per_device_train_batch_size=2)
    words = "2 completions together" if given in ALONE else "code, and such code is never run"
    assert words in str(told.value)
    model = make_model(seed=0)
    config = transformers.GenerationConfig(**{"do_sample": True, "max_new_tokens": 3, **given})
    with pytest.raises((ValueError, NotImplementedError)):
        model.generate(torch.tensor([[5, 6], [7, 8]]), generation_config=config)


@pytest.mark.parametrize("when", [{"eval_on_start": True}, {"eval_strategy": "epoch"}])
def test_completions_of_an_evaluation_count_whenever_it_is(tmp_path, when):
    alone = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 2}
    settings = CPU | OURS | alone | {"generation_kwargs": ALONE[0]}
    assert TeachabilityConfig(output_dir=str(tmp_path), **settings)
    with pytest.raises(ConfigError, match="samples 2 completions together"):
        TeachabilityConfig(output_dir=str(tmp_path), **settings, **when)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prompt_lookup_num_tokens", 2, "asks for assisted decoding"),
        ("return_dict_in_generate", True, "changes what sampling returns"),
        ("num_return_sequences", 2, "changes what sampling returns"),
        ("stop_strings", ["a"], "ends a completion at a token that is no end"),
    ],
)
def test_a_student_that_asks_for_it_is_refused_by_name(tmp_path, name, value, message):
    trainer = make_trainer(tmp_path, max_steps=1)
    setattr(trainer.model.generation_config, name, value)
    with pytest.raises(ConfigError, match=f"generation_config.json: {name} {message}"):
        trainer.train()


def test_a_mixture_of_experts_with_an_auxiliary_loss_samples(tmp_path):
    """Oracle: transformers' own `generate` fails on padded prompts, and the setting is as it was after."""
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
    sizes |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.MixtralConfig(**SIZES | sizes)
    student, teacher = (transformers.MixtralForCausalLM(config) for _ in range(2))
    trainer = make_trainer(tmp_path, student, teacher, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1 and trainer.model.config.output_router_logits


def test_ids_that_only_the_student_has_are_not_scored_by_the_check(tmp_path):
    """A padded output layer of random weights samples them; the check looks at what comes before."""
    student = make_model(seed=0, vocab_size=len(make_tokenizer()) + 40)
    trainer = make_trainer(tmp_path, student, max_steps=1)
    found = trainer.check()
    assert not [each for each in found if "broke" in each.measured]


@pytest.mark.parametrize("ids", [[[39, 5], [41, 5], [4, 40, 6]], [[41, 5], [40], [41, 6]]])
def test_the_check_leaves_out_completions_that_begin_outside_the_shared_ids(tmp_path, ids):
    student = make_model(seed=0, vocab_size=len(make_tokenizer()) + 40)
    trainer = make_trainer(tmp_path, student, max_steps=1)
    trainer.vocab_size = 40
    trainer.sample = lambda rows, tokens: ([[1, 2]] * 3, ids)
    if ids[0][0] < 40:
        assert len(measure_micro_batch(trainer).positions) == 3
    else:
        with pytest.raises(DataError, match="every completion begins with an id that one of the"):
            measure_micro_batch(trainer)


def test_the_logged_entropy_is_of_scored_tokens_alone(tmp_path):
    """With a mask over a tool's results; the mean entropy of what is left."""
    trainer = make_trainer(tmp_path, max_steps=1, learning_rate=0.0)
    sample = trainer._generate

    def with_tool_results(prompts):
        ids, completions, _, images, results = sample(prompts)
        completions = [[*row[:1], 4, 5, 6, *row[1:]] for row in completions]
        return (
            ids,
            completions,
            [[1, 0, 0, 0] + [1] * (len(c) - 4) for c in completions],
            images,
            results,
        )

    trainer._generate, seen = with_tool_results, []
    trainer.observers.append(lambda scored: seen.append(scored.signals.entropy.mean().item()))
    trainer.train()
    logged = [log["entropy"] for log in trainer.state.log_history if "entropy" in log]
    assert logged == [pytest.approx(seen[0], rel=1e-3)]
