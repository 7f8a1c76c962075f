"""Notebooks as they are read: without what changes from run to run, checked, and listed in the README."""

import ast
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import nbformat
import pandas as pd

from .profiles import DEFAULT_MODEL, DEFAULT_SIZE, NOTEBOOKS, RESULTS, ROOT

FINDING = "> **Finding:** "  # the line of a notebook's first cell that its last run fills in
NAVIGATION = "navigation"  # the id of the last cell, which leads to the notebooks before and after
HEADLINE = {"02_entropy_vs_cosine": 2, "04_accuracy_tables": 1}  # with how many sentences of whose findings the README opens
LONGEST_CELL = 20  # lines
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
    head, line, _ = notebook.cells[0].source.partition(FINDING.rstrip())
    if line and (found := finding(notebook)):
        notebook.cells[0].source = f"{head}{FINDING}{found}"
    return notebook


def title(notebook: nbformat.NotebookNode) -> str:
    """The heading that its first cell opens with."""
    return notebook.cells[0].source.splitlines()[0].lstrip("# ")


def finding(notebook: nbformat.NotebookNode) -> str:
    """The sentence that the cell tagged ``finding`` computed; empty when it has not run."""
    for cell in notebook.cells:
        if "finding" in cell.metadata.get("tags", []):
            return " ".join("".join(o.get("data", {}).get("text/markdown", "") for o in cell.outputs).split())
    return ""


def problems(notebook: nbformat.NotebookNode) -> list[str]:
    """What a reader of a committed notebook would stumble over, a sentence each."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = [f"its text links to {link}, which does not exist" for link in _dead_links(notebook)]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("its cells were not run once, in order")
    parameters = [number for number, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", [])]
    if parameters != [1] or not _literals(code[1].source):
        found.append("its second code cell, after the imports, is not the one tagged parameters, or holds more than literals")
    if "widgets" in notebook.metadata:
        found.append("it holds widget state")
    if not finding(notebook):
        found.append("it computes no finding")
    elif FINDING + finding(notebook) not in notebook.cells[0].source:
        found.append("its first cell does not hold its finding")
    if len(nbformat.writes(notebook).encode()) > MOST_BYTES:
        found.append(f"it is larger than {MOST_BYTES / 1e6:.0f} MB")
    return found + [f"cell {number} {says}" for number, cell in enumerate(code, 1) for says in _cell_problems(cell)]


def _cell_problems(cell: nbformat.NotebookNode) -> Iterator[str]:
    """What is wrong with one code cell and what it shows."""
    if len(cell.source.splitlines()) > LONGEST_CELL:
        yield f"is longer than {LONGEST_CELL} lines"
    if MACHINE_PATH.search(str(cell.outputs)):
        yield "shows a path of the machine it ran on"
    for number, out in enumerate(cell.outputs):
        if out.output_type == "error" or out.get("name") == "stderr":
            yield "shows an error or a warning"
        if "application/vnd.jupyter.widget-view+json" in out.get("data", {}):
            yield "shows a widget, which is dead when it is read"
        if "image/png" in out.get("data", {}):
            if not out.metadata.get("image/png", {}).get("alt"):
                yield "has a figure without alt text"
            if not any("text/markdown" in later.get("data", {}) for later in cell.outputs[number + 1 :]):
                yield "has a figure without caption"


def _literals(source: str) -> bool:
    """Whether a cell assigns literals and does nothing else."""
    try:
        return all(ast.literal_eval(statement.value) is not Ellipsis for statement in ast.parse(source).body)
    except (AttributeError, ValueError, SyntaxError):
        return False


def _dead_links(notebook: nbformat.NotebookNode) -> list[str]:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return [link for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text) if not (NOTEBOOKS / link).exists()]


def index() -> None:
    """Bring up to date what depends on all notebooks: the README's tables, and the way from each notebook to the next."""
    books = {path: nbformat.read(path, as_version=4) for path in available()}
    titles = {path: title(book) for path, book in books.items()}
    order = list(books)
    for number, path in enumerate(order):
        back = [f"← [{titles[p]}]({p.name})" for p in order[max(0, number - 1) : number]]
        on = [f"[{titles[p]}]({p.name}) →" for p in order[number + 1 : number + 2]]
        way = nbformat.v4.new_markdown_cell(" · ".join([*back, "[index](../README.md)", *on]), id=NAVIGATION)
        books[path].cells = [cell for cell in books[path].cells if cell.id != NAVIGATION] + [way]
        write(books[path], path)
    _tabulate(
        "notebooks", ["notebook", "what it found"], [(f"[{titles[p]}](notebooks/{p.name})", finding(books[p])) for p in order]
    )
    said = [". ".join(finding(book).split(". ")[: HEADLINE.get(path.stem, 0)]).rstrip(".") for path, book in books.items()]
    if any(said):
        _put("headline", f"**What we find.** {' '.join(f'{sentences}.' for sentences in said if sentences)}")
    if (file := RESULTS / DEFAULT_MODEL / DEFAULT_SIZE / "claims.csv").exists():
        claims = [
            (row.claim, row.source, row.published, f"{row.measured:.3g} [{row.low:.3g}, {row.high:.3g}]", row.verdict)
            for row in pd.read_csv(file, keep_default_na=False).itertuples()
        ]
        _tabulate("claims", ["claim", "in the paper", "published", "measured, 95% interval", "verdict"], claims)
    if (file := RESULTS / "families.csv").exists():
        families = pd.read_csv(file)
        _tabulate("families", families.columns, families.itertuples(index=False))


def _tabulate(name: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Put a table into the README under this name."""
    lines = [" | ".join(columns), " | ".join("---" for _ in columns), *(" | ".join(row) for row in rows)]
    _put(name, "\n".join(f"| {line} |" for line in lines))


def _put(name: str, new: str) -> None:
    """Replace what the README holds between the comments ``<!-- name -->`` and ``<!-- /name -->``, if it has them."""
    readme = ROOT / "README.md"
    before, start, rest = readme.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    if start:
        after = rest.partition(f"<!-- /{name} -->")[2]
        readme.write_text(f"{before}{start}{new}\n<!-- /{name} -->{after}", encoding="utf-8")


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook in one step, and only where that changes it."""
    text = nbformat.writes(notebook) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
