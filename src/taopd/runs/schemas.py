"""The shapes of what a run folder holds, as far as anything reads it. See `taopd.runs.validation`.

Keys that are absent are absent: a run may be young, old, or of another writer. What is there must be what it
says it is.
"""

from typing import Any

from taopd.errors import DataError
from taopd.runs.signal_names import SIGNALS
from taopd.runs.validation import (
    ANY,
    MARK,
    NUMBER,
    SHARE,
    TEXT,
    WHOLE,
    WORD,
    Leaf,
    Maybe,
    Some,
    fit,
    number,
    shown,
    whole,
)

OBJECT = {...: ANY}
_CURVE = Some((NUMBER, SHARE))
_ESTIMATE = {"mean?": NUMBER, "low?": Maybe(NUMBER), "high?": Maybe(NUMBER)}
_ESTIMATES = {"greedy?": _ESTIMATE, "sampled?": _ESTIMATE}

CONFIG = {"changed?": Maybe(OBJECT)}
ENV = {
    "versions?": OBJECT,
    "git_commit?": Maybe(TEXT),
    "devices?": [ANY],
}
ARM = {"name?": TEXT, "seed?": Maybe(whole()), "config?": OBJECT, "match?": TEXT}
METRICS = {"step?": WHOLE}
CHECK = {"items?": [OBJECT]}
OUTCOME = {
    "name?": TEXT,
    "selector?": TEXT,
    "method?": Maybe(TEXT),
    "loss?": Maybe(TEXT),
    "budget?": SHARE,
    "learning_rate?": Maybe(NUMBER),
    "seed?": Maybe(WHOLE),
    "base_accuracy?": SHARE,
    "accuracy_greedy?": SHARE,
    "accuracy_sampled?": SHARE,
    "accuracy_curve?": _CURVE,
    "accuracy_sampled_curve?": _CURVE,
    "num_test_prompts?": Maybe(WHOLE),
    "kept_fraction?": SHARE,
    "steps?": WHOLE,
    "stopped_by?": TEXT,
    "selected_tokens?": WHOLE,
    "selected_tokens_curve?": [(WHOLE, WHOLE)],
    "train_seconds?": NUMBER,
    "train_seconds_curve?": [(WHOLE, NUMBER)],
    "prompt_digests?": [(WHOLE, TEXT)],
    "right_greedy_curve?": [(WHOLE, TEXT)],
    "right_sampled_curve?": [(WHOLE, TEXT)],
}
"""One arm and seed, as `taopd.experiments.arm.run_arm` leaves it."""
_BOUNDS = Maybe({"low": Maybe(NUMBER), "high": Maybe(NUMBER)})
_UNITS = {"over_seeds?": _BOUNDS, "over_problems?": _BOUNDS}
_AT_RATES = {"rates": (NUMBER, NUMBER), "difference": NUMBER} | _UNITS
RATES = {
    "rates": Some(number(1e-30)),
    "shared_rate": number(1e-30),
    "shared_by": TEXT,
    "arms": Some(
        {
            "name": TEXT,
            "curve": Some((number(1e-30), SHARE)),
            "best_rate": NUMBER,
            "best": SHARE,
            "spread": {"points": NUMBER} | _UNITS,
        }
        | _UNITS
    ),
    "comparisons": [
        {
            **{"arm": TEXT, "to": TEXT, "reference": TEXT},
            **{"own_best": _AT_RATES, "shared": Maybe(_AT_RATES)},
        }
    ],
}
"""What `taopd.experiments.study.own_best.compare` gives."""
STUDY = {
    # An analysed arm has means over its seeds, which are no whole numbers.
    "arms?": [OUTCOME | dict.fromkeys(("steps?", "selected_tokens?"), NUMBER) | _ESTIMATES],
    "outcomes?": Maybe([OUTCOME]),
    "question?": {"metric?": TEXT, "collapse_points?": NUMBER},
    "unfinished?": WHOLE,
    "comparisons?": [
        {
            "difference?": NUMBER,
            "low?": Maybe(NUMBER),
            "high?": Maybe(NUMBER),
            "p_holm?": Maybe(NUMBER),
            "over_problems?": _BOUNDS,
        }
    ],
    "rates?": RATES,
}
_ONE_METRIC = {"mean": NUMBER, "median": NUMBER, "low": Maybe(NUMBER), "high": Maybe(NUMBER)}
_TABLE_OF_STUDY = {
    **{"title": TEXT, "seeds": [WHOLE], "noise_floor": {"words": TEXT}},
    "question": {"metric": Leaf("greedy or sampled", lambda v: v in ("greedy", "sampled"))}
    | {"equal": TEXT, "amount": Maybe(NUMBER)},
    "comparisons": [
        {"arm": TEXT, "to": TEXT, "seeds": [WHOLE], "difference": NUMBER, "p_holm": Maybe(SHARE)}
    ],
    "arms": Some({"name": TEXT, "num_seeds": WHOLE, "collapsed_seeds": [ANY]}),
}
EVALUATION = {
    "model?": ANY,
    "model_from_here?": TEXT,
    "pass_at_k?": {...: SHARE},
    "intervals?": {...: [SHARE]},
    "num_problems?": WHOLE,
    "num_samples?": WHOLE,
    "settings?": OBJECT,
}
"""`results.json` of `taopd evaluate`; other commands have other keys."""
TRANSCRIPT = {"prompt?": ANY, "answer?": ANY, "correct?": ANY}
TRAINER_STATE = {"global_step": WHOLE, "epoch?": Maybe(NUMBER)}
QUESTION = {
    "question": {
        "equal": TEXT,
        "amount": Maybe(NUMBER),
        "metric": TEXT,
        "collapse_points": NUMBER,
        "rates?": [number(1e-30)],
        "shared_rate?": Maybe(NUMBER),
    },
    "controls": {...: {...: Maybe(TEXT)}},
}
VERDICTS = [{...: ANY}]
MANIFEST = {
    "format?": ANY,
    "checkpoints?": [
        {
            f"gain_forward_nats/{group}?": Maybe(NUMBER)
            for group in ("mean", "learnable", "incompatible")
        }
    ],
}
BANK_FORMAT = "taopd-bank-1"
GAIN_FORMAT = "taopd-gain-1"
ONE_STEP_FORMAT = "taopd-one-step-1"
"""`format` of the manifests of `taopd diagnose`."""
_TOP = {"ids": [[WHOLE]], "logprobs": [[NUMBER]]}
ROLLOUT = {
    "step?": WHOLE,
    "teacher?": Maybe(TEXT),
    "tokens?": Maybe([Maybe(WORD)]),
    "token_ids?": [WHOLE],
    "truncated?": ANY,
    # After how many of its tokens a tool answered, and what.
    "tool_results?": [(WHOLE, TEXT)],
    "num_valid?": Maybe(WHOLE),
    "cut?": Maybe(WHOLE),
    "rank?": Maybe([whole(-1, 2**31)]),
    "kept?": Maybe([Maybe(MARK)]),
    "anchored?": Maybe([Maybe(MARK)]),
    "quadrant?": Maybe([whole(0, 4)]),
    **{f"{name}?": Maybe([Maybe(NUMBER)]) for name in SIGNALS},
    "student_top?": Maybe(_TOP),
    "teacher_top?": Maybe(_TOP),
    "vocabulary?": {...: Maybe(WORD)},
}
_PER_TOKEN = tuple(
    key.removesuffix("?")
    for key, shape in ROLLOUT.items()
    if isinstance(shape, Maybe) and isinstance(shape.shape, list)
)
"""Columns of a rollout that have one entry for each of its tokens."""


def check_study(results: Any, place: str) -> None:
    """The results of a study that has finished: all that its tables on the terminal show.

    Raises:
        DataError: names what is missing or of another shape.
    """
    for shape in (STUDY, _TABLE_OF_STUDY):
        fit(results, shape, place)
    metric = results["question"]["metric"]
    means = {f"{name}?": {"mean": NUMBER} for name in ("greedy", "sampled") if name != metric}
    fit(results["arms"], [{metric: _ONE_METRIC} | means], f"{place}, arms")


def check_rollout(line: Any, place: str) -> None:
    """A line of `rollouts.jsonl`: its shape, and columns and lists that fit its tokens.

    Raises:
        DataError: names the field.
    """
    fit(line, ROLLOUT, place)
    size = len(line.get("tokens") or [])
    for name in (*_PER_TOKEN, "token_ids"):
        if line.get(name) and len(line[name]) != size:
            raise DataError(f"{place}, {name}: {len(line[name])} entries for {size} tokens")
    for name in ("student_top", "teacher_top"):
        lists = line.get(name)
        if not lists:
            continue
        lengths = [[len(row) for row in lists[key]] for key in ("ids", "logprobs")]
        if len(lengths[0]) != size or lengths[0] != lengths[1]:
            raise DataError(f"{place}, {name}: the lists do not fit its {size} tokens")
    for token in line.get("vocabulary", {}):
        if not (token.isascii() and token.isdigit()):
            raise DataError(f"{place}, vocabulary: {shown(token)} is no token id")
