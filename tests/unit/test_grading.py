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
