"""The files that one default training step goes through, measured on micro models.

    python -m scripts.trace_step            # a line of counts, then a line for every module
    python -m scripts.trace_step --calls    # also every call, in order

The second training step of a run with default settings is traced with `sys.setprofile`, from the call that
fetches its batch (sample, score, select) to the end of its backward. Counted are calls of taopd's functions,
comprehensions and resumed generators left out. A move is a call in another module than the call before. A
room is an entry directly below src/taopd.
"""

import contextlib
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import taopd
from scripts.arguments import Arguments
from scripts.reliability.tiny_models import write_lab

ROOT = str(Path(taopd.__file__).parent)
STEP = 2
"""The step that is traced: nothing is set up in it any more."""
FIRST_INSTRUCTIONS = 8
"""A frame that is called beyond them is a generator that goes on."""


class Trace:
    """Records the module of every function of the package that is called."""

    def __init__(self) -> None:
        self.modules: list[str] = []
        self.calls: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """What `sys.setprofile` calls."""
        code = frame.f_code
        ours = event == "call" and code.co_filename.startswith(ROOT)
        if not ours or code.co_name.startswith("<") or frame.f_lasti > FIRST_INSTRUCTIONS:
            return
        module = os.path.relpath(code.co_filename, ROOT).removesuffix(".py")
        self.calls.append(f"{module}:{code.co_qualname}")
        if not self.modules or self.modules[-1] != module:
            self.modules.append(module)


def trace(folder: Path) -> Trace:
    """Trace one step of a run in a folder."""
    from taopd import TeachabilityConfig, TeachabilityTrainer

    try:
        from taopd import load_prompts
    except ImportError:  # a commit before the rooms
        from taopd.data import load_prompts

    write_lab(folder)
    args = TeachabilityConfig(
        output_dir=str(folder / "run"),
        max_steps=STEP,
        per_device_train_batch_size=4,
        max_completion_length=8,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    prompts = load_prompts(str(folder / "prompts.parquet"), split="train")
    trainer = TeachabilityTrainer(
        str(folder / "student"), str(folder / "teacher"), args, train_dataset=prompts
    )
    tracing, training_step = Trace(), trainer.training_step

    def traced(*args: Any, **kwargs: Any) -> Any:
        sys.setprofile(tracing if trainer.state.global_step == STEP - 1 else None)
        try:
            return training_step(*args, **kwargs)
        finally:
            sys.setprofile(None)

    trainer.training_step = traced
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train(check=False)
    return tracing


def main() -> None:
    """Print the counts."""
    parser = Arguments(description=__doc__)
    parser.add_argument("--calls", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        traced = trace(Path(folder))
    modules = traced.modules
    rooms = {module.partition("/")[0] for module in modules}
    print(f"rooms {len(rooms)}, modules {len(set(modules))}, moves {len(modules) - 1}")
    print("rooms:", ", ".join(sorted(rooms)))
    for module, count in Counter(modules).most_common():
        print(f"{count:4}  {module}")
    if options.calls:
        print("\n".join(traced.calls))


if __name__ == "__main__":
    main()
