"""The typed numbers of both papers against the papers' text, cell by cell; and the check is shown to see one changed digit."""
import re
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest

from anatcxr.data.table import shared_data
from anatcxr.methods.afire import AFIRE_TABLE1
from anatcxr.reproduce.published import PublishedCell, published, published_table, stated_numbers

CELLS = {("peac", 1): 45, ("peac", 2): 15, ("peac", 3): 12, ("peac", 4): 36, ("peac", 5): 32,
         ("afire", 1): 21, ("afire", 2): 134, ("afire", 3): 72}
UNREADABLE = {("peac", 5, "ViT-B, ChestX-ray14, SimMIM", "ChestX-ray14"), ("peac", 5, "ViT-B, ChestX-ray14, PEAC-3", "ChestX-ray14")}
VALUE = re.compile(r"\d+\.\d+(?:±\d+\.\d+)?\*?|(?<=\t)-(?=\t|$)")  # every number of the tables has a decimal point; no name has one
KEY = ["paper", "table", "row", "column"]


@cache
def paper_text(paper: str) -> str:
    "The text of a paper, which lies beside the shared data, with its marks made plain: 82.78±0.21, * for bold, PEAC-1."
    shared = shared_data()
    if shared is None: pytest.skip("no shared data here, and so no papers to compare with")
    path = shared.parent / "papers" / f"{paper}.txt"
    if not path.is_file(): pytest.skip(f"the text of the paper is not here: papers/{path.name} beside the shared data")
    text = re.sub(r"\{?\\pm\s?\}?", "±", path.read_text(encoding="utf-8"))
    text = re.sub(r" *± *", "±", text)
    text = re.sub(r"<b>(.*?)</b>|\\textbf\{(.*?)\}", lambda m: f"{m[1] or m[2]}*", text)
    return re.sub(r" ?⁻([¹³])", lambda m: "-" + "1_3"["¹_³".index(m[1])], text)


class PrintedRow(NamedTuple):
    label: str                # what stands before the values; of several rows if the text has merged them
    values: list[str | None]  # "82.78±0.21", "89.4*", "-"; None: unreadable


@cache
def printed(paper: str, table: int) -> tuple[list[str], list[PrintedRow]]:
    "Columns and rows of a table, from the text alone."
    lines = paper_text(paper).splitlines()
    starts = [i for i, line in enumerate(lines) if "\t" in line and "\t" not in lines[i - 1]]
    assert len(starts) == len({t for p, t in CELLS if p == paper})
    start = starts[table - 1]
    stop = next(i for i in range(start, len(lines)) if "\t" not in lines[i])
    assert any(line.startswith(f"Table {table}: ") for line in (lines[start - 2], lines[stop + 1])), f"{paper} table {table} is elsewhere"
    block = [line.split("\t") for line in lines[start:stop]]
    heads = [f for f in block if not VALUE.search("\t".join(f))]
    width = {("peac", 2): 3, ("peac", 3): 3, ("afire", 1): 3, ("afire", 2): 12, ("afire", 3): 9}.get((paper, table), 4)
    if len(heads) == 2:  # the data sets stand over the first of their columns
        for i in range(1, len(heads[0])): heads[0][i] = heads[0][i] or heads[0][i - 1]
        heads = [[f"{a} {b}" for a, b in zip(*heads, strict=True)]]
    rows = []
    for fields in block:
        if not VALUE.search("\t".join(fields)): continue
        found = [[m[0] for m in VALUE.finditer(f"\t{f}")] for f in fields[-width:]]
        stacked = max(map(len, found))
        label = re.split(VALUE, "\t".join(fields))[0]
        rows += [PrintedRow(label, [f[i] if len(f) == stacked else None for f in found]) for i in range(stacked)]
    return heads[0][-width:], rows


def typed(paper: str, table: int) -> list[PublishedCell]:
    return [PublishedCell(**c) for c in published(paper, table).to_dict("records")]


def as_printed(cell: PublishedCell) -> str:
    digits = 2 if cell.paper == "peac" else 1
    return f"{cell.mean:.{digits}f}" + ("" if np.isnan(cell.deviation) else f"±{cell.deviation:.{digits}f}") + "*" * (cell.bold is True)


def names_agree(row: str, label: str) -> bool:
    if row.split()[0].isdigit(): return row.split()[0] == label.split("\t")[0]  # the ablation's rows are numbered
    return row.split(", ")[-1].casefold() in label.casefold()


def differences(cells: list[PublishedCell], paper: str, table: int) -> list[tuple]:
    "Where typed cells and the text of a table disagree: (row, column, typed, printed)."
    columns, rows = printed(paper, table)
    names, at = list(dict.fromkeys(c.row for c in cells)), {(c.row, c.column): c for c in cells}
    if len(names) != len(rows): return [("rows", "", len(names), len(rows))]
    res = [(c.row, c.column, as_printed(c), "no such column") for c in cells if c.column not in columns]
    for name, row in zip(names, rows):
        if not names_agree(name, row.label): res.append((name, "name", name, row.label))
        for column, value in zip(columns, row.values, strict=True):
            cell = at.get((name, column))
            if value is None: ok = cell is not None and not cell.legible and (paper, table, name, column) in UNREADABLE
            elif value == "-": ok = cell is None
            else: ok = cell is not None and cell.legible and as_printed(cell) == value
            if not ok: res.append((name, column, None if cell is None else as_printed(cell), value))
    return res


@pytest.mark.parametrize("paper, table", CELLS)
def test_every_cell_is_as_the_paper_prints_it(paper, table):
    assert not differences(typed(paper, table), paper, table)


@pytest.mark.parametrize("paper, table", CELLS)
def test_one_change_is_seen(paper, table):
    "The last digit of a mean or a deviation, bold, a cell gone: each time exactly that cell is reported."
    cells, step = typed(paper, table), .01 if paper == "peac" else .1
    for i, cell in enumerate(cells):
        deviation = step if np.isnan(cell.deviation) else cell.deviation + step
        changes = [dict(mean=cell.mean + step), dict(mean=cell.mean - step), dict(deviation=deviation), dict(bold=cell.bold is not True), dict(legible=False)]
        changed = [[cell._replace(**c)] for c in changes] if cell.legible else [[cell._replace(legible=True)]]
        for new in [*changed, []]:
            found = differences(cells[:i] + new + cells[i + 1:], paper, table)
            assert [d[:2] for d in found] == [(cell.row, cell.column)], f"{cell} became {new}: {found}"


def test_rows_and_columns_that_change_places_are_seen():
    cells = typed("peac", 4)
    first, second = list(dict.fromkeys(c.row for c in cells))[:2]
    rows = {first: second, second: first}
    assert [d[:2] for d in differences([c._replace(row=rows.get(c.row, c.row)) for c in cells], "peac", 4)] == [(second, "name"), (first, "name")]
    assert len(differences(cells[4:8] + cells[:4] + cells[8:], "peac", 4)) == 2 + 8  # two names, and eight values
    columns = {"CheXpert": "ShenZhen", "ShenZhen": "CheXpert"}
    assert len(differences([c._replace(column=columns.get(c.column, c.column)) for c in cells], "peac", 4)) == 18
    assert differences([c for c in cells if c.row != first], "peac", 4) == [("rows", "", 8, 9)]
    assert differences([c._replace(column=c.column.replace("CheXpert", "CXP")) for c in cells], "peac", 4)


def test_counts():
    cells = published()
    assert cells.groupby(["paper", "table"]).size().to_dict() == CELLS
    assert cells.groupby("paper").size().to_dict() == {"peac": 140, "afire": 227}
    assert set(map(tuple, cells.loc[~cells.legible, KEY].values)) == UNREADABLE
    assert not cells.duplicated(KEY).any() and (cells.unit == "%").all()


def test_what_cannot_be_read_is_missing_or_printed_elsewhere():
    gone, known = (published().query("row == @r and table == 5 and column == 'ChestX-ray14'").iloc[0] for r in sorted((u[2] for u in UNREADABLE), reverse=True))
    assert np.isnan([gone["mean"], gone.deviation]).all() and gone.note and known.note
    for table in (1, 4):
        same = published("peac", table).query("method == 'PEAC-3' and column == 'ChestX-ray14'").iloc[0]
        assert same.legible and (same["mean"], same.deviation) == (known["mean"], known.deviation)


@pytest.mark.parametrize("paper, table", CELLS)
def test_table_in_the_shape_of_the_paper(paper, table):
    columns, rows = printed(paper, table)
    shape = published_table(paper, table)
    assert list(shape) == columns and len(shape) == len(rows)
    for (_, ours), row in zip(shape.iterrows(), rows):
        for text, value in zip(ours, row.values): assert text == value.strip("*") if value else text in ("?", "80.04±0.20")


def test_arms_of_the_ablation_are_the_ticks():
    _, rows = printed("afire", 1)
    for (name, change), row in zip(AFIRE_TABLE1.items(), rows, strict=True):
        number, aug, *ticks = row.label.split("\t")[:6]
        arms = change.get("arms", "scr")
        ours = [change.get("proto") != "none", *(a in arms for a in "csr")]
        assert (name[0], ours) == (number, [t == "✓" for t in ticks])
        assert aug.casefold() == change.get("augmentation", "slm")


def numbers_after(paper: str, cue: str, count: int) -> list[float]:
    "The numbers that follow a cue that the text has once; `a \\times 10^{b}` is one."
    text = paper_text(paper)
    assert text.count(cue) == 1, f"{cue!r} is {text.count(cue)} times in {paper}"
    text = re.sub(r"\s*\\times\s*10\^\{?(-?\d+)\}?", r"e\1", text.split(cue)[1])
    return [float(x) for x in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", text)[:count]]


def test_numbers_of_the_text():
    said = stated_numbers()
    def ours(**where): return said.loc[np.logical_and.reduce([said[k] == v for k, v in where.items()]), "value"].tolist()
    assert ours(paper="peac") == numbers_after("peac", "p-values: ", 8)
    assert ours(quantity="gain") == numbers_after("afire", "(+", 3)
    assert ours(quantity="average gain") == numbers_after("afire", "average AUC +", 3)
    assert ours(quantity="value") == numbers_after("afire", "top AUC scores of ", 3)
    assert ours(relation="<") == [float(x) for x in re.findall(r"p\W{1,4}<\s*(0\.\d+)", paper_text("afire"))]
    assert len(said) == 8 + 3 + 3 + 3 + 2
    for disease, value in zip(said.query("place == 'Fig. 6'").subject.str.removeprefix("AFiRe, "), (89.4, 93.4, 89.6)):
        assert disease in paper_text("afire") and value in ours(quantity="value")
