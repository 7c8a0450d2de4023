"""Do both models mean the same by a token, an end, a turn? Tokenizers and templates; no weights.

Each function is one item of `taopd check`. A fail is what makes the run wrong, a warning what usually is
an oversight and can be meant.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from taopd.errors import DataError
from taopd.models.output_head import head_rows
from taopd.models.prompt_faults import LOOKED_AT
from taopd.models.prompt_rows import Prompt, read_prompt, render
from taopd.models.stop_tokens import declared_ids
from taopd.models.tokenizers import shared_vocabulary
from taopd.preflight.verdict import Problems, Verdict, judge

if TYPE_CHECKING:
    from taopd.preflight.subject import Subject

THINKING_FLAGS = ("enable_thinking", "thinking", "reasoning_effort")
"""Names under which chat templates take their thinking mode."""
_MERGE = (
    "Set stop_tokens: merge (all ids that end a completion count as one token, not for tool use)"
)
_EXCLUDE = (
    "Set stop_tokens: exclude (no id that ends a completion trains; a server cannot merge them)"
)


def token_name(tokenizer: Tokenizer, index: int | None) -> str:
    """An id with its token, for a person."""
    if index is None:
        return "none"
    token = tokenizer.convert_ids_to_tokens(index) if index < len(tokenizer) else None
    return f"{token or 'no token'} ({index})"


def check_tokenizers(subject: "Subject") -> Verdict:
    """Every shared id is the same token, and both heads have a row for each."""
    student_rows, teacher_rows = (head_rows(config) for config in subject.configs)
    student, teacher = subject.tokenizers
    shared = shared_vocabulary(
        student,
        teacher,
        student_rows,
        teacher_rows,
        cut_renamed_control_tokens=subject.settings.training.cut_renamed_control_tokens,
    )
    problems = Problems()
    for owner, tokenizer, rows in (
        ("student", student, student_rows),
        ("teacher", teacher, teacher_rows),
    ):
        if rows < len(tokenizer):
            problems.fail(
                f"The {owner}'s output layer has {rows} rows for {len(tokenizer)} tokens: it cannot write or "
                f"read token ids from {rows} on. Its tokenizer belongs to another checkpoint, or the "
                "embeddings were not resized after tokens were added."
            )
    sizes = {"student_rows": student_rows, "teacher_rows": teacher_rows, "shared_ids": shared}
    measured = (
        f"{shared} token ids in common; output layers of {student_rows} rows (student) and {teacher_rows} "
        "rows (teacher)"
    )
    return judge("tokenizers", measured, problems, figures=sizes)


def check_special_tokens(subject: "Subject") -> Verdict:
    """End-of-sequence and padding ids of both tokenizers."""
    student, teacher = subject.tokenizers
    chosen = subject.settings.training.stop_tokens
    cured = chosen == "merge" or (subject.remote and chosen == "exclude")
    problems = Problems()
    if student.eos_token_id is None:
        problems.fail("The student has no end-of-sequence token: set eos_token in its tokenizer.")
    elif teacher.eos_token_id != student.eos_token_id and not cured:
        problems.warn(
            f"The student ends with {token_name(student, student.eos_token_id)}, the teacher with "
            f"{token_name(teacher, teacher.eos_token_id)}. {_EXCLUDE if subject.remote else _MERGE}."
        )
    if student.pad_token_id == student.eos_token_id:
        problems.warn(
            "The student's padding is its end-of-sequence token, or it has none of its own: tools "
            "that mask padding would also mask the end. Give the tokenizer a pad_token."
        )
    names = ("eos_token_id", "pad_token_id", "bos_token_id")
    figures = {
        f"{owner}_{name}": getattr(tokenizer, name)
        for owner, tokenizer in (("student", student), ("teacher", teacher))
        for name in names
    }
    measured = "of student / teacher: " + "; ".join(
        f"{word} {token_name(student, figures[f'student_{name}'])} / "
        f"{token_name(teacher, figures[f'teacher_{name}'])}"
        for word, name in (("end", "eos_token_id"), ("padding", "pad_token_id"))
    )
    return judge("special tokens", measured, problems, figures=figures)


def check_generation_config(subject: "Subject") -> Verdict:
    """Where a model stops by its generation config, against its tokenizer's end."""
    tokenizers, configs = subject.tokenizers, subject.generation_configs
    declared = [declared_ids(config.eos_token_id) for config in configs]
    cure = _EXCLUDE if subject.remote else _MERGE
    merged = subject.settings.training.stop_tokens == "merge"
    problems = Problems()
    for owner, tokenizer, stops in zip(("student", "teacher"), tokenizers, declared, strict=True):
        outside = [index for index in stops if index >= len(tokenizer)]
        if outside:
            problems.fail(
                f"The {owner}'s generation config stops at {outside[0]}, which is no token."
            )
        if stops and tokenizer.eos_token_id not in stops and not merged:
            names = ", ".join(token_name(tokenizer, index) for index in stops)
            tell = problems.fail if owner == "student" else problems.warn
            tell(
                f"The {owner}'s generation config stops at {names}, its tokenizer ends with "
                f"{token_name(tokenizer, tokenizer.eos_token_id)}: one of the two files is of another "
                f"model. Mend eos_token_id in generation_config.json, or, if both are ends, "
                f"{cure[0].lower()}{cure[1:]}."
            )
    shown = [
        ", ".join(token_name(tokenizer, index) for index in stops) or "no token"
        for tokenizer, stops in zip(tokenizers, declared, strict=True)
    ]
    measured = f"the student stops at {shown[0]}, the teacher at {shown[1]}"
    figures = {"student_stop_ids": declared[0], "teacher_stop_ids": declared[1]}
    return judge("generation config", measured, problems, figures=figures)


def _first_prompt(subject: "Subject") -> Prompt:
    return read_prompt(subject.prompts[0], "row 0")


def check_chat_template(subject: "Subject") -> Verdict:
    """One prompt rendered by both templates; the teacher will read the student's rendering.

    Raises:
        DataError: messages, and a student without a template.
    """
    item, prompt = "chat template", _first_prompt(subject)
    student, teacher = subject.tokenizers
    if isinstance(prompt.content, str):
        return judge(item, "not used: the prompts are plain text", [])
    if student.chat_template is None:
        raise DataError(
            "the prompts are lists of messages, but the student's tokenizer has no chat template: copy the "
            "chat_template of its instruct version, or use plain text"
        )
    if teacher.chat_template is None:
        problem = (
            "The teacher has no chat template: it may never have seen these turns. Take an instruct "
            "teacher, or plain-text prompts."
        )
        return judge(item, "only the student has one", [("warn", problem)])
    texts = _rendered(subject, prompt)
    pieces = difference(*texts)
    if texts[0] == texts[1]:
        return judge(
            item, f"both render the first prompt as the same {len(texts[0])} characters", []
        )
    control = [_control_tokens(student, text) for text in texts]
    problems = Problems()
    if _same_with_system(subject, prompt):
        problems.warn(
            "Only one template has a default system prompt, or each has another: give both the same system "
            "message in the prompts."
        )
    elif control[0] != control[1]:
        problems.fail(
            "The turns are marked by other control tokens: the teacher would score a layout it was not "
            "trained on. Take the teacher's template for both, or another teacher."
        )
    else:
        problems.warn(
            "Only ordinary text differs, as a default system prompt would: give both the same system "
            "message in the prompts."
        )
    changed = sum(len(text) for owner, text in pieces if owner != "both")
    figures = {"student": texts[0], "teacher": texts[1]}
    measured = f"{changed} characters of the first prompt differ between the two templates"
    return judge(item, measured, problems, figures=figures, difference=pieces)


def _rendered(subject: "Subject", prompt: Prompt) -> list[str]:
    """A prompt by the student's template and by the teacher's.

    Raises:
        DataError: says whose template fails.
    """
    texts = []
    for owner, tokenizer in zip(("student", "teacher"), subject.tokenizers, strict=True):
        try:
            texts.append(render(tokenizer, prompt, **subject.shown))
        except DataError as error:
            raise DataError(f"for the {owner} {error}") from error
    return texts


def _same_with_system(subject: "Subject", prompt: Prompt) -> bool:
    """Whether the templates agree once a system message takes the place of their default ones."""
    assert not isinstance(prompt.content, str)
    if prompt.content[0]["role"] == "system":
        return False
    system = {"role": "system", "content": "x"}
    try:
        student, teacher = _rendered(subject, replace(prompt, content=[system, *prompt.content]))
    except DataError:  # a template that takes no system message
        return False
    return student == teacher


def check_thinking(subject: "Subject") -> Verdict:
    """Thinking mode: which template takes a flag, and whether the rendered prompts open a thought."""
    item, prompt, options = "thinking mode", _first_prompt(subject), subject.shown["options"]
    student, teacher = subject.tokenizers
    if isinstance(prompt.content, str):
        return judge(item, "not used: the prompts are plain text", _unread(subject, options))
    flags = [_flags(tokenizer) for tokenizer in (student, teacher)]
    set_flags = {
        name: value
        for name, value in {**options, **prompt.options}.items()
        if name in THINKING_FLAGS
    }
    problems = Problems()
    for name in sorted(flags[0] ^ flags[1]):
        if name in flags[1]:
            problems.fail(
                f"Only the teacher's template takes {name}, and the student's writes the prompts: one model "
                "thinks, the other answers. Choose a pair of one kind, or give the student's tokenizer the "
                "teacher's template."
            )
        # Where it is set, the two rendered prompts tell whether they agree: the item before compares them.
        elif name not in set_flags:
            problems.fail(
                f"Only the student's template takes {name}: one model thinks, the other answers. Choose a "
                f"pair of one kind, or set chat_template_kwargs: {{{name}: false}} if the student then "
                "writes as the teacher does."
            )
    # What single rows set is an item of its own.
    for name in options:
        if not _reads(student, name):
            problems.fail(
                f"chat_template_kwargs sets {name}, which the student's template ignores: take it out."
            )
    if student.chat_template is not None and teacher.chat_template is not None:
        opens = [_opens_thought(text) for text in _rendered(subject, prompt)]
        if opens[0] != opens[1]:
            owner = "student" if opens[0] else "teacher"
            problems.fail(
                f"Only the {owner}'s rendered prompt ends inside <think>: set its thinking flag."
            )
    shown = [", ".join(sorted(names)) or "none" for names in flags]
    chosen = ", ".join(f"{name}={value}" for name, value in set_flags.items()) or "none"
    measured = (
        f"flags that the templates read: student {shown[0]}, teacher {shown[1]}; set by "
        f"chat_template_kwargs: {chosen}"
    )
    return judge(item, measured, problems, figures={"student": shown[0], "teacher": shown[1]})


def _flags(tokenizer: Tokenizer) -> set[str]:
    return {name for name in THINKING_FLAGS if _reads(tokenizer, name)}


def _reads(tokenizer: Tokenizer, name: str) -> bool:
    """Whether a chat template has a name in it."""
    return bool(re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template or "")))


def _unread(subject: "Subject", options: Mapping[str, Any]) -> Problems:
    """Options of a template that no prompt goes through."""
    problems = Problems()
    rows = subject.some_rows(LOOKED_AT) if options else ()
    prompts = [read_prompt(row, f"row {place}") for place, row in enumerate(rows)]
    if prompts and all(isinstance(prompt.content, str) for prompt in prompts):
        problems.warn(
            "chat_template_kwargs has no effect: no prompt goes through the template. Take it out, or store "
            "messages."
        )
    return problems


def _opens_thought(text: str) -> bool:
    return text.rfind("<think>") > text.rfind("</think>")


def _control_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Added and special tokens in a text, in order; what marks turns. Not the one for unknown words."""
    control = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {
        tokenizer.unk_token_id
    }
    ids = tokenizer(text=text, add_special_tokens=False)["input_ids"]
    return [index for index in ids if index in control]


def difference(student: str, teacher: str) -> tuple[tuple[str, str], ...]:
    """Both texts as pieces, cut at words and white space."""
    left, right = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (student, teacher))
    pieces: list[tuple[str, str]] = []
    matcher = difflib.SequenceMatcher(a=left, b=right, autojunk=False)
    for tag, start, end, other_start, other_end in matcher.get_opcodes():
        if tag == "equal":
            pieces.append(("both", "".join(left[start:end])))
            continue
        for owner, text in (
            ("student", left[start:end]),
            ("teacher", right[other_start:other_end]),
        ):
            if text:
                pieces.append((owner, "".join(text)))
    return tuple(pieces)
