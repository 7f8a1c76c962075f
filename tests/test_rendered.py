"""The committed notebooks show what the committed tables say, those of other models among them."""

from pathlib import Path

import nbformat
import pandas as pd
import pytest

from entrodrop_utils import paths
from entrodrop_utils.profile import DEFAULT_SIZE, Profile
from entrodrop_utils.runner import run as runner
from entrodrop_utils.studies import model_facts

DEFAULT = Profile()


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def shown(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """The text that each code cell shows."""
    cells = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    kinds = ("text/markdown", "text/html", "text/plain")
    return [[out.get("text", "") + "".join(out.get("data", {}).get(kind, "") for kind in kinds) for out in cell] for cell in cells]


@pytest.mark.parametrize("name", ["10_scale", "A3_size_check"])
def test_a_notebook_that_reads_only_tables_shows_the_committed_ones(name, tmp_path):
    notebook = paths.NOTEBOOKS / f"{name}.ipynb"
    assert shown(runner.execute(notebook, {}, tmp_path)) == shown(read(notebook))


def test_the_first_notebook_shows_the_committed_tables_of_every_model():
    """It measures the default model and sets the others beside it, which may have been measured later."""
    depth, massive = (
        model_facts.with_committed(DEFAULT, DEFAULT.committed(name, DEFAULT_SIZE), name)
        for name in ("00_depth.csv", "00_massive.csv")
    )
    summary = model_facts.summary_table(depth, massive)
    assert len(summary.columns) > 1
    text = " ".join(part for cell in shown(read(paths.NOTEBOOKS / "00_models.ipynb")) for part in cell)
    for cells in (summary.to_numpy().ravel(), model_facts.registered_models().results):
        assert [cell for cell in cells if isinstance(cell, str) and f">{cell}<" not in text] == []


def test_no_committed_claim_is_decided_by_rounding():
    """An end of an interval that differs from zero by less than its own rounding is zero."""
    files = sorted(paths.RESULTS.glob("*/*/*claims.csv"))
    assert files
    for file in files:
        numbers = pd.read_csv(file).select_dtypes("number").abs()
        assert not ((numbers > 0) & (numbers < 1e-9)).any(axis=None), file.relative_to(paths.RESULTS)
