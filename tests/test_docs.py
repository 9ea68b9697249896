"""The site is whole and README.md is current; the checks are shown to fail on a broken site."""
import json
import shutil

import pytest

import render_readme
from docs_check import Site, heading_ids, pandoc_id, parse, walk
from notebooks import ROOT, read_cells


def test_site_is_whole():
    found = Site(ROOT).problems()
    assert not found, "\n".join(found)


def test_readme_is_current():
    found = render_readme.problems(ROOT)
    assert not found, "\n".join(found)


def cell(source, outputs=None):
    code = outputs is not None or source.startswith("#|")
    extra = {"outputs": outputs or [], "execution_count": None} if code else {}
    return {"cell_type": "code" if code else "markdown", "id": f"c{abs(hash(source)) % 10**6}", "metadata": {}, "source": [source]} | extra


def write_notebook(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNiAAAABgADNjd8qAAAAABJRU5ErkJggg=="


@pytest.fixture
def site(tmp_path):
    "A small site in which everything resolves."
    for name in ("settings.ini", "_quarto.yml"): shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "_quarto.yml").write_text("website: {navbar: {left: [{text: A, href: 1_data/00_a.ipynb}]}}\n")
    nbs = tmp_path / "nbs"
    write_notebook(nbs / "index.ipynb", cell("# Home\n\n> What it is."), cell("See [a](1_data/00_a.ipynb#part-2-of-x_y)."),
                   cell("#| hide\nimport os"), cell("#| eval: false\nprint(1)", [{"output_type": "stream", "name": "stdout", "text": ["1\n"]}]),
                   cell("#| echo: false\nplot()", [{"output_type": "display_data", "metadata": {}, "data": {"image/png": PNG, "text/plain": "<Figure>"}}]))
    write_notebook(nbs / "1_data/00_a.ipynb", cell("# A\n\n> One line."), cell("## Part 2 of `x_y`\n\n[up](../index.ipynb), [same](#part-2-of-x_y)"),
                   cell("#| export\ndef f(x):\n    'Doc.'"), cell("[f](#f), @fig-one, [here][r], note[^n]\n\n[r]: ../index.ipynb\n\n[^n]: It is."),
                   cell("#| label: fig-one\nplot()"))
    (nbs / "sidebar.yml").write_text("website: {sidebar: {contents: [index.ipynb, {section: D, contents: [1_data/00_a.ipynb]}]}}\n")
    (nbs / "_quarto.yml").write_text("metadata-files: [../_quarto.yml, sidebar.yml]\n")
    render_readme.write(tmp_path)
    return tmp_path


def test_small_site_has_no_problems(site):
    assert Site(site).problems() == [] and render_readme.problems(site) == []


BROKEN = {
    "[x](missing.ipynb)": "link missing.ipynb: no such file",
    "[x](../index.ipynb#nowhere)": "index.ipynb has no anchor #nowhere",
    "[x](#nowhere)": "no anchor #nowhere",
    "[x](a.html)": "link to the notebook, 1_data/00_a.ipynb",
    "[x](../../LICENSE)": "leaves nbs/",
    "[x](https://github.com/anatcxr/anatcxr/blob/main/nothing.py)": "nothing.py is not in the repository",
    "[x](https://anatcxr.github.io/anatcxr/1_data/b.html)": "the site has no page 1_data/b.html",
    "![x](picture.png)": "link picture.png: no such file",
    "![x](attachment:p.png)": "attachment p.png is not in the cell",
    '<img src="picture.png">': "link picture.png: no such file",
    "as @fig-two shows": "cross reference @fig-two",
    "as [here][nowhere] says": "[here][nowhere] has no definition",
    "a note[^7]": "[^7] has no definition",
    "# Another title": "second heading of level 1",
    "a list:\n- one": "needs an empty line before it: '- one'",
}


@pytest.mark.parametrize("source, problem", BROKEN.items())
def test_broken_page_is_found(site, source, problem):
    page = site / "nbs/1_data/00_a.ipynb"
    write_notebook(page, *read_cells(page), cell(source))
    found = Site(site).problems()
    assert len(found) == 1 and problem in found[0] and found[0].startswith("nbs/1_data/00_a.ipynb: "), found


@pytest.mark.parametrize("source", ["`[x](missing.ipynb)`", "```\n[x](missing.ipynb)\n- y\n```", "$a[i](b)$", "[x](https://example.org/y)"])
def test_code_formulas_and_foreign_links_are_left_alone(site, source):
    page = site / "nbs/1_data/00_a.ipynb"
    write_notebook(page, *read_cells(page), cell(source))
    assert Site(site).problems() == []


@pytest.mark.parametrize("title", ["## A\n\n> One line.", "# A", "# A\n\n> One line.\n\nProse that nbdev would drop.", "# A\n\n> One\n> Two"])
def test_page_without_title_and_line_is_found(site, title):
    write_notebook(site / "nbs/1_data/00_a.ipynb", cell(title), *read_cells(site / "nbs/1_data/00_a.ipynb")[1:])
    assert any("the first cell must be" in p for p in Site(site).problems())


def test_navigation_and_files_are_compared(site):
    (site / "nbs/1_data/00_a.ipynb").rename(site / "nbs/1_data/01_b.ipynb")
    found = Site(site).problems()
    assert "navigation: 1_data/00_a.ipynb does not exist" in found
    assert "navigation: 1_data/01_b.ipynb is missing from nbs/sidebar.yml" in found


def test_notebook_must_be_in_the_sidebar_itself(site):
    (site / "nbs/sidebar.yml").write_text("website: {sidebar: {contents: [index.ipynb]}}\n")
    assert Site(site).problems() == ["navigation: 1_data/00_a.ipynb is missing from nbs/sidebar.yml"]


def test_readme_shows_what_the_page_shows(site):
    text = (site / "README.md").read_text()
    assert text.startswith("# Home\n\n> What it is.\n\n<!--") and "import os" not in text
    assert "[a](nbs/1_data/00_a.ipynb#part-2-of-x_y)" in text
    assert "```python\nprint(1)\n```\n\n```\n1\n```" in text
    picture, = (site / "index_files").glob("*.png")
    assert f"![figure](index_files/{picture.name})" in text and "plot()" not in text


def test_stale_readme_is_found(site):
    with (site / "README.md").open("a") as f: f.write("edited by hand\n")
    (site / "index_files/old.png").write_bytes(b"")
    assert [p.split(":")[0] for p in render_readme.problems(site)] == ["README.md", "index_files/old.png"]


# What `pandoc -f markdown -t html` (3.9) makes of these headings.
PANDOC = {
    "The `x_y` *map* and [link](a.ipynb#b)": "the-x_y-map-and-link", "Eq. 1-3: L_order": "eq.-1-3-l_order", "2. Numbers first": "numbers-first",
    "Don't \"quote\" me": "dont-quote-me", "a -- b ... c": "a-b-c", "$\\tau_2$ and $n=19$": "tau_2-and-n19", "I -> I'": "i---i",
    "100 %": "section", "Same": "same", "Same ": "same-1", "Unnumbered {.unnumbered}": "unnumbered", "H₂O, Größe": "h₂o-größe",
}


def test_anchors_are_pandocs():
    tokens = list(walk(parse("\n\n".join(f"## {h}" for h in PANDOC))))
    assert list(heading_ids(tokens, pandoc_id)) == list(PANDOC.values())
