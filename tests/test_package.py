"""What pip installs: every room, the recipes and the results."""
import configparser
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml

from notebooks import ROOT, find_notebooks

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built from a copy of the tree, with the build tools that are installed."
    src, out = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for part in ("anatcxr", "nbs"): shutil.copytree(ROOT / part, src / part, ignore=ignore)
    for part in ("pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / part, src)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(out), str(src)]
    subprocess.run(command, check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("anatcxr-*.whl")))


def test_packages_are_the_folders():
    rooms = {"anatcxr", *(f"anatcxr.{p.parent.name}" for p in (ROOT / "anatcxr").glob("*/__init__.py"))}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == rooms | {"anatcxr.recipes", "anatcxr.results"}


def test_settings_agree():
    "nbdev reads settings.ini, pip pyproject.toml, a citing reader CITATION.cff."
    cfg = configparser.ConfigParser()
    cfg.read(ROOT / "settings.ini")
    nbdev, project = cfg["DEFAULT"], PYPROJECT["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert nbdev["description"] == project["description"]
    assert f">={nbdev['min_python']}" == project["requires-python"]
    assert nbdev["git_url"] == project["urls"]["Source"] == citation["repository-code"]
    assert f'__version__ = "{nbdev["version"]}"' in (ROOT / "anatcxr/__init__.py").read_text()
    assert nbdev["version"] == citation["version"] and citation["license"] == project["license"]


def test_command_finds_recipes_in_a_checkout_and_in_a_wheel(wheel, tmp_path):
    expected = {p.stem for room in ("recipes", "results") for p in find_notebooks(under=f"nbs/{room}")}
    wheel.extractall(tmp_path)
    for root in (ROOT, tmp_path):
        code = f"import sys; sys.path.insert(0, {str(root)!r}); from anatcxr.reproduce.pages import recipes; print(*sorted(recipes()))"
        run = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
        assert set(run.stdout.split()) == expected


def test_wheel_has_modules_recipes_and_results(wheel):
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "anatcxr").rglob("*.py")}
    shipped = [p for room in ("recipes", "results") for p in find_notebooks(under=f"nbs/{room}")]
    shipped += [p for p in (ROOT / "nbs/results/records").rglob("*") if p.is_file()]
    expected = modules | {f"anatcxr/{p.relative_to(ROOT / 'nbs').as_posix()}" for p in shipped}
    assert expected == {n for n in wheel.namelist() if n.startswith("anatcxr/")}


def test_wheel_has_licence_and_command(wheel):
    assert any(n.endswith("licenses/LICENSE") for n in wheel.namelist())
    assert any(n.endswith("entry_points.txt") for n in wheel.namelist())
