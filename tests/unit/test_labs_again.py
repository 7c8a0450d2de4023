"""The table of labs that are made again, on made-up curves. Oracle: what its columns say."""

from scripts.labs_again import gathered, table
from tests.unit.lab_jobs import finished

STEPS = (0, 400, 600, 1000)


def job(folder, part, lab_seed, **arms):
    """A finished job on a lab of this seed: greedy accuracy at STEPS by name."""
    path = folder / f"{part}__made__{lab_seed}.json"
    finished(path, "made", STEPS, arms, teacher=1.0 - lab_seed / 100, lab_seed=lab_seed)


def test_a_row_has_the_ends_of_the_default_and_of_its_rivals(tmp_path):
    job(tmp_path, "reach", 1, **{"reach@0.1": (0.0, 0.2, 0.9, 1.0)})
    job(tmp_path, "reach", 2, **{"reach@0.1": (0.0, 0.9, 0.3, 0.8)})
    job(tmp_path, "rivals", 1, full=(0.0, 0.7, 0.1, 0.0))
    rows = gathered(tmp_path)
    last = table(rows, {("made", "reverse_kl", "reach@0.1"): 0.99}).splitlines()[-1]
    # Teachers, first pair, ends, sampled, full's end and best, none of published, least of the second half.
    assert last == "| made | exact | 99, 98 | 99 | 100, 80 | 10, 8 | 0 (70) | - | 90, 30 |"
