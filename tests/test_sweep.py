"""Sweeps: the list of runs, and a real dask cluster of two workers that loses one of them."""

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


@pytest.fixture
def project(tmp_path):
    """A project with a notebook whose run of seed 1 waits the first time, and one that fails."""
    pytest.importorskip("distributed")
    folder = tmp_path / "notebooks"
    (folder / "sizes").mkdir(parents=True)
    waits = f"import pathlib, time\nmarker = pathlib.Path({str(tmp_path)!r}) / 'waits'\n"
    waits += "if seed == 1 and not marker.exists():\n    marker.touch()\n    time.sleep(600)"
    nbformat.write(notebook(waits), folder / "97_waits.ipynb")
    nbformat.write(notebook("1 / 0"), folder / "98_fails.ipynb")
    (tmp_path / "s.toml").write_text('seeds = [1, 2]\nnotebooks = ["97", "98"]\n')
    return tmp_path


@pytest.mark.slow
def test_a_lost_worker_is_replaced_and_a_failed_run_is_told(project):
    """kill -9 of a worker in the middle of a run: dask runs the cell again, and the table says what failed."""
    command = [sys.executable, "-m", "entrodrop_utils.runner.sweep", str(project / "s.toml"), "--jobs", "2"]
    env = {**os.environ, "ENTRODROP_HOME": str(project), "PYTHONPATH": f"{paths.PACKAGE.parent}:{os.environ.get('PYTHONPATH', '')}"}
    running = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=project)
    deadline = time.monotonic() + 300
    while not (project / "waits").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert (project / "waits").exists()
    os.kill(_worker_above(_kernel_that_waits(running.pid)), signal.SIGKILL)
    said, _ = running.communicate(timeout=400)
    assert running.returncode == 1, said
    rows = {(row["notebook"], row["seed"]): row for row in json.loads((project / "build/sweep.json").read_text())}
    assert [rows["97_waits", seed]["status"] for seed in (1, 2)] == ["done", "done"], said
    assert [rows["98_fails", seed]["status"] for seed in (1, 2)] == ["FAILED", "FAILED"]
    assert "ZeroDivisionError" in rows["98_fails", 1]["reason"]
    tables = sorted(path.parent.name for path in (project / "data/results").rglob("99_table.csv"))
    assert tables == ["default-seed-1", "default-seed-2"]


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
