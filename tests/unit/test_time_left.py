"""The time that a study has left. Oracle: a simulated study whose end is known."""

import itertools

import pytest

from taopd.cli.time_left import TimeLeft


def study(*, arms, workers, evaluation, step, steps):
    """Times of every event: (seconds, shares of all arms, finished of all arms), to the end."""
    events, free = [], [0.0] * workers
    for arm in range(arms):
        worker = min(range(workers), key=free.__getitem__)
        now = free[worker] + evaluation
        for number in range(1, steps + 1):
            now += step
            events.append((now, arm, number / steps, False))
        now += evaluation
        events.append((now, arm, 1.0, True))
        free[worker] = now
    shares, finished = [0.0] * arms, [False] * arms
    yield 0.0, list(shares), list(finished)
    for now, together in itertools.groupby(sorted(events), key=lambda event: event[0]):
        for _, arm, share, end in together:
            shares[arm], finished[arm] = share, end
        yield now, list(shares), list(finished)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("evaluation", "step"), [(90.0, 12.0), (1.0, 12.0), (300.0, 2.0)])
def test_the_estimate_is_right_from_a_quarter_of_the_first_arm_on(workers, evaluation, step):
    events = list(study(arms=4, workers=workers, evaluation=evaluation, step=step, steps=24))
    end, left = events[-1][0], TimeLeft(now=0.0)
    for now, shares, finished in events:
        seconds = left.seconds(shares, finished, now=now)
        if max(shares) < 0.05:
            assert seconds is None
        elif sum(shares) > 0.25:
            # One step is counted with the first evaluation, and the last arms may end apart.
            allowed = 0.05 * end + (workers - 1) * step
            assert seconds == pytest.approx(end - now, abs=allowed)


def test_nothing_is_said_before_two_steps_and_what_was_done_before_is_no_work_of_this_run():
    left = TimeLeft(now=0.0)
    assert left.seconds([1.0, 0.5, 0.0], [True, False, False], now=1.0) is None
    assert left.seconds([1.0, 0.0, 0.0], [True, False, False], now=60.0) is None
    assert left.seconds([1.0, 0.1, 0.0], [True, False, False], now=110.0) is None
    # A step takes 10 s, so all take 100, and an evaluation 100: 0.8 + 1 arms of steps, 1 + 2 evaluations.
    found = left.seconds([1.0, 0.2, 0.0], [True, False, False], now=120.0)
    assert found == pytest.approx(100 * 1.8 + 100 * 3)


def test_nothing_is_left_of_arms_that_have_finished_however_short():
    left = TimeLeft(now=0.0)
    assert left.seconds([1.0, 0.0], [True, False], now=1.0) is None
    assert left.seconds([1.0, 1.0], [True, True], now=2.0) == 0.0
