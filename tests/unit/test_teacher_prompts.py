"""Teacher prompts: where they come from, how they are padded, what they change.

Oracles: the texts written out by hand; each row alone, unpadded, through the model's own forward.
"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PretrainedConfig

from taopd.errors import ConfigError, DataError
from taopd.models.batch import Positions, Rollouts
from taopd.models.forward import backbone_forward
from taopd.models.prompt_faults import faults_of_ends
from taopd.models.prompt_lengths import check_prompt_lengths
from taopd.models.prompt_rows import Prompt, read_prompt
from taopd.models.prompts import encode_prompts
from taopd.models.scoring import score_positions
from taopd.models.teacher_prompts import TeacherPrompts
from taopd.preflight.teacher_context import check_effect, check_prompt, measure_context
from tests.conftest import WORDS, make_model, make_tokenizer
from tests.unit.test_prompts import tokenizer  # noqa: F401 (a fixture)

IDS = st.integers(4, len(WORDS) - 1)
ROW = st.tuples(*(st.lists(IDS, min_size=1, max_size=size) for size in (5, 9, 6)))
STUDENT, TEACHER = make_model(seed=0).eval(), make_model(seed=1, hidden_size=32).eval()
for model in (STUDENT, TEACHER):  # sharper than random weights are
    model.lm_head.weight.data *= 20.0


def alone(model, prompt, completion):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


@torch.no_grad()
def scored(batch, positions, size, **options):
    return score_positions(
        *(backbone_forward(len(WORDS)), STUDENT, TEACHER, batch, positions),
        micro_batch_size=size,
        k=4,
        temperature=1.0,
        keep_teacher_hidden=False,
        when="test",
        **options,
    ).signals


@settings(max_examples=25, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=5), st.integers(1, 5), st.integers(0, 4))
def test_padding_and_batch_composition_change_nothing(rows, size, padding):
    """Both models' log-probs and divergence of every token, within 1e-5 nats in float32."""
    prompts, teachers, completions = (list(column) for column in zip(*rows, strict=True))
    pairs = Rollouts(prompt_ids=prompts, completion_ids=completions, teacher_prompt_ids=teachers)
    batch = pairs.batch()
    for name in ("teacher_prompt_ids", "teacher_prompt_mask"):
        batch[name] = torch.nn.functional.pad(batch[name], (padding, 0))
    positions = Positions.of(batch["completion_mask"].bool())
    found = scored(batch, positions, size, full_kl=True)
    student, teacher, kl = [], [], []
    for prompt, own, completion in rows:
        each = [alone(m, p, completion) for m, p in ((STUDENT, prompt), (TEACHER, own))]
        here = torch.arange(len(completion)), torch.tensor(completion)
        student.append(each[0][here])
        teacher.append(each[1][here])
        kl.append((each[0].exp() * (each[0] - each[1])).sum(-1))
    for value, truth in zip(
        (found.student_logprobs, found.teacher_logprobs, found.reverse_kl),
        map(torch.cat, (student, teacher, kl)),
        strict=True,
    ):
        torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-5)
    assert Rollouts.of_batch(pairs.batch(), {}) == pairs


@settings(max_examples=10, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=4), st.integers(1, 4))
def test_the_same_prompt_gives_the_same_bits(rows, size):
    prompts, _, completions = (list(column) for column in zip(*rows, strict=True))
    plain = Rollouts(prompt_ids=prompts, completion_ids=completions)
    own = Rollouts(prompt_ids=prompts, completion_ids=completions, teacher_prompt_ids=prompts)
    positions = Positions.of(plain.batch()["completion_mask"].bool())
    one, other = (scored(pairs.batch(), positions, size) for pairs in (plain, own))
    for name in ("teacher_logprobs", "disagreement", "compatibility", "entropy"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_the_effect_of_the_context_is_a_divergence_of_the_teacher_from_itself():
    pairs = Rollouts(
        prompt_ids=[[5, 6], [7]],
        completion_ids=[[8, 9, 10], [11, 2]],
        teacher_prompt_ids=[[4, 20, 5, 6], [21, 7]],
    )
    batch = pairs.batch()
    common = {"remote": False, "vocab_size": len(WORDS), "k": 4}
    common |= {"micro_batch_size": 2, "when": "test", "temperature": 1.0}
    place = backbone_forward(len(WORDS)), STUDENT, TEACHER
    positions = Positions.of(batch["completion_mask"].bool())
    with torch.no_grad():
        found = measure_context(*place, batch, positions, **common)
    both = [
        torch.cat(
            [alone(TEACHER, p, c) for p, c in zip(prompts, pairs.completion_ids, strict=True)]
        )
        for prompts in (pairs.teacher_prompt_ids, pairs.prompt_ids)
    ]
    ids = torch.tensor([token for row in pairs.completion_ids for token in row]).unsqueeze(1)
    change = (both[0] - both[1]).gather(1, ids)
    truth = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in (both, both[::-1])]
    assert (found.forward, found.reverse) == pytest.approx(tuple(truth), abs=1e-5)
    assert (found.gap, found.shift) == pytest.approx(
        (float(change.abs().mean()), float(change.mean())), abs=1e-5
    )
    assert verdict_of(found).level == "pass"
    same = Rollouts(
        prompt_ids=pairs.prompt_ids,
        completion_ids=pairs.completion_ids,
        teacher_prompt_ids=pairs.prompt_ids,
    )
    with torch.no_grad():
        nothing = measure_context(*place, same.batch(), positions, **common)
    assert verdict_of(nothing).level == "warn"


def verdict_of(effect):
    return check_effect(SimpleNamespace(), SimpleNamespace(context=effect, signals=range(5)))


CHAT = [
    {"role": "system", "content": "w1"},
    {"role": "user", "content": "w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "1 + 1"},
]


def own_prompt(row, template=None):
    return TeacherPrompts(template).of(row, read_prompt(row, "row 3"), "row 3")


def test_a_template_fills_the_text_or_the_last_user_turn():
    row = {"prompt": "1 + {x}", "answer": 2, "note": "{answer}"}
    # Braces of a column are text; so are doubled ones of the template.
    filled = own_prompt(row, "{{ {note} }} {prompt}, {answer}")
    assert filled == Prompt(content="{ {answer} } 1 + {x}, 2")
    row = {
        "prompt": CHAT,
        "answer": "2",
        "tools": [{"name": "f"}],
        "chat_template_kwargs": {"a": 1},
    }
    filled = own_prompt(row, "{prompt} ( {answer} )")
    assert filled.content == [*CHAT[:3], {"role": "user", "content": "1 + 1 ( 2 )"}]
    assert (filled.tools, filled.options) == ([{"name": "f"}], {"a": 1})


def test_a_column_is_taken_as_it_is_and_rendered_like_the_prompt(tokenizer):  # noqa: F811
    row = {"prompt": CHAT[3:], "teacher_prompt": [{"from": "human", "value": "w9"}, CHAT[3]]}
    (prompt,) = TeacherPrompts().of_rows([row])
    text = tokenizer.decode(encode_prompts(tokenizer, [prompt])[0])
    assert text == "<turn> user w9 <end> <turn> user 1 + 1 <end> <turn> assistant"
    assert (
        own_prompt({"prompt": "1"}) is None and TeacherPrompts().of_rows([{"prompt": "1"}]) is None
    )
    # A set without columns may have some of each.
    mixed = TeacherPrompts().of_rows([row, {"prompt": "1"}])
    assert [each.content for each in mixed] == [prompt.content, "1"]


@pytest.mark.parametrize(
    ("template", "row", "error", "words"),
    [
        ("{solution}", {}, ConfigError, r"no \{prompt\}"),
        ("{prompt} {", {}, ConfigError, "cannot be read.*written twice"),
        ("{prompt} {}", {}, ConfigError, "no name of a column"),
        ("{prompt} {a.b}", {}, ConfigError, r"\{a.b\} is no name of a column"),
        ("{prompt} {a!r}", {}, ConfigError, "no name of a column"),
        (
            "{prompt} {solutio}",
            {"solution": "x"},
            DataError,
            "row 3 has no column 'solutio'.*solution",
        ),
        ("{prompt} {a}", {"a": None}, DataError, "the column 'a' of row 3 is null"),
        ("{prompt} {a}", {"a": float("nan")}, DataError, "the column 'a' of row 3 is null"),
        ("{prompt} {a}", {"a": " "}, DataError, "the column 'a' of row 3 is empty"),
        ("{prompt} {a}", {"a": ["x"]}, DataError, "the column 'a' of row 3 is list"),
        ("{prompt} {a}", {"a": torch.ones(2)}, DataError, "the column 'a' of row 3 is Tensor"),
        ("{prompt} {a}", {"prompt": CHAT[:1], "a": "x"}, DataError, "row 3 has no user turn"),
        (
            None,
            {"teacher_prompt": None},
            DataError,
            "row 3 has no teacher_prompt, its column is null",
        ),
        (None, {"teacher_prompt": []}, DataError, "the teacher_prompt of row 3 is empty"),
        (None, {"teacher_prompt": 3}, DataError, "the teacher_prompt of row 3 is int"),
        (
            None,
            {"teacher_prompt": CHAT[:3]},
            DataError,
            "row 3 ends with an assistant message: the teacher",
        ),
        (
            None,
            {"teacher_prompt": [CHAT[1], {"role": "Assistant", "content": "w3"}]},
            DataError,
            "row 3 ends with an assistant message: the teacher",
        ),
    ],
)
def test_what_cannot_be_filled_names_row_and_column(template, row, error, words):
    row = {"prompt": "1 + 1"} | row
    if row["prompt"] != "1 + 1":  # a system message alone is refused as a prompt
        prompt = Prompt(content=row["prompt"])
        with pytest.raises(error, match=words):
            TeacherPrompts(template).of(row, prompt, "row 3")
        return
    with pytest.raises(error, match=words):
        own_prompt(row, template)


def test_text_that_ends_inside_the_assistants_turn_is_found(tokenizer):  # noqa: F811
    row = {"prompt": "1", "teacher_prompt": "<turn> user 1 <end> <turn> assistant w7"}
    (fault,) = faults_of_ends(tokenizer, TeacherPrompts().of_rows([row]), begun="the teacher fails")
    assert fault.certain and "'w7': the teacher fails" in fault.text


def looked_at(tokenizer, rows, tools=()):  # noqa: F811
    subject = SimpleNamespace(
        remote=False,
        known_configs={},
        student_config=PretrainedConfig(),
        tokenizer=tokenizer,
        some_rows=lambda count: rows,
        student_generation_config=SimpleNamespace(eos_token_id=None),
        shown={"tools": tools},
        longest_teacher_prompt=9,
        teacher_prompts=TeacherPrompts(),
        settings=SimpleNamespace(training=SimpleNamespace(max_completion_length=1)),
    )
    return check_prompt(subject)


@pytest.mark.parametrize(
    ("prompt", "own", "warned"),
    [
        (CHAT[3:], "w9 1 + 1", True),
        (CHAT[3:], "<turn> user w9 1 + 1 <end> <turn> assistant", False),
        (CHAT[3:], [{"role": "user", "content": "w9 1 + 1"}], False),
        ("1 + 1", "w9 1 + 1", False),
    ],
)
def test_text_for_the_teacher_beside_messages_is_told(tokenizer, prompt, own, warned):  # noqa: F811
    """Each of the two is in order; together the teacher scores an answer as a text that goes on."""
    verdict = looked_at(tokenizer, [{"prompt": prompt, "teacher_prompt": own}])
    assert verdict.level == ("warn" if warned else "pass"), verdict.advice
    assert ("plain text where the student's are messages" in verdict.advice) == warned


def test_the_check_shows_both_prompts_with_the_tools(tokenizer):  # noqa: F811
    tokenizer.chat_template = "{% for t in tools or [] %}w7 {% endfor %}" + tokenizer.chat_template
    row = {"prompt": CHAT[3:], "teacher_prompt": [{"role": "user", "content": "w9 1 + 1"}]}

    def look(place: int) -> int:
        """Where it is.

        Args:
            place: which.
        """
        return place

    figures = looked_at(tokenizer, [row], tools=[look]).figures
    assert figures["student"].startswith("w7 ") and figures["teacher"].startswith("w7 ")
    bare = looked_at(tokenizer, [row]).figures
    assert not bare["student"].startswith("w7")


def test_the_longest_teacher_prompt_must_fit():
    import datasets

    rows = datasets.Dataset.from_list(
        [{"prompt": "1", "teacher_prompt": "1 2"}, {"prompt": "1", "teacher_prompt": "1 2 " * 6}]
    )
    limits = {"context_length": 16, "max_completion_length": 5}
    check_prompt_lengths(rows, make_tokenizer(), **limits)
    with pytest.raises(DataError, match="the teacher's prompt of row 1 has 12 tokens"):
        check_prompt_lengths(rows, make_tokenizer(), teacher_prompts=TeacherPrompts(), **limits)
