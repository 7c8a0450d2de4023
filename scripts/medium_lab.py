"""The medium lab: word problems with worked steps, a 100 M teacher, a 25 M student, for one GPU.

    python scripts/medium_lab.py data  --root runs/medium
    python scripts/medium_lab.py pretrain teacher --root runs/medium      (again until it says "done")
    python scripts/medium_lab.py pretrain student --root runs/medium
    python scripts/medium_lab.py arms  --root runs/medium --minutes 9     (again until it says "done")
    python scripts/medium_lab.py table --root runs/medium --page docs/results/medium.md
    taopd diagnose one-step --help               (with runs/medium/student and runs/medium/teacher)

Every command ends within `--minutes` and goes on where it was. `--tiny` shrinks models, data and steps to
what a laptop does in a minute; it is how the script is tested.

The task: one to three purchases, gifts or losses, a question, the steps in words, and `#### answer`. Each
step can be worded in one of several dialects. The teacher writes dialects 0 to 3; the student's corpus has
dialects 2 to 5, so they share two, and one step in four of the student's is wrong by ten or by one. What the
student can learn at once is the arithmetic; what lies outside its support are two ways of wording.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from scripts.arguments import Arguments
from taopd.experiments.arm_settings import Arm
from taopd.experiments.kept_arms import prepare
from taopd.experiments.pool import run_pool
from taopd.report.generated_part import markdown_table

NAMES = (
    *("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus"),
    *("Hana", "Ivo", "Jane", "Kofi", "Lea", "Mia"),
)
THINGS = (
    *("apples", "books", "coins", "shells", "marbles"),
    *("stamps", "cards", "pens", "beads", "stones"),
)
DIALECTS = (
    ("Start with {a}. ", "Add {b}: {a} + {b} = {c}. ", "Take away {b}: {a} - {b} = {c}. "),
    ("First there are {a}. ", "{b} more makes {c}. ", "{b} fewer makes {c}. "),
    ("We begin at {a}. ", "Going up by {b} we reach {c}. ", "Going down by {b} we reach {c}. "),
    ("Count {a}. ", "Plus {b} is {c}. ", "Minus {b} is {c}. "),
    (
        "Let me see , {a} at the outset. ",
        "Then comes {b} , so {c}. ",
        "Then {b} is gone , so {c}. ",
    ),
    ("{a} , okay. ", "{b} in , total {c}. ", "{b} out , total {c}. "),
)
ROLE_DIALECTS = {"teacher": (0, 1, 2, 3), "student": (2, 3, 4, 5)}
ERROR_SHARE = {"teacher": 0.0, "student": 0.25}
ARMS: dict[str, dict[str, Any]] = {
    "full": {"selector": "full"},
    **{f"anchored-{budget:g}": {"budget": budget, "method": "anchored"} for budget in (0.05, 0.1)},
    **{
        f"{name}-{budget:g}": {"selector": selector, "budget": budget}
        for budget in (0.05, 0.1)
        for name, selector in (
            ("teachability", "teachability"),
            ("c-only", "compatible"),
            ("random", "random"),
            ("entropy", "entropy"),
            ("tip", "tip"),
        )
    },
}
SIZES: dict[bool, dict[str, Any]] = {
    False: {
        "teacher": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
        "student": {"hidden_size": 448, "num_hidden_layers": 8, "num_attention_heads": 7},
        "steps": 12_000,
        "batch": 128,
        "vocabulary": 4000,
        "prompts": 20_000,
        "tests": 500,
        "arm_steps": 300,
        "rollouts": 64,
        "seeds": 3,
    },
    True: {
        "teacher": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "student": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        "steps": 4,
        "batch": 8,
        "vocabulary": 300,
        "prompts": 64,
        "tests": 8,
        "arm_steps": 2,
        "rollouts": 4,
        "seeds": 1,
    },
}
MAX_LENGTH, MAX_COMPLETION = 192, 112


def problem(rng: random.Random) -> tuple[str, int, list[int]]:
    """A question, its first number and its signed changes."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    total = first = rng.randint(10, 99)
    text, changes = f"{name} has {first} {thing}. ", []
    for _ in range(rng.randint(1, 3)):
        change = rng.randint(2, 60)
        if change < total and rng.random() < 0.5:
            change = -change
        other = rng.choice([n for n in NAMES if n != name])
        words = (
            f"{name} buys {change} more. " if change > 0 else f"{name} gives {-change} to {other}. "
        )
        text, total = text + words, total + change
        changes.append(change)
    return f"{text}How many {thing} does {name} have ? ", first, changes


def solution(first: int, changes: list[int], role: str, rng: random.Random) -> str:
    """Worked steps in the role's dialects, and the answer that they lead to."""
    begin, plus, minus = DIALECTS[rng.choice(ROLE_DIALECTS[role])]
    text, total = begin.format(a=first), first
    for change in changes:
        result = total + change
        if rng.random() < ERROR_SHARE[role]:
            result += rng.choice((-10, -1, 1, 10))
        text += (plus if change > 0 else minus).format(a=total, b=abs(change), c=result)
        total = result
    return f"{text}#### {total}"


def make_data(root: Path, sizes: dict[str, Any]) -> None:
    """Tokenizer and prompts."""
    rng = random.Random(0)
    corpus = []
    for index in range(4000):
        text, first, changes = problem(rng)
        corpus.append(text + solution(first, changes, ("teacher", "student")[index % 2], rng))
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=sizes["vocabulary"],
            special_tokens=["<pad>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    tokenizer.save_pretrained(root / "tokenizer")
    rows = []
    for index in range(sizes["prompts"] + sizes["tests"]):
        text, first, changes = problem(rng)
        split = "test" if index < sizes["tests"] else "train"
        rows.append({"prompt": text, "answer": str(first + sum(changes)), "split": split})
    pq.write_table(pa.Table.from_pylist(rows), root / "prompts.parquet")
    print(f"{len(tokenizer)} tokens, {len(rows)} prompts in {root}")


def pretrain(root: Path, role: str, sizes: dict[str, Any], deadline: float) -> None:
    """Train one model on fresh problems until done or until the deadline; resumable."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
    folder, state_file = root / role, root / f"{role}-progress"
    for path in (folder, state_file):
        if (path / "config.json").exists():
            width = json.loads((path / "config.json").read_text())["hidden_size"]
            if width != sizes[role]["hidden_size"]:
                raise SystemExit(
                    f"{path} holds a model of width {width}, made with or without --tiny: name another --root"
                )
    if (folder / "config.json").exists():
        print(f"{role}: done before, in {folder}")
        return
    done = json.loads((state_file / "step.json").read_text())["step"] if state_file.exists() else 0
    if done:
        model = Qwen3ForCausalLM.from_pretrained(state_file, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        width = sizes[role]["hidden_size"]
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                intermediate_size=3 * width,
                num_key_value_heads=sizes[role]["num_attention_heads"],
                head_dim=width // sizes[role]["num_attention_heads"],
                max_position_embeddings=2 * MAX_LENGTH,
                tie_word_embeddings=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **sizes[role],
            )
        )
    model.to(device).train()
    # Moments start anew after a break; a short warm-up covers it.
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.01)
    for local, step in enumerate(range(done, sizes["steps"])):
        rng = random.Random(f"{role}-{step}")
        texts = []
        for _ in range(sizes["batch"]):
            text, first, changes = problem(rng)
            texts.append(text + solution(first, changes, role, rng) + tokenizer.eos_token)
        batch = tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True, max_length=MAX_LENGTH
        )
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        labels = ids.masked_fill(mask == 0, -100)
        share = min(1.0, (local + 1) / 100) * max(0.05, 1 - step / sizes["steps"])
        for group in optimizer.param_groups:
            group["lr"] = 6e-4 * share
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0:
            print(f"{role} step {step} loss {loss.item():.3f}", flush=True)
        if time.monotonic() > deadline and step + 1 < sizes["steps"]:
            model.save_pretrained(state_file)
            (state_file / "step.json").write_text(json.dumps({"step": step + 1}))
            print(f"{role}: {step + 1} of {sizes['steps']} steps; run the command again")
            return
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{role}: done, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


def run_arms(root: Path, sizes: dict[str, Any], deadline: float) -> None:
    """Run arms, one after the other, while there is time; finished ones are kept."""
    pace, remaining = 0.0, []
    for seed in range(sizes["seeds"]):
        for name, settings in ARMS.items():
            arm = Arm(
                name=name,
                seed=seed,
                config={
                    "per_device_train_batch_size": sizes["rollouts"],
                    "learning_rate": 1e-5,
                    "lr_scheduler_type": "constant",
                    "gradient_checkpointing": False,
                    "max_steps": sizes["arm_steps"],
                    "max_completion_length": MAX_COMPLETION,
                    "logging_steps": 1,
                    "method": "published",
                    **settings,
                },
                student=str(root / "student"),
                teacher=str(root / "teacher"),
                prompts=str(root / "prompts.parquet"),
                match=r"regex:(?<=#### )\d+",
                evaluate_every=max(1, sizes["arm_steps"] // 6),
                num_test_prompts=sizes["tests"],
            )
            folder = root / "arms" / arm.folder_name
            finished = (folder / "results.json").exists()
            if not finished and time.monotonic() + pace > deadline:
                remaining.append(arm.folder_name)
                continue
            prepare([(arm, folder)])  # refuses one of other settings
            if finished:
                continue
            started = time.monotonic()
            run_pool([folder], num_workers=1)
            pace = max(pace, time.monotonic() - started)
            print(f"{arm.folder_name}: {time.monotonic() - started:.0f} s", flush=True)
    print(f"{len(remaining)} arms to go; run the command again" if remaining else "arms: done")


def write_table(root: Path, page: Path) -> None:
    """A markdown table of what has finished: mean, smallest and largest over seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((root / "arms").glob("*/results.json")):
        row = json.loads(path.read_text())
        found.setdefault(row["name"], []).append(row)
    table = []
    for name, rows in found.items():
        columns = [
            [max(value for _, value in row["accuracy_curve"]) for row in rows],
            [row["accuracy_greedy"] for row in rows],
            [row["accuracy_sampled"] for row in rows],
        ]
        cells = [
            f"{100 * sum(c) / len(c):.1f} [{100 * min(c):.0f}, {100 * max(c):.0f}]" for c in columns
        ]
        table.append([name, str(len(rows)), *cells])
    heads = ("arm", "seeds", "best greedy", "end, greedy", "end, sampled")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("# The medium lab\n\n" + "\n".join(markdown_table(heads, table)) + "\n")
    print(page)


def main(argv: list[str] | None = None) -> None:
    """Run one command."""
    parser = Arguments(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("command", choices=("data", "pretrain", "arms", "table"))
    parser.add_argument("role", nargs="?", choices=("teacher", "student"))
    parser.add_argument("--root", type=Path, default=Path("runs/medium"))
    parser.add_argument("--minutes", type=float, default=9.0, help="end within about this (9)")
    parser.add_argument("--page", type=Path, default=Path("docs/results/medium.md"))
    parser.add_argument("--tiny", action="store_true", help="toy sizes, as in the test")
    options = parser.parse_args(argv)
    sizes, deadline = SIZES[options.tiny], time.monotonic() + 60 * options.minutes
    options.root.mkdir(parents=True, exist_ok=True)
    if options.command == "data":
        make_data(options.root, sizes)
    elif options.command == "pretrain":
        if options.role is None:
            parser.error("pretrain needs a role: teacher or student")
        pretrain(options.root, options.role, sizes, deadline)
    elif options.command == "arms":
        run_arms(options.root, sizes, deadline)
    else:
        write_table(options.root, options.page)


if __name__ == "__main__":
    main()
