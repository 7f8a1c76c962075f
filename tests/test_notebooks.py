"""The runner: refuses what does not exist, moves only what succeeded, gives the same bytes twice."""

import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest

from entrodrop_utils import notebooks, profiles, rendered
from entrodrop_utils.profiles import Profile

SMALL = """
from entrodrop_utils.profiles import Profile
import pandas as pd
profile = Profile.of(size=size, seed=seed)
profile.write(pd.DataFrame({"a": [1 / 3]}), "99_table.csv")
"""


def notebook(*extra: str) -> nbformat.NotebookNode:
    """A notebook of the suite's form that needs no model."""
    v4 = nbformat.v4
    cells = [
        v4.new_markdown_cell("# 99 · A small one\n\nA claim.\n\n> **Finding:** "),
        v4.new_code_cell("import math"),
        v4.new_code_cell('size = "default"\nseed = 0', metadata={"tags": ["parameters"]}),
        v4.new_code_cell(SMALL.strip()),
        *[v4.new_code_cell(source) for source in extra],
        v4.new_code_cell(
            'from IPython.display import Markdown\nMarkdown(f"seed {seed} found it.")', metadata={"tags": ["finding"]}
        ),
    ]
    for number, cell in enumerate(cells):
        cell["id"] = f"c{number}"
    return v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "p", "language": "python"}})


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of its own with one small notebook."""
    for module in (notebooks, profiles, rendered):
        for name in ("ROOT", "NOTEBOOKS", "BUILD", "RESULTS", "FIGURES"):
            if hasattr(module, name):
                folder = {"ROOT": tmp_path, "RESULTS": tmp_path / "data" / "results"}.get(name, tmp_path / name.lower())
                folder.mkdir(parents=True, exist_ok=True)
                monkeypatch.setattr(module, name, folder)
    (tmp_path / "README.md").write_text(
        "before\n<!-- notebooks -->\nold\n<!-- /notebooks -->\n<!-- claims -->\n<!-- /claims -->\nafter\n"
    )
    nbformat.write(notebook(), tmp_path / "notebooks" / "99_small.ipynb")
    return tmp_path


def run(size="default", seed=0, only="", **kwargs):
    return notebooks.reproduce("smollm2-135m-instruct", size, "docs", seed, only, **kwargs)


def test_a_default_run_goes_into_place_and_gives_the_same_bytes_twice(project, capsys):
    table = project / "data/results/smollm2-135m-instruct/default/99_table.csv"
    book = project / "notebooks/99_small.ipynb"
    assert run() == 0
    first = table.read_bytes(), book.read_bytes(), (project / "README.md").read_bytes()
    assert b"0.333333\n" in first[0]
    assert "> **Finding:** seed 0 found it." in nbformat.read(book, 4).cells[0].source
    assert "| [99 · A small one](notebooks/99_small.ipynb) | seed 0 found it. |" in first[2].decode()
    assert first[2].decode().startswith("before\n")
    assert first[2].decode().endswith("after\n")
    assert run() == 0
    assert (table.read_bytes(), book.read_bytes(), (project / "README.md").read_bytes()) == first
    assert not list((project / "build").glob("run-*"))
    assert "99_small  done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sentences", "says"), [({"99_small": 1}, "\n**What we find.** seed 0 found it.\n"), ({}, "\nas it was\n")]
)
def test_the_readme_opens_with_what_was_found(project, monkeypatch, sentences, says):
    monkeypatch.setattr(rendered, "HEADLINE", sentences)
    (project / "README.md").write_text("<!-- headline -->\nas it was\n<!-- /headline -->\n")
    assert run() == 0
    assert (project / "README.md").read_text() == f"<!-- headline -->{says}<!-- /headline -->\n"


def test_another_run_leaves_the_committed_notebook_alone(project):
    before = (project / "notebooks/99_small.ipynb").read_bytes()
    assert run(size="smoke", seed=3) == 0
    assert (project / "notebooks/99_small.ipynb").read_bytes() == before
    made = project / "build/smollm2-135m-instruct/smoke/99_small.ipynb"
    assert "seed 3 found it." in nbformat.read(made, 4).cells[0].source
    assert (project / "data/results/smollm2-135m-instruct/smoke/99_table.csv").exists()


@pytest.mark.parametrize("spoil", ["1 / 0", "import warnings; warnings.warn('careful')"])
def test_a_failed_run_moves_nothing(project, spoil, capsys):
    nbformat.write(notebook(spoil), project / "notebooks/99_small.ipynb")
    before = (project / "notebooks/99_small.ipynb").read_bytes()
    assert run() == 1
    assert (project / "notebooks/99_small.ipynb").read_bytes() == before
    assert not list((project / "data/results").rglob("*.csv"))
    said = capsys.readouterr().out
    assert "FAILED" in said
    assert "ZeroDivisionError" in said or "a warning" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nonsense", "default", "docs", 0, ""), "unknown model 'nonsense': choose one of smollm2-135m-instruct"),
        (("smollm2-135m-instruct", "huge", "docs", 0, ""), "unknown size 'huge': choose one of smoke, default, paper"),
        (("smollm2-135m-instruct", "default", "prose", 0, ""), "unknown text 'prose': choose docs"),
        (("smollm2-135m-instruct", "default", "docs", 0, "77"), "no notebook '77': choose from 99_small"),
    ],
)
def test_what_does_not_exist_is_refused_before_anything_runs(project, arguments, says):
    with pytest.raises(ValueError, match=says):
        notebooks.reproduce(*arguments)
    assert not list((project / "build").iterdir())


def test_an_unknown_parameter_is_refused(project):
    with pytest.raises(ValueError, match="99_small has no parameter bins: it has size, seed"):
        notebooks.execute(project / "notebooks/99_small.ipynb", {"bins": 3}, project / "build")


def test_only_by_number_or_name(project):
    nbformat.write(notebook(), project / "notebooks/98_other.ipynb")
    assert [p.stem for p in notebooks.chosen("99")] == ["99_small"]
    assert [p.stem for p in notebooks.chosen("99_small.ipynb, 98")] == ["98_other", "99_small"]
    assert [p.stem for p in notebooks.chosen("")] == ["98_other", "99_small"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda nb: nb.cells[3].update(execution_count=9), "in order"),
        (lambda nb: nb.cells[2].metadata.pop("tags"), "parameters"),
        (lambda nb: nb.cells[2].update(source="size = str(1)"), "literals"),
        (lambda nb: nb.cells[0].update(source="see [this](no-such-notebook.ipynb)"), "links to no-such-notebook.ipynb"),
        (lambda nb: nb.metadata.update(widgets={}), "widget state"),
        (lambda nb: nb.cells[4].outputs.clear(), "no finding"),
        (lambda nb: nb.cells[0].update(source="# 99 · A small one"), "does not hold its finding"),
        (lambda nb: nb.cells[3].outputs.append(nbformat.v4.new_output("stream", name="stderr", text="w")), "a warning"),
        (lambda nb: nb.cells[3].outputs.append(nbformat.v4.new_output("stream", text="in /home/me/x")), "path of the machine"),
        (lambda nb: nb.cells[3].outputs.append(nbformat.v4.new_output("display_data", {"image/png": "x"})), "alt text"),
        (lambda nb: nb.cells[3].outputs.append(nbformat.v4.new_output("display_data", {"image/png": "x"})), "without caption"),
        (lambda nb: nb.cells[3].update(source="x = 1\n" * 30), "longer than 20 lines"),
    ],
)
def test_each_problem_of_a_rendered_notebook_is_found(project, change, says):
    run()
    book = nbformat.read(project / "notebooks/99_small.ipynb", 4)
    assert rendered.problems(book) == []
    change(book)
    assert any(says in problem for problem in rendered.problems(book))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_what_was_committed(project, how):
    """kill -9 or Ctrl-C in the middle of a cell: nothing in place changes, and the next run completes."""
    nbformat.write(notebook("import time; time.sleep(600)"), project / "notebooks/99_small.ipynb")
    before = (project / "notebooks/99_small.ipynb").read_bytes()
    code = (
        "import entrodrop_utils.notebooks as n, entrodrop_utils.profiles as p, entrodrop_utils.rendered as r, pathlib, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell starts what is in the background without it
        f"root = pathlib.Path({str(project)!r})\n"
        "n.ROOT = r.ROOT = root; n.BUILD = p.BUILD = root / 'build'; n.NOTEBOOKS = r.NOTEBOOKS = root / 'notebooks'\n"
        "n.RESULTS = root / 'data/results'; n.FIGURES = root / 'figures'\n"
        "n.reproduce('smollm2-135m-instruct', 'default', 'docs', 0, '')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.PIPE)
    table = "run-*/results/smollm2-135m-instruct/default/99_table.csv"
    deadline = time.monotonic() + 60
    while not list((project / "build").glob(table)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert list((project / "build").glob(table))
    os.killpg(process.pid, how)
    said = process.communicate(timeout=60)[1]
    assert b"zmq" not in said
    assert bool(list((project / "build").glob("run-*"))) == (how == signal.SIGKILL)  # which nobody can tidy up after
    assert (project / "notebooks/99_small.ipynb").read_bytes() == before
    assert not list((project / "data/results").rglob("*.csv"))
    nbformat.write(notebook(), project / "notebooks/99_small.ipynb")
    assert run() == 0


def test_output_of_a_person_goes_beside_what_is_committed():
    assert Profile.of().output == (profiles.BUILD / "interactive").resolve()


def test_folders_of_other_models_and_texts(tmp_path):
    assert Profile.of("org/name").folder == "org--name/default"
    mine = tmp_path / "My Model"
    mine.mkdir()
    (tmp_path / "novel.txt").write_text("words")
    assert Profile.of(str(mine), text=str(tmp_path / "novel.txt")).folder == "my-model/default-novel.txt"


@pytest.mark.parametrize(("total", "counts"), [(30, [4, 8, 11]), (18, [2, 4, 7]), (6, [1, 2]), (4, [1])])
def test_counts_follow_the_depth(total, counts):
    assert Profile.of().counts(total) == counts


def test_committed_notebooks_are_fit_to_be_read():
    for path in rendered.available():
        assert rendered.problems(nbformat.read(path, 4)) == [], path.name
