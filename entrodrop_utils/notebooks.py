"""Run one notebook or all of them through papermill; what they make moves into place only when they succeed."""

import argparse
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import papermill

from . import ledger, models, text
from .profiles import BUILD, DEFAULT_MODEL, DEFAULT_SIZE, DEFAULT_TEXT, FIGURES, NOTEBOOKS, OUTPUT, RESULTS, ROOT, Profile
from .progress import HEADLESS
from .rendered import available, cleaned, index, problems, write


def chosen(only: str) -> list[Path]:
    """The notebooks that ``only`` names: numbers or names, separated by commas; empty for all.

    Raises:
        ValueError: one that does not exist, with the list of those that do.
    """
    have = available()
    picked = []
    for want in filter(None, re.split(r"[,\s]+", only)):
        stem = Path(want).stem
        match = [path for path in have if stem in (path.stem, path.stem[:2])]
        if not match:
            raise ValueError(f"no notebook {want!r}: choose from {', '.join(path.stem for path in have)}")
        picked += match
    return sorted(set(picked)) if picked else have


def execute(notebook: Path, parameters: dict, output: Path) -> nbformat.NotebookNode:
    """The notebook, run with these parameters; its files go under ``output``. What runs is a copy: the notebook is not touched.

    Raises:
        ValueError: a parameter that the notebook does not have.
        papermill.PapermillExecutionError: a cell failed; the half-run notebook stays under ``output``.
    """
    known = papermill.inspect_notebook(str(notebook))
    if unknown := sorted(set(parameters) - set(known)):
        raise ValueError(f"{notebook.stem} has no parameter {', '.join(unknown)}: it has {', '.join(known)}")
    run = output / notebook.name
    with _environment({OUTPUT: str(output)}):
        papermill.execute_notebook(
            str(notebook),
            str(run),
            parameters,
            kernel_name="python3",
            cwd=str(ROOT),
            progress_bar=False,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # what a cell raises comes back as its output
        )
    return cleaned(nbformat.read(run, as_version=4))


def place(profile: Profile, rendered: Path) -> list[Path]:
    """Move what a run made from its own folder to where it belongs, file by file, each in one step; where it went."""
    notebooks = NOTEBOOKS if is_default(profile) else BUILD / profile.folder
    moves = [([rendered], notebooks)]
    for made, target in (("results", RESULTS), ("figures", FIGURES)):
        moves.append((sorted((profile.output / made / profile.folder).glob("*")), target / profile.folder))
    for files, target in moves:
        for file in files:
            target.mkdir(parents=True, exist_ok=True)
            os.replace(file, target / file.name)
    ledger.join(RESULTS / profile.folder)
    return [(notebooks / rendered.name).relative_to(ROOT), *(target.relative_to(ROOT) for files, target in moves[1:] if files)]


def is_default(profile: Profile) -> bool:
    """Whether this is the run that the committed notebooks show."""
    return (profile.model, profile.size, profile.text, profile.seed) == (DEFAULT_MODEL, DEFAULT_SIZE, DEFAULT_TEXT, 0)


def reproduce(model: str, size: str, corpus: str, seed: int, only: str) -> int:
    """Run the notebooks in order and report; the exit status: 0, or 1 when one failed.

    Raises:
        ValueError: anything that does not exist, before anything runs.
    """
    models.check(model)
    text.check(corpus)
    Profile.of(model, size)
    todo = chosen(only)
    BUILD.mkdir(exist_ok=True)
    wanted = {"model": _absolute(model), "size": size, "text_source": _absolute(corpus), "seed": seed}
    defaults = {"model": DEFAULT_MODEL, "size": DEFAULT_SIZE, "text_source": DEFAULT_TEXT, "seed": 0}
    parameters = {key: value for key, value in wanted.items() if value != defaults[key]}
    table, failed = [], False
    for number, notebook in enumerate(todo, 1):
        stage = Path(tempfile.mkdtemp(prefix="run-", dir=BUILD))
        profile = Profile.of(wanted["model"], size, wanted["text_source"], seed, str(stage))
        print(f"[{number}/{len(todo)}] {notebook.stem} ({profile.folder})", flush=True)
        start = time.monotonic()
        try:
            with _terminal(stage / "progress"):
                result = execute(notebook, parameters, stage)
            if is_default(profile) and (wrong := problems(result)):  # what is not committed may well show a path
                raise RuntimeError(f"the rendered notebook is not fit to be read: {'; '.join(wrong)}")
            write(result, stage / notebook.name)
            where = ", ".join(map(str, place(profile, stage / notebook.name)))
            shutil.rmtree(stage)
            table.append((notebook.stem, "done", time.monotonic() - start, where))
        except KeyboardInterrupt:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        except (papermill.PapermillExecutionError, RuntimeError, ValueError) as error:
            failed = True  # the half-run notebook stays in the stage, to be looked at
            reason = f"{error.ename}: {error.evalue}" if isinstance(error, papermill.PapermillExecutionError) else str(error)
            table.append(
                (notebook.stem, "FAILED", time.monotonic() - start, f"{stage.relative_to(ROOT) / notebook.name} ({reason})")
            )
            break
    if not failed and is_default(profile):
        index()
    width = max(len(row[0]) for row in table)
    for name, status, seconds, where in table:
        print(f"{name:{width}}  {status:6}  {seconds / 60:5.1f} min  {where}")
    for notebook in todo[len(table) :]:
        print(f"{notebook.stem:{width}}  not run")
    return int(failed)


def _absolute(name: str) -> str:
    """A folder or file as seen from anywhere: notebooks do not run where make was called."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() and name not in models.KNOWN else name


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


@contextmanager
def _terminal(log: Path) -> Iterator[None]:
    """While open, what kernels append to the log is shown here."""
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
        with _environment({HEADLESS: str(log)}):
            yield
    finally:
        done.set()
        thread.join()


def main() -> int:
    """The command line behind `make reproduce` and `make lint`."""
    parser = argparse.ArgumentParser(prog="python -m entrodrop_utils.notebooks", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a registered name, a folder, a .gguf file or a hub name")
    parser.add_argument("--size", default=DEFAULT_SIZE, help="smoke, default or paper")
    parser.add_argument("--text", default=DEFAULT_TEXT, help="calibration text: docs, a .txt or .jsonl file, or a hub dataset")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="notebooks by number or name, separated by commas")
    parser.add_argument("--check", action="store_true", help="only look at the committed notebooks")
    args = parser.parse_args()
    if args.check:
        found = [f"{path.name}: {p}" for path in available() for p in problems(nbformat.read(path, as_version=4))]
        print("\n".join(found) or f"{len(available())} notebooks are fit to be read")
        return int(bool(found))
    try:
        return reproduce(args.model, args.size, args.text, args.seed, args.only)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: what was committed is as it was, and the next run starts this notebook again", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
