"""Run notebooks through papermill; their tables, figures and rendered copies are moved into place only when a run succeeds."""

import itertools
import logging
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import nbformat
import papermill
import torch
import yaml
from nbclient.exceptions import DeadKernelError

from ..claims import join_claims
from ..files import replacing
from ..models import KNOWN, check_model
from ..paths import BUILD, FIGURES, NOTEBOOKS, RESULTS, ROOT, SIZES
from ..processes import is_main_process, n_processes
from ..profile import DEFAULT_MODEL, DEFAULT_SIZE, DEFAULT_TEXT, OUTPUT, Profile, plain_name, short_hash
from ..progress import HEADLESS
from ..record import run_record, write_record
from ..text import check_text
from .checks import available, cleaned, problems
from .index import update_index, write_notebook

# How torch, CUDA, MPS and numpy say that memory ran out
MEMORY = re.compile(r"MemoryError|out of memory|(can't|[Uu]nable to|[Cc]annot) allocate")
EARLY = ("01", "07", "09")  # of those beside each other: 02 finds the entropies of 01 in the cache; the others are long
LAST = ("10", "A3")  # they read the tables that the other notebooks write
READS = {"06": "02"}  # a notebook, and the one whose tables it reads
IGNORED = (signal.SIGINT, signal.SIG_IGN)
CURSOR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # movements of the cursor, by which nested bars are drawn
BAR = re.compile(r"\[\d+:\d+.*\]$")  # the times at the end of a step of a bar
SECONDS_PER_LINE = 15  # of progress of a notebook that runs beside others


def chosen_notebooks(only: str) -> list[Path]:
    """The notebooks that ``only`` names by number or name, separated by commas; all of them if it is empty.

    Raises:
        ValueError: one that does not exist, with the list of those that do.
    """
    notebooks = available()
    chosen = []
    for name in filter(None, re.split(r"[,\s]+", only)):
        stem = Path(name).stem
        matching = [path for path in notebooks if stem in (path.stem, _number(path))]
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
    if size == DEFAULT_SIZE:
        return {}
    if size not in files:
        raise ValueError(f"unknown size {size!r}: choose one of {', '.join([DEFAULT_SIZE, *files])}")
    return yaml.safe_load(files[size].read_text(encoding="utf-8")) or {}


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
    return list(papermill.inspect_notebook(_literal(notebook)))


def _literal(path: Path) -> str:
    """A path for papermill, which would put parameters into braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def execute(notebook: Path, parameters: dict[str, object], output: Path) -> nbformat.NotebookNode:
    """The notebook, run with these parameters; its files go under ``output``. A copy runs: the notebook itself is not changed.

    Raises:
        ValueError: a parameter that the notebook does not have.
        papermill.PapermillExecutionError: a cell failed; the half-run notebook stays under ``output``.
    """
    known = notebook_parameters(notebook)
    if unknown := sorted(set(parameters) - set(known)):
        raise ValueError(f"{notebook.stem} has no parameter {', '.join(unknown)}: it has {', '.join(known)}")
    # After Ctrl-C they may say that the kernel died or that its loop ended early; the report says what failed
    for name in ("asyncio", "papermill"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
    run = output / notebook.name
    with patch.dict(os.environ, {OUTPUT: str(output)} | _meeting_point(notebook)):
        papermill.execute_notebook(
            _literal(notebook),
            _literal(run),
            parameters,
            kernel_name="python3",
            cwd=str(ROOT),
            progress_bar=False,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # an error is in the cell's output
        )
    return cleaned(nbformat.read(run, as_version=4))


def _meeting_point(notebook: Path) -> dict[str, str]:
    """The variables with which the kernels of several processes connect: a port for each notebook, since each has new kernels."""
    if n_processes() == 1:
        return {}
    port = int(os.environ["MASTER_PORT"]) + 1 + available().index(notebook)
    return {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def move_into_place(profile: Profile, rendered: Path) -> list[Path]:
    """Move a run's files from its own folder to where they belong; returns their folders.

    All are copied before the first is replaced, each in one step, so a full disk leaves what was there; the folders may be on
    different disks.
    """
    notebooks = NOTEBOOKS if is_default(profile) else BUILD / profile.folder
    moves = [([rendered], notebooks)]
    for kind, target in (("results", RESULTS), ("figures", FIGURES)):
        moves.append((sorted((profile.output_folder / kind / profile.folder).glob("*")), target / profile.folder))
    with ExitStack() as stack:
        for files, target in moves:
            for file in files:
                shutil.copyfile(file, stack.enter_context(replacing(target / file.name)))
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
    name = size
    if own:
        content = " ".join(f"{name}={value}" for name, value in sorted(own.items()))
        name = f"{size}-{plain_name(content)[:60]}-{short_hash(content)}"
    elif "-" in size:  # without a hash, `default-code` would name the default size with the text `code` too
        name = f"{size}-{short_hash(size)}"
    parameters = size_parameters(size) | own
    if name != DEFAULT_SIZE:  # whatever the file of the size calls itself
        parameters["size"] = name
    wanted = {"model": _absolute(model, KNOWN), "text": _absolute(text), "seed": seed}
    defaults = {"model": DEFAULT_MODEL, "text": DEFAULT_TEXT, "seed": 0}
    return parameters | {name: value for name, value in wanted.items() if value != defaults[name]}


def reproduce(model: str, size: str, text: str, seed: int, only: str, settings: str = "", jobs: int = 0) -> int:
    """Run the notebooks and print a report; the exit status: 0, or 1 if one failed.

    Of several processes (``accelerate launch``) each runs the notebooks, and computes its share; the main one keeps the files.

    Args:
        jobs: notebooks that run beside each other, which share the processors; 0: ``default_jobs``.
    Raises:
        ValueError: anything that does not exist, before anything runs.
    """
    notebooks = chosen_notebooks(only)
    parameters = run_parameters(model, size, text, seed, settings, notebooks)
    BUILD.mkdir(parents=True, exist_ok=True)
    jobs, report, profile = jobs or default_jobs(model), [], _profile(parameters)
    number = itertools.count(1)
    for together in run_groups(notebooks, EARLY if jobs > 1 else ()):
        labels = {notebook: f"[{next(number)}/{len(notebooks)}] {notebook.stem}" for notebook in together}
        try:
            if min(jobs, len(together)) == 1:
                rows = [run_notebook(notebook, parameters, label) for notebook, label in labels.items()]
            else:
                rows = _beside_each_other(labels, parameters, jobs)
        finally:  # after Ctrl-C too: the notebooks before it are in place
            if is_main_process():
                join_claims(RESULTS / profile.folder)
        report += filter(None, rows)
    width = max((len(row.name) for row in report), default=0)
    for row in report:
        print(f"{row.name:{width}}  {row.status:6}  {row.seconds / 60:5.1f} min  {row.where}")
    failed = any(row.status == "FAILED" for row in report)
    if is_default(profile) and not failed and is_main_process():
        update_index()
    return int(failed)


def default_jobs(model: str) -> int:
    """Two notebooks at a time for the default model, whose kernels need up to 3 GB each; else, and on one processor, one."""
    return 2 if model == DEFAULT_MODEL and torch.get_num_threads() > 1 and n_processes() == 1 else 1


def run_groups(notebooks: list[Path], early: Sequence[str] = ()) -> list[list[Path]]:
    """The notebooks in groups that run one after another; inside a group any order will do, and the ``early`` ones begin."""
    by_time = sorted(notebooks, key=lambda notebook: (_number(notebook) in LAST, _number(notebook) not in early))
    return [list(group) for _, group in itertools.groupby(by_time, lambda notebook: _number(notebook) in LAST)]


def _number(notebook: Path) -> str:
    return notebook.stem.split("_")[0]


class Row(NamedTuple):
    """What became of one notebook."""

    name: str
    status: str
    seconds: float
    where: str


def recorded_settings(profile: Profile, parameters: dict[str, object]) -> dict[str, object]:
    """What was chosen for a run. Of a file or folder it is the name: where it lies differs between machines."""
    chosen = {name: getattr(profile, name) for name in ("model", "size", "text", "seed")}
    others = {name: value for name, value in sorted(parameters.items()) if name not in chosen}
    chosen |= {name: Path(chosen[name]).name for name in ("model", "text") if Path(chosen[name]).is_absolute()}
    return {**chosen, "parameters": others}


def printed_texts(notebook: nbformat.NotebookNode) -> list[str]:
    """The hashes of token windows that the output of a rendered notebook names."""
    output = " ".join(str(out.get("text", "")) for cell in notebook.cells for out in cell.get("outputs", []))
    return re.findall(r"\bhash ([0-9a-f]{12})\b", output)


def run_notebook(notebook: Path, parameters: dict[str, object], label: str, prefix: str = "") -> Row | None:
    """Run one notebook and move what it made into place; None in a process that is not the main one.

    Args:
        parameters: those of ``run_parameters``; the notebook gets the ones that it has.
        label: what is printed at the start, before the run's folder.
        prefix: begins each line of its progress, for notebooks that run beside each other; without it, bars are drawn.
    """
    profile, start, before, stage = _profile(parameters), time.monotonic(), _most_memory(), None
    if is_main_process():
        print(f"{label} ({profile.folder})", flush=True)
    try:
        stage = Path(tempfile.mkdtemp(prefix="run-", dir=BUILD))
        known = notebook_parameters(notebook)
        own = {name: value for name, value in parameters.items() if name in known}
        with _shown_in_terminal(stage / "progress", prefix):
            result = execute(notebook, own, stage)
        if not is_main_process():
            shutil.rmtree(stage, ignore_errors=True)
            return None
        default = is_default(profile)
        if default and (wrong := problems(result)):  # other runs are not committed
            raise RuntimeError(f"the rendered notebook cannot be committed: {'; '.join(wrong)}")
        write_notebook(result, stage / notebook.name)
        profile = replace(profile, output=str(stage))
        if not default:  # whose tables are the same bytes at every run; git knows the commit
            settings = {"notebook": notebook.stem, **recorded_settings(profile, own)}
            record = run_record(settings, profile.model, printed_texts(result), time.monotonic() - start)
            write_record(stage / "results" / profile.folder / f"{_number(notebook)}_run.json", record)
        folders = move_into_place(profile, stage / notebook.name)
        shutil.rmtree(stage, ignore_errors=True)
        return Row(notebook.stem, "done", time.monotonic() - start, ", ".join(map(str, folders)))
    except KeyboardInterrupt:
        # Objects that it left half made, such as an event loop, fail when they are freed, after the one sentence of the command
        sys.unraisablehook = lambda unraisable: None
        if stage:
            shutil.rmtree(stage, ignore_errors=True)
        raise
    except Exception as error:  # of the notebook, papermill, the kernel or the machine: a dozen kinds; the others are run
        held = _most_memory()  # a process begins as a copy of this one, so a little more says nothing
        reason = reason_of(error, held if held > 1.5 * before else 0)
        half_run = f"{stage.relative_to(ROOT) / notebook.name} ({reason})" if stage else reason  # it stays there
        return Row(notebook.stem, "FAILED", time.monotonic() - start, half_run)


def _profile(parameters: dict[str, object]) -> Profile:
    return Profile(**{name: parameters[name] for name in ("model", "size", "text", "seed") if name in parameters})


def _beside_each_other(labels: dict[Path, str], parameters: dict[str, object], jobs: int) -> list[Row]:
    """Run the labelled notebooks, at most ``jobs`` at a time and each in a process of its own; the rows in their order."""
    threads = str(max(1, torch.get_num_threads() // jobs))  # OpenMP reads it when a kernel starts
    spawned = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
    futures: dict[Path, Future[Row]] = {}
    with patch.dict(os.environ, {"OMP_NUM_THREADS": threads}), ProcessPoolExecutor(jobs, spawned, signal.signal, IGNORED) as pool:
        for notebook, label in labels.items():  # the workers ignore Ctrl-C between notebooks: it is for the main process then
            wait([future for earlier, future in futures.items() if _number(earlier) == READS.get(_number(notebook))])
            # Nothing waits in the pool: after Ctrl-C, which reaches its workers too, they would begin it
            while len(running := [future for future in futures.values() if not future.done()]) == jobs:
                wait(running, return_when=FIRST_COMPLETED)
            futures[notebook] = pool.submit(_run_in_pool, notebook, parameters, label)
        wait(futures.values())
    return [_row(notebook, future) for notebook, future in futures.items()]


def _row(notebook: Path, future: Future[Row]) -> Row:
    try:
        return future.result()
    except BrokenProcessPool as error:  # the worker itself was killed
        return Row(notebook.stem, "FAILED", 0.0, reason_of(error))


def _run_in_pool(notebook: Path, parameters: dict[str, object], label: str) -> Row:
    """``run_notebook``, which Ctrl-C interrupts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        row = run_notebook(notebook, parameters, label, f"{_number(notebook)}  ")
        print(f"{label} {row.status}, {row.seconds / 60:.1f} min", flush=True)
        return row
    finally:
        signal.signal(*IGNORED)


def _most_memory() -> int:
    """Bytes in memory of the largest process that was started here and has ended; at least those of this process."""
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF))
    return most * (1 if sys.platform == "darwin" else 1024)


def reason_of(error: Exception, held: int = 0) -> str:
    """One sentence about a failed run.

    Args:
        held: bytes in memory of its kernel; 0 where they are not known.
    """
    advice = "close other programs, or use a smaller model or SIZE"
    if isinstance(error, DeadKernelError):
        most = f", of which it had {held / 1e9:.1f} GB" if held else ""
        return f"its kernel died, most likely for lack of memory{most}: {advice}"
    if isinstance(error, papermill.PapermillExecutionError):
        said = " ".join(str(error.evalue).split())
        if MEMORY.search(f"{error.ename} {said}"):
            return f"there was too little memory ({'. '.join(said.split('. ')[:2]).rstrip('.') or error.ename}): {advice}"
        return f"{error.ename}: {said}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    said = " ".join(str(error).split())
    return said if said and isinstance(error, (RuntimeError, ValueError)) else f"{type(error).__name__}: {said}"


def _absolute(name: str, registered: dict | tuple = ()) -> str:
    """A file or folder as an absolute path: notebooks do not run where make was called."""
    path = Path(name).expanduser()
    return os.path.abspath(path) if path.exists() and name not in registered else name  # a link of a hub cache keeps its own name


@contextmanager
def _shown_in_terminal(log: Path, prefix: str = "") -> Iterator[None]:
    """While open, the progress that kernels append to the log is printed here: as it is, or with a prefix.

    With a prefix it is the newest step of a bar, now and then, and whatever is no step of a bar (a notice).
    """
    log.touch()
    lines = open(log, encoding="utf-8", errors="replace", newline="")  # noqa: SIM115 - here: an interrupted run removes the log
    done = threading.Event()

    def follow() -> None:
        newest, ended = "", False
        with lines:
            while not ended:
                ended = done.wait(SECONDS_PER_LINE if prefix else 0.5)
                said = lines.read()
                if prefix:
                    texts = [text for line in re.split(r"[\r\n]", CURSOR.sub("", said)) if (text := line.strip())]
                    steps = [text for text in texts if BAR.search(text)]
                    shown = [text for text in texts if text not in steps] + [text for text in steps[-1:] if text != newest]
                    newest = steps[-1] if steps else newest
                    said = "".join(f"{prefix}{text}\n" for text in shown)
                sys.stderr.write(said)
                sys.stderr.flush()

    thread = threading.Thread(target=follow, daemon=True)
    try:
        thread.start()
        with patch.dict(os.environ, {HEADLESS: str(log)}):
            yield
    finally:
        done.set()
        if thread.is_alive():  # not where Ctrl-C came before it
            thread.join()
