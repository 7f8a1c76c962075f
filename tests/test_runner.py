"""The runner: refuses what does not exist, moves only what succeeded, gives the same bytes twice."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import nbformat
import pandas as pd
import papermill
import pytest
import yaml
from nbclient.exceptions import DeadKernelError

from entrodrop_utils import figures, paths, record
from entrodrop_utils import profile as profile_module
from entrodrop_utils.profile import Profile, parameter_value
from entrodrop_utils.runner import __main__ as runner_main
from entrodrop_utils.runner import checks, index
from entrodrop_utils.runner import run as runner
from entrodrop_utils.selection import count_of

SIZE_NAMES = ", ".join(sorted(["default", *(file.stem for file in (paths.NOTEBOOKS / "sizes").glob("*.yaml"))]))
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
        v4.new_markdown_cell("## Findings"),
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
    monkeypatch.setattr(runner, "default_jobs", lambda model: 1)  # other processes do not see these folders
    (tmp_path / "README.md").write_text("before\n<!-- notebooks -->\nold\n<!-- /notebooks -->\nafter\n")
    (tmp_path / "notebooks" / "README.md").write_text("<!-- answers -->\n<!-- /answers -->\n")
    nbformat.write(notebook(), tmp_path / "notebooks" / "99_small.ipynb")
    return tmp_path


def run(size="default", seed=0, only="", settings=""):
    return runner.reproduce("smollm2-135m-instruct", size, "docs", seed, only, settings)


RENDERED: list[str] = []


@pytest.fixture
def rendered(project) -> nbformat.NotebookNode:
    """The small notebook as a run leaves it; it is run once for all tests that change a copy."""
    if not RENDERED:
        run()
        RENDERED.append((project / "notebooks/99_small.ipynb").read_text())
    return nbformat.reads(RENDERED[0], 4)


def test_a_default_run_goes_into_place_and_gives_the_same_bytes_twice(project, capsys):
    table = project / "data/results/smollm2-135m-instruct/default/99_table.csv"
    book = project / "notebooks/99_small.ipynb"
    assert run() == 0
    first = table.read_bytes(), book.read_bytes(), (project / "README.md").read_bytes()
    assert b"0.333333,25\n" in first[0]
    assert nbformat.read(book, 4).cells[0].source.endswith("> **Finding:** Seed 0 gives 0.5 [0.4, 0.6].")
    assert "\n- [99 · A small notebook](notebooks/99_small.ipynb)\n" in first[2].decode()
    answers = (project / "notebooks/README.md").read_text()
    assert "| [99 · A small notebook](99_small.ipynb) | Seed 0 gives 0.5 [0.4, 0.6]. |" in answers
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
        (("smollm2-135m-instruct", "huge", "docs", 0, ""), f"unknown size 'huge': choose one of {SIZE_NAMES}"),
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
def test_each_problem_of_a_rendered_notebook_is_found(rendered, change, says):
    assert checks.problems(rendered) == []
    change(rendered)
    assert any(says in problem for problem in checks.problems(rendered))


@pytest.mark.parametrize(
    ("cell", "rows", "says"),
    [
        ("1.5", 13, "a table of 13 rows, more than 12"),
        ("12.345", 1, "more than three digits, or an exponent: 12.345"),
        ("0.31 [1e-05, 0.36]", 1, "or an exponent: 1e-05"),
        ("NaN", 1, "with the cell NaN"),
        ("a long sente...", 1, "a cut cell: a long sente..."),
    ],
)
def test_each_problem_of_a_table_is_found(cell, rows, says):
    (problem,) = checks.table_problems(pd.DataFrame({"a": [cell] * rows}).to_html())
    assert says in problem


def test_a_table_as_it_is_shown_has_no_problem():
    wide = pd.DataFrame({"a": [1234.56, -0.5, float("nan")] * 5, "b": [1e-5, 0.12345, 7e-9] * 5, "c": ["x" * 99, None, "y"] * 5})
    with patch.object(figures, "display") as shown:
        figures.show_table(wide)
    with pd.option_context("display.max_colwidth", None):
        html = shown.call_args_list[0].args[0].to_html()
    assert list(checks.table_problems(html)) == [] and html.count("<tr") == 1 + figures.MAX_ROWS
    assert shown.call_args_list[1].args[0].data == "*12 of 15 rows.*"
    assert shown.call_args_list[0].args[0].iloc[:3].to_numpy().tolist() == [
        ["1230", "0.00001", "x" * 99],
        ["-0.5", "0.123", ""],
        ["", "0.000000007", "y"],
    ]


@pytest.mark.parametrize("values", [[], [float("nan")], [0.0, float("nan")]])
def test_a_column_without_numbers_has_empty_cells(values):
    assert figures.three_digits(pd.Series(values, dtype=float)).tolist() == ["0.00" if value == 0 else "" for value in values]


class Fake:
    """In place of the execution of notebooks: each writes a table with its seed, or fails."""

    def __init__(self, failures: dict[str, Exception]):
        self.failures = failures

    def execute(self, path, parameters, output):
        if path.stem in self.failures:
            raise self.failures[path.stem]
        identity = {name: parameters[name] for name in ("model", "size", "text", "seed") if name in parameters}
        table = pd.DataFrame({"seed": [identity.get("seed", 0)]})
        Profile(**identity, output=str(output)).write(table, f"{path.stem.split('_')[0]}_table.csv")
        return nbformat.read(path, 4)


@pytest.fixture
def fake(project, monkeypatch):
    """Three notebooks that take no time."""
    for name in ("97_first", "98_second"):
        shutil.copy(project / "notebooks/99_small.ipynb", project / "notebooks" / f"{name}.ipynb")
    made = Fake({})
    monkeypatch.setattr(runner, "execute", made.execute)
    monkeypatch.setattr(runner, "problems", lambda _: [])
    return made


def rows(said: str) -> dict[str, str]:
    """The report: status and place of every notebook."""
    return {line.split()[0]: " ".join(line.split()[1:]) for line in said.splitlines() if re.match(r"\d\d_", line)}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


DEFAULT = {"model": "smollm2-135m-instruct", "size": "default", "text": "docs", "seed": 0, "settings": ""}
OWN_SIZES = ("default-code", "smoke-seed-1", "my_size", "my-size")


def runs_of_ones_own(root: Path) -> list[dict]:
    """Runs whose models and texts are called as others are, or that differ in one thing from the default run."""
    for place in ("a", "b", "a b"):
        for name in ("SmolLM2-135M-Instruct", "checkpoint-500", "gemma-3-270m", "[2024]", "x" * 200):
            (root / place / name).mkdir(parents=True)
        for name in ("corpus.txt", "docs.txt", "tiny.gguf"):
            (root / place / name).write_text("words")
    (root / "latest").mkdir()
    paths = [str(path) for place in ("a", "b", "a b") for path in sorted((root / place).iterdir())]
    hub = ["org/SmolLM2-135M-Instruct", "org/name", "org/name@v1", "org/name-v1", "other/name", "gemma-3-270m"]
    texts = [*(path for path in paths if path.endswith(".txt")), "code", "english", "c4", "org/corpus"]
    settings = ["k=50", "k=51", "fractions=[0.5]", "k=50 fractions=[0.5]", "fractions=[0.25,0.5]"]
    others = [
        {"seed": 1},
        {"seed": 2},
        {"size": "smoke"},
        {"size": "paper"},
        {"size": "smoke", "seed": 1},
        {"text": "code", "seed": 1},
    ]
    runs = [{"model": name} for name in (*(path for path in paths if not path.endswith(".txt")), *hub)]
    runs += [{"text": one} for one in texts] + [{"settings": one} for one in settings] + [{"size": one} for one in OWN_SIZES]
    return runs + others


def test_every_run_but_the_default_one_has_a_folder_of_its_own(project, tmp_path_factory):
    for size in OWN_SIZES:
        (project / "notebooks/sizes" / f"{size}.yaml").write_text("size: paper\nk: 7")  # begun as a copy of another
    folders = {}
    for one in [DEFAULT, *runs_of_ones_own(tmp_path_factory.mktemp("own"))]:
        parameters = runner.run_parameters(**(DEFAULT | one), notebooks=checks.available())
        profile = Profile(**{name: parameters[name] for name in ("model", "size", "text", "seed") if name in parameters})
        assert profile.folder not in folders, (one, folders[profile.folder])
        assert re.fullmatch(r"[\w.-]{1,110}/[\w.-]{1,110}", profile.folder)
        folders[profile.folder] = one
        assert runner.is_default(profile) == (one is DEFAULT)
    committed = {path.relative_to(paths.RESULTS).as_posix() for path in paths.RESULTS.glob("*/*")}
    shared = {folder: one for folder, one in folders.items() if folder in committed and one is not DEFAULT}
    assert all(one in ({"model": "gemma-3-270m"}, {"size": "smoke"}, {"size": "paper"}) for one in shared.values())


@pytest.mark.parametrize(
    "own",
    [
        {"model": "SmolLM2-135M-Instruct"},
        {"model": "./smollm2-135m-instruct"},
        {"seed": 1},
        {"text": "docs.txt"},
        {"settings": "k=25"},
    ],
    ids=str,
)
def test_a_run_of_ones_own_changes_nothing_that_is_there_and_says_where_it_writes(own, fake, project, monkeypatch, capsys):
    (home := project / "home").mkdir()
    for name in ("SmolLM2-135M-Instruct", "smollm2-135m-instruct"):
        (home / name).mkdir()
    (home / "docs.txt").write_text("words")
    monkeypatch.chdir(home)
    assert run() == 0
    before = contents(project)
    capsys.readouterr()
    assert runner.reproduce(**(DEFAULT | own), only="98") == 0
    said = capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    (made,) = [path for path in (project / "data/results").rglob("98_table.csv") if path not in before]
    folder = made.parent.relative_to(project / "data/results").as_posix()
    assert f"[1/1] 98_second ({folder})" in said and f"data/results/{folder}" in rows(said)["98_second"]
    assert (project / "build" / folder / "98_second.ipynb").exists()


def test_a_file_that_is_a_link_keeps_its_own_name_and_a_link_that_moves_is_another_run(project, tmp_path_factory):
    """The hub's cache holds links to files that are called by their hash, without an ending."""
    home = tmp_path_factory.mktemp("home")
    (home / "0123").write_text("words")
    for name in ("tiny.gguf", "corpus.txt"):
        (home / name).symlink_to(home / "0123")
    both = {"model": str(home / "tiny.gguf"), "text": str(home / "corpus.txt")}
    parameters = runner.run_parameters(**(DEFAULT | both), notebooks=checks.available())
    assert {name: parameters[name] for name in both} == both
    assert re.fullmatch(r"tiny.gguf-\w{8}/default-corpus.txt-\w{8}", Profile(**both).folder)
    folders = set()
    for name in ("checkpoint-500", "checkpoint-1000"):
        (home / name).mkdir()
        (home / "latest").unlink(missing_ok=True)
        (home / "latest").symlink_to(home / name)
        folders.add(Profile(str(home / "latest")).folder)
    assert len(folders) == 2


@pytest.mark.parametrize("name", ["[2024]", "{k}", "a*b"])
def test_a_checkout_in_a_folder_with_an_odd_name_runs_its_own_notebooks(name, project):
    """papermill would put the parameter k into a path with {k}."""
    for place in (name, "25", "50", "2", "ab"):
        (project / place).mkdir()
        content = notebook()
        content.cells[3].source += f"\nplace: str = {place!r}"
        nbformat.write(content, project / place / "99_small.ipynb")
    own = project / name / "99_small.ipynb"
    assert runner.notebook_parameters(own)[-1] == "place"
    if name == "{k}":  # one kernel suffices
        (project / name / "build").mkdir()
        made = runner.execute(own, {"k": 50}, project / name / "build")
        assert f"place: str = {name!r}" in made.cells[3].source
        assert (project / name / "build/99_small.ipynb").exists() and not list((project / "50").glob("build"))


@pytest.mark.parametrize("size", ["smok?", "s*", "[s]moke", "../sizes/smoke"])
def test_a_size_is_a_name_and_no_pattern(size, project):
    with pytest.raises(ValueError, match=re.escape(f"unknown size {size!r}: choose one of {SIZE_NAMES}")):
        run(size=size)


CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 15.77 GiB. Process 1 has 3 GiB. See docs."
MPS = "MPS backend out of memory (MPS allocated: 8.1 GB, max allowed: 9 GB). Tried to allocate 2 GB on private pool. Use X."
ON_CPU = "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes."
FULL = OSError(errno.ENOSPC, "No space left on device", "/build/run-1")


def failed(name: str, said: str) -> papermill.PapermillExecutionError:
    return papermill.PapermillExecutionError(3, 3, "x = 1", name, said, [])


@pytest.mark.parametrize(
    ("error", "held", "says"),
    [
        (failed("OutOfMemoryError", CUDA), 0, "too little memory (CUDA out of memory. Tried to allocate 20.00 GiB): close other"),
        (
            failed("RuntimeError", MPS),
            0,
            "too little memory (MPS backend out of memory (MPS allocated: 8.1 GB, max allowed: 9 GB).",
        ),
        (failed("RuntimeError", ON_CPU), 0, "can't allocate memory: you tried to allocate 4000 bytes): close other programs"),
        (
            failed("_ArrayMemoryError", "Unable to allocate 7.28 TiB for an array"),
            0,
            "too little memory (Unable to allocate 7.28 TiB",
        ),
        (failed("MemoryError", ""), 0, "too little memory (MemoryError): close other programs, or use a smaller model or SIZE"),
        (failed("ValueError", "two\n lines"), 0, "ValueError: two lines"),
        (failed("OSError", "[Errno 28] No space left on device"), 0, "OSError: [Errno 28] No space left on device"),
        (DeadKernelError("Kernel died"), 0, "its kernel died, most likely for lack of memory: close other programs"),
        (DeadKernelError("Kernel died"), 12_300_000_000, "for lack of memory, of which it had 12.3 GB: close other programs"),
        (FULL, 0, "No space left on device: /build/run-1"),
        (OSError(errno.EROFS, "Read-only file system"), 0, "Read-only file system"),
        (KeyError("python3"), 0, "KeyError: 'python3'"),
        (RuntimeError("the kernel\ndid not start"), 0, "the kernel did not start"),
        (RuntimeError(), 0, "RuntimeError"),
    ],
)
def test_the_reason_of_a_failure_is_one_sentence(error, held, says):
    reason = runner.reason_of(error, held)
    assert says in reason and "\n" not in reason and len(reason) < 260


@pytest.mark.parametrize("error", [FULL, DeadKernelError("died"), KeyError("no such kernel"), failed("NameError", "x")], ids=repr)
def test_a_notebook_that_fails_for_any_reason_does_not_stop_the_others(error, fake, project, capsys):
    fake.failures["98_second"] = error
    before = (project / "README.md").read_bytes()
    assert run() == 1
    said = rows(capsys.readouterr().out)
    assert [row.split()[0] for row in said.values()] == ["done", "FAILED", "done"]
    assert re.search(r"FAILED .*build/run-\w+/98_second.ipynb \(.+\)$", said["98_second"])
    assert (project / "README.md").read_bytes() == before, "no index of half the notebooks"


def test_a_build_folder_that_is_full_for_one_notebook_is_said_in_its_row(fake, monkeypatch, capsys):
    make, made = runner.tempfile.mkdtemp, []

    def full_once(*arguments, **settings):
        made.append(1)
        if len(made) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", "build/run-2")
        return make(*arguments, **settings)

    monkeypatch.setattr(runner.tempfile, "mkdtemp", full_once)
    assert run() == 1
    said = rows(capsys.readouterr().out)
    assert said["98_second"].endswith("min No space left on device: build/run-2") and said["99_small"].startswith("done")


@pytest.mark.parametrize("of", ["BUILD", "RESULTS"])
def test_a_folder_that_cannot_be_written_is_said_in_one_sentence(of, fake, project, monkeypatch, capsys):
    (project / "a file").write_text("")
    monkeypatch.setattr(runner, of, project / "a file" / "folder")
    monkeypatch.setattr(sys, "argv", ["runner", "--only", "98,99"])
    status = runner_main.main()
    said = capsys.readouterr()
    if of == "BUILD":
        assert status == 2 and re.fullmatch(r"error: Not a directory: .*/a file/folder\n", said.err)
    else:
        found = rows(said.out)
        assert status == 1 and len(found) == 2 and not said.err
        assert all(re.search(r"^FAILED .*\((Not a directory|File exists): .*/a file.*\)$", row) for row in found.values())


def test_a_disk_that_is_full_while_files_are_moved_leaves_what_was_there(fake, project, monkeypatch, capsys):
    assert run() == 0
    before, copy = contents(project), shutil.copyfile

    def full(source, target):
        if source.name == "99_table.csv":  # the last one: the notebook was copied before
            target.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return copy(source, target)

    monkeypatch.setattr(runner.shutil, "copyfile", full)
    assert run(only="99") == 1
    assert "(No space left on device: " in rows(capsys.readouterr().out)["99_small"]
    assert {path: path.read_bytes() for path in before} == before
    assert not [path for path in project.rglob(".*") if path.name.endswith("unfinished")]


def test_build_may_be_on_another_disk(fake, project, monkeypatch):
    replace = os.replace

    def within_one_folder(source, target):
        if os.path.dirname(source) != os.path.dirname(target):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", within_one_folder)
    assert run() == 0
    assert (project / "data/results/smollm2-135m-instruct/default/99_table.csv").exists()
    assert not list((project / "build").glob("run-*"))


def test_a_readme_that_cannot_be_written_does_not_hide_the_report(fake, monkeypatch, capsys):
    def read_only():
        raise OSError(errno.EROFS, "Read-only file system", "README.md")

    monkeypatch.setattr(runner, "update_index", read_only)
    monkeypatch.setattr(sys, "argv", ["runner"])
    assert runner_main.main() == 2
    said = capsys.readouterr()
    assert len(rows(said.out)) == 3 and said.err == "error: Read-only file system: README.md\n"


def test_a_kernel_that_dies_and_one_without_memory_do_not_stop_the_next(project, capsys):
    cuda = f"class OutOfMemoryError(RuntimeError): ...\nraise OutOfMemoryError({CUDA!r})"
    for name, source in (("97_dies", "import os\nos._exit(1)"), ("98_full", cuda)):
        content = notebook()
        content.cells[1].source = source
        nbformat.write(content, project / "notebooks" / f"{name}.ipynb")
    assert run() == 1
    said = rows(capsys.readouterr().out)
    assert said["97_dies"].startswith("FAILED") and "its kernel died, most likely for lack of memory" in said["97_dies"]
    assert said["98_full"].startswith("FAILED") and "(CUDA out of memory. Tried to allocate 20.00 GiB)" in said["98_full"]
    assert said["99_small"].startswith("done")
    assert [path.name for path in (project / "data/results").rglob("*.csv")] == ["99_table.csv"]


def command(project: Path, *arguments: str, first: str = "") -> subprocess.Popen:
    """``make reproduce`` in a project of its own, which Ctrl-C interrupts; ``first`` is executed in its process before it."""
    code = (
        f"{first}\n"
        "import signal, sys\n"
        "from entrodrop_utils.runner.__main__ import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell starts what is in the background without it
        "sys.exit(main())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"ENTRODROP_HOME": str(project), "OMP_NUM_THREADS": "2"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


ONE_SENTENCE = "interrupted: the committed files are unchanged, and the next run starts this notebook again"
TABLE = "run-*/results/smollm2-135m-instruct/default/99_table.csv"


@pytest.mark.parametrize(
    ("how", "moment"),
    [(signal.SIGKILL, TABLE), (signal.SIGINT, TABLE), (signal.SIGINT, "run-*"), (signal.SIGINT, "run-*/99_small.ipynb")],
    ids=["killed in a cell", "interrupted in a cell", "interrupted before the kernel", "interrupted as the kernel starts"],
)
def test_a_killed_run_leaves_what_was_committed(project, how, moment):
    """kill -9 or Ctrl-C: nothing in place changes, one sentence says so, and the next run completes."""
    nbformat.write(notebook("import time; time.sleep(600)"), project / "notebooks/99_small.ipynb")
    before = (project / "notebooks/99_small.ipynb").read_bytes()
    process = command(project)
    deadline = time.monotonic() + 60
    while not list((project / "build").glob(moment)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list((project / "build").glob(moment))
    os.killpg(process.pid, how)
    said = process.communicate(timeout=60)[1]
    assert bool(list((project / "build").glob("run-*"))) == (how == signal.SIGKILL)  # which nobody can tidy up after
    if how == signal.SIGINT:  # wherever it was: in the loop of messages, in the kernel's start
        assert process.returncode == 130
        assert said.strip() == ONE_SENTENCE
    assert (project / "notebooks/99_small.ipynb").read_bytes() == before
    assert not list((project / "data/results").rglob("*.csv"))
    nbformat.write(notebook(), project / "notebooks/99_small.ipynb")
    assert run() == 0


@pytest.mark.parametrize(
    ("module", "name"),
    [("asyncio.selector_events", "BaseSelectorEventLoop._make_self_pipe"), ("subprocess", "Popen._execute_child")],
)
def test_ctrl_c_says_one_sentence_whatever_object_it_leaves_half_made(project, module, name):
    """An object whose constructor was interrupted may fail when it is freed, after the command has said its sentence."""
    halfway = f"""
import os, signal, time
import {module}
def interrupted(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
{module}.{name} = interrupted
"""
    process = command(project, first=halfway)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert said.strip() == ONE_SENTENCE
    assert not list((project / "build").glob("run-*"))


MEET = """
import os, time
from pathlib import Path
folder = Path(os.environ["ENTRODROP_HOME"]) / "here"
folder.mkdir(exist_ok=True)
(folder / str(os.getpid())).touch()
start = time.monotonic()
while len(list(folder.iterdir())) < 2 and time.monotonic() - start < 60:
    time.sleep(0.1)
n, threads = len(list(folder.iterdir())), os.environ["OMP_NUM_THREADS"]
profile.write(pd.DataFrame({"met": [n], "threads": [threads]}), "NN_met.csv")
"""
READ = """
from entrodrop_utils.paths import RESULTS
tables = [pd.read_csv(file) for file in RESULTS.rglob("*_met.csv")]
profile.write(pd.concat(tables), "10_read.csv")
"""


def test_notebooks_run_beside_each_other_before_the_last(project):
    """Two meet, with half of the threads each; 10 reads what they wrote; a failure stops nobody."""
    folder = project / "data/results/smollm2-135m-instruct/default"
    books = {
        "97_fails": "1 / 0",
        "98_a": MEET.replace("NN", "98"),
        "99_small": MEET.replace("NN", "99"),
        "10_reads": READ,
    }
    for name, source in books.items():
        nbformat.write(notebook(source), project / f"notebooks/{name}.ipynb")
    process = command(project, "--jobs", "2")
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 1, said + errors
    assert pd.read_csv(folder / "10_read.csv").to_dict("list") == {"met": [2, 2], "threads": [1, 1]}
    assert {name: row.split()[0] for name, row in rows(said).items()} == {
        name: "FAILED" if name == "97_fails" else "done" for name in books
    }
    assert re.search(r"^97_fails .*ZeroDivisionError: division by zero", said, re.MULTILINE)


def test_beside_others_a_notice_is_said_and_of_a_bar_its_newest_step(tmp_path, capsys):
    log = tmp_path / "log"
    with runner._shown_in_terminal(log, "02  "):
        step = "scoring: {n}%|##  | {n}/100 [00:0{n}<00:30,  2.10s/it]"
        log.write_text(f"\r{step.format(n=1)}\rthe model is downloaded\n\r{step.format(n=2)}\x1b[A\r    \r")
    assert capsys.readouterr().err.splitlines() == ["02  " + text for text in ("the model is downloaded", step.format(n=2))]


def test_ctrl_c_ends_notebooks_that_run_beside_each_other(project):
    for name in ("97_first", "98_second", "99_small"):
        nbformat.write(notebook("import time; time.sleep(600)"), project / f"notebooks/{name}.ipynb")
    before = {file.name: file.read_bytes() for file in (project / "notebooks").glob("*.ipynb")}
    process = command(project, "--jobs", "2")
    deadline = time.monotonic() + 60
    while len(list((project / "build").glob(TABLE))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said[1].strip() == ONE_SENTENCE
    assert "99_small" not in said[0]  # which had not begun
    assert not list((project / "build").glob("run-*"))
    assert {file.name: file.read_bytes() for file in (project / "notebooks").glob("*.ipynb")} == before


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


def test_a_first_cell_shows_question_finding_and_picture_before_the_rest():
    source = "# 01 · Title\n\nDoes it\nhold?\n\nThe method.\n\n> **Finding:** old"
    once = checks.opening(source, "it does", "![a](a.png)\n*a*")
    assert once == "# 01 · Title\n\nDoes it\nhold?\n\n> **Finding:** it does\n\n![a](a.png)\n*a*\n\nThe method."
    assert checks.opening(once, "it does not") == source.replace(
        "\n\nThe method.\n\n> **Finding:** old", "\n\n> **Finding:** it does not\n\nThe method."
    )


def test_the_picture_of_a_notebook_is_its_first_or_the_tagged_one():
    image = nbformat.v4.new_output("display_data", {"image/png": ""}, metadata={"image/png": {"alt": "What it shows."}})
    cells = [nbformat.v4.new_code_cell(f'show_figure(draw(), profile, "{name}", caption)', outputs=[image]) for name in "ab"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("def show_figure(): ..."), *cells])
    assert checks.opening_picture(book) == ("a", "What it shows.")
    cells[1].metadata.tags = ["opening"]
    assert checks.opening_picture(book) == ("b", "What it shows.")
    assert checks.opening_picture(nbformat.v4.new_notebook()) == ("", "")


def test_a_run_other_than_the_default_one_has_a_record(project):
    assert run(settings="k=50") == 0 and run() == 0
    (record,) = (project / "data/results").rglob("*_run.json")
    assert record.parent.name.startswith("default-k-50") and record.name == "99_run.json"
    content = json.loads(record.read_text())
    assert content["notebook"] == "99_small" and content["parameters"] == {"k": 50} and content["model"] == "smollm2-135m-instruct"
    assert content["packages"]["torch"].startswith("2.13") and content["texts"] == []


def test_the_record_names_a_file_and_not_where_it_lies(tmp_path):
    profile = Profile(model="smollm2-135m-instruct", size="large", text=str(tmp_path / "own.txt"))
    settings = runner.recorded_settings(profile, {"k": 2, "model": "a", "text": "b"})
    assert settings == {"model": profile.model, "size": "large", "text": "own.txt", "seed": 0, "parameters": {"k": 2}}


def test_the_record_names_the_texts_of_the_output_and_the_commit(tmp_path):
    shown = nbformat.v4.new_output(
        "stream", name="stdout", text="24 windows of docs, hash b258e4ffd450\nheld out: hash 64b5896584c7"
    )
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=[shown])])
    made = record.run_record({"k": 2}, "no-such-model", runner.printed_texts(book), 1.6)
    assert made["texts"] == ["64b5896584c7", "b258e4ffd450"] and made["weights"] == {} and made["seconds"] == 2
    assert record.commit(tmp_path) == ""
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "--allow-empty", "-m", "one"]):
        (tmp_path / "file").write_text("a")
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    assert len(record.commit(tmp_path)) == 40
    (tmp_path / "file").write_text("b")
    assert record.commit(tmp_path).endswith("+")
