"""The runner: refuses what does not exist, moves only what succeeded, gives the same bytes twice."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pytest
import yaml

from entrodrop_utils import paths
from entrodrop_utils import profile as profile_module
from entrodrop_utils.profile import Profile, parameter_value
from entrodrop_utils.runner import checks, index
from entrodrop_utils.runner import run as runner
from entrodrop_utils.selection import count_of

SMALL = """
from entrodrop_utils.profile import Profile
import pandas as pd
profile = Profile.from_parameters(globals())
profile.write(pd.DataFrame({"a": [1 / 3], "k": [k]}), "99_table.csv")
"""
PARAMETERS = """
model: str = "smollm2-135m-instruct"
size: str = "default"
text: str = "docs"
seed: int = 0
output: str = ""
k: int = 25  # neighbour
fractions: list = [0.25]
"""


def notebook(*extra: str) -> nbformat.NotebookNode:
    """A notebook of the suite's form that needs no model."""
    v4 = nbformat.v4
    cells = [
        v4.new_markdown_cell("# 99 · A small notebook\n\nDoes it run?\n\n> **Finding:** "),
        v4.new_code_cell("import math"),
        v4.new_markdown_cell("Parameters:"),
        v4.new_code_cell(PARAMETERS.strip(), metadata={"tags": ["parameters"]}),
        v4.new_markdown_cell("A table:"),
        v4.new_code_cell(SMALL.strip()),
        *[cell for source in extra for cell in (v4.new_markdown_cell("More:"), v4.new_code_cell(source))],
        v4.new_markdown_cell("## What this run says"),
        v4.new_code_cell(
            'from IPython.display import Markdown\nMarkdown(f"Seed {seed} gives 0.5 [0.4, 0.6].\\n\\n- k is {k}")',
            metadata={"tags": ["finding"]},
        ),
    ]
    for number, cell in enumerate(cells):
        cell["id"] = f"c{number}"
    return v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "p", "language": "python"}})


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of its own with one small notebook and the sizes of the suite."""
    folders = {"ROOT": tmp_path, "RESULTS": tmp_path / "data" / "results", "SIZES": tmp_path / "notebooks" / "sizes"}
    for module in (runner, profile_module, checks, index):
        for name in ("ROOT", "NOTEBOOKS", "BUILD", "RESULTS", "FIGURES", "SIZES"):
            if hasattr(module, name):
                folder = folders.get(name, tmp_path / name.lower())
                folder.mkdir(parents=True, exist_ok=True)
                monkeypatch.setattr(module, name, folder)
    for file in paths.SIZES.glob("*.yaml"):
        shutil.copy(file, tmp_path / "notebooks" / "sizes")
    (tmp_path / "README.md").write_text("before\n<!-- notebooks -->\nold\n<!-- /notebooks -->\nafter\n")
    nbformat.write(notebook(), tmp_path / "notebooks" / "99_small.ipynb")
    return tmp_path


def run(size="default", seed=0, only="", settings=""):
    return runner.reproduce("smollm2-135m-instruct", size, "docs", seed, only, settings)


def test_a_default_run_goes_into_place_and_gives_the_same_bytes_twice(project, capsys):
    table = project / "data/results/smollm2-135m-instruct/default/99_table.csv"
    book = project / "notebooks/99_small.ipynb"
    assert run() == 0
    first = table.read_bytes(), book.read_bytes(), (project / "README.md").read_bytes()
    assert b"0.333333,25\n" in first[0]
    assert nbformat.read(book, 4).cells[0].source.endswith("> **Finding:** Seed 0 gives 0.5 [0.4, 0.6].")
    assert "| [99](notebooks/99_small.ipynb) | Does it run? | Seed 0 gives 0.5 [0.4, 0.6]. |" in first[2].decode()
    assert first[2].decode().startswith("before\n")
    assert first[2].decode().endswith("after\n")
    assert run() == 0
    assert (table.read_bytes(), book.read_bytes(), (project / "README.md").read_bytes()) == first
    assert not list((project / "build").glob("run-*"))
    assert "99_small  done" in capsys.readouterr().out


def test_the_readme_opens_with_the_main_findings(project, monkeypatch):
    monkeypatch.setattr(index, "HEADLINE", ("99_small",))
    (project / "README.md").write_text("<!-- headline -->\nas it was\n<!-- /headline -->\n")
    assert run() == 0
    assert (project / "README.md").read_text() == "<!-- headline -->\n- Seed 0 gives 0.5 [0.4, 0.6].\n<!-- /headline -->\n"


def test_another_run_leaves_the_committed_notebook_alone(project):
    before = (project / "notebooks/99_small.ipynb").read_bytes()
    assert run(size="smoke", seed=3) == 0
    assert (project / "notebooks/99_small.ipynb").read_bytes() == before
    made = project / "build/smollm2-135m-instruct/smoke-seed-3/99_small.ipynb"
    assert "Seed 3 gives" in nbformat.read(made, 4).cells[0].source
    assert (project / "data/results/smollm2-135m-instruct/smoke-seed-3/99_table.csv").exists()
    assert not (project / "data/results/smollm2-135m-instruct/smoke").exists()


def test_settings_reach_the_notebook_and_name_its_folder(project):
    assert run(settings="k=50 fractions=[0.5]") == 0
    assert run(settings="k=51") == 0
    tables = sorted((project / "data/results/smollm2-135m-instruct").glob("default-*/99_table.csv"))
    assert sorted(table.read_text().splitlines()[1] for table in tables) == ["0.333333,50", "0.333333,51"]
    assert tables[0].parent.name.startswith("default-fractions--0.5--k-50-")
    assert not (project / "data/results/smollm2-135m-instruct/default").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("knn=50", "no notebook has the parameter knn: they have fractions, k, model"),
        ("k", "cannot read the setting 'k': write name=value"),
        ("k=[1", "cannot read the value of the setting 'k=\\[1'"),
        ("seed=3", "seed is not a setting: use SEED"),
        ("9k=3", "cannot read the setting"),
    ],
)
def test_settings_that_no_notebook_has_are_refused_before_anything_runs(project, settings, message):
    with pytest.raises(ValueError, match=message):
        run(settings=settings)
    assert not list((project / "build").iterdir())


def test_a_setting_of_another_type_fails_with_its_name(project, capsys):
    assert run(settings="k=many") == 1
    assert "the parameter k must be of type int, got 'many'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("[0.5]", list, [0.5]),
        ("50", int, 50),
        (2, float, 2.0),
        ("{a: 1}", dict, {"a": 1}),
        (2024, str, "2024"),
        ("true", bool, True),
    ],
)
def test_parameters_are_read_in_the_type_of_their_annotation(value, kind, expected):
    assert parameter_value("name", value, kind) == expected
    assert type(parameter_value("name", value, kind)) is kind


@pytest.mark.parametrize(("value", "kind"), [("x", int), (1.5, int), (True, int), ("0.5", list), (None, str), ("[1", dict)])
def test_parameters_of_another_type_are_refused(value, kind):
    with pytest.raises(ValueError, match="the parameter name must be of type"):
        parameter_value("name", value, kind)


def test_every_parameter_of_a_size_exists_in_a_notebook():
    known = {name for path in checks.available() for name in runner.notebook_parameters(path)}
    for file in paths.SIZES.glob("*.yaml"):
        assert set(yaml.safe_load(file.read_text())) <= known, file.name


def test_every_notebook_begins_with_the_same_parameters():
    for path in checks.available():
        assert runner.notebook_parameters(path)[:5] == ["model", "size", "text", "seed", "output"], path.name


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
        (("smollm2-135m-instruct", "huge", "docs", 0, ""), "unknown size 'huge': choose one of default, paper, smoke"),
        (("smollm2-135m-instruct", "default", "prose", 0, ""), "unknown text 'prose': choose docs"),
        (("smollm2-135m-instruct", "default", "docs", 0, "77"), "no notebook '77': choose from 99_small"),
    ],
)
def test_what_does_not_exist_is_refused_before_anything_runs(project, arguments, says):
    with pytest.raises(ValueError, match=says):
        runner.reproduce(*arguments)
    assert not list((project / "build").iterdir())


def test_an_unknown_parameter_is_refused(project):
    with pytest.raises(ValueError, match="99_small has no parameter bins: it has model, size, text, seed, output, k, fractions"):
        runner.execute(project / "notebooks/99_small.ipynb", {"bins": 3}, project / "build")


def test_only_by_number_or_name(project):
    nbformat.write(notebook(), project / "notebooks/98_other.ipynb")
    assert [p.stem for p in runner.chosen_notebooks("99")] == ["99_small"]
    assert [p.stem for p in runner.chosen_notebooks("99_small.ipynb, 98")] == ["98_other", "99_small"]
    assert [p.stem for p in runner.chosen_notebooks("")] == ["98_other", "99_small"]


LONG = "Seed 0 " + "and so on " * 10 + "[0.4, 0.6]."


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda nb: nb.cells[5].update(execution_count=9), "in order"),
        (lambda nb: nb.cells[3].metadata.pop("tags"), "parameters"),
        (lambda nb: nb.cells[3].update(source="size: str = str(1)"), "annotated literals"),
        (lambda nb: nb.cells[3].update(source="size = 'default'"), "annotated literals"),
        (lambda nb: nb.cells[0].update(source="see [this](no-such-notebook.ipynb)"), "links to no-such-notebook.ipynb"),
        (lambda nb: nb.cells[0].update(source="# 99\n\nIt runs."), "asks no question"),
        (lambda nb: nb.metadata.update(widgets={}), "widget state"),
        (lambda nb: nb.cells[7].outputs.clear(), "no finding"),
        (lambda nb: nb.cells[7].outputs[0].data.update({"text/markdown": LONG}), "its finding has"),
        (lambda nb: nb.cells[0].update(source="# 99 · A small one"), "does not hold its finding"),
        (lambda nb: nb.cells[5].outputs.append(nbformat.v4.new_output("stream", name="stderr", text="w")), "a warning"),
        (lambda nb: nb.cells[5].outputs.append(nbformat.v4.new_output("stream", text="in /home/me/x")), "path of the machine"),
        (lambda nb: nb.cells[5].outputs.append(nbformat.v4.new_output("display_data", {"image/png": "x"})), "alt text"),
        (lambda nb: nb.cells[5].outputs.append(nbformat.v4.new_output("display_data", {"image/png": "x"})), "without caption"),
        (lambda nb: nb.cells[5].update(source="x = 1\n" * 16), "has 16 lines, more than 15"),
        (lambda nb: nb.cells[5].update(source="x = " + "1" * 100), "has a line of 104 characters"),
        (lambda nb: nb.cells.pop(4), "no text comes before"),
        (lambda nb: nb.cells.extend(nbformat.v4.new_markdown_cell("more") for _ in range(30)), "more than 30 cells"),
    ],
)
def test_each_problem_of_a_rendered_notebook_is_found(project, change, says):
    run()
    book = nbformat.read(project / "notebooks/99_small.ipynb", 4)
    assert checks.problems(book) == []
    change(book)
    assert any(says in problem for problem in checks.problems(book))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_what_was_committed(project, how):
    """kill -9 or Ctrl-C in the middle of a cell: nothing in place changes, and the next run completes."""
    nbformat.write(notebook("import time; time.sleep(600)"), project / "notebooks/99_small.ipynb")
    before = (project / "notebooks/99_small.ipynb").read_bytes()
    code = (
        "import entrodrop_utils.runner.run as n, entrodrop_utils.profile as p, entrodrop_utils.runner.checks as c\n"
        "import pathlib, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell starts what is in the background without it
        f"root = pathlib.Path({str(project)!r})\n"
        "n.ROOT = root; n.BUILD = p.BUILD = root / 'build'; n.NOTEBOOKS = c.NOTEBOOKS = root / 'notebooks'\n"
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
    assert Profile().output_folder == (paths.BUILD / "interactive").resolve()


def test_folders_of_other_models_and_texts(tmp_path):
    assert Profile("org/name").folder == "org--name/default"
    folders = set()
    for place in ("a", "b"):
        mine = tmp_path / place / "My Model"
        mine.mkdir(parents=True)
        (mine / "novel.txt").write_text("words")
        folders.add(Profile(str(mine), text=str(mine / "novel.txt")).folder)
    assert len(folders) == 2
    assert all(re.fullmatch(r"my-model-\w{8}/default-novel.txt-\w{8}", folder) for folder in folders)


def test_a_folder_with_the_name_of_a_registered_model_is_another_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SmolLM2-135M-Instruct").mkdir()
    (tmp_path / "gemma-3-270m").mkdir()
    assert Profile("SmolLM2-135M-Instruct").folder != Profile().folder
    assert Profile("gemma-3-270m").folder == "gemma-3-270m/default"  # a registered name is the registered model
    assert Profile(seed=1).folder != Profile().folder


@pytest.mark.parametrize(("total", "counts"), [(30, [4, 8, 11]), (18, [2, 4, 7]), (6, [1, 2]), (4, [1])])
def test_counts_follow_the_depth(total, counts):
    assert sorted({count_of(fraction, total) for fraction in (0.125, 0.25, 0.375)}) == counts


def test_committed_notebooks_are_fit_to_be_read():
    for path in checks.available():
        assert checks.problems(nbformat.read(path, 4)) == [], path.name
