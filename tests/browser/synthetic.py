"""Run folders as a trainer leaves them, without a trainer: for the page's tests and its measurements.

Rollouts have the shape of a large model's: most tokens nearly certain, a few open, a vocabulary of
byte-level tokens, two top-16 lists that mostly agree. What goes into a list follows `rollout_log`.
"""

import json
from functools import cache
from itertools import compress
from pathlib import Path

import numpy as np

LIST_FLOOR = 5e-4
VOCABULARY = 150_000
LETTERS = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))


@cache
def word(token: int) -> str:
    """A byte-level vocabulary entry."""
    rng = np.random.default_rng(token)
    length = 1 + int(rng.integers(1, 8))
    text = "".join(rng.choice(LETTERS[:14], length))
    return f"Ġ{text}" if token % 3 else text


def rollout(
    rng: np.random.Generator, size: int, *, step: int, k: int = 16, whole: bool = False
) -> dict:
    """One line of `rollouts.jsonl`.

    Args:
        whole: write every entry of both lists, whatever its probability.
    """
    # Sharpness of every position: entropy is near 0 for most and a few nats for some.
    sharp = rng.gamma(2.0, 3.0, size) + 0.3
    student = -np.outer(sharp, np.log1p(np.arange(k))) + 0.3 * rng.standard_normal((size, k))
    student = np.sort(student - np.log(np.exp(student).sum(1, keepdims=True)) - 0.002)[:, ::-1]
    ids = np.minimum(rng.zipf(1.2, (size, k)), VOCABULARY - 1)
    ids = (ids + np.arange(k) * 977) % VOCABULARY
    teacher_ids = np.where(rng.random((size, k)) < 0.25, (ids + 31) % VOCABULARY, ids)
    teacher = np.sort(student + 0.5 * rng.standard_normal((size, k)))[:, ::-1]
    teacher = teacher - np.log(np.exp(teacher).sum(1, keepdims=True)) - 0.002
    disagreement = rng.gamma(0.25, 0.6, size)
    compatibility = 1 - rng.beta(0.3, 6, size)
    learnable = np.clip(disagreement / 2, 0, 1) * compatibility
    rank = learnable.argsort()[::-1].argsort() * 20
    lists = {}
    for name, mine, own, other, theirs in (
        ("student", ids, student, teacher_ids, teacher),
        ("teacher", teacher_ids, teacher, ids, student),
    ):
        likely = (
            (mine[:, :, None] == other[:, None]) & (theirs > np.log(LIST_FLOOR))[:, None]
        ).any(2)
        kept = whole | (own > np.log(LIST_FLOOR)) | likely
        lists[f"{name}_top"] = {
            column: [
                list(compress(*each)) for each in zip(rows.tolist(), kept.tolist(), strict=True)
            ]
            for column, rows in (("ids", mine), ("logprobs", own.round(2)))
        }
    sampled = ids[:, 0].tolist()
    listed = {t for ids in lists.values() for row in ids["ids"] for t in row}
    short = lambda values: [float(f"{v:.4g}") for v in values]  # noqa: E731
    return {
        "step": step,
        "completion": 0,
        "prompt": f"Question {step}: what is {step} + {size}?",
        "answer": str(step + size),
        "truncated": bool(rng.random() < 0.2),
        "num_valid": 20 * size,
        "cut": size,
        "tokens": [word(token) for token in sampled],
        "token_ids": sampled,
        "disagreement": short(disagreement),
        "compatibility": short(compatibility),
        "entropy": short(-(np.exp(student) * student).sum(1)),
        "score": short(learnable),
        "rank": rank.tolist(),
        "kept": (rank < size).tolist(),
        "anchored": [False] * size,
        "quadrant": rng.integers(1, 5, size).tolist(),
        "learnable": short(learnable),
        "incompatible": short(np.clip(disagreement / 2, 0, 1) * (1 - compatibility)),
        "student_logprob": short(student[:, 0]),
        "teacher_logprob": short(teacher[:, 0]),
        **lists,
        "vocabulary": {str(token): word(token) for token in sorted(listed)},
    }


def write_run(
    folder: Path, lines: list[dict], *, selector: str = "teachability", steps: int = 40
) -> Path:
    """A run folder with these rollouts and plausible metrics."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    write = lambda name, value: (folder / name).write_text(json.dumps(value))  # noqa: E731
    changed = {"selector": selector, "budget": 0.05, "loss": "reverse_kl"}
    write("config.json", {"command": "train", "changed": changed, **changed, "max_steps": steps})
    write("env.json", {"versions": {"taopd": "0"}, "argv": ["x", "train"], "devices": ["cpu"]})
    write("results.json", {"command": "train", "steps": steps})
    metrics = [
        {
            "step": step,
            "loss": 2 / step,
            "select/kept_fraction": 0.05,
            "signal/disagreement_nats/mean": 1 / step,
            "signal/compatibility/mean": 0.9,
            "signal/entropy_nats/mean": 0.4 + 0.01 * float(rng.random()),
            **{f"select/quadrant_q{q}": 0.25 for q in (1, 2, 3, 4)},
            "step_time": 0.1,
            "perf/train_s": 0.05,
        }
        for step in range(1, steps + 1)
    ]
    for name, rows in (("metrics.jsonl", metrics), ("rollouts.jsonl", lines)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_study(folder: Path) -> Path:
    """A study with three arms of three seeds."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    arms = [
        {
            "name": name,
            "selector": name.partition("@")[0],
            "budget": budget,
            "kept_fraction": budget,
            "seed": seed,
            "base_accuracy": 0.4,
            "accuracy_greedy": end,
            "accuracy_sampled": end - 0.05,
            "accuracy_curve": [[0, 0.4], [10, 0.6], [20, end]],
            "num_test_prompts": 500,
        }
        for name, budget, mean in (
            ("full", 1.0, 0.8),
            ("teachability@5%", 0.05, 0.82),
            ("teachability@10%", 0.1, 0.84),
        )
        for seed in range(3)
        for end in [round(mean + 0.02 * float(rng.standard_normal()), 3)]
    ]
    document = {"task": "synthetic", "arms": arms}
    (folder / "results.json").write_text(json.dumps(document))
    return folder


HOSTILE = (
    "</script><script>window.harmed=1</script>",
    "<!--<script>",
    "]]>",
    "<img src=x onerror=window.harmed=1>",
    "\"'`${window.harmed=1}\\",
    "javascript:window.harmed=1",
    "\u202egnp.exe\u202c",
    "\u2066\u2067\u200f\u200e",
    "\u0000\u0007\u001b[31m\r\n\t",
    "👩\u200d👩\u200d👧🏽 🇩🇪",
    "שלום עולם",
    "\u0300" * 60,
    "\ud800",
    "&lt;b&gt;&amp;",
    "\u2028\u2029\ufeff\u00ad",
    "<style>*{display:none}</style>",
    "__proto__",
    "constructor",
)


def hostile_lines() -> list[dict]:
    """Rollouts whose prompt, answer, tokens and vocabulary try to do harm, and one of 100,000 characters."""
    lines = []
    for size, entries in (
        (len(HOSTILE), HOSTILE),
        (12_500, ("<b>harm", "Ġ\"x'>yz&", "Ċ</p>", "Ġ12")),
    ):
        line = rollout(np.random.default_rng(3), size, step=len(lines))
        tokens = [entries[i % len(entries)] for i in range(size)]
        line |= {"tokens": tokens, "prompt": "".join(HOSTILE) * 30, "answer": HOSTILE[0]}
        names = sorted(line["vocabulary"])
        line["vocabulary"] = {name: HOSTILE[i % len(HOSTILE)] for i, name in enumerate(names)}
        lines.append(line)
    return lines
