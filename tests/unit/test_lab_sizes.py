"""Labs with models of other sizes: `build_lab` takes the list; the table, on made-up curves."""

from scripts.lab_sizes import ABOUT, LABS, table
from scripts.labs_again import gathered
from scripts.unseen_labs import FOUND_WITH, NO_PART
from taopd.experiments.lab.spec import LabSpec
from taopd.experiments.lab.variants import VARIANTS
from tests.unit.lab_jobs import finished

STEPS = (0, 500, 1000)


def test_a_row_has_both_models_and_the_ends_of_the_arms(tmp_path):
    for part, arms in (
        ("reach", {"reach@0.1": (0.0, 0.2, 0.9)}),
        ("rivals", {"full": (0.4, 0.7, 0.1)}),
    ):
        path = tmp_path / f"{part}__made-small.json"
        finished(path, "made, small", STEPS, arms, teacher=0.98)
    last = table(gathered(tmp_path, ABOUT)).splitlines()[-1]
    assert last == "| made, small | exact | 98 | 40 | 90 | 9 | 10 (70) | - |"


def test_every_lab_of_the_list_differs_from_the_usual_one_in_what_it_names():
    known = {*VARIANTS, *(each.name for each in (*FOUND_WITH, *NO_PART))}
    usual = LabSpec()
    for name, (variant, sizes) in LABS.items():
        assert variant in known, name
        spec = LabSpec.from_sizes("dialect", 0, sizes)
        assert all(getattr(spec, size) != getattr(usual, size) for size in sizes), name
