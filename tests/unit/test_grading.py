"""Which completions are right: answers of several parts, and copies of an answer."""

import time

import pytest

from taopd.cli.evaluate import _print_table
from taopd.experiments.evaluation.accuracy import summarize
from taopd.experiments.evaluation.grading import Grader, is_mathematical


@pytest.mark.parametrize(
    ("completion", "answer", "correct"),
    [
        ("10.5.2021", "10.5.2020", False),
        ("10.5.2020", "10.5.2020", True),
        ("192.168.0.7", "192.168.0.1", False),
        ("1,2", "1,2,3", False),
        ("1.5", "1.5,2.5", False),
        (r"\boxed{1,2,3}", "1,2,3", True),
        (r"\boxed{1,2,4}", "1,2,3", False),
        (r"\boxed{1,2}", "1,2", True),
        ("it is 1.2", "1,2", True),
        ("it is 1234567.5", "1,234,567.5", True),
        (r"\boxed{1,234}", "1234", True),
        (r"\text{yes}", r"\text{yes}", True),
        (r"C:\temp", r"C:\temp", True),
    ],
)
def test_an_answer_is_right_as_a_whole(completion, answer, correct):
    """Of dates, addresses and lists the first two parts were compared; a copy of LaTeX text was wrong."""
    for match in ("auto", *(["math"] if is_mathematical(answer) else [])):
        assert Grader(match)(completion, answer).correct is correct


WORKED = "There are 3 + 4 = <<3+4=7>>7 ducks.\nHe pays $2 for each.\n#### 1,407"


@pytest.mark.parametrize(
    ("completion", "answer", "correct"),
    [
        ("It is 1407.", WORKED, True),
        ("#### 1407", WORKED, True),
        (WORKED, WORKED, True),
        ("so 7 ducks", WORKED, False),
        ("so 7 ducks", "3 + 4 = 7 ducks.\n#### 7", True),
        ("so 8 ducks", "3 + 4 = 7 ducks.\n#### 7\n", False),
        ("Birds fly.\n#### yes", "Ducks are birds.\n#### yes", True),
        ("yes", "Ducks are birds.\n#### yes", True),
        ("no", "Ducks are birds.\n#### yes", False),
        ("#### A heading\nand a text", "#### A heading\nand a text", True),
    ],
)
def test_of_a_solution_that_ends_with_four_hashes_the_last_line_is_the_answer(
    completion, answer, correct
):
    """Without a dollar it was compared as one text, so that every completion was wrong."""
    assert Grader("auto")(completion, answer).correct is correct
    assert Grader("exact")(completion, answer).correct is (completion.strip() == answer.strip())


@pytest.mark.parametrize(
    ("completion", "answer", "correct"),
    [
        (r"so \boxed{q - p}", "q-p", True),
        (r"so \boxed{p - q}", "q-p", False),
        (r"\boxed{(2, 1)}", "(1,2)", False),
        (r"\boxed{(1, 2)}", "(1,2)", True),
        (r"\boxed{1024}", "2^{10}", True),
        (r"it is \boxed{B}", "B", True),
        (r"it is \boxed{A}", "B", False),
        (r"\boxed{\text{Evelyn}}", "Evelyn", True),
        (r"\boxed{silent}", "listen", False),
        (r"first \boxed{12:30}, then \boxed{12:31}", "12:30", False),
        (r"\boxed{12:30}", "12:30", True),
        (r"\boxed{2, -1}", "-1,2", True),
        (r"\boxed{1,2,3}", "1, 2, 3", True),
        ("The answer is 1, 2, 3.", "1,2,3", True),
        ("The answer is 1, 2, 4.", "1,2,3", False),
        (r"\boxed{18.9}", r"\$18.90", True),
        (r"\boxed{\$18}", r"\$18.90", False),
    ],
)
def test_a_boxed_answer_is_compared_as_a_whole(completion, answer, correct):
    """In "auto" a formula, a tuple, a list or a letter in a box was wrong, and so was any price in LaTeX."""
    assert Grader("auto")(completion, answer).correct is correct


@pytest.mark.parametrize(
    ("completion", "answer", "correct"),
    [
        ("The answer is \N{MINUS SIGN}5.", "-5", True),
        ("The answer is \N{MINUS SIGN}5.", "5", False),
        ("It is 1.5e3.", "1500", True),
        ("It is 1.5e3.", "1.5", False),
        ("0.00001", "1e-05", True),
        ("0.00002", "1e-05", False),
        ("1.5 \N{MULTIPLICATION SIGN} 10^3", "1500", True),
        ("1.5 \N{MULTIPLICATION SIGN} 10^3", "10", False),
        ("1.5 x 10^3", "1000", False),
        ("The answer is 10².", "100", True),
        ("The answer is 10².", "10", False),
        ("The answer is 12 cm².", "12", True),
        ("The answer is 3 1/2.", "3.5", True),
        ("The answer is 3 1/2.", "1", False),
        ("-2.5", "-2 1/2", True),
        ("0.0000002", "0.0000001", False),
        ("3.1415927", "3.14159265", True),
        ('{"answer":"34"}', "34", True),
        ("The answer is (34).", "34", True),
        ("The answer is 53/5.", "53/5", True),
        ("The answer is 53/6.", "53/5", False),
        (r"\boxed{940\,006}", "940006", True),
        ("The answer is -.5", "-1/2", True),
        ("The answer is +34.", "34", True),
        ("34", "+34", True),
    ],
)
def test_a_number_is_read_as_it_is_written(completion, answer, correct):
    """math-verify reads 1.5e3 as 1.5, 3 1/2 as 1, 10² as 10; and nothing from (34)."""
    for match in ("auto", "math"):
        assert Grader(match)(completion, answer).correct is correct


@pytest.mark.parametrize(
    ("completion", "answer", "correct"),
    [
        ("It was on 2024-01-06.", "2024-01-05", False),
        ("It was on 2024-01-05.", "2024-01-05", True),
        ("at 12:45", "12:30", False),
        ("12", "12:30", False),
        ("1.2.4", "1.2.3", False),
        ("2", "2^{10}", False),
        ("1024", "2^{10}", True),
        ("3", "3x+2", False),
        ("$2 + 3x$", "3x+2", True),
        ("34 apples", "34 apples in all", True),
    ],
)
def test_asked_for_mathematics_an_answer_is_read_as_a_whole(completion, answer, correct):
    """The first number of a date, a time or a formula was compared, and the rest passed over."""
    assert Grader("math")(completion, answer).correct is correct


@pytest.mark.parametrize("text", ["1" * 20_000, "1," * 10_000, "(" * 20_000, r"\boxed{" * 3_000])
def test_a_degenerate_completion_is_graded_soon(text):
    began = time.monotonic()
    assert not Grader("auto")(text, "1,2,3").correct
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("completion", "answer", "correct"),
    [
        ("The answer is 10^{-3}.", "0.001", True),
        ("The answer is 10^{-3}.", "10", False),
        ("0.001", "10^{-3}", True),
        ("10", "10^{-3}", False),
        (r"The mass is 2 \times 10^{-3} kg.", "0.002", True),
        (r"The mass is 2 \times 10^{-3} kg.", "2", False),
        ("2 x 10^{-3}", "0.002", True),
        (r"It is 2\sqrt{3}.", r"2\sqrt{3}", True),
        (r"It is 2\sqrt{3}.", "2", False),
        (r"It is 2\sqrt{3}.", r"3\sqrt{2}", False),
        (r"3\pi", r"$3\pi$", True),
        (r"3\pi", "3", False),
        ("1{,}000", "1000", True),
        ("1{,}000", "1", False),
        (r"It costs \$5.", "5", True),
        (r"It costs \$5.", "$5", True),
        (r"It costs \$5.", "6", False),
        (r"It costs \$5 and \$6, that is \$11.", "11", True),
        (r"It costs \$5 and \$6, that is \$11.", "5", False),
        # What comes after the formula is the answer.
        (r"With 2\sqrt{3} apples there are 5.", "5", True),
    ],
)
def test_latex_without_dollars_is_read_as_a_whole(completion, answer, correct):
    r"""math-verify reads 10^{-3} as 10, 2\sqrt{3} as 2, 1{,}000 as 1; and nothing from \$5."""
    for match in ("auto", "math"):
        assert Grader(match)(completion, answer).correct is correct


@pytest.mark.parametrize(
    ("completion", "answer", "correct"),
    [
        ("<think>5 + 7 = 12</think>\n<answer>13</answer>", "12", False),
        ("<think>5 + 7 = 12</think>\n<answer>13</answer>", "13", True),
        ("<think>yes or no</think>\n<Answer>\nyes\n</Answer>", "yes", True),
        ("<think>5 + 7 = 13, no</think>12", "12", True),
        ("<answer>It is $5$.</answer> not <answer>7", "5", True),
        ("5 and 7 make <b>12</b>", "12", True),
        ("5 and 7 make 12<|im_end|>", "12", True),
        *((f"5 and 7 make {text}", "12", True) for text in ("`12`", "*12*", "“12”", "≈12", "->12")),
        *((f"5 and 7 make {text}", "12", True) for text in ("US$12", "A$12.", "Rs.12", "+12")),
        *((f"5 and 7: it is {text}", "12", True) for text in ("(12)", "[12]", "'12'.")),
        *((f"It is 12{text}", "12", True) for text in (" (3).", " [3].", ", see (3)")),
        ("5 and 7:\nAnswer:12", "12", True),
        ("5 *3", "15", True),
        ("12 1\N{NARROW NO-BREAK SPACE}000", "1000", True),
        ("1 and 2½", "2.5", True),
        (r"it is -\frac12", "-1/2", True),
        ("at 3:30", "3:30", False),  # text, and not the whole completion
    ],
)
def test_a_number_is_seen_behind_tags_quotes_and_arrows(completion, answer, correct):
    """The last number with a space before it was taken: 12 was right for <answer>13</answer>."""
    assert Grader("auto")(completion, answer).correct is correct


@pytest.mark.parametrize(
    ("completion", "correct"),
    [("The point is (1, 2).", True), ("$(1, 2)$", True), ("1, 2", False), ("[1, 2]", False)],
)
def test_a_tuple_is_compared_as_mathematics(completion, correct):
    for match in ("auto", "math"):
        assert Grader(match)(completion, "(1,2)").correct is correct


def test_evaluate_tells_how_many_answers_are_text(capsys):
    answers = ["12", "12 km", "3:30", "so 3\n#### 4", "(1, 2)", "50%"]
    graded = [
        {"problem": i, "answer": answer, "correct": False, "truncated": False, "parsed": True}
        for i, answer in enumerate(answers)
    ]
    for match, told in (("auto", True), ("exact", False)):
        settings = {"match": match}
        _print_table("m", summarize(graded, num_problems=6, num_samples=1, settings=settings))
        assert ("compared as text   │ 2 of 6 answers" in capsys.readouterr().out) is told
