"""The default on another task than that of the labs: sorting letters. Writes docs/results/letters.json.

    python -m scripts.letters --runs runs/letters        # half an hour of one core, resumable
    python -m scripts.letters --gather                   # the page from its saved file

    prompt       d a f h c b =
    completion   a b c d f h <eos>

`method: reach` was not changed after a look at these. Models have 0.1 M parameters, and are made on this
machine. The run itself is that of a user: `TeachabilityTrainer` with its defaults, the exact reverse KL, 32
rollouts a step. Accuracy is that of 300 held-out prompts.
"""

import json
import math
from collections.abc import Iterable
from itertools import permutations, product
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from scripts.arguments import Arguments
from scripts.lab_results import write_page, write_rows
from taopd import TeachabilityConfig, TeachabilityTrainer
from taopd.report.generated_part import markdown_table
from taopd.runs.jsonl import write_json
from taopd.trainer.environment import environment

NUM_LETTERS, LENGTH = 8, 6
LETTERS = "abcdefgh"
WORDS = (*LETTERS, *LETTERS.upper(), "=", "<pad>", "<bos>", "<eos>", "<unk>")
EQUALS, PAD, BOS, EOS = (WORDS.index(word) for word in ("=", "<pad>", "<bos>", "<eos>"))
MAX_NEW = 14
SITUATIONS = {
    "orders": "copies 60 %, sorts 25 %, reverses 15 %; 8 % of its letters are chance",
    "copies": "copies 80 %, reverses 20 %; 5 % of its letters are chance",
    "capitals": "as *orders*; its teacher writes capitals, which it never wrote",
}
"""What the student does before training; its teacher sorts."""
SHARES = {"orders": (0.6, 0.25, 0.08), "copies": (0.8, 0.0, 0.05), "capitals": (0.6, 0.25, 0.08)}
"""Of texts that copy and that sort, of letters that are chance."""
ARMS: dict[str, dict[str, Any]] = {
    "reach": {"method": "reach"},
    "full": {"method": "published", "selector": "full"},
    "published": {"method": "published"},
}
SEEDS, STEPS, EVERY = range(2), 1000, 50
PRETRAIN_STEPS, BATCH, RATE = 3000, 64, 3e-3


def prompts() -> tuple[Tensor, Tensor]:
    """Prompts to train on [4000, 6], and held out [300, 6]."""
    every = torch.tensor(list(permutations(range(NUM_LETTERS), LENGTH)))
    drawn = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
    return drawn[300:4300], drawn[:300]


def student_texts(name: str, rows: Tensor, generator: torch.Generator) -> Tensor:
    """What the student learns to write, [N, 7]."""
    copies, sorts, chance = SHARES[name]
    draw = torch.rand(len(rows), 1, generator=generator)
    ordered = rows.sort(1).values
    texts = torch.where(draw < copies, rows, ordered.flip(1))
    texts = torch.where((draw >= copies) & (draw < copies + sorts), ordered, texts)
    slips = torch.rand(rows.shape, generator=generator) < chance
    other = torch.randint(NUM_LETTERS, rows.shape, generator=generator)
    return torch.nn.functional.pad(torch.where(slips, other, texts), (0, 1), value=EOS)


def teacher_texts(name: str, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What the teacher reads [N, 14] and what it says next: the least letter that is missing so far.

    A third of the texts it reads are its own, a third the student's, in the others three tokens of ten are
    the student's. After an end there is nothing to say (-100).
    """
    first = NUM_LETTERS * (name == "capitals")
    student = torch.nn.functional.pad(
        student_texts(name, rows, generator), (0, MAX_NEW - LENGTH - 1), value=EOS
    )
    share = torch.tensor([0.0, 1.0, 0.3])[torch.randint(3, (len(rows), 1), generator=generator)]
    missing = torch.zeros(len(rows), NUM_LETTERS, dtype=torch.bool).scatter(1, rows, True)
    ended = torch.zeros(len(rows), dtype=torch.bool)
    read, said = [], []
    for place in range(MAX_NEW):
        own = torch.where(missing.any(1), first + missing.long().argmax(1), EOS)
        said.append(torch.where(ended, -100, own))
        foreign = torch.rand(len(rows), generator=generator) < share[:, 0]
        token = torch.where(foreign, student[:, place], own)
        read.append(torch.where(ended, PAD, token))
        letters = torch.arange(NUM_LETTERS) == (token % NUM_LETTERS)[:, None]
        missing &= ~(letters & (token < 2 * NUM_LETTERS)[:, None])
        ended |= token == EOS
    return torch.stack(read, 1), torch.stack(said, 1)


def pretrain(name: str, role: str, folder: Path) -> None:
    """Make one model and save it with its tokenizer."""
    width, seed = (64, 1) if role == "teacher" else (48, 2)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(WORDS),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=width // 16,
            num_key_value_heads=width // 16,
            head_dim=16,
            initializer_range=0.05,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )
    train, _ = prompts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    for step in range(PRETRAIN_STEPS):
        done = step / PRETRAIN_STEPS
        optimizer.param_groups[0]["lr"] = RATE * min(10 * done, (1 + math.cos(math.pi * done)) / 2)
        rows = train[torch.randint(len(train), (BATCH,), generator=generator)]
        if role == "teacher":
            read, said = teacher_texts(name, rows, generator)
        else:
            read = said = student_texts(name, rows, generator)
        equals = torch.full((BATCH, 1), EQUALS)
        inputs = torch.cat([rows, equals, read[:, :-1]], dim=1)
        logits = model(inputs, logits_to_keep=said.shape[1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), said.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {f"{kind}_token": f"<{kind}>" for kind in ("bos", "eos", "pad", "unk")}
    PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", model_max_length=64, **special
    ).save_pretrained(folder)
    # Last: a folder with weights is finished.
    model.save_pretrained(folder)


@torch.no_grad()
def accuracy(model: Any, rows: Tensor, *, sample: bool) -> float:
    """Share of prompts whose completion is sorted and ends, capitals or not."""
    training = model.training
    inputs = torch.cat([rows, torch.full((len(rows), 1), EQUALS)], dim=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        texts = model.eval().generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=MAX_NEW,
            do_sample=sample,
            **({"top_k": 0} if sample else {}),
        )[:, inputs.shape[1] :]
    model.train(training)
    texts = torch.nn.functional.pad(texts, (0, LENGTH + 1), value=PAD)[:, : LENGTH + 1]
    right = (texts[:, :LENGTH] % NUM_LETTERS == rows.sort(1).values) & (
        texts[:, :LENGTH] < 2 * NUM_LETTERS
    )
    return float((right.all(1) & (texts[:, LENGTH] == EOS)).double().mean())


class Curve(TrainerCallback):
    """Measures the student every `EVERY` steps."""

    def __init__(self, model: Any, rows: Tensor) -> None:
        self._rows = rows
        self.greedy = [accuracy(model, rows, sample=False)]
        self.sampled = [accuracy(model, rows, sample=True)]

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % EVERY == 0:
            self.greedy.append(accuracy(model, self._rows, sample=False))
            self.sampled.append(accuracy(model, self._rows, sample=True))


def run(folder: Path, name: str, arm: str, seed: int) -> None:
    """Train one arm, and write its file."""
    pair = {role: folder / "models" / name / role for role in ("teacher", "student")}
    for role, path in pair.items():
        if not (path / "model.safetensors").exists():
            pretrain(name, role, path)
    train, test = prompts()
    texts = [" ".join(WORDS[letter] for letter in row) + " =" for row in train.tolist()]
    args = TeachabilityConfig(
        output_dir=str(folder / "runs" / f"{name}-{arm}-{seed}"),
        score_top_k=4,
        max_steps=STEPS,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        loss="reverse_kl",
        per_device_train_batch_size=32,
        max_completion_length=MAX_NEW,
        seed=seed,
        save_strategy="no",
        logging_steps=100,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        **ARMS[arm],
    )
    trainer = TeachabilityTrainer(
        str(pair["student"]),
        str(pair["teacher"]),
        args,
        train_dataset=Dataset.from_dict({"prompt": texts}),
    )
    curve = Curve(trainer.model, test)
    trainer.add_callback(curve)
    trainer.train(check=False)
    about = {"situation": name, "arm": arm, "seed": seed, "steps": STEPS}
    measured = {"greedy": curve.greedy, "sampled": curve.sampled}
    write_json(file_of(folder, name, arm, seed), about | measured)


def file_of(folder: Path, name: str, arm: str, seed: int) -> Path:
    """Of one arm."""
    return folder / f"{name}__{arm}__seed{seed}.json"


def page(rows: list[dict[str, Any]]) -> str:
    """When half of the texts are right, and the end: greedy and sampled accuracy, %, a number a seed."""
    lines = []
    for name, arm in product(SITUATIONS, ARMS):
        own = [row for row in rows if (row["situation"], row["arm"]) == (name, arm)]
        if own:
            lines.append(
                [
                    name,
                    arm,
                    listed(first_half_right(row["greedy"]) for row in own),
                    *(
                        listed(f"{100 * row[how][-1]:.0f}" for row in own)
                        for how in ("greedy", "sampled")
                    ),
                ]
            )
    heads = ["situation", "arm", "half right at step", "greedy, end", "sampled, end"]
    return "\n".join(markdown_table(heads, lines, texts=2))


def first_half_right(greedy: list[float]) -> str:
    """The first checkpoint from which on at least half of the texts are right; - if there is none."""
    wrong = [index for index, share in enumerate(greedy) if share < 0.5]
    first = wrong[-1] + 1 if wrong else 0
    return str(first * EVERY) if first < len(greedy) else "-"


def listed(cells: Iterable[str]) -> str:
    """One number a seed."""
    return ", ".join(cells)


def main() -> None:
    """Run what is missing, and write the page."""
    parser = Arguments(description=(__doc__ or "").splitlines()[0])
    parser.add_runs("runs/letters", from_saved=True)
    parser.add_argument(
        "--only", nargs="*", choices=list(SITUATIONS), default=list(SITUATIONS), metavar="SITUATION"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results/letters.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, seed, arm in [] if args.gather else product(args.only, SEEDS, ARMS):
        if not file_of(args.runs, name, arm, seed).exists():
            run(args.runs, name, arm, seed)
            print(f"{name}, {arm}, seed {seed}", flush=True)
    known = json.loads(args.output.read_text()) if args.output.exists() else {"arms": []}
    rows = {(row["situation"], row["arm"], row["seed"]): row for row in known["arms"]}
    for path in [] if args.runs is None else args.runs.glob("*__seed*.json"):
        row = json.loads(path.read_text())
        rows[row["situation"], row["arm"], row["seed"]] = row
    order = [rows[key] for key in product(SITUATIONS, ARMS, SEEDS) if key in rows]
    about = known.get("about") or environment() if args.gather else environment()
    shown = {"versions": about["versions"], "devices": about["devices"]}
    write_rows(args.output, {"about": shown}, "arms", order)
    steps = range(0, STEPS + 1, EVERY)
    panels = {
        name: [(row["arm"], steps, row["greedy"]) for row in order if row["situation"] == name]
        for name in SITUATIONS
    }
    numbers = (
        f"Exact reverse KL, 10 %, {STEPS:,} steps of 32 rollouts, constant rate of 3e-4; "
        f"{len(SEEDS)} seeds. {shown['devices'][0]}."
    )
    write_page(
        args.output,
        panels,
        [numbers, page(order)],
        title="Sorting letters",
        of="Greedy accuracy over steps, a line a seed",
    )


if __name__ == "__main__":
    main()
