"""Which completions are right: answers of several parts, and copies of an answer."""

import pytest

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
