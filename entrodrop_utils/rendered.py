"""Notebooks as they are read: without what changes from run to run, checked, and listed in the README."""

import re
from pathlib import Path

import nbformat

from .profiles import NOTEBOOKS, ROOT

FINDING = "> **Finding:** "  # the line of a notebook's first cell that its last run fills in
MOST_BYTES = 1_000_000  # GitHub does not render more
MACHINE_PATH = re.compile(r"(?<![\w.:/<])/(home|Users|root|tmp|usr|opt|var|work)/|\b[A-Z]:\\\\")


def available() -> list[Path]:
    """The notebooks, in order."""
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what changes from run to run (times, versions, widgets), its finding copied into its first cell."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata.tags} if cell.metadata.get("tags") else {}
    if (found := finding(notebook)) and FINDING in notebook.cells[0].source:
        head = notebook.cells[0].source.split(FINDING)[0]
        notebook.cells[0].source = f"{head}{FINDING}{found}"
    return notebook


def finding(notebook: nbformat.NotebookNode) -> str:
    """The sentence that the cell tagged ``finding`` computed; empty when it has not run."""
    for cell in notebook.cells:
        if "finding" in cell.metadata.get("tags", []):
            return " ".join("".join(o.get("data", {}).get("text/markdown", "") for o in cell.outputs).split())
    return ""


def problems(notebook: nbformat.NotebookNode) -> list[str]:
    """What a reader of a committed notebook would stumble over, a sentence each."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = []
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("its cells were not run once, in order")
    if not any("parameters" in cell.metadata.get("tags", []) for cell in code):
        found.append("it has no cell tagged parameters")
    if "widgets" in notebook.metadata:
        found.append("it holds widget state")
    if not finding(notebook):
        found.append("it computes no finding")
    raw = nbformat.writes(notebook)
    if len(raw.encode()) > MOST_BYTES:
        found.append(f"it is larger than {MOST_BYTES / 1e6:.0f} MB")
    for number, cell in enumerate(code, 1):
        if len(cell.source.splitlines()) > 20:
            found.append(f"cell {number} is longer than 20 lines")
        for out in cell.outputs:
            if out.output_type == "error" or out.get("name") == "stderr":
                found.append(f"cell {number} shows an error or a warning")
            if "application/vnd.jupyter.widget-view+json" in out.get("data", {}):
                found.append(f"cell {number} shows a widget, which is dead when it is read")
            if "image/png" in out.get("data", {}) and not out.metadata.get("image/png", {}).get("alt"):
                found.append(f"cell {number} has a figure without alt text")
        if MACHINE_PATH.search(str(cell.outputs)):
            found.append(f"cell {number} shows a path of the machine it ran on")
    return found


def index() -> None:
    """Bring the README's table of notebooks up to date with their titles and findings."""
    rows = ["| notebook | what it found |", "|---|---|"]
    for path in available():
        notebook = nbformat.read(path, as_version=4)
        title = notebook.cells[0].source.split("\n")[0].lstrip("# ")
        rows.append(f"| [{title}](notebooks/{path.name}) | {finding(notebook)} |")
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition("<!-- notebooks -->")
    after = rest.partition("<!-- /notebooks -->")[2]
    table = "\n".join(rows)
    readme.write_text(f"{before}<!-- notebooks -->\n{table}\n<!-- /notebooks -->{after}", encoding="utf-8")
