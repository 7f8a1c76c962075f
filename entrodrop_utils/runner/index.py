"""The generated parts of the documentation: README tables, and the links from each notebook to the next."""

from collections.abc import Iterable
from pathlib import Path

import nbformat
import pandas as pd

from ..claims import ledger, summary, value_text
from ..files import with_part, write_text
from ..paths import FIGURES, NOTEBOOKS, PACKAGE, RESULTS, ROOT
from ..profile import DEFAULT_MODEL, Profile
from .checks import NAVIGATION, available, finding, opening, opening_picture, title

HEADLINE = ("01_layerwise_entropy", "02_entropy_vs_cosine", "04_accuracy_tables", "10_scale")  # whose findings open the README


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
        name, caption = opening_picture(notebooks[path])
        if (FIGURES / Profile().folder / f"{name}.png").is_file():
            shown = (
                f"![{caption}](../figures/{Profile().folder}/{name}.png)\n*{caption} Finding and figure are of the committed run.*"
            )
            notebooks[path].cells[0].source = opening(notebooks[path].cells[0].source, finding(notebooks[path]), shown)
        write_notebook(notebooks[path], path)
    readme = ROOT / "README.md"
    put(readme, "notebooks", "\n".join(f"- [{titles[path]}](notebooks/{path.name})" for path in notebooks))
    rows = [(f"[{titles[path]}]({path.name})", finding(notebook)) for path, notebook in notebooks.items()]
    put(NOTEBOOKS / "README.md", "answers", markdown_table(["notebook", "answer"], rows))
    put(readme, "headline", "\n".join(f"- {finding(notebook)}" for path, notebook in notebooks.items() if path.stem in HEADLINE))
    if ledgers := committed_ledgers():
        put(readme, "summary", summary_text(ledgers))
        put(
            ROOT / "data" / "README.md",
            "claims",
            "\n\n".join(f"### {name}\n\n{ledger_text(rows)}" for name, rows in ledgers.items()),
        )
    if (file := RESULTS / "families.csv").exists():
        families = pd.read_csv(file)
        table = markdown_table(families.columns, families.itertuples(index=False))
        put(PACKAGE / "families" / "README.md", "families", table)


def committed_ledgers() -> dict[str, pd.DataFrame]:
    """The ledger of every model with committed claims, the default model first."""
    models = sorted(
        (folder.name for folder in RESULTS.glob("*/") if list(folder.glob("*/claims.csv"))), key=lambda m: (m != DEFAULT_MODEL, m)
    )
    return {model: ledger(RESULTS / model) for model in models}


def ledger_text(rows: pd.DataFrame) -> str:
    """A ledger as a table in Markdown."""
    columns = ["claim", "in the paper", "measured, 95% interval", "verdict", "evidence", "weaker evidence that disagrees"]
    cells = [
        (row.claim, row.source, f"{row.quantity}: {value_text(row)}", row.verdict, row.evidence or f"run {row.run}", row.disagrees)
        for row in rows.rename(columns={"size": "run"}).itertuples()
    ]
    return markdown_table(columns, cells)


def summary_text(ledgers: dict[str, pd.DataFrame]) -> str:
    """The claims of the front page for every model, as a table in Markdown whose heads link to the ledgers."""
    table = summary(ledgers)
    columns = ["claim", *(f"[{model}](data/README.md#{model})" for model in table)]
    return markdown_table(columns, table.reset_index().itertuples(index=False))


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def put(file: Path, name: str, content: str) -> None:
    """``with_part`` of a file, if it exists."""
    if file.exists():
        write_text(file, with_part(file.read_text(encoding="utf-8"), name, content))


def write_notebook(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook in one step, and only if it changed."""
    text = nbformat.writes(notebook) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
