"""Teachers and students with one tokenizer but for a few tokens at its end, and heads padded otherwise.

Oracle: each row's own forward without padding, over the ids that both know.
"""

import pytest
import torch

from taopd.errors import DataError
from taopd.models.prompts import load_prompts
from taopd.preflight.probe import measure_micro_batch
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.trainer import TeachabilityTrainer
from tests.conftest import WORDS, make_model, make_tokenizer
from tests.e2e.test_trainer import CPU, OURS
from tests.e2e.test_two_teachers import trained
from tests.scripted_server import ScriptedServer

MORE = (*WORDS, "x0", "x1", "x2", "x3")
SETTINGS = CPU | OURS | {"per_device_train_batch_size": 4, "max_steps": 1, "budget": 0.3}


def made(folder, seed, words, rows):
    """A model with so many rows, saved with a tokenizer of these words."""
    model = make_model(seed=seed, vocab_size=rows)
    for weight in model.parameters():
        weight.data *= 3.0 if weight.ndim == 2 else 1.0
    model.save_pretrained(folder)
    make_tokenizer(words).save_pretrained(folder)
    return model.eval()


def trainer_of(micro_lab, folder, student, teacher, *, added="", own=None, **settings):
    rows = load_prompts(str(micro_lab.prompts), split="train")
    rows = rows.map(lambda row: {"prompt": row["prompt"] + added})
    if own is not None:
        rows = rows.map(lambda row: {"teacher_prompt": row["prompt"].replace(added, own)})
    return TeachabilityTrainer(
        model=str(student),
        teacher_model=teacher if teacher is None else str(teacher),
        args=TeachabilityConfig(output_dir=str(folder / "run"), **(SETTINGS | settings)),
        train_dataset=rows,
    )


CASES = {
    "the teacher has more tokens": ((WORDS, 40), (MORE, 48)),
    "the student has more tokens": ((MORE, 48), (WORDS, 40)),
    "and the teacher's head has rows for them": ((MORE, 44), (WORDS, 56)),
    "another padding": ((WORDS, 44), (WORDS, 48)),
}


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_over_the_shared_ids(micro_lab, tmp_path, case):
    student, teacher = (
        made(tmp_path / role, seed, *sizes)
        for seed, (role, sizes) in enumerate(zip(("s", "t"), CASES[case], strict=True))
    )
    (scored,) = trained(trainer_of(micro_lab, tmp_path, tmp_path / "s", tmp_path / "t"))
    batch, at, signals = scored.batch, 0, scored.signals
    for row in range(len(batch["prompt_ids"])):
        with torch.no_grad():
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
            here = scored.positions.row == row
            # An id that one of them lacks ends what is compared.
            completion = batch["completion_ids"][row][: int(here.sum())]
            for model, found in (
                (student, signals.student_logprobs),
                (teacher, signals.teacher_logprobs),
            ):
                logits = model(torch.cat([prompt, completion])[None]).logits[0, :, : len(WORDS)]
                own = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
                expected = own.gather(1, completion[:, None])[:, 0]
                torch.testing.assert_close(found[here].double(), expected, rtol=0, atol=2e-5)
        at += len(completion)
    assert at == len(signals) and at > 8


@pytest.mark.parametrize("rows", [40, 56])
@pytest.mark.parametrize("served", [False, True])
def test_a_prompt_with_a_token_that_the_teacher_lacks_is_refused(micro_lab, tmp_path, rows, served):
    """Also where its head has a row for it, which nothing has trained."""
    made(tmp_path / "s", 0, MORE, 44)
    path = tmp_path / "tiny-teacher"
    teacher = made(path, 1, WORDS, rows)
    loss = {"loss": "sampled_reverse_kl"} if served else {}
    with ScriptedServer(teacher) as server:
        if served:
            loss |= {"teacher_url": server.url, "teacher_model_name_or_path": str(path)}
        models = tmp_path / "s", None if served else path
        with pytest.raises(DataError, match="the token id 41, and the teacher knows ids up to 39"):
            trained(trainer_of(micro_lab, tmp_path / "a", *models, added=" x1", **loss))
        with pytest.raises(DataError, match="the token id 41"):
            measure_micro_batch(trainer_of(micro_lab, tmp_path / "c", *models, added=" x1", **loss))
        # The cure that it names.
        trained(trainer_of(micro_lab, tmp_path / "b", *models, added=" x1", own=" w3", **loss))
