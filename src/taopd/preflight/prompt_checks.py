"""The item of `taopd check` about prompts: a few rows as the tokens that the student will read."""

from typing import TYPE_CHECKING

from taopd.models.prompt_faults import LOOKED_AT, Turns, prompt_faults
from taopd.models.prompt_rows import read_prompt
from taopd.models.prompts import encode_prompts
from taopd.models.stop_tokens import declared_ids
from taopd.preflight.verdict import Problems, Verdict, judge

if TYPE_CHECKING:
    from taopd.preflight.subject import Subject

_SHOWN = 60
"""Characters of the end of a prompt that are shown."""


def check_prompts(subject: "Subject") -> Verdict:
    """Both ends of the prompts, answers within them, and what the template leaves out.

    Raises:
        DataError: a row that is no prompt, or messages and no chat template.
    """
    student = subject.tokenizer
    # None where its files are not named.
    teacher = subject.tokenizers[1] if subject.names_teacher else None
    rows = subject.some_rows(LOOKED_AT)
    stop_ids = declared_ids(subject.student_generation_config.eos_token_id)
    ids = encode_prompts(student, rows, **subject.shown)
    problems = Problems()
    for fault in prompt_faults(student, rows, stop_ids=stop_ids, **subject.shown):
        problems.append(("fail" if fault.certain else "warn", fault.text))
    markers = Turns.of(student, None, stop_ids).markers
    plain = [
        row
        for place, row in enumerate(rows)
        if isinstance(text := read_prompt(row, f"row {place}").content, str)
        and not any(token in text for token in markers)
    ]
    if plain and student.chat_template and (teacher is None or teacher.chat_template):
        problems.warn(
            f"{len(plain)} of {len(rows)} prompts are plain text without turns, and the models are chat "
            "models: they would go on with the text instead of answering. Store messages with role and "
            "content, unless both are base models whose tokenizers carry a template."
        )
    lengths = [len(tokens) for tokens in ids]
    end = student.decode(ids[0])[-_SHOWN:]
    figures = {"prompts": len(ids), "shortest_tokens": min(lengths), "longest_tokens": max(lengths)}
    least, most = min(lengths), max(lengths)
    span = f"{most}" if least == most else f"{least} to {most}"
    text = f"{len(ids)} prompts looked at, of {span} tokens each; the first ends with {end!r}"
    return judge("prompts", text, problems, figures=figures | {"end": end})
