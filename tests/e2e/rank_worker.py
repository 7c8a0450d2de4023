"""One rank of `test_ranks.py`: a step on fixed completions; rank 0 saves what was kept and the step taken.

Run as: torchrun --nproc-per-node N rank_worker.py MICRO_LAB_FOLDER OUTPUT_FOLDER SETTINGS_JSON
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from taopd.config import TeachabilityConfig
from taopd.data import load_prompts
from taopd.trainer import TeachabilityTrainer


def completion_of(prompt_ids: list[int]) -> list[int]:
    """A completion that depends on the prompt alone, so that ranks cannot change it; some are cut short."""
    generator = torch.Generator().manual_seed(sum(i * t for i, t in enumerate(prompt_ids, start=1)))
    length = int(torch.randint(1, 6, (1,), generator=generator))
    return [*torch.randint(4, 40, (length,), generator=generator).tolist(), 2]


def main() -> None:
    """Train one step and save."""
    lab, out, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    args = TeachabilityConfig(
        output_dir=str(out / "run"),
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        max_completion_length=6,
        lr_scheduler_type="constant",
        score_top_k=4,
        logging_steps=1,
        max_steps=1,
        optim="sgd",
        learning_rate=1e3,
        max_grad_norm=0.0,
        **settings,
    )
    trainer = TeachabilityTrainer(
        model=str(lab / "student"),
        teacher_model=str(lab / "teacher"),
        args=args,
        train_dataset=load_prompts(str(lab / "prompts.parquet"), split="train"),
    )
    trainer._generate_single_turn = lambda ids, *_, **__: [completion_of(prompt) for prompt in ids]
    seen = []
    trainer.observers.append(seen.append)
    trainer.train()
    if trainer.accelerator.is_main_process:
        state = {
            f"model.{name}": p.detach().contiguous() for name, p in trainer.model.named_parameters()
        }
        choice = seen[0].choice
        state |= {"kept": choice.selection.kept.int(), "anchors": choice.anchor_weights}
        save_file(state, out / "state.safetensors")
        (out / "loss.json").write_text(json.dumps(trainer.state.log_history[0]))


if __name__ == "__main__":
    main()
