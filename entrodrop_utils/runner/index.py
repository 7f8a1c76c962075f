"""The generated parts of the documentation: README tables, and the links from each notebook to the next."""

from collections.abc import Iterable
from pathlib import Path

import nbformat
import pandas as pd

from ..files import write_text
from ..paths import PACKAGE, RESULTS, ROOT
from ..profile import DEFAULT_MODEL, DEFAULT_SIZE
from .checks import NAVIGATION, available, finding, question, title

HEADLINE = ("01_layerwise_entropy", "02_entropy_vs_cosine", "04_accuracy_tables")  # whose findings open the README


def update_index() -> None:
    """Update everything that depends on all notebooks."""
    notebooks = {path: nbformat.read(path, as_version=4) for path in available()}
    titles = {path: title(notebook) for path, notebook in notebooks.items()}
    order = list(notebooks)
    for number, path in enumerate(order):
        back = [f"← [{titles[p]}]({p.name})" for p in order[max(0, number - 1) : number]]
        forward = [f"[{titles[p]}]({p.name}) →" for p in order[number + 1 : number + 2]]
        source = " · ".join([*back, "[index](../README.md)", *forward])
        links = nbformat.v4.new_markdown_cell(source, id=NAVIGATION)
        notebooks[path].cells = [cell for cell in notebooks[path].cells if cell.id != NAVIGATION] + [links]
        write_notebook(notebooks[path], path)
    readme = ROOT / "README.md"
    rows = [
        (f"[{path.stem.split('_')[0]}](notebooks/{path.name})", question(notebook), finding(notebook))
        for path, notebook in notebooks.items()
    ]
    put(readme, "notebooks", markdown_table(["", "question", "answer"], rows))
    put(readme, "headline", "\n".join(f"- {finding(notebook)}" for path, notebook in notebooks.items() if path.stem in HEADLINE))
    if (file := RESULTS / DEFAULT_MODEL / DEFAULT_SIZE / "claims.csv").exists():
        claims = [
            (row.claim, row.source, row.published, f"{row.measured:.3g} [{row.low:.3g}, {row.high:.3g}]", row.verdict)
            for row in pd.read_csv(file, keep_default_na=False).itertuples()
        ]
        columns = ["claim", "in the paper", "published", "measured, 95% interval", "verdict"]
        put(ROOT / "data" / "README.md", "claims", markdown_table(columns, claims))
    if (file := RESULTS / "families.csv").exists():
        families = pd.read_csv(file)
        table = markdown_table(families.columns, families.itertuples(index=False))
        put(PACKAGE / "families" / "README.md", "families", table)


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def put(file: Path, name: str, content: str) -> None:
    """Replace the text between the comments ``<!-- name -->`` and ``<!-- /name -->`` of a Markdown file, if it has them."""
    if not file.exists():
        return
    before, start, rest = file.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    if start:
        after = rest.partition(f"<!-- /{name} -->")[2]
        write_text(file, f"{before}{start}{content}\n<!-- /{name} -->{after}")


def write_notebook(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook in one step, and only if it changed."""
    text = nbformat.writes(notebook) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
