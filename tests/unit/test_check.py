"""`taopd check`: planted mismatches are caught, each by its item and by no other; the tiny lab is clean.

Oracle: what was planted (`tests.planted`), into copies of the lab's real files. The labs are pretrained for
a tenth of the usual steps: they end their texts and look like each other, which is all that is asked here.
"""

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
import yaml

from taopd import cli
from taopd.cli.check import _config_and_rest
from taopd.cli.check import _parser as check_parser
from taopd.experiments.lab import build_lab
from taopd.trainer.sampler_monitor import SamplerMonitor
from taopd.trainer.settings_file import parse_settings
from tests.conftest import is_documented
from tests.planted import DOCS, PLANTED, TEMPLATE, check, messages, stale_sampler, write_config
from tests.wording import bare_numbers


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """Labs by variant, each built on first use."""
    root, built = tmp_path_factory.mktemp("labs"), {}

    def get(variant):
        if variant not in built:
            sizes = {"teacher_steps": 300, "student_steps": 300, "parallel": False}
            built[variant] = build_lab(variant, root=root, **sizes)
        return built[variant]

    return get


def not_passed(items):
    return {item["item"]: item["level"] for item in items if item["level"] != "pass"}


def run_json(capsys, path, *flags):
    status = cli.main(["check", str(path), "--json", *flags])
    return status, json.loads(capsys.readouterr().out)


@pytest.fixture
def config(lab, tmp_path):
    """Writes settings of a run on a copy of a variant; returns the file."""

    def write(variant="dialect", plant=None, **settings):
        path, base = write_config(lab(variant), tmp_path)
        if plant is not None:
            plant(tmp_path, base)
        path.write_text(yaml.safe_dump(base | settings))
        return path

    return write


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mismatch_is_caught_by_its_item_alone(lab, name, tmp_path):
    planted = PLANTED[name]
    status, items = check(name, lab(planted.variant), tmp_path)
    assert not_passed(items) == planted.caught
    assert status == int("fail" in planted.caught.values())
    assert all(bool(item["advice"]) == (item["level"] != "pass") for item in items)
    assert not (tmp_path / "run").exists()
    # Read by a stranger: what was measured has units, of passed items too.
    assert {item["item"]: bare_numbers(item["measured"]) for item in items} == {
        item["item"]: [] for item in items
    }
    assert not [item["measured"] for item in items if "refused" in item["measured"]]


@pytest.mark.parametrize("variant", ["dialect", "bilingual", "reversal", "fallible"])
def test_the_tiny_lab_is_clean(capsys, config, variant):
    status, found = run_json(capsys, config(variant))
    assert (status, not_passed(found["items"])) == (0, {})
    assert found["counts"]["pass"] == len(found["items"]) == 17


@pytest.mark.parametrize("stop_tokens", ["merge", "exclude"])
def test_the_offered_cure_passes(capsys, config, stop_tokens):
    """`stop_tokens` finds the teacher's end in its generation config by itself."""
    status, found = run_json(capsys, config("termination", stop_tokens=stop_tokens))
    audit = next(item for item in found["items"] if item["item"] == "stop audit")
    assert (status, audit["level"]) == (0, "pass")
    masses = audit["figures"]["mass"]
    assert masses["<eos>"]["student"] > 0.9 and masses["<bos>"]["teacher"] > 0.9


@pytest.mark.parametrize(
    ("settings", "level"),
    [
        ({}, "pass"),
        ({"selector": "full"}, "fail"),
        ({"method": "published"}, "fail"),
    ],
    ids=str,
)
def test_an_end_that_the_method_never_teaches_is_a_note(capsys, config, settings, level):
    """The method decides: reach leaves the teacher's own end out of reach, no other does."""
    status, found = run_json(capsys, config("termination", **settings))
    audit = next(item for item in found["items"] if item["item"] == "stop audit")
    assert (audit["level"], status) == (level, int(level == "fail"))
    note = "the teacher ends with <bos> (45), where the sampler does not stop: method reach never"
    assert (note in audit["measured"]) == (level == "pass")
    assert audit["figures"]["mass"]["<bos>"]["teacher"] > 0.9


def test_one_template_for_both_passes(capsys, config):
    assert not_passed(run_json(capsys, config(plant=messages()))[1]["items"]) == {}


def test_what_is_measured_equals_the_definitions(capsys, config, monkeypatch):
    """Oracle: both models over the same completions in one whole forward, as transformers loads them."""
    from transformers import AutoModelForCausalLM

    from taopd.preflight import subject as check_subject

    seen = {}
    original = check_subject.measure_micro_batch

    def spy(trainer, **kwargs):
        generate = trainer._generate_single_turn

        def keep(prompts, *args):
            seen["prompts"], seen["completions"] = prompts, generate(prompts, *args)
            return seen["completions"]

        trainer._generate_single_turn = keep
        return original(trainer, **kwargs)

    monkeypatch.setattr(check_subject, "measure_micro_batch", spy)
    path = config(temperature=0.7)
    _, found = run_json(capsys, path)
    figures = {item["item"]: item["figures"] for item in found["items"]}
    forward, reverse, off, worth = [], [], [], []
    models = [AutoModelForCausalLM.from_pretrained(path.parent / x) for x in ("student", "teacher")]
    for prompt, completion in zip(seen["prompts"], seen["completions"], strict=True):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            p, q = (
                (model(ids).logits[0, len(prompt) - 1 : -1].double() / 0.7).log_softmax(-1)
                for model in models
            )
        reverse += (p.exp() * (p - q)).sum(1).tolist()
        forward += (q.exp() * (q - p)).sum(1).tolist()
        off += (1.0 - q.exp().gather(1, p.topk(4).indices).sum(1)).tolist()
        for own, other in zip(p, q, strict=True):
            # D on both lists, and r over all words.
            union = sorted({*own.topk(4).indices.tolist(), *other.topk(4).indices.tolist()})
            mine, theirs = (row[union] - row[union].logsumexp(0) for row in (own, other))
            d = float((theirs.exp() * (theirs - mine)).sum())
            r = float(other.exp()[own.exp() >= 3e-4].sum())
            worth.append(d * r >= 0.05)
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    assert figures["teacher KL"]["reverse_nats"] == pytest.approx(mean(reverse), rel=1e-4)
    assert figures["teacher KL"]["forward_nats"] == pytest.approx(mean(forward), rel=1e-4)
    assert figures["off support"]["off_support_mass"] == pytest.approx(mean(off), rel=1e-4)
    kept = figures["kept tokens"]
    assert kept["kept_tokens"] == pytest.approx(0.1 * len(off) / 32)
    selected = min(sum(worth), math.ceil(0.1 * len(off)))
    assert kept["selected_tokens"] == pytest.approx(selected / 32) and selected > 0
    assert figures["drift"]["tokens"] == len(off) and figures["drift"]["max_nats"] < 1e-4


def test_a_broken_check_is_a_note_of_that_item(capsys, config, monkeypatch):
    from taopd.preflight import items

    def broken(*_, **__):
        raise ZeroDivisionError("no such luck")

    monkeypatch.setitem(items._ITEMS, "special tokens", broken)
    status, found = run_json(capsys, config())
    assert status == 0
    assert not_passed(found["items"]) == {"special tokens": "warn"}
    assert "ZeroDivisionError: no such luck" in found["items"][1]["advice"]


def test_the_table_shows_verdict_advice_and_difference(capsys, config):
    path = config(plant=messages(teacher="wrong " + TEMPLATE))
    assert cli.main(["check", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "{+wrong +}" in shown and "16 pass, 1 warn, 0 fail" in shown


def test_what_a_cut_cannot_tell_is_not_judged(capsys, config):
    """As in `taopd train`, where completions are cut: no verdict on lengths that were not seen."""
    status, found = run_json(capsys, config(), "--max-tokens", "4")
    items = {item["item"]: item for item in found["items"]}
    assert (status, not_passed(items.values())) == (0, {"stop audit": "warn"})
    assert items["truncation"]["measured"].endswith("not judged, a run allows 9")
    assert items["kept tokens"]["measured"].endswith(
        "more in a run, as these completions were cut short"
    )


def test_bad_arguments(capsys):
    for argv, message in (
        ([], "name the config file"),
        (["none.yaml"], "cannot read the config file none.yaml"),
        (["none.yaml", "--max-tokens", "0"], "max-tokens"),
        (["none.yaml", "--max-tokens"], "max-tokens"),
    ):
        assert cli.main(["check", *argv]) == 2
        assert message in capsys.readouterr().err


def test_train_stops_at_a_fail_and_leaves_nothing(capsys, config, tmp_path):
    path = config("termination", max_steps=1, method="anchored")
    assert cli.main(["train", "--config", str(path)]) == 2
    shown = capsys.readouterr().err
    assert "check fail: stop audit" in shown and "stop_token_ids: [45, 46]" in shown
    assert not (tmp_path / "run").exists()
    assert cli.main(["train", "--config", str(path), "--skip-check"]) == 0


def test_the_check_changes_no_number_of_the_run(config, tmp_path):
    """Oracle: the metrics of the same run without it, but for seconds."""
    found, path = [], config(max_steps=2, logging_steps=1)
    for name, flags in (("a", []), ("b", ["--skip-check"])):
        run = tmp_path / name
        assert cli.main(["train", "--config", str(path), "--output_dir", str(run), *flags]) == 0
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found.append(
            [
                {
                    k: v
                    for k, v in line.items()
                    if "time" not in k and "second" not in k and "perf" not in k
                }
                for line in lines
            ]
        )
    assert found[0] == found[1]
    drifts = {key: value for key, value in found[0][0].items() if key.startswith("rollout/drift")}
    assert drifts.keys() == {"rollout/drift_nats/mean", "rollout/drift_nats/max"}
    assert all(is_documented(key) and value < 1e-4 for key, value in drifts.items())


def test_a_run_with_a_stale_sampler_warns_once(config, caplog):
    logging.getLogger("taopd").propagate = True
    path = config(max_steps=3, logging_steps=1)
    with stale_sampler(), caplog.at_level(logging.WARNING, logger="taopd.trainer.sampler_monitor"):
        assert cli.main(["train", "--config", str(path), "--skip-check"]) == 0
    warnings = [r.getMessage() for r in caplog.records if r.name == "taopd.trainer.sampler_monitor"]
    assert len(warnings) == 1 and "nats a token at step 1: sampling and scoring" in warnings[0]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([0.0, 0.05, 0.2], None),
        (
            [0.0, 0.05, 0.4, 0.9],
            "40% of the completions truncated at step 2: the student is unlearning",
        ),
        ([0.2, 0.4], "20% of the completions truncated at step 0: Many completions are cut"),
    ],
)
def test_truncation_out_of_bounds_warns_once_with_the_likely_cause(shares, message, caplog):
    logging.getLogger("taopd").propagate = True
    watch = SamplerMonitor(SimpleNamespace(use_vllm=False))
    with caplog.at_level(logging.WARNING, logger="taopd.trainer.sampler_monitor"):
        for step, share in enumerate(shares):
            state = SimpleNamespace(is_world_process_zero=True, global_step=step)
            watch.on_log(None, state, None, logs={"completions/clipped_ratio": share})
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (0 if message is None else 1)
    assert message is None or warnings[0].startswith(message)


def test_log_probs_of_vllm_are_read_as_trl_hands_them_on():
    """Rows of unequal length, and a NaN that TRL turned into None. Oracle: the numbers handed in."""

    class Engine:
        logprobs = None

        def generate(self, prompts):
            assert self.logprobs == 0
            return prompts, [[5, 6], [7]], [[[-0.5], [None]], [[-1.5]]], None

    trainer = SimpleNamespace(use_vllm=True, vllm_generation=Engine())
    watch = SamplerMonitor(trainer)
    with watch.listening():
        assert trainer.vllm_generation.generate(prompts=[[1], [2]])[1] == [[5, 6], [7]]
    assert trainer.vllm_generation.logprobs is None and "generate" not in vars(
        trainer.vllm_generation
    )
    expected = [[-0.5, math.nan], [-1.5, math.nan]]
    assert torch.equal(watch.logprobs.nan_to_num(9.0), torch.tensor(expected).nan_to_num(9.0))


def test_the_page_lists_every_planted_mismatch():
    page = (DOCS / "check.md").read_text()
    assert [name for name in PLANTED if f"| {name} |" not in page] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("FILE", "--budget", "0.3", "--max-tokens", "3"),
        ("--config", "FILE", "--budget", "0.3"),
        ("--config=FILE", "--budget=0.3"),
        ("--budget", "0.3", "FILE"),
        (
            "--max-tokens",
            "3",
            "--budget=0.3",
            "--shadow_selectors",
            "tip",
            "random",
            "--config",
            "FILE",
        ),
    ],
)
def test_the_file_may_stand_anywhere_and_flags_of_train_win(arguments, tmp_path):
    config, rest = _config_and_rest([each.replace("FILE", "a.yaml") for each in arguments])
    own, flags = check_parser().parse_known_args(rest)
    (tmp_path / "a.yaml").write_text("lab: dialect\noutput_dir: x\nuse_cpu: true\nbf16: false\n")
    names = {"model_name_or_path": "s", "teacher_model_name_or_path": "t", "dataset_name": "p"}
    settings = parse_settings(str(tmp_path / str(config)), flags, lab=lambda variant: names)
    assert settings.training.budget == 0.3
    assert own.max_tokens == (3 if "--max-tokens" in arguments else None)


def test_a_flag_of_train_reaches_the_check(capsys, config):
    status, found = run_json(capsys, config(), "--max_completion_length", "5", "--budget", "0.5")
    by_name = {item["item"]: item for item in found["items"]}
    assert status == 0
    assert by_name["context"]["figures"]["completion_tokens"] == 5


def test_related_models_whose_c_does_not_vary_are_warned_of(capsys, config, tmp_path):
    """The teacher is the student with a little noise, and K is most of the vocabulary: C is 1 everywhere."""

    def plant(folder, settings):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder / "student")
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter))
        model.save_pretrained(folder / "teacher")
        settings["score_top_k"] = 40

    path = config(plant=plant)
    stretched = ["--method", "anchored"]
    # The default takes r as it is: nothing is stretched.
    for flags, level in (
        (stretched, "warn"),
        ([*stretched, "--normalization", "none"], "pass"),
        ([], "pass"),
    ):
        items = {item["item"]: item for item in run_json(capsys, path, *flags)[1]["items"]}
        support = items["off support"]
        assert (support["level"], "normalization: none" in support["advice"]) == (
            level,
            level == "warn",
        )
        assert support["figures"]["c_p90"] - support["figures"]["c_p10"] < 1e-3
