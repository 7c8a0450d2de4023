"""Settings of our own that nothing reads, because of another one. Oracle: the weights after training."""

import dataclasses

import pytest
import torch
from trl import DistillationConfig

from taopd.errors import ConfigError
from taopd.experiments.study.expand import expand
from taopd.experiments.study.file import parse_study_file
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.settings.unread import unread
from tests.e2e.test_trainer import make_trainer, weights_of

OTHER = {
    **{"score_top_k": 3, "compatibility": "jaccard", "normalization": "none", "min_keep": 1},
    **{"split_gamma": 0.1, "stop_tokens": "exclude", "budget_steps": 2, "budget_scope": "response"},
    **{"budget_schedule": "linear", "budget_end": 0.9, "weighting": "rank", "draw": "proportional"},
    **{"draw_floor": 0.5, "draw_clip": 1.5, "denominator": "completion", "loss": "forward_kl"},
    **{"ppo_clip_low": 1e-6, "ppo_clip_high": 1e-6, "reach_threshold": 0.2, "anchor_coef": 7.0},
    **{"anchor_fraction": 0.9, "anchor_responses": 0.5, "anchor_loss": "forward_kl"},
    **{"guard_every": 1, "num_generations": 2, "num_iterations": 2, "gradient_window": 1},
    **{"gradient_check_every": 1, "prefix_memory_mib": 0, "match_update_norm": 0.1},
    **{"max_update_norm": 1e-3, "teacher_ema_decay": 0.5, "teacher_server": "vllm"},
    **{"teacher_concurrency": 3, "teacher_timeout_s": 3.0, "teacher_patience_s": 3.0, "beta": 0.5},
    **{"selector": "entropy", "budget": 0.5, "reduction": "sample_mean", "method": "published"},
    **{"signals": "topk_lists", "cut_renamed_control_tokens": True},
}
"""Another value than the default, of every setting that can change what is trained."""
LOGS = {"log_selection", "log_update_norm", "log_rollouts", "shadow_selectors", "gather_limit"}
"""They change what is written, or where the tokens lie while they are chosen."""
ONLY_ON_FAILURE = {"on_bad_numbers", "max_skipped_steps", "collapse_guard"}
OF_THE_CALLER = {
    *("teacher_url", "teachers", "teacher_column", "teacher_weights", "teacher_prompt_template"),
    *("teacher_quantization", "teacher_offload", "tools", "stop_token_ids"),
}
"""Who the teacher is, what it reads, where it is held, and ids of a tokenizer: tested with each of these."""
METHODS = {
    # Sharp distributions, of which not all are within reach.
    "reach": {"method": "reach", "reach_threshold": 0.01, "temperature": 0.05},
    "published": {"method": "published", "collapse_guard": "off"},
    "full": {"budget": 1.0, "collapse_guard": "off"},
    "sampled": {"method": "anchored", "loss": "sampled_reverse_kl", "anchor_fraction": 0.2},
}
SAME_ANYWAY = {
    # Of one token more or less of a few: nothing is cut, ended or scaled otherwise here.
    **{"stop_tokens": {"sampled"}, "cut_renamed_control_tokens": set(METHODS)},
    # The guard warns of nothing in four steps.
    "guard_every": {"reach", "sampled"},
    # Of every token: a user who asks for them all asks for no choice.
    **{"score_top_k": {"full"}, "compatibility": {"full"}, "normalization": {"full"}},
    **{"min_keep": {"full"}, "budget_scope": {"full"}, "draw": {"full"}},
    **{"denominator": {"full"}, "selector": {"full"}, "method": {"full"}, "signals": {"full"}},
}
"""Settings that change nothing here under these methods, and are not told."""


def own_settings() -> set[str]:
    ours, trls = dataclasses.fields(TeachabilityConfig), dataclasses.fields(DistillationConfig)
    return {each.name for each in ours} - {each.name for each in trls} | {"beta"}


def test_every_setting_of_ours_is_looked_at():
    assert own_settings() == OTHER.keys() | LOGS | ONLY_ON_FAILURE | OF_THE_CALLER


@pytest.mark.slow
@pytest.mark.parametrize("method", list(METHODS))
def test_a_setting_changes_what_is_trained_or_is_said_to_have_no_effect(
    micro_lab, tmp_path, method, caplog
):
    """Or is refused. Two generation batches and more, so that a schedule and a guard could act."""

    def trained(**other):
        caplog.clear()
        asked = {"budget": 0.3, "max_steps": 4, "learning_rate": 0.5, "optim": "sgd"}
        trainer = make_trainer(micro_lab, tmp_path, **asked | METHODS[method] | other)
        trainer.train()
        return weights_of(trainer)

    plain = trained()
    assert "has no effect" not in caplog.text
    for name, value in OTHER.items():
        other = {name: value}
        if name in ("budget_schedule", "budget_end"):
            other = {"budget_schedule": "linear", "budget_end": 0.9}
        if METHODS[method].get(name) == value:
            continue
        try:
            weights = trained(**other)
        except ConfigError:
            continue
        same = all(torch.equal(value, plain[key]) for key, value in weights.items())
        told = f"{name}={value} has no effect: " in caplog.text
        assert told is (same and method not in SAME_ANYWAY.get(name, ())), (name, same, told)


@pytest.mark.parametrize(
    ("read", "by"),
    [
        ({"budget_steps": 2}, {"budget_schedule": "linear", "budget_end": 0.9}),
        ({"draw_floor": 0.5, "draw_clip": 2.0}, {"draw": "proportional", "method": "anchored"}),
        ({"split_gamma": 0.1}, {"selector": "split"}),
        ({"split_gamma": 0.1}, {"shadow_selectors": ["split"]}),
        ({"ppo_clip_low": 0.1}, {"loss": "sampled_tv", "num_iterations": 2}),
        ({"reach_threshold": 0.1}, {"method": "published", "compatibility": "reach"}),
        ({"anchor_loss": "forward_kl"}, {"method": "published", "anchor_coef": 0.5}),
        ({"anchor_fraction": 0.5, "guard_every": 2}, {"method": "published"}),
        ({"prefix_memory_mib": 9}, {"gradient_window": 0}),
        ({"teacher_ema_decay": 0.5}, {"teacher_model_name_or_path": "self_ema"}),
        ({"teacher_timeout_s": 5.0}, {"teacher_url": "http://a:1", "loss": "sampled_tv"}),
        (
            {"teacher_timeout_s": 5.0},
            {"teachers": {"a": {"url": "http://a:1"}}, "loss": "sampled_tv"},
        ),
        ({"teacher_timeout_s": 5.0, "teacher_ema_decay": 0.5}, {}),
    ],
    ids=str,
)
def test_nothing_is_said_of_a_setting_that_is_read(read, by):
    """The last one: the teacher is given to the trainer."""
    assert unread(TeachabilityConfig("unused", bf16=False, use_cpu=True, **read | by)) == {}


def test_a_study_says_it_by_arm(caplog):
    def said(**study):
        caplog.clear()
        base = {"max_steps": 2, "use_cpu": True, "bf16": False} | study.get("config", {})
        expand(
            parse_study_file({"lab": "dialect", "seeds": [0], "full_control": False} | study), base
        )
        return [record.getMessage() for record in caplog.records]

    arms = [{"name": "a", "selector": "random"}, {"name": "b", "draw": "proportional"}]
    assert said(arms=arms, config={"draw_floor": 0.5}) == []
    assert said(arms=arms, config={"budget_steps": 3}) == [
        "config: budget_steps has no effect on any arm: budget_schedule is constant"
    ]
    arms[0]["draw_floor"] = 0.5
    assert said(arms=arms) == ["arm 'a': draw_floor=0.5 has no effect: draw is top"]
