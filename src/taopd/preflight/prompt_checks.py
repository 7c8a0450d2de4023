"""The item of `taopd check` about prompts: a few rows as the tokens that the student will read."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from taopd.models.prompt_faults import Turns, prompt_faults
from taopd.models.prompt_rows import read_prompt
from taopd.models.prompts import encode_prompts
from taopd.preflight.verdict import Problems, Verdict, judge

_SHOWN = 60
"""Characters of the end of a prompt that are shown."""


def check_prompts(
    student: Tokenizer,
    teacher: Tokenizer | None,
    rows: Sequence[Mapping[str, Any]],
    *,
    options: Mapping[str, Any],
    stop_ids: Sequence[int],
    tools: Sequence[Any] = (),
) -> Verdict:
    """Both ends of the prompts, answers within them, and what the template leaves out.

    Args:
        teacher: None where its files are not named.
        options: `chat_template_kwargs`.
        stop_ids: of the student's generation config.
        tools: that every prompt is shown.

    Raises:
        DataError: a row that is no prompt, or messages and no chat template.
    """
    ids = encode_prompts(student, rows, options=options, tools=tools)
    problems = Problems()
    for fault in prompt_faults(student, rows, options=options, stop_ids=stop_ids, tools=tools):
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
