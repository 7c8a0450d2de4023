"""The stack against transformers and against the trainer: same forward, same choice, same update."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.reach_forms import FORMS, RULE, FormStack
from taopd import TeachabilityConfig, TeachabilityTrainer
from taopd.errors import ConfigError, DataError
from taopd.experiments.lab import build_lab
from taopd.experiments.lab.demo import lab_arm
from taopd.experiments.lab.stacked import Stack, run_stack
from taopd.experiments.lab.stacked.model import generate, hidden_states, logits, stack
from taopd.experiments.lab.stacked.problems import Exam
from taopd.experiments.lab.task import EOS_ID, PAD_ID
from taopd.experiments.lab.variants import NUM_DIGITS
from taopd.models.prompts import load_prompts

STEPS = 3
PROMPT_LENGTH = 2 * NUM_DIGITS + 2


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return build_lab(
        root=tmp_path_factory.mktemp("labs"),
        parallel=False,
        num_train_prompts=64,
        num_test_prompts=16,
        teacher_steps=60,
        student_steps=60,
        batch_size=32,
    )


def small_arm(lab, name="arm", seed=0, **settings):
    return lab_arm(lab, name, {"per_device_train_batch_size": 8} | settings, seed=seed, steps=STEPS)


def test_forward_and_greedy_generation_equal_transformers(lab):
    model = AutoModelForCausalLM.from_pretrained(lab.student, dtype=torch.float32).eval()
    shape, weights = stack(model, 3)
    ids = torch.randint(0, 44, (3, 5, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = logits(weights, hidden_states(shape, weights, ids).flatten(1, 2))
        theirs = model(ids.flatten(0, 1)).logits
        torch.testing.assert_close(ours.reshape(theirs.shape), theirs, atol=2e-5, rtol=2e-5)
        prompts = ids[..., :PROMPT_LENGTH]
        made = generate(shape, weights, prompts, max_new_tokens=9, eos_id=EOS_ID, pad_id=PAD_ID)
        expected = model.generate(
            prompts.flatten(0, 1),
            attention_mask=torch.ones(15, PROMPT_LENGTH),
            max_new_tokens=9,
            do_sample=False,
            pad_token_id=PAD_ID,
        )[:, PROMPT_LENGTH:]
    padded = torch.nn.functional.pad(expected, (0, 9 - expected.shape[1]), value=PAD_ID)
    assert torch.equal(made.flatten(0, 1), padded)


def test_sampled_tokens_follow_the_models_distribution(lab):
    model = AutoModelForCausalLM.from_pretrained(lab.student, dtype=torch.float32).eval()
    shape, weights = stack(model, 1)
    prompts = torch.tensor([[3, 2, 1, 10, 4, 8, 9, 11]]).expand(1, 4000, -1)
    noise = torch.rand(1, 4000, 1, generator=torch.Generator().manual_seed(0))
    drawn = generate(
        shape, weights, prompts, max_new_tokens=1, eos_id=EOS_ID, pad_id=PAD_ID, uniforms=noise
    )
    shares = torch.bincount(drawn.flatten(), minlength=48) / 4000
    with torch.no_grad():
        expected = model(prompts[0, :1]).logits[0, -1].softmax(-1)
    assert (shares - expected).abs().max() < 0.03  # 4,000 draws: sd at most 0.008


@pytest.mark.parametrize(
    ("selector", "loss", "anchor", "schedule"),
    [
        ("teachability", "reverse_kl", 1.0, "constant"),
        ("teachability", "sampled_reverse_kl", 0.0, "constant"),
        ("teachability_frozen", "reverse_kl", 1.0, "constant"),
        ("full", "forward_kl", 0.0, "linear"),
        ("random", "jsd", 0.5, "constant"),
        ("reach", "reverse_kl", 3.0, "constant"),
        ("reach", "sampled_reverse_kl", 3.0, "linear"),
        ("remembered", "reverse_kl", 3.0, "constant"),
    ],
)
def test_steps_equal_the_trainers(lab, tmp_path, selector, loss, anchor, schedule):
    # With Adam's usual epsilon a gradient of 1e-9, all rounding, moves a weight as far as any other.
    settings = {"anchor_coef": anchor, "adam_epsilon": 1e-5, "lr_scheduler_type": schedule}
    if selector == "remembered":
        settings |= {"anchor_responses": 0.5}
    if selector in ("reach", "remembered"):
        settings |= {"method": "reach", "reach_threshold": 0.01, "stop_token_ids": [3, EOS_ID]}
        selector = "teachability"
    arm = small_arm(lab, selector=selector, loss=loss, **settings)
    trainer = TeachabilityTrainer(
        model=AutoModelForCausalLM.from_pretrained(arm.student, dtype=torch.float32),
        teacher_model=arm.teacher,
        args=TeachabilityConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            seed=0,
            **arm.config,
        ),
        train_dataset=load_prompts(arm.prompts, split="train"),
        processing_class=AutoTokenizer.from_pretrained(arm.student, padding_side="left"),
    )
    seen = []
    trainer.observers.append(seen.append)
    trainer.train()

    ours = Stack([arm], output_dir=str(tmp_path))
    start = {name: weight.detach().clone() for name, weight in ours.weights.items()}
    for step, scored in enumerate(seen):
        ids = torch.cat([scored.batch["prompt_ids"], scored.batch["completion_ids"]], dim=1)
        ids = torch.nn.functional.pad(ids, (0, 17 - ids.shape[1]), value=PAD_ID)
        (choice,) = ours.update(ids.unsqueeze(0), step)
        assert torch.equal(choice.selection.kept, scored.choice.selection.kept)
        # With reach they hold 1 - r, of two forwards that round otherwise.
        weights = choice.anchor_weights, scored.choice.anchor_weights
        tolerance = 1e-5 if arm.config["method"] == "reach" else 0.0
        torch.testing.assert_close(*weights, rtol=tolerance, atol=tolerance)
    theirs = stack(trainer.model, 1)[1]
    moved = max((theirs[name] - start[name]).abs().max() for name in start)
    assert moved > 2e-4
    for name, weight in ours.weights.items():
        torch.testing.assert_close(weight.detach(), theirs[name], atol=2e-5, rtol=0)


def test_an_arm_does_not_depend_on_its_neighbours(lab, tmp_path):
    arms = [small_arm(lab, "a", seed, selector=s) for s in ("full", "random") for seed in (0, 1)]
    together = run_stack(arms, output_dir=str(tmp_path))
    (alone,) = run_stack(arms[2:3], output_dir=str(tmp_path))
    assert [row["seed"] for row in together] == [0, 1, 0, 1]
    assert alone["selected_tokens_curve"] == together[2]["selected_tokens_curve"]
    assert alone["accuracy_curve"] == together[2]["accuracy_curve"]
    assert together[0]["kept_fraction"] == 1.0
    assert together[2]["kept_fraction"] == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("gradient_window", 4),
        ("gradient_accumulation_steps", 2),
        ("optim", "sgd"),
        ("weight_decay", 0.1),
        ("temperature", 0.5),
        ("top_p", 0.9),
        ("generation_kwargs", {"min_new_tokens": 3}),
        ("neftune_noise_alpha", 5.0),
        ("bf16", True),
        ("signals", "topk_lists"),
        ("stop_tokens", "exclude"),
        ("shuffle_dataset", False),
        ("teacher_model_name_or_path", "self"),
        ("teacher_prompt_template", "{answer} {prompt}"),
        ("collapse_guard", "stop"),
        ("use_peft", True),
        ("lora_r", 4),
    ],
)
def test_settings_that_only_the_trainer_follows_are_refused(lab, tmp_path, setting, value):
    with pytest.raises(ConfigError, match=f"arm 'arm': {setting}=.* needs the trainer"):
        Stack([small_arm(lab, **{setting: value})], output_dir=str(tmp_path))


def test_what_changes_nothing_that_a_stack_does_is_taken(lab, tmp_path):
    quiet = {"collapse_guard": "off", "log_update_norm": False, "disable_tqdm": True}
    assert len(Stack([small_arm(lab, **quiet)], output_dir=str(tmp_path)).settings) == 1


def test_arms_that_do_not_fit_together_are_refused(lab, tmp_path):
    with pytest.raises(ConfigError, match=r"one stack has one learning_rate"):
        Stack([small_arm(lab), small_arm(lab, learning_rate=1e-3)], output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"a stack counts no epochs: set max_steps"):
        Stack([small_arm(lab, max_steps=-1)], output_dir=str(tmp_path))


def test_a_norm_of_0_clips_nothing(lab, tmp_path):
    """As in transformers. Oracle: a limit that no gradient reaches."""
    stacks = [
        Stack([small_arm(lab, max_grad_norm=most)], output_dir=str(tmp_path)) for most in (0.0, 1e9)
    ]
    start = {name: weight.detach().clone() for name, weight in stacks[0].weights.items()}
    for each in stacks:
        each.step(0)
    found, expected = (each.weights for each in stacks)
    assert any(not torch.equal(found[name], start[name]) for name in start)
    assert all(torch.equal(found[name], expected[name]) for name in start)


def test_an_arm_is_graded_on_as_many_problems_as_it_names(lab):
    arm = small_arm(lab)
    with pytest.raises(DataError, match="num_test_prompts=9999 is too many"):
        Exam(replace(arm, num_test_prompts=9999))


def test_one_of_the_forms_of_reach_is_the_rule(lab, tmp_path):
    """Of the forms in docs/results/reach_forms.md; another form chooses something else."""
    settings = {"method": "reach", "loss": "reverse_kl", "stop_token_ids": [3], "max_steps": 200}

    def choices(kind, form):
        arm = small_arm(lab, form, anchor_coef=FORMS[form].coef, **settings)
        made_of = kind([arm], output_dir=str(tmp_path))
        # A student that has moved: contexts that are new to the start are worse than the others.
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in made_of.weights.values():
                weight += 0.08 * torch.randn(weight.shape, generator=generator)
        # The last step: the start has been let go, where nothing holds it longer.
        (made,) = made_of.step(made_of.settings[0].max_steps - 1)
        return made.loss_weights, made.anchor_weights

    rule = choices(Stack, RULE)
    for found, expected in zip(choices(FormStack, RULE), rule, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    for form in (
        "p^0.2",
        "sigmoid, hold 1",
        "rest by forward KL, start let go over its first half",
    ):
        assert not torch.allclose(choices(FormStack, form)[1], rule[1], rtol=1e-3)
    by_dr = choices(FormStack, "order D r, half 0.0001, hold 3")
    assert not torch.allclose(by_dr[0], rule[0], rtol=1e-3)
    slips = choices(FormStack, "slips are new, half 0.0001, hold 3")
    assert not torch.allclose(slips[0], rule[0], rtol=1e-3)
    held = choices(FormStack, "ends held, half 0.0001, hold 3")
    assert not torch.allclose(held[1], rule[1], rtol=1e-3)
