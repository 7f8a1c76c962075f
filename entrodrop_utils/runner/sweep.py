"""A sweep: models x sizes x texts x seeds x notebooks as runs on a dask cluster, ``python -m entrodrop_utils.runner.sweep FILE``.

Scheduling, retries after a lost worker and resources are dask's. Work that is done is free: results are kept under ``data/cache``,
which the workers share. On several machines, the checkout must lie on a shared disk.
"""

import argparse
import contextlib
import io
import itertools
import json
import platform
import sys
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from ..models import check_model
from ..paths import BUILD
from ..profile import DEFAULT_MODEL, DEFAULT_SIZE, DEFAULT_TEXT
from ..progress import progress
from ..text import check_text
from .run import chosen_notebooks, parse_settings, reproduce, size_parameters

AXES = {"models": DEFAULT_MODEL, "sizes": DEFAULT_SIZE, "texts": DEFAULT_TEXT, "seeds": 0, "notebooks": ""}
OPTIONS = {"set": "", "retries": 2}
SLOT = "run"  # dask's name of what a worker has one of: a run uses the whole worker


class Cell(NamedTuple):
    """One run of one notebook."""

    model: str
    size: str
    text: str
    seed: int
    notebook: str
    settings: str = ""


def sweep_cells(file: Path) -> tuple[list[Cell], int]:
    """The runs that a TOML file lists, and how often each is tried again.

    Raises:
        ValueError: a key, model, size, text, notebook or setting that does not exist; nothing has run then.
    """
    content = tomllib.loads(file.read_text(encoding="utf-8"))
    if unknown := sorted(set(content) - set(AXES) - set(OPTIONS)):
        raise ValueError(f"{file} has the key {unknown[0]!r}: its keys are {', '.join([*AXES, *OPTIONS])}")
    models, sizes, texts, seeds, names = (content.get(axis, [default]) for axis, default in AXES.items())
    for model in models:
        check_model(model)
    for text in texts:
        check_text(text)
    for size in sizes:
        size_parameters(size)
    settings = content.get("set", "")
    parse_settings(settings)
    notebooks = [path.stem for name in names for path in chosen_notebooks(name)]
    cells = [Cell(*values, settings) for values in itertools.product(models, sizes, texts, seeds, dict.fromkeys(notebooks))]
    return cells, int(content.get("retries", OPTIONS["retries"]))


def run_cell(cell: Cell) -> dict[str, object]:
    """Run one cell in this process; its kernel ends with it. Returns the cell, status, seconds, machine and reason."""
    start, said = time.monotonic(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            failed = reproduce(cell.model, cell.size, cell.text, cell.seed, cell.notebook, cell.settings)
        reason = said.getvalue().strip().splitlines()[-1] if failed else ""
    except Exception as error:  # what does not exist on this machine, a disk that is full
        failed, reason = True, f"{type(error).__name__}: {error}"
    seconds = round(time.monotonic() - start)
    return cell._asdict() | {
        "status": "FAILED" if failed else "done",
        "seconds": seconds,
        "machine": platform.node(),
        "reason": reason,
    }


def sweep(cells: list[Cell], client, retries: int = 2) -> pd.DataFrame:
    """Run the cells on a dask cluster: one row per cell, in their order.

    A cell whose worker is lost runs again on another one, at most ``retries`` times. A failed cell does not stop the others.
    """
    from distributed import as_completed

    # a local worker has one slot; workers of another cluster without the resource are used as they are
    limits = (
        {SLOT: 1} if any(SLOT in worker.get("resources", {}) for worker in client.scheduler_info()["workers"].values()) else None
    )
    futures = {client.submit(run_cell, cell, retries=retries, resources=limits, pure=False): cell for cell in cells}
    rows = {}
    for future in progress(as_completed(futures), "sweep (runs)", len(futures)):
        cell = futures[future]
        if future.status == "finished":
            rows[cell] = future.result()
        else:  # its workers were lost again and again, most likely for lack of memory
            reason = f"{type(future.exception()).__name__}: fewer JOBS, or workers with more memory"
            rows[cell] = cell._asdict() | {"status": "LOST", "seconds": 0, "machine": "", "reason": reason}
        print(f"{rows[cell]['status']}: {cell.notebook} of {cell.model}, {cell.size}, {cell.text}, seed {cell.seed}", flush=True)
    return pd.DataFrame([rows[cell] for cell in cells])


def main() -> int:
    """Run a sweep and print what ran where; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m entrodrop_utils.runner.sweep", description="Run many notebooks on a dask cluster."
    )
    parser.add_argument("file", type=Path, help="a TOML file with models, sizes, texts, seeds, notebooks, set, retries")
    parser.add_argument("--jobs", type=int, default=1, help="workers on this machine, each a process")
    parser.add_argument("--scheduler", default="", help="address of a running dask scheduler, or a file that it wrote (.json)")
    args = parser.parse_args()
    try:
        cells, retries = sweep_cells(args.file)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        print("error: a sweep needs dask: make sweep installs it, or pip install 'entrodrop-utils[sweep]'", file=sys.stderr)
        return 2
    with contextlib.ExitStack() as stack:
        if args.scheduler:
            is_file = args.scheduler.endswith(".json")
            client = stack.enter_context(Client(**{"scheduler_file" if is_file else "address": args.scheduler}))
        else:
            look = {"n_workers": args.jobs, "threads_per_worker": 1, "resources": {SLOT: 1}, "dashboard_address": None}
            cluster = stack.enter_context(LocalCluster(**look, memory_limit=0))
            client = stack.enter_context(Client(cluster))
        table = sweep(cells, client, retries)
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "sweep.json").write_text(json.dumps(table.to_dict("records"), indent=1))
    print(table.drop(columns="settings").to_string(index=False))
    return int((table.status != "done").any())


if __name__ == "__main__":
    sys.exit(main())
