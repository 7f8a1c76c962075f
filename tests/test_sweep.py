"""Sweeps: the list of runs, and a real dask cluster of two workers that loses one of them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from test_runner import notebook

from entrodrop_utils import paths
from entrodrop_utils.runner import sweep

FILE = """
models = ["smollm2-135m-instruct", "gemma-3-270m"]
sizes = ["smoke"]
seeds = [0, 1]
notebooks = ["01", "02_entropy_vs_cosine"]
set = "k=9"
"""


def test_a_sweep_is_the_product_of_its_axes(tmp_path):
    (tmp_path / "s.toml").write_text(FILE)
    cells, retries = sweep.sweep_cells(tmp_path / "s.toml")
    assert len(cells) == len(set(cells)) == 2 * 2 * 2 and retries == 2
    assert cells[0] == ("smollm2-135m-instruct", "smoke", "docs", 0, "01_layerwise_entropy", "k=9")
    assert {cell.notebook for cell in cells} == {"01_layerwise_entropy", "02_entropy_vs_cosine"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('model = ["x"]', "has the key 'model': its keys are models, sizes"),
        ('models = ["nonsense"]', "unknown model 'nonsense'"),
        ('sizes = ["huge"]', "unknown size 'huge'"),
        ('texts = ["nowhere.txt"]', "nowhere.txt"),
        ('notebooks = ["77"]', "no notebook '77'"),
        ('set = "k"', "cannot read the setting 'k'"),
    ],
)
def test_what_does_not_exist_is_refused_before_anything_is_run(line, message, tmp_path):
    (tmp_path / "s.toml").write_text(line)
    with pytest.raises(ValueError, match=message):
        sweep.sweep_cells(tmp_path / "s.toml")


# A notebook that scores a small model; the run of seed 1 waits once, in one phase
PHASES = ["before the model", "before the scores", "between the scores", "after the scores", "after the table"]
SCORES = """
import pathlib, sys, time
sys.path.insert(0, TESTS)
def wait(phase):
    marker = pathlib.Path(HERE) / "waits"
    if seed == 1 and phase == PHASE and not marker.exists():
        marker.touch()
        time.sleep(600)
wait("before the model")
import torch
from tiny_llama import tiny_llama
from entrodrop_utils.cached_scoring import cached_score
model, texts = tiny_llama(), torch.arange(96).reshape(2, 3, 16)
wait("before the scores")
first = cached_score(model, texts[0], ["bucket", "cosine"], ["attention"])
wait("between the scores")
second = cached_score(model, texts[1], ["bucket", "cosine"], ["attention"])
wait("after the scores")
profile.write(pd.concat([first, second]), "99_scores.csv")
wait("after the table")
"""


@pytest.fixture
def project(tmp_path, request):
    """A project with a notebook whose run of seed 1 waits in a phase, the first time, and one that fails."""
    pytest.importorskip("distributed")
    folder = tmp_path / "notebooks"
    (folder / "sizes").mkdir(parents=True)
    values = {"TESTS": str(Path(__file__).parent), "HERE": str(tmp_path), "PHASE": request.param}
    source = "\n".join([*(f"{name} = {value!r}" for name, value in values.items()), SCORES.strip()])
    nbformat.write(notebook(source), folder / "97_waits.ipynb")
    nbformat.write(notebook("1 / 0"), folder / "98_fails.ipynb")
    (tmp_path / "s.toml").write_text('seeds = [1, 2]\nnotebooks = ["97", "98"]\n')
    return tmp_path


def start(project: Path) -> subprocess.Popen:
    """The sweep of a project, on two workers."""
    command = [sys.executable, "-m", "entrodrop_utils.runner.sweep", str(project / "s.toml"), "--jobs", "2"]
    env = {**os.environ, "ENTRODROP_HOME": str(project), "PYTHONPATH": f"{paths.PACKAGE.parent}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=project, start_new_session=True
    )


def await_the_phase(project: Path) -> None:
    deadline = time.monotonic() + 300
    while not (project / "waits").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert (project / "waits").exists()


def check_results(project: Path, said: str) -> None:
    """Every run of the first notebook is done, and its tables are those of the run that was not disturbed."""
    assert (project / "build/sweep.json").is_file(), said
    rows = {(row["notebook"], row["seed"]): row for row in json.loads((project / "build/sweep.json").read_text())}
    assert [rows["97_waits", seed]["status"] for seed in (1, 2)] == ["done", "done"], said
    assert [rows["98_fails", seed]["status"] for seed in (1, 2)] == ["FAILED", "FAILED"]
    assert "ZeroDivisionError" in rows["98_fails", 1]["reason"]
    tables = {path.parent.name: path.read_bytes() for path in (project / "data/results").rglob("99_scores.csv")}
    assert set(tables) == {"default-seed-1", "default-seed-2"}
    assert tables["default-seed-1"] == tables["default-seed-2"] != b""


def cached_scores(project: Path) -> dict[str, int]:
    """File -> the time it was written, of the scores in the cache."""
    return {path.name: path.stat().st_mtime_ns for path in (project / "data/cache/scores").glob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("project", PHASES, indirect=True)
def test_a_lost_worker_is_replaced_and_a_failed_run_is_told(project):
    """kill -9 of a worker in each phase of a run: dask runs the cell again, and the table says what failed."""
    running = start(project)
    await_the_phase(project)
    os.kill(_worker_above(_kernel_that_waits(running.pid)), signal.SIGKILL)
    said, _ = running.communicate(timeout=400)
    assert running.returncode == 1, said
    check_results(project, said)


@pytest.mark.slow
@pytest.mark.parametrize("project", ["between the scores", "after the table"], indirect=True)
def test_a_sweep_that_was_killed_goes_on_from_the_cache(project):
    """kill -9 of the whole sweep; started again, it finishes, and what was scored is not scored again."""
    running = start(project)
    await_the_phase(project)
    parents = _parents()
    for process in [pid for pid in parents if pid == running.pid or running.pid in _ancestors(pid, parents)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    running.communicate(timeout=60)
    before = cached_scores(project)
    assert before
    again = start(project)
    said, _ = again.communicate(timeout=400)
    assert again.returncode == 1, said
    check_results(project, said)
    assert cached_scores(project).items() >= before.items()


def _parents() -> dict[int, int]:
    """Process -> its parent, of all processes of this machine."""
    stats = (path.read_text() for path in Path("/proc").glob("[0-9]*/stat") if path.exists())
    return {int(stat.split(" ", 1)[0]): int(stat.rsplit(")", 1)[1].split()[1]) for stat in stats}


def _kernel_that_waits(ancestor: int) -> int:
    """The kernel of the run that waits: the one that stays."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        parents = _parents()
        kernels = [pid for pid in parents if _is_kernel(pid) and ancestor in _ancestors(pid, parents)]
        time.sleep(8)
        kernels = [pid for pid in kernels if Path(f"/proc/{pid}").exists()]
        if len(kernels) == 1:
            return kernels[0]
    raise AssertionError("no kernel waits")


def _is_kernel(pid: int) -> bool:
    try:
        return b"ipykernel_launcher" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _ancestors(pid: int, parents: dict[int, int]) -> list[int]:
    chain = []
    while pid := parents.get(pid, 0):
        chain.append(pid)
    return chain


def _worker_above(kernel: int) -> int:
    return _parents()[kernel]
