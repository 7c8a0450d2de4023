"""The page about the guard counts warnings as it says. Oracle: runs with a planted fall and planted signs."""

import pytest

from scripts.pages import guard

QUIET = {"excess": 0.0, "idle_drift": 0.0, "teachable": 0.5, "entropy": 0.4, "length": 9.0}


def run(greedy, variant="dialect", **signs):
    """80 looks, one every 5 steps; a sign is (step, value): from this step on it has this value."""
    looks = {name: [value] * 80 for name, value in QUIET.items()}
    for name, (step, value) in signs.items():
        looks[name][step // 5 :] = [value] * (80 - step // 5)
    about = {"variant": variant, "loss": "reverse_kl", "arm": "full", "seed": 0}
    return about | {"look_every": 5, "exam_every": 20, "greedy": greedy, "looks": looks}


FALLS_AT_100 = [0.5, 1.0, 1.0, 1.0, 1.0, 0.6, *[0.0] * 15]
HOLDS = [0.5, *[1.0] * 20]


def test_a_warning_is_in_time_late_or_missing():
    runs = [
        run(FALLS_AT_100, excess=(60, 1.0)),
        run(FALLS_AT_100, excess=(100, 1.0)),
        run(FALLS_AT_100),
        run(HOLDS, excess=(200, 1.0)),
        run(HOLDS),
        run(HOLDS),
    ]
    found = guard.counts(runs, "stray drift", 0.2)
    assert (found.in_time, found.late, found.missed) == (1, 1, 1)
    assert (found.false, found.stable, found.notice) == (1, 3, [40])
    assert found.late_rate == pytest.approx(2 / 3) and found.false_rate == pytest.approx(1 / 3)


def test_the_smoothing_delays_a_small_excess_and_the_gate_opens_where_the_student_is_less_sure():
    # 0.4 x, 0.64 x, 0.784 x, ...: the moving average of a step after many zeros.
    one = run(HOLDS, excess=(200, 1.0))
    assert guard.first_warning(one, "stray drift", 0.7) == 210
    assert guard.first_warning(one, "stray drift, less sure than at first", 0.7) is None
    one["looks"]["entropy"][60:] = [0.5] * 20
    assert guard.first_warning(one, "stray drift, less sure than at first", 0.7) == 300
    drifts = run(HOLDS, idle_drift=(200, 1.0), entropy=(250, 0.6))
    drifts["looks"]["teachable"] = [1 / (1 + look) for look in range(80)]
    assert guard.guards_warning(drifts) == 250
    # The earlier guard: D C has to rise too.
    assert guard.first_warning(drifts, "idle drift, D C and entropy rise", 0.1) is None
    drifts["looks"]["teachable"][70:] = [0.7] * 10
    assert guard.first_warning(drifts, "idle drift, D C and entropy rise", 0.1) == 350


def test_a_limit_is_chosen_where_the_larger_error_is_smallest_and_judged_on_the_other_part():
    def half(variant, lively):
        """Healthy runs stray by `lively`, collapses by four times as much."""
        healthy = [run(HOLDS, variant, excess=(0, lively)) for _ in range(4)]
        return healthy + [run(FALLS_AT_100, variant, excess=(40, 4 * lively)) for _ in range(4)]

    calm, wild = half("dialect", 0.05), half("jargon", 0.4)
    assert 0.05 <= guard.best_limit(calm, "stray drift") < 0.2
    assert 0.4 <= guard.best_limit(wild, "stray drift") < 1.6
    row = next(
        line
        for line in guard.tables(calm + wild).splitlines()
        if line.startswith("| stray drift |")
    )
    # The calm half's limit warns of all of the wild half's healthy runs, the wild one's of no calm collapse.
    assert "| 4 of 8 | 50 % | 4 of 8 | 50 % |" in row
