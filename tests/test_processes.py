"""Work split over processes gives what one process gives, on every process; the runner keeps the files of the main one."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from entrodrop_utils import cache, processes
from entrodrop_utils.runner import run

SCRIPT = Path(__file__).with_name("split_work.py")
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def launched(n: int, *arguments: object) -> None:
    """Run a program in ``n`` processes, as ``accelerate launch`` does on accelerators."""
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, *LAUNCH, str(n), *map(str, arguments)]
    done = subprocess.run(command, env=own | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_give_the_tables_of_one(n, tmp_path, monkeypatch):
    import split_work

    monkeypatch.setattr(cache, "CACHE", tmp_path / "one" / "cache")
    launched(n, SCRIPT, tmp_path)
    for name, table in split_work.work().items():
        for process in range(n):
            other = pd.read_csv(tmp_path / f"{name} {process}.csv")
            expected = table.drop(columns="set", errors="ignore").reset_index(drop=True)
            pd.testing.assert_frame_equal(other, expected, rtol=0, atol=1e-6, check_dtype=False)


def test_a_process_computes_only_its_share(monkeypatch):
    """Each item by one process: their shares are disjoint and complete."""
    for n in (1, 2, 3, 5):
        monkeypatch.setenv("WORLD_SIZE", str(n))
        shares = []
        for rank in range(n):
            monkeypatch.setenv("RANK", str(rank))
            shares += processes.share_of(4)
        assert sorted(shares) == [0, 1, 2, 3]


def test_each_notebook_has_a_meeting_point_of_its_own(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "29500")
    ports = [run._meeting_point(notebook)["MASTER_PORT"] for notebook in run.available()]
    assert len(set(ports)) == len(ports) and "29500" not in ports
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run._meeting_point(run.available()[0]) == {}
