"""Run notebooks through papermill; their tables, figures and rendered copies are moved into place only when a run succeeds."""

import os
import re
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError

from ..claims import join_claims
from ..models import KNOWN, check_model
from ..paths import BUILD, FIGURES, NOTEBOOKS, RESULTS, ROOT, SIZES
from ..profile import DEFAULT_MODEL, DEFAULT_SIZE, DEFAULT_TEXT, OUTPUT, Profile, short_hash, slug
from ..progress import HEADLESS
from ..text import check_text
from .checks import available, cleaned, problems
from .index import update_index, write_notebook


def chosen_notebooks(only: str) -> list[Path]:
    """The notebooks that ``only`` names by number or name, separated by commas; all of them if it is empty.

    Raises:
        ValueError: one that does not exist, with the list of those that do.
    """
    notebooks = available()
    chosen = []
    for name in filter(None, re.split(r"[,\s]+", only)):
        stem = Path(name).stem
        matching = [path for path in notebooks if stem in (path.stem, path.stem.split("_")[0])]
        if not matching:
            raise ValueError(f"no notebook {name!r}: choose from {', '.join(path.stem for path in notebooks)}")
        chosen += matching
    return sorted(set(chosen)) if chosen else notebooks


def size_parameters(size: str) -> dict[str, object]:
    """The parameters of a size, from its file in ``notebooks/sizes``; none for the default, which the notebooks hold.

    Raises:
        ValueError: a size that does not exist, with the list of those that do.
    """
    files = {path.stem: path for path in sorted(SIZES.glob("*.yaml"))}
    if size != DEFAULT_SIZE and size not in files:
        raise ValueError(f"unknown size {size!r}: choose one of {', '.join([DEFAULT_SIZE, *files])}")
    return yaml.safe_load(files[size].read_text(encoding="utf-8")) if size in files else {}


def parse_settings(settings: str) -> dict[str, object]:
    """``k=50 fractions=[0.5]`` as parameters; values are YAML.

    Raises:
        ValueError: a part that is no assignment.
    """
    parameters = {}
    for part in shlex.split(settings):
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"cannot read the setting {part!r}: write name=value, as in SET='k=50 fractions=[0.5]'")
        try:
            parameters[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"cannot read the value of the setting {part!r}: it must be YAML, as in fractions=[0.5]") from error
    return parameters


def notebook_parameters(notebook: Path) -> list[str]:
    """The names of a notebook's parameters."""
    return list(papermill.inspect_notebook(str(notebook)))


def execute(notebook: Path, parameters: dict[str, object], output: Path) -> nbformat.NotebookNode:
    """The notebook, run with these parameters; its files go under ``output``. A copy runs: the notebook itself is not changed.

    Raises:
        ValueError: a parameter that the notebook does not have.
        papermill.PapermillExecutionError: a cell failed; the half-run notebook stays under ``output``.
    """
    known = notebook_parameters(notebook)
    if unknown := sorted(set(parameters) - set(known)):
        raise ValueError(f"{notebook.stem} has no parameter {', '.join(unknown)}: it has {', '.join(known)}")
    run = output / notebook.name
    with patch.dict(os.environ, {OUTPUT: str(output)}):
        papermill.execute_notebook(
            str(notebook),
            str(run),
            parameters,
            kernel_name="python3",
            cwd=str(ROOT),
            progress_bar=False,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # an error is in the cell's output
        )
    return cleaned(nbformat.read(run, as_version=4))


def move_into_place(profile: Profile, rendered: Path) -> list[Path]:
    """Move a run's files from its own folder to where they belong, one by one, each in one step; returns their folders."""
    notebooks = NOTEBOOKS if is_default(profile) else BUILD / profile.folder
    moves = [([rendered], notebooks)]
    for kind, target in (("results", RESULTS), ("figures", FIGURES)):
        moves.append((sorted((profile.output_folder / kind / profile.folder).glob("*")), target / profile.folder))
    for files, target in moves:
        for file in files:
            target.mkdir(parents=True, exist_ok=True)
            os.replace(file, target / file.name)
    join_claims(RESULTS / profile.folder)
    return [(notebooks / rendered.name).relative_to(ROOT), *(target.relative_to(ROOT) for files, target in moves[1:] if files)]


def is_default(profile: Profile) -> bool:
    """Whether this is the run that the committed notebooks show."""
    return (profile.model, profile.size, profile.text, profile.seed) == (DEFAULT_MODEL, DEFAULT_SIZE, DEFAULT_TEXT, 0)


def run_parameters(model: str, size: str, text: str, seed: int, settings: str, notebooks: list[Path]) -> dict[str, object]:
    """All parameters of a run that differ from the notebooks' own; ``size`` names the settings too, so each has its folder.

    Raises:
        ValueError: a model, text, size or parameter that does not exist.
    """
    check_model(model)
    check_text(text)
    own = parse_settings(settings)
    known = {name for notebook in notebooks for name in notebook_parameters(notebook)}
    if unknown := sorted(set(own) - known):
        raise ValueError(f"no notebook has the parameter {', '.join(unknown)}: they have {', '.join(sorted(known))}")
    if reserved := sorted(set(own) & {"model", "size", "text", "seed", "output"}):
        raise ValueError(f"{reserved[0]} is not a setting: use {reserved[0].upper()}=... of make reproduce")
    parameters = size_parameters(size) | own
    if own:
        content = " ".join(f"{name}={value}" for name, value in sorted(own.items()))
        parameters["size"] = f"{size}-{slug(content)[:60]}-{short_hash(content)}"
    wanted = {"model": _absolute(model, KNOWN), "text": _absolute(text), "seed": seed}
    defaults = {"model": DEFAULT_MODEL, "text": DEFAULT_TEXT, "seed": 0}
    return parameters | {name: value for name, value in wanted.items() if value != defaults[name]}


def reproduce(model: str, size: str, text: str, seed: int, only: str, settings: str = "") -> int:
    """Run the notebooks in order and print a report; the exit status: 0, or 1 if one failed.

    Raises:
        ValueError: anything that does not exist, before anything runs.
    """
    notebooks = chosen_notebooks(only)
    parameters = run_parameters(model, size, text, seed, settings, notebooks)
    BUILD.mkdir(parents=True, exist_ok=True)
    report, failed = [], False
    for number, notebook in enumerate(notebooks, 1):
        stage = Path(tempfile.mkdtemp(prefix="run-", dir=BUILD))
        identity = {name: parameters[name] for name in ("model", "size", "text", "seed") if name in parameters}
        profile = Profile(**identity, output=str(stage))
        print(f"[{number}/{len(notebooks)}] {notebook.stem} ({profile.folder})", flush=True)
        start = time.monotonic()
        try:
            known = notebook_parameters(notebook)
            with _shown_in_terminal(stage / "progress"):
                result = execute(notebook, {name: value for name, value in parameters.items() if name in known}, stage)
            if is_default(profile) and (wrong := problems(result)):  # other runs are not committed
                raise RuntimeError(f"the rendered notebook cannot be committed: {'; '.join(wrong)}")
            write_notebook(result, stage / notebook.name)
            folders = ", ".join(map(str, move_into_place(profile, stage / notebook.name)))
            shutil.rmtree(stage)
            report.append((notebook.stem, "done", time.monotonic() - start, folders))
        except KeyboardInterrupt:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        except (papermill.PapermillExecutionError, RuntimeError, ValueError, OSError) as error:
            failed = True  # the half-run notebook stays in its folder; the others are run
            place = stage.relative_to(ROOT) / notebook.name
            report.append((notebook.stem, "FAILED", time.monotonic() - start, f"{place} ({_reason(error)})"))
    if not failed and is_default(profile):
        update_index()
    width = max(len(row[0]) for row in report)
    for name, status, seconds, where in report:
        print(f"{name:{width}}  {status:6}  {seconds / 60:5.1f} min  {where}")
    return int(failed)


def _reason(error: Exception) -> str:
    """One sentence about a failed run."""
    if isinstance(error, DeadKernelError):
        return "its kernel died, most likely for lack of memory: close other programs, or use a smaller model or SIZE"
    if isinstance(error, papermill.PapermillExecutionError):
        return f"{error.ename}: {' '.join(str(error.evalue).split())}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split())


def _absolute(name: str, registered: dict | tuple = ()) -> str:
    """A file or folder as an absolute path: notebooks do not run where make was called."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() and name not in registered else name


@contextmanager
def _shown_in_terminal(log: Path) -> Iterator[None]:
    """While open, the progress that kernels append to the log is printed here."""
    log.touch()
    done = threading.Event()

    def follow() -> None:
        with open(log, encoding="utf-8", errors="replace", newline="") as lines:
            while not done.is_set():
                sys.stderr.write(lines.read())
                sys.stderr.flush()
                done.wait(0.5)
            sys.stderr.write(lines.read())

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        with patch.dict(os.environ, {HEADLESS: str(log)}):
            yield
    finally:
        done.set()
        thread.join()
