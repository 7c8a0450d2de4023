"""A teacher behind a server: the student's process holds no teacher weights.

Run it: python examples/served_teacher.py (with a small server of its own, on loopback)
With vLLM or SGLang: python examples/served_teacher.py http://localhost:8000

There `vllm serve FOLDER --port 8000` must run, where FOLDER is what
`python -c "import taopd; print(taopd.build_lab('dialect').teacher)"` prints.
"""

import argparse
import contextlib
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

from taopd import TeachabilityConfig, TeachabilityTrainer, build_lab, load_prompts
from taopd.errors import TaopdError

parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS)
parser.add_argument("url", nargs="?", help="of the server; without it a small one is started")
url = parser.parse_args().url
lab = build_lab("dialect")
with contextlib.ExitStack() as stack:
    if url is None:
        # The small server is that of the tests: it answers as SGLang does, from a model in this process.
        sys.path.append(str(Path(__file__).parents[1]))
        from tests.scripted_server import ScriptedServer

        teacher = AutoModelForCausalLM.from_pretrained(lab.teacher)
        url = stack.enter_context(ScriptedServer(teacher, "sglang")).url
    try:
        args = TeachabilityConfig(
            output_dir="runs/served",
            teacher_url=url,
            # Tokenizer and config only, to compare them.
            teacher_model_name_or_path=str(lab.teacher),
            loss="sampled_reverse_kl",  # needs the teacher's log-prob of the sampled token alone
            budget=0.1,
            score_top_k=lab.top_k,
            max_steps=5,
            learning_rate=3e-4,
            per_device_train_batch_size=16,
            max_completion_length=lab.max_completion_length,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
        )
        prompts = load_prompts(lab.prompts, split="train")
        trainer = TeachabilityTrainer(str(lab.student), args=args, train_dataset=prompts)
        trainer.train()
    except TaopdError as error:  # no server there, or one that serves something else
        parser.error(str(error))
print(f"{trainer.state.global_step} steps with the teacher at {url}: see runs/served/teacher.json")
