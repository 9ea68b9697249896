"""The pages of the papers' figures, run at smoke scale."""
import pytest

from anatcxr.reproduce.pages import run_recipe
from test_recipes import FIGURES, SMOKE, name, run_and_check


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory) -> str:
    "A folder for the runs of the figures, which have many in common."
    return str(tmp_path_factory.mktemp("figures"))


@pytest.mark.parametrize("path", FIGURES, ids=name)
def test_figure_runs(path, tmp_path, shared_runs):
    run_and_check(path, tmp_path / "out", out=shared_runs)


def test_every_figure_is_run():
    assert len(FIGURES) == 9  # seven figures of two papers, PEAC's ablations, and the recipe for several


def test_a_page_whose_runs_are_left_says_so(tmp_path):
    "Stopped by `minutes` before anything was done: a page without numbers, which can be started again."
    text = run_recipe("peac_ablations", tmp_path, SMOKE["peac_ablations"] | dict(minutes=.001)).read_text(encoding="utf-8")
    assert "runs are left</strong>: start the page again" in text and "Traceback" not in text
