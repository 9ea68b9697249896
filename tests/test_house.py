"""The rules of the house: what may import what, names, sizes, and modules that are what their notebooks export."""
import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from notebooks import ROOT, find_notebooks, read_cells

ROOMS = ["data", "views", "models", "methods", "train", "downstream", "explain", "reproduce", "cli"]
LIGHT = {"views", "models", "methods"}  # these import torch, timm and numpy only
DEV = {"fastcore", "nbdev", "execnb", "IPython"}
HEAVY = {"pandas", "pyarrow", "accelerate", "sklearn", "scipy", "matplotlib", "seaborn", "tyro", "papermill"}
DISTRIBUTIONS = packages_distributions()
MODULES = [p for p in sorted((ROOT / "anatcxr").rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py")]
NOTEBOOKS = find_notebooks()


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(module: Path) -> str:
    return module.relative_to(ROOT / "anatcxr").parts[0].removesuffix(".py")


def imported(tree: ast.Module, nested: bool = True) -> list[ast.Import | ast.ImportFrom]:
    "Import statements; without `nested`, only those that run when the module is imported."
    todo, res = list(tree.body), []
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)): res.append(node)
        if nested or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)): todo += ast.iter_child_nodes(node)
    return res


def imported_names(module: Path, nested: bool = True) -> set[str]:
    "Dotted names of what a module imports; nbdev has made those of the package relative."
    package, res = ["", "anatcxr", *module.relative_to(ROOT / "anatcxr").parts[:-1]], set()
    for n in imported(ast.parse(module.read_text()), nested):
        if isinstance(n, ast.Import): res |= {a.name for a in n.names}
        elif n.level: res.add(".".join([*package[1:len(package) + 1 - n.level], n.module or ""]).rstrip("."))
        else: res.add(n.module)
    return res


def public_names(module: Path) -> list[str]:
    "The module's `__all__`."
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__": return ast.literal_eval(node.value)
    return []


def requirements(*lists: str) -> set[str]:
    "Distributions that pyproject.toml names: `core` and extras."
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    table = {"core": project["dependencies"]} | project["optional-dependencies"]
    return {canonical(re.match(r"[\w.-]+", r)[0]) for key in lists or table for r in table[key]}


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_there_is_something_to_check():
    assert len(MODULES) > 5 and len(NOTEBOOKS) > 5


@pytest.mark.parametrize("module", MODULES, ids=name)
def test_room_imports_only_from_rooms_before(module):
    here = room(module)
    assert here in ROOMS, f"{name(module)} is in no room of the house: {ROOMS}"
    rooms = {n.split(".")[1] for n in imported_names(module) if n.startswith("anatcxr.")}
    later = {r for r in rooms if r != here and ROOMS.index(r) > ROOMS.index(here)}
    assert not later, f"{name(module)} imports from {later}, which come after {here}"


@pytest.mark.parametrize("module", MODULES, ids=name)
def test_imports_are_full_names_of_allowed_packages(module):
    nodes = imported(ast.parse(module.read_text()))
    assert not [n.lineno for n in nodes if any(a.name == "*" for a in n.names)], f"{name(module)}: star import"
    tops = {n.partition(".")[0] for n in imported_names(module)} - sys.stdlib_module_names
    assert not tops & DEV, f"{name(module)} imports {tops & DEV}: notebooks' test cells may, exported code may not"
    inside = {"lightly"} if name(module) == "anatcxr/methods/peers.py" else set()  # in a function: peers are its heads and losses
    at_once = {n.partition(".")[0] for n in imported_names(module, nested=False)}
    if room(module) in LIGHT: assert tops <= {"torch", "timm", "numpy", "anatcxr"} | inside - at_once, f"{name(module)} imports {tops}"


@pytest.mark.parametrize("module", MODULES, ids=name)
def test_imports_are_declared_dependencies(module):
    "At the top of a module only core dependencies; inside functions also those of an extra."
    for nested, allowed in ((False, requirements("core")), (True, requirements() - requirements("dev") | requirements("core"))):
        tops = {n.partition(".")[0] for n in imported_names(module, nested)} - sys.stdlib_module_names - {"anatcxr"}
        for top in tops:
            dists = {canonical(d) for d in DISTRIBUTIONS.get(top, [top])}
            assert dists & allowed, f"{name(module)} imports {top} ({dists}), which pyproject.toml does not require"


def test_package_imports_without_development_tools():
    "In a fresh process: rooms 2 to 4 without heavy packages, then everything without the notebook tools."
    dotted = {m: name(m).removesuffix(".py").replace("/", ".") for m in MODULES}
    light = [d for m, d in dotted.items() if room(m) in LIGHT]
    code = f"""
import importlib, sys
sys.modules |= dict.fromkeys({DEV | HEAVY!r})  # None there: the import fails
for m in {light!r}: importlib.import_module(m)
for m in {HEAVY!r}: del sys.modules[m]
for m in {list(dotted.values())!r}: importlib.import_module(m)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_public_names_are_unique():
    count = Counter(n for m in MODULES for n in public_names(m))
    twice = {n: [name(m) for m in MODULES if n in public_names(m)] for n, k in count.items() if k > 1}
    assert not twice, f"nbdev links by bare name, so these would link to the wrong page: {twice}"


@pytest.mark.parametrize("module", MODULES, ids=name)
def test_public_names_are_documented(module):
    defs = [n for n in ast.parse(module.read_text()).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_"]
    bare = [n.name for n in defs if not ast.get_docstring(n)]
    assert not bare, f"{name(module)}: no docstring in {bare}"


@pytest.mark.parametrize("module", MODULES, ids=name)
def test_module_is_one_idea(module):
    text = module.read_text()
    assert "AUTOGENERATED" in text, f"{name(module)} comes from no notebook"
    lines = len(text.splitlines())
    assert lines <= 300, f"{name(module)} has {lines} lines: more than one idea?"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_notebook_is_small_and_names_no_machine(notebook):
    assert notebook.stat().st_size < 300 * 1024, f"{name(notebook)} has {notebook.stat().st_size // 1024} KB: fewer or smaller figures"
    texts = [c["source"] for c in read_cells(notebook)]
    for c in read_cells(notebook):
        for o in c.get("outputs", []):
            texts += ["".join(o.get("text", "")), *("".join(v) for k, v in o.get("data", {}).items() if k.startswith("text"))]
    paths = re.findall(r"(?<![\w.~/])/(?:home|root|Users|opt|work|mnt|srv)/\w[^\s'\"]*", "\n".join(texts))
    assert not paths, f"{name(notebook)} shows paths of the machine it ran on: {paths[:3]}"


COMMANDS = {
    "nbdev_export": [str(Path(sys.executable).parent / "nbdev_export")],
    "nbdev_clean": [str(Path(sys.executable).parent / "nbdev_clean")],
    "nbs/nbdev.yml": [sys.executable, "-c", "from nbdev.quarto import refresh_quarto_yml as f; f()"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_notebooks_and_what_is_made_from_them_agree(command, tmp_path):
    "Modules, index and site settings are current, and notebooks are clean: nbdev's commands change nothing."
    for part in ("nbs", "anatcxr"): shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for part in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT / part, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    subprocess.run(COMMANDS[command], cwd=tmp_path, env=env, check=True, capture_output=True)
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    changed = sorted(str(p.relative_to(tmp_path)) for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    assert not changed, f"{command} changes {changed}: run it and commit the result"
