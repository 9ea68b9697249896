"""Renders README.md from nbs/index.ipynb without Quarto: `python tests/render_readme.py` writes it, a test compares it."""
import base64
import re
from pathlib import Path

from notebooks import ROOT, directives, read_cells, without_directives

FILES = "index_files"  # pictures of index.ipynb, beside README.md
NOTE = "<!-- Rendered from nbs/index.ipynb by tests/render_readme.py. Edit the notebook. -->"
HIDDEN = {"hide", "export", "exporti", "default_exp"}  # as nbdev drops them from the site
CODE = re.compile(r"(^ {0,3}```.*?^ {0,3}```[^\n]*$|``.+?``|`[^`\n]+`)", re.M | re.S)
LINK = re.compile(r"""(\]\(<?|^\[[^\]^]+\]:\s*|(?:src|href)=["'])(?![a-z][a-z0-9+.-]*:|[#/\s])""", re.I | re.M)
ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


def relink(markdown: str) -> str:
    "Links relative to nbs/ as links relative to the root; code stays as it is."
    parts = CODE.split(markdown)
    return "".join(p if i % 2 else LINK.sub(r"\1nbs/", p) for i, p in enumerate(parts))


def fence(text: str, language: str = "") -> str:
    ticks = "`" * max([3, *(len(m) + 1 for m in re.findall(r"^`{3,}", text, re.M))])
    return f"{ticks}{language}\n{text}\n{ticks}"


def shown(source: str) -> str:
    "A code cell's source; `%%bash` becomes the language of the block."
    code = without_directives(source)
    magic = re.match(r"%%(bash|sh)\n", code)
    return fence(code[magic.end():], magic[1]) if magic else fence(code, "python")


def printed(text: str) -> str:
    "Terminal text as it stood at the end: no colours, of a progress bar only its last state."
    return "\n".join(line.rsplit("\r", 1)[-1] for line in ANSI.sub("", text).rstrip().replace("\r\n", "\n").split("\n"))


def rendered_output(out: dict, name: str, alt: str) -> tuple[str, dict[str, bytes]]:
    "One output as Markdown, and the pictures that it needs."
    if out["output_type"] == "stream": return fence(printed("".join(out["text"]))), {}
    if out["output_type"] == "error": return fence(printed("\n".join(out["traceback"]))), {}
    data = out["data"]
    if "image/png" in data:
        return f"![{alt}]({FILES}/{name}.png)", {f"{FILES}/{name}.png": base64.b64decode("".join(data["image/png"]))}
    if "text/markdown" in data: return relink("".join(data["text/markdown"]).strip()), {}
    return fence(printed("".join(data["text/plain"]))), {}


def render(index: Path) -> dict[str, bytes]:
    "Every file that the notebook renders to, by its path below the root; README.md is one."
    files, parts = {}, []
    for cell in read_cells(index):
        opts = directives(cell["source"])
        if HIDDEN & opts.keys() or opts.get("include") == "false": continue
        if cell["cell_type"] == "markdown": parts.append(relink(cell["source"].strip()))
        if cell["cell_type"] != "code" or not cell["source"].strip(): continue
        if opts.get("echo") != "false": parts.append(shown(cell["source"]))
        if opts.get("output") == "false": continue
        for i, out in enumerate(cell["outputs"]):
            text, pictures = rendered_output(out, f"{cell['id']}-{i}", opts.get("fig-alt", "").strip("\"'") or "figure")
            parts.append(text)
            files |= pictures
    title, *rest = parts
    return {"README.md": ("\n\n".join([title, NOTE, *rest]) + "\n").encode()} | files


def problems(root: Path = ROOT) -> list[str]:
    "Where README.md and its pictures differ from what nbs/index.ipynb renders to."
    index = root / "nbs/index.ipynb"
    if not index.exists(): return ["nbs/index.ipynb: not found, README.md is rendered from it"]
    files = render(index)
    old = {str(p.relative_to(root)) for p in (root / FILES).glob("*")} - files.keys()
    stale = [n for n, data in files.items() if not (root / n).exists() or (root / n).read_bytes() != data]
    return [f"{n}: not what nbs/index.ipynb renders to; run `python tests/render_readme.py`" for n in sorted(old.union(stale))]


def write(root: Path = ROOT) -> list[str]:
    "Write README.md and its pictures; pictures of earlier renderings go."
    files = render(root / "nbs/index.ipynb")
    for old in (root / FILES).glob("*"): old.unlink()
    for name, data in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    return list(files)


if __name__ == "__main__":
    print("wrote", *write())
