"""Recipes: parameters that papermill can show as help and that agree with their dataclass, and a run of each at smoke scale."""
import ast
import dataclasses
import html
import importlib
import inspect
import re
import typing
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin

import papermill
import pytest

from anatcxr.reproduce.pages import run_recipe
from notebooks import ROOT, Declaration, declarations, find_notebooks, parameters, parameters_source, read_cells

RECIPES = [*find_notebooks(under="nbs/recipes"), *find_notebooks(under="nbs/results")]
FIGURES = [p for p in RECIPES if re.search("_fig|_ablations|^figures", p.stem)]  # run by test_figures.py, in a process of its own
PARAMETERISED = [p for p in find_notebooks() if parameters_source(p) is not None]

# Parameters that make a recipe small enough for a test; `out` is the test's. Every recipe has an entry.
SMOKE: dict[str, dict] = {
    "quickstart": dict(data="phantom:100", steps=4, batch_size=8, patients=2, partners=1, afire_steps=3),
    "afire_arms": dict(data="phantom:120", arms="1 all; 4 restoration alone; released", steps=2, batch_size=8, seeds=1),
    "benchmark": dict(size=112, batch=2, repeats=1, phantoms=2, loss_B=8, loss_L=16, loss_K=16, films=2, stored=64),
    "downstream": dict(data="phantom:100", encoders="untrained ViT; AFiRe ViT; CutPaste", targets="phantom 100 %; phantom heart; phantom probe; phantom anomaly", seeds=2,
                       pretrain_steps=2, finetune_epochs=1, segment_steps=2, anomaly_steps=2),
    **{p.stem: dict(data="phantom:150", pretrain_steps=2, steps=2) for p in RECIPES if "_table" in p.stem},
    "pretrain": dict(data="phantom:60", settings="steps=3; batch_size=8"),
    "finetune": dict(data="phantom:100", settings="steps=3; epochs=null; size=112; resize=112; bootstrap=50"),
    "probe": dict(data="phantom:100", settings="size=112; bootstrap=50"),
    "segment": dict(data="phantom:60", settings="steps=3; batch_size=4; bootstrap=50"),
    "anomaly": dict(data="phantom:100", settings="steps=3; batch_size=8; bootstrap=50"),
    "figures": dict(data="phantom:150", pretrain_steps=2, steps=2, items="peac-fig7"),
    **{p.stem: dict(data="phantom:300" if p.stem == "afire_fig6" else "phantom:150", pretrain_steps=2, steps=2) for p in FIGURES if p.stem != "figures"},
}
PICTURES = {"quickstart", "afire_arms", "benchmark", "pretrain", "finetune", "probe", "segment", "anomaly", *(p.stem for p in FIGURES)}  # recipes whose page shows figures


def name(path: Path) -> str:
    return path.relative_to(ROOT / "nbs").with_suffix("").as_posix()


def config_class(path: Path) -> type | None:
    "The dataclass that a line `# config: package.module.Class` of the parameters cell names, or None."
    found = re.search(r"^# config: ([\w.]+)\.(\w+)\s*$", parameters_source(path), re.M)
    return getattr(importlib.import_module(found[1]), found[2]) if found else None


def field_declarations(cls: type) -> dict[str, Declaration]:
    "The fields of a dataclass as its source, and that of its bases, declares them."
    found = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base): continue
        source = inspect.getsource(importlib.import_module(base.__module__))
        body = next(n.body for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef) and n.name == base.__name__)
        found |= {d.name: d for d in declarations([n for n in body if isinstance(n, ast.AnnAssign)], source)}
    return {f.name: found[f.name] for f in dataclasses.fields(cls)}


def default_value(cls: type, name: str):
    "What the dataclass has where nothing is given."
    f = next(f for f in dataclasses.fields(cls) if f.name == name)
    return f.default_factory() if f.default is dataclasses.MISSING and f.default_factory is not dataclasses.MISSING else f.default


def widened(hint):
    "A type as a parameters cell can write it: papermill's pattern knows no quotes, so a Literal becomes the type of its values."
    if get_origin(hint) is Literal: return Union[tuple(type(v) for v in get_args(hint))]
    if get_origin(hint) in (Union, UnionType): return Union[tuple(map(widened, get_args(hint)))]
    return hint


def incomplete(cell: list[Declaration]) -> list[str]:
    "Lines of a parameters cell that lack a type, a default or a comment."
    return [d.name for d in cell if not (d.type and d.default and d.comment)]


def disagreements(cell: list[Declaration], cls: type) -> list[str]:
    "Where a parameters cell and its dataclass differ in name, type, default or comment."
    fields, hints, given = field_declarations(cls), typing.get_type_hints(cls), {d.name: d for d in cell}
    res = [f"{n} is no field of {cls.__name__}" for n in given.keys() - fields.keys()]
    res += [f"{n} of {cls.__name__} is no parameter" for n in fields.keys() - given.keys()]
    for n in given.keys() & fields.keys():
        value, default = ast.literal_eval(given[n].default), default_value(cls, n)
        if widened(eval(given[n].type, vars(typing))) != widened(hints[n]): res.append(f"{n}: type {given[n].type}, in the dataclass {fields[n].type}")
        if (value, type(value)) != (default, type(default)): res.append(f"{n}: default {value!r}, in the dataclass {default!r}")
        if given[n].comment != fields[n].comment: res.append(f"{n}: comment {given[n].comment!r}, in the dataclass {fields[n].comment!r}")
    return sorted(res)


@pytest.mark.parametrize("path", PARAMETERISED, ids=name)
def test_every_parameter_has_type_default_and_comment(path):
    lacking = incomplete(parameters(path))
    assert not lacking, f"{name(path)}: without type, default or comment: {lacking}"


@pytest.mark.parametrize("path", PARAMETERISED, ids=name)
def test_papermill_shows_every_parameter(path):
    "`papermill --help-notebook` reads lines by a pattern of its own: no `|` or quote in a type, no second `=` in a line."
    seen = {n: p["help"] for n, p in papermill.inspect_notebook(str(path)).items()}
    assert seen == {d.name: d.comment for d in parameters(path)}


@pytest.mark.parametrize("path", PARAMETERISED, ids=name)
def test_parameters_agree_with_their_dataclass(path):
    cls = config_class(path)
    assert path not in RECIPES or cls, f"{name(path)}: the parameters cell names no dataclass (`# config: anatcxr.train.config.Name`)"
    found = disagreements(parameters(path), cls) if cls else []
    assert not found, f"{name(path)}: " + "; ".join(found)


def test_every_recipe_is_parameterised():
    "So that the tests above leave none out in silence."
    assert set(RECIPES) <= set(PARAMETERISED), f"no cell tagged parameters: {[name(p) for p in set(RECIPES) - set(PARAMETERISED)]}"
    assert set(SMOKE) <= {p.stem for p in RECIPES}, "SMOKE in this file names recipes that are gone"


@pytest.fixture(scope="session")
def shared_runs(tmp_path_factory) -> str:
    "A folder for the runs of the papers' tables, which have many in common."
    return str(tmp_path_factory.mktemp("tables"))


def run_and_check(path: Path, folder: Path, **parameters):
    "The way of the command `anatcxr`: checked, executed in a folder of its own, rendered as a page."
    assert path.stem in SMOKE, f"add smoke parameters for {path.stem} to SMOKE in this file"
    page = run_recipe(path.stem, folder, SMOKE[path.stem] | parameters)
    assert page == folder / f"{path.stem}.html"
    text, title = page.read_text(encoding="utf-8"), read_cells(path)[0]["source"].splitlines()[0].lstrip("# ")
    assert re.search(rf"<h1[^>]*>\s*{re.escape(html.escape(title))}", text), f"no heading {title!r} in {page}"
    assert path.stem not in PICTURES or re.search('src="data:image/(png|jpeg);base64,', text), f"no picture in {page}"


@pytest.mark.parametrize("path", [p for p in RECIPES if p not in FIGURES], ids=name)
def test_recipe_runs(path, tmp_path, shared_runs):
    run_and_check(path, tmp_path / "out", **(dict(out=shared_runs) if "_table" in path.stem else {}))


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_wrong_values_stop_a_recipe_before_it_starts(path, tmp_path):
    first = parameters(path)[0]
    with pytest.raises(ValueError, match=rf"\b{first.name}\b|no manifest there"):
        run_recipe(path.stem, tmp_path / "out", {first.name: "no/such"})
    assert not (tmp_path / "out").exists()


@dataclasses.dataclass(frozen=True)
class Base:
    "For the tests of the tests below."
    steps: int = 10  # optimiser steps
    lr: float = 1e-3  # learning rate


@dataclasses.dataclass(frozen=True)
class Child(Base):
    steps: int = 20  # fewer
    sizes: tuple = (1, 2)  # two of them
    scale: Literal["smoke", "full"] | None = None  # how large


def parsed(source: str) -> list[Declaration]:
    return declarations(ast.parse(source).body, source)


AGREES = "steps: int = 20  # fewer\nlr: float = 0.001  # learning rate\nsizes: tuple = (1, 2)  # two of them\nscale: Optional[str] = None  # how large"


def test_comparison_accepts_what_agrees():
    assert disagreements(parsed(AGREES), Child) == []


@pytest.mark.parametrize("old, new, problem", [
    ("steps: int = 20", "steps: int = 21", "steps: default 21, in the dataclass 20"),
    ("steps: int = 20", "steps: int = 20.0", "steps: default 20.0, in the dataclass 20"),
    ("steps: int", "steps: float", "steps: type float, in the dataclass int"),
    ("Optional[str]", "Optional[int]", "scale: type Optional[int], in the dataclass Literal['smoke', 'full'] | None"),
    ("# learning rate", "# step size", "lr: comment 'step size', in the dataclass 'learning rate'"),
    ("steps: int", "step: int", "step is no field of Child"),
    ("sizes: tuple = (1, 2)  # two of them", "", "sizes of Child is no parameter"),
])
def test_comparison_finds_what_differs(old, new, problem):
    assert problem in disagreements(parsed(AGREES.replace(old, new)), Child)


@pytest.mark.parametrize("line", ["steps = 20  # fewer", "steps: int = 20", "steps: int  # fewer", "print(1)  # fewer"])
def test_incomplete_parameters_are_found(line):
    assert len(incomplete(parsed(line))) == 1
