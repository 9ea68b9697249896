"""What the tests know about notebooks: which there are, what their cells hold, which parameters they take."""
import ast
import io
import json
import tokenize
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


def find_notebooks(root: Path = ROOT, under: str = "nbs") -> list[Path]:
    "The notebooks that nbdev sees: no name on the way begins with `_` or `.`."
    top = root / under
    return [p for p in sorted(top.rglob("*.ipynb")) if not any(part[0] in "_." for part in p.relative_to(top).parts)]


def read_cells(path: Path) -> list[dict]:
    "The cells, each `source` one string."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [c | {"source": "".join(c["source"])} for c in cells]


def directives(source: str) -> dict[str, str]:
    "The leading `#| name value` or `#| name: value` lines of a cell."
    res = {}
    for line in source.splitlines():
        if not line.startswith("#|"): break
        name, _, value = line[2:].strip().replace(":", " ", 1).partition(" ")
        res[name] = value.strip()
    return res


def without_directives(source: str) -> str:
    "The cell as a reader of the page sees it."
    lines = source.splitlines()
    while lines and lines[0].startswith("#|"): lines.pop(0)
    return "\n".join(lines).strip("\n")


class Declaration(NamedTuple):
    "`name: type = default  # comment`; a part that is not there is empty."
    name: str
    type: str
    default: str
    comment: str


def comments(source: str) -> dict[int, str]:
    "Line number -> trailing comment."
    found = (t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT)
    return {t.start[0]: t.string.lstrip("# ").strip() for t in found}


def declarations(body: list[ast.stmt], source: str) -> list[Declaration]:
    "Every statement of a parameters cell or a dataclass body; one that declares nothing has no type."
    notes, res = comments(source), []
    for node in body:
        named = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        res.append(Declaration(node.target.id if named else ast.unparse(node), ast.unparse(node.annotation) if named else "",
                               ast.unparse(node.value) if named and node.value else "", notes.get(node.end_lineno, "")))
    return res


def parameters_source(path: Path) -> str | None:
    "The cell tagged `parameters`, or None."
    return next((c["source"] for c in read_cells(path) if "parameters" in c["metadata"].get("tags", [])), None)


def parameters(path: Path) -> list[Declaration]:
    "What the cell tagged `parameters` declares."
    source = parameters_source(path) or ""
    return declarations(ast.parse(source).body, source)
