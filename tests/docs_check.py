"""Checks the site without Quarto: `python tests/docs_check.py` prints what is wrong, a test expects nothing.

Every page of the navigation exists and every notebook is in it; every notebook begins with a title and one line; every
link, anchor, cross reference and footnote resolves, by the rules of Pandoc and nbdev.
"""
import ast
import configparser
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import mistune
import yaml

from notebooks import ROOT, directives, find_notebooks, read_cells, without_directives
from render_readme import CODE, HIDDEN

TITLE = re.compile(r"# \S[^\n]*\n+> \S[^\n]*\n*")
ATTRIBUTE = re.compile(r"\{[^{}\n]*#([\w:.-]+)[^{}\n]*\}")  # {#name .class}, of a heading, span, figure, equation
HTML_ID = re.compile(r"""<[^>]*\b(?:id|name)=["']([^"']+)""")
HTML_LINK = re.compile(r"""<[^>]*\b(?:src|href)=["']([^"']+)""")
CROSS_REFERENCE = re.compile(r"(?<![\w\\@])@((?:fig|tbl|sec|eq|lst)-[\w-]*\w)", re.I)
UNRESOLVED = re.compile(r"\[\^[^\]\s]+\]|\[[^\[\]]+\]\[[^\[\]]+\]")  # a footnote or link whose definition is missing
OPENS_BLOCK = re.compile(r" {0,3}(?:#{1,6} |[-*+] |\d+[.)] )")
MATH = re.compile(r"\$\$.*?\$\$", re.S)
parse = mistune.create_markdown(renderer=None, plugins=["table", "footnotes", "math", "strikethrough"])


def walk(tokens: list[dict]) -> Iterator[dict]:
    "Every token, depth first."
    for t in tokens:
        yield t
        yield from walk(t.get("children", []))


def plain(token: dict) -> str:
    "The text of a heading."
    if token["type"] in ("softbreak", "linebreak"): return " "
    return token.get("raw") or "".join(map(plain, token.get("children", [])))


def pandoc_id(text: str) -> str:
    "The anchor that Pandoc makes from a heading's text (extension auto_identifiers)."
    text = re.sub(r"--+|\.{3}", "", text.lower())  # dashes and ellipses, which count as punctuation
    kept = "".join(c for c in text if c.isalnum() or c.isspace() or c in "_-.")
    name = "-".join(kept.split())
    return name[next((i for i, c in enumerate(name) if c.isalpha()), len(name)):] or "section"


def github_id(text: str) -> str:
    "The anchor that GitHub makes from a heading's text."
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def heading_ids(tokens: list[dict], rule) -> Iterator[str]:
    "Anchors of the headings in order, a repeated one numbered."
    used = set()
    for t in (t for t in tokens if t["type"] == "heading"):
        text = plain(t).strip()
        base, n = rule(re.sub(r"\s*\{[^{}]*\}$", "", text)), 0
        if ATTRIBUTE.search(text): continue
        name = base
        while name in used: name, n = f"{base}-{n + 1}", n + 1
        used.add(name)
        yield name


def cross_references(tokens: list[dict]) -> tuple[list[str], list[str]]:
    "Names referred to with `@`, and marks that refer to a missing definition."
    refs, missing = [], []
    for t in tokens:
        kids = t.get("children", [])
        run = "".join(k["raw"] if k["type"] == "text" else "\0" for k in kids)
        refs += CROSS_REFERENCE.findall(run)
        missing += UNRESOLVED.findall(run)
    return refs, missing


def urls(tokens: list[dict]) -> list[str]:
    "Targets of links and images, those in raw HTML too."
    res = []
    for t in tokens:
        if t["type"] in ("link", "image"): res.append(unquote(t["attrs"]["url"]))
        if t["type"] in ("inline_html", "block_html"): res += map(unquote, HTML_LINK.findall(t["raw"]))
    return res


def swallowed(markdown: str) -> Iterator[str]:
    "Lines that Jupyter shows as a list or heading and Pandoc does not, for want of an empty line before them."
    for block in re.split(r"\n\s*\n", MATH.sub("", CODE.sub("", markdown))):
        first, *rest = block.strip("\n").split("\n")
        if OPENS_BLOCK.match(first) or first.startswith((" ", ">", "|", ":::", "<")): continue
        yield from (line for line in rest if OPENS_BLOCK.match(line))


class Page:
    "A notebook as the site shows it."
    def __init__(self, path: Path):
        self.path, self.cells = path, read_cells(path)
        self.titled = bool(self.cells) and self.cells[0]["cell_type"] == "markdown" and TITLE.fullmatch(self.cells[0]["source"])
        shown = [c for c in self.cells if not (HIDDEN & directives(c["source"]).keys())]
        self.code = [c for c in self.cells if c["cell_type"] == "code"]
        self.texts = [c["source"] for c in shown[bool(self.titled):] if c["cell_type"] == "markdown"]
        self.texts += ["".join(o["data"]["text/markdown"]) for c in shown if c["cell_type"] == "code"
                       for o in c["outputs"] if "text/markdown" in o.get("data", {})]
        self.tokens = list(walk(parse("\n\n".join(self.texts))))

    def anchors(self) -> set[str]:
        "Everything on the page that a link can point at."
        bare = CODE.sub("", "\n\n".join(self.texts))
        return {*heading_ids(self.tokens, pandoc_id), *ATTRIBUTE.findall(bare), *HTML_ID.findall(bare), *self.labels(), *self.documented()}

    def labels(self) -> set[str]:
        "Names given to code cells for cross references."
        return {directives(c["source"]).get("label", "").strip("\"'") for c in self.code} - {""}

    def documented(self) -> set[str]:
        "Anchors of what nbdev documents: exported public names and those that `show_doc` is called with."
        names = set()
        for c in self.code:
            dirs = directives(c["source"])
            if not {"export", "exports"} & dirs.keys() and "show_doc(" not in c["source"]: continue
            for node in ast.parse(without_directives(c["source"])).body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_": names.add(node.name.lower())
                call = node.value if isinstance(node, ast.Expr) else None
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "show_doc": names.add(ast.unparse(call.args[0]).lower())
        return names

    def problems(self) -> Iterator[str]:
        "What is wrong with the page by itself."
        if not self.titled: yield "the first cell must be `# Title`, an empty line, `> one line` and nothing else (nbdev drops the rest)"
        elif any(t["type"] == "heading" and t["attrs"]["level"] == 1 for t in self.tokens): yield "a second heading of level 1"
        refs, missing = cross_references(self.tokens)
        defined = set(ATTRIBUTE.findall("\n\n".join(self.texts))) | self.labels()
        yield from (f"cross reference @{r} to nothing on this page" for r in refs if r not in defined)
        yield from (f"{m} has no definition" for m in missing)
        for text in self.texts: yield from (f"needs an empty line before it: {line!r}" for line in swallowed(text))


class Site:
    "The notebooks, the navigation, and what a link may point at."
    def __init__(self, root: Path = ROOT):
        self.root, self.nbs = root, root / "nbs"
        self.pages = {p.relative_to(self.nbs).as_posix(): Page(p) for p in find_notebooks(root)}
        cfg = configparser.ConfigParser()
        cfg.read(root / "settings.ini")
        s = cfg["DEFAULT"]
        self.url = s["doc_host"] + s["doc_baseurl"]
        self.source = re.compile(rf"{re.escape(s['git_url'])}/(?:blob|tree|raw)/{re.escape(s['branch'])}/(.*)")
        self.rendered = {self.output(p): p for p in self.pages}

    @staticmethod
    def output(page: str) -> str:
        "Where nbdev puts a page: the number goes from the file's name, not from its folder's."
        head, _, name = page.rpartition("/")
        stem = re.sub(r"^\d+[a-zA-Z0-9]*_", "", name.lower()).removesuffix(".ipynb")
        return f"{head}/{stem}.html" if head else f"{stem}.html"

    def navigation(self, file: Path) -> list[str]:
        "Every page that a navigation file leads to, in order."
        found = []

        def collect(x):
            if isinstance(x, str) and "://" not in x: found.append(x)
            if isinstance(x, list): [collect(y) for y in x]
            if isinstance(x, dict): [collect(v) for k, v in x.items() if k in ("href", "contents", "left", "right")]

        site = yaml.safe_load(file.read_text()).get("website", {})
        collect([site.get("navbar", {}), site.get("sidebar", {})])
        return found

    def navigation_problems(self) -> Iterator[str]:
        sidebar, bar = self.navigation(self.nbs / "sidebar.yml"), self.navigation(self.root / "_quarto.yml")
        yield from (f"navigation: {h} does not exist" for h in dict.fromkeys(sidebar + bar) if not (self.nbs / h).is_file())
        yield from (f"navigation: {p} is missing from nbs/sidebar.yml" for p in self.pages if p not in sidebar)
        yield from (f"navigation: {p} is in nbs/sidebar.yml twice" for p in self.pages if sidebar.count(p) > 1)
        stub = yaml.safe_load((self.nbs / "_quarto.yml").read_text())
        yield from (f"nbs/_quarto.yml: {f} does not exist" for f in stub["metadata-files"] if not (self.nbs / f).is_file())
        if len(self.rendered) < len(self.pages): yield "two notebooks render to the same page"

    def link_problem(self, url: str, here: str) -> str:
        "Why a link on page `here` (a path in nbs) leads nowhere, or ''."
        if m := self.source.fullmatch(url.partition("#")[0]):
            return "" if (self.root / m[1]).exists() else f"{m[1]} is not in the repository"
        if url.startswith(self.url):
            page, _, anchor = url[len(self.url):].lstrip("/").partition("#")
            page = page or "index.html"
            return self.anchor_problem(self.rendered[page], anchor) if page in self.rendered else f"the site has no page {page}"
        if re.match(r"[a-z][a-z0-9+.-]*:", url, re.I): return ""
        path, _, anchor = url.partition("#")
        if not path: return self.anchor_problem(here, anchor)
        target = os.path.normpath(os.path.join(os.path.dirname(here), path)) if path[0] != "/" else path[1:]
        if target in self.pages: return self.anchor_problem(target, anchor)
        if target in self.rendered: return f"link to the notebook, {self.rendered[target]}, which also works outside the site"
        if target.startswith(".."): return "leaves nbs/: link to the file's address in the repository"
        return "" if (self.nbs / target).is_file() else "no such file"

    def anchor_problem(self, page: str, anchor: str) -> str:
        known = self.pages[page].anchors()
        return "" if not anchor or anchor in known else f"{page} has no anchor #{anchor}"

    def attachment_problems(self, page: Page) -> Iterator[str]:
        for c in page.cells:
            if c["cell_type"] != "markdown": continue
            used = [u.removeprefix("attachment:") for u in urls(list(walk(parse(c["source"])))) if u.startswith("attachment:")]
            yield from (f"attachment {u} is not in the cell" for u in used if u not in c.get("attachments", {}))

    def text_problems(self, file: Path) -> Iterator[str]:
        "Links and anchors of a Markdown file at the root, as GitHub shows it."
        tokens = list(walk(parse(file.read_text(encoding="utf-8"))))
        ids = set(heading_ids(tokens, github_id))
        for url in urls(tokens):
            path, _, anchor = url.partition("#")
            outside = re.match(r"[a-z][a-z0-9+.-]*:", url, re.I)
            bad = self.link_problem(url, "index.ipynb") if outside else \
                "no such file" if path and not (self.root / path).exists() else "no such heading" if not path and anchor not in ids else ""
            if bad: yield f"link {url}: {bad}"

    def problems(self) -> list[str]:
        res = list(self.navigation_problems())
        for name, page in self.pages.items():
            found = [*page.problems(), *self.attachment_problems(page)]
            found += [f"link {u}: {bad}" for u in urls(page.tokens) if (bad := self.link_problem(u, name))]
            res += [f"nbs/{name}: {f}" for f in found]
        for file in sorted(self.root.glob("*.md")): res += [f"{file.name}: {f}" for f in self.text_problems(file)]
        return res


if __name__ == "__main__":
    found = Site().problems()
    print("\n".join(found) or "every page, link, anchor and cross reference resolves")
    sys.exit(bool(found))
