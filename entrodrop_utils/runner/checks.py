"""Rendered notebooks: without what changes from run to run, and checked for what a reader would stumble over."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat

from ..figures import MAX_ROWS
from ..paths import NOTEBOOKS

FINDING = "> **Finding:** "  # the line of a notebook's first cell that its last run fills in
NAVIGATION = "navigation"  # the id of the last cell, which links to the notebooks before and after
MAX_CELLS, MAX_CELL_LINES, MAX_LINE_LENGTH = 30, 15, 100
MAX_FINDING_WORDS = 30
MAX_BYTES = 1_000_000  # GitHub does not render larger notebooks
DECIMAL = re.compile(r"(?<![\w.-])[-+]?\d+(?:\.\d+(?:e[-+]?\d+)?|e[-+]?\d+)(?![\w.])")  # a number with a point or an exponent
MACHINE_PATH = re.compile(r"(?<![\w.:/<])/(home|Users|root|tmp|usr|opt|var|work)/|\b[A-Z]:\\\\")


def available() -> list[Path]:
    """The notebooks, in order: numbered ones, then appendices."""
    return sorted(path for path in NOTEBOOKS.glob("*_*.ipynb") if re.match(r"(\d\d|A\d)_", path.name))


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without times, versions and widgets, with its finding copied into its first cell."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata.tags} if cell.metadata.get("tags") else {}
    if FINDING.rstrip() in notebook.cells[0].source and (sentence := finding(notebook)):
        notebook.cells[0].source = opening(notebook.cells[0].source, sentence)
    return notebook


def opening(source: str, sentence: str, picture: str = "") -> str:
    """A first cell with the finding right after its question, then the picture that shows it; earlier ones are replaced."""
    parts = [part for part in source.split("\n\n") if not part.startswith((FINDING.rstrip(), "!["))]
    place = next((number for number, part in enumerate(parts, 1) if part.endswith("?")), len(parts))
    return "\n\n".join([*parts[:place], FINDING + sentence, *filter(None, [picture]), *parts[place:]])


def opening_picture(notebook: nbformat.NotebookNode) -> tuple[str, str]:
    """Name and caption of the figure that shows the finding: of the cell tagged ``opening``, else the first; empty without one."""
    tagged = [cell for cell in notebook.cells if "opening" in cell.metadata.get("tags", [])]
    for cell in tagged or notebook.cells:
        name = re.search(r'show_figure\(.*?profile,\s*"(\w+)"', cell.source, re.DOTALL)
        captions = [
            out.metadata["image/png"].get("alt", "") for out in cell.get("outputs", []) if "image/png" in out.get("data", {})
        ]
        if name and captions:
            return name[1], captions[-1]
    return "", ""


def title(notebook: nbformat.NotebookNode) -> str:
    """The heading of its first cell."""
    return notebook.cells[0].source.splitlines()[0].lstrip("# ")


def question(notebook: nbformat.NotebookNode) -> str:
    """The question of its first cell: the paragraph that ends in a question mark."""
    paragraphs = (" ".join(part.split()) for part in notebook.cells[0].source.split("\n\n"))
    return next((part for part in paragraphs if part.endswith("?")), "")


def finding(notebook: nbformat.NotebookNode) -> str:
    """The first paragraph of the output of the cell tagged ``finding``; empty when it has not run."""
    for cell in notebook.cells:
        if "finding" in cell.metadata.get("tags", []):
            markdown = "".join("".join(out.get("data", {}).get("text/markdown", "")) for out in cell.outputs)
            return " ".join(markdown.split("\n\n")[0].split())
    return ""


def problems(notebook: nbformat.NotebookNode) -> list[str]:
    """What a reader of a committed notebook would stumble over, one sentence each."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = [f"its text links to {link}, which does not exist" for link in _dead_links(notebook)]
    if len([cell for cell in notebook.cells if cell.id != NAVIGATION]) > MAX_CELLS:
        found.append(f"it has more than {MAX_CELLS} cells")
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("its cells were not run once, in order")
    parameters = [number for number, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", [])]
    if parameters != [1] or not _annotated_literals(code[1].source):
        found.append("its second code cell, after the imports, is not tagged parameters, or holds more than annotated literals")
    if not question(notebook):
        found.append("its first cell asks no question")
    if "widgets" in notebook.metadata:
        found.append("it holds widget state")
    if not finding(notebook):
        found.append("it computes no finding")
    elif FINDING + finding(notebook) not in notebook.cells[0].source:
        found.append("its first cell does not hold its finding")
    if len(finding(notebook).split()) > MAX_FINDING_WORDS:
        found.append(f"its finding has {len(finding(notebook).split())} words, more than {MAX_FINDING_WORDS}")
    if len(nbformat.writes(notebook).encode()) > MAX_BYTES:
        found.append(f"it is larger than {MAX_BYTES / 1e6:.0f} MB")
    for before, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.cell_type == before.cell_type == "code":
            found.append(f"no text comes before the cell that starts {cell.source.splitlines()[0]!r}")
    return found + [f"code cell {number} {problem}" for number, cell in enumerate(code, 1) for problem in _cell_problems(cell)]


def _cell_problems(cell: nbformat.NotebookNode) -> Iterator[str]:
    """What is wrong with one code cell and its output."""
    lines = cell.source.splitlines()
    if len(lines) > MAX_CELL_LINES and "parameters" not in cell.metadata.get("tags", []):
        yield f"has {len(lines)} lines, more than {MAX_CELL_LINES}"
    if longest := [line for line in lines if len(line) > MAX_LINE_LENGTH]:
        yield f"has a line of {len(longest[0])} characters, more than {MAX_LINE_LENGTH}"
    if MACHINE_PATH.search(str(cell.outputs)):
        yield "shows a path of the machine it ran on"
    for number, out in enumerate(cell.outputs):
        if out.output_type == "error" or out.get("name") == "stderr":
            yield "shows an error or a warning"
        if "application/vnd.jupyter.widget-view+json" in out.get("data", {}):
            yield "shows a widget, which does not work in a rendered notebook"
        yield from table_problems("".join(out.get("data", {}).get("text/html", "")))
        if "image/png" in out.get("data", {}):
            if not out.metadata.get("image/png", {}).get("alt"):
                yield "has a figure without alt text"
            if not any("text/markdown" in later.get("data", {}) for later in cell.outputs[number + 1 :]):
                yield "has a figure without caption"


def table_problems(html: str) -> Iterator[str]:
    """What is wrong with a table that pandas wrote, if there is one."""
    body = html.partition("<tbody")[2]
    if (rows := body.count("<tr")) > MAX_ROWS:
        yield f"shows a table of {rows} rows, more than {MAX_ROWS}"
    for cell in re.findall(r"<td[^>]*>(.*?)</td>", body, re.DOTALL):
        if cell.strip() in ("NaN", "nan", "None", "NaT"):
            yield f"shows a table with the cell {cell.strip()}"
        if cell.endswith("..."):
            yield f"shows a table with a cut cell: {cell}"
        if long := [
            number for number in DECIMAL.findall(cell) if len(re.sub(r"e.*|\D", "", number).lstrip("0")) > 3 or "e" in number
        ]:
            yield f"shows a table with more than three digits, or an exponent: {long[0]}"


def _annotated_literals(source: str) -> bool:
    """Whether a cell only assigns literals to annotated names."""
    try:
        statements = ast.parse(source).body
        return all(isinstance(s, ast.AnnAssign) and ast.literal_eval(s.value) is not Ellipsis for s in statements)
    except (AttributeError, ValueError, SyntaxError, TypeError):
        return False


def _dead_links(notebook: nbformat.NotebookNode) -> list[str]:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return [link for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text) if not (NOTEBOOKS / link).exists()]
