"""The record beside a table: what was run, on which weights and texts, with which packages, and how long it took."""

import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

from .files import write_table, write_text
from .models.sources import weight_hashes
from .paths import ROOT

PACKAGES = ("torch", "transformers", "datasets", "lm_eval", "numpy", "scipy", "gguf")


def run_record(settings: Mapping[str, object], model: str, texts: Iterable[str], seconds: float) -> dict[str, object]:
    """What identifies a run and its results.

    Args:
        settings: what was chosen, the model's name among it.
        model: whose weights are hashed.
        texts: hashes of the token windows.
        seconds: of this process; what it found in the cache took none.
    Returns:
        the settings, and weights (file -> sha256; empty for a model that is used as published), texts, packages, python, machine,
        seconds, commit (with "+" where files differ from it).
    """
    return {
        **settings,
        "weights": weight_hashes(model),
        "texts": sorted(set(texts)),
        "packages": {package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "machine": machine(),
        "seconds": round(seconds),
        "commit": commit(),
    }


def write_record(path: Path, record: Mapping[str, object]) -> None:
    """A record as JSON."""
    write_text(path, json.dumps(record, indent=1) + "\n")


def write_recorded(path: Path, table: pd.DataFrame, record: Mapping[str, object]) -> None:
    """A table as CSV, and its record beside it as ``<name>_run.json``."""
    write_table(path, table)
    write_record(path.with_name(f"{path.stem}_run.json"), record)


def machine() -> str:
    """The accelerator, or the processor's architecture and torch's threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def commit(folder: Path = ROOT) -> str:
    """The commit of a checkout, with "+" where tracked files differ from it; empty without git."""
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + "+" * bool(changed.strip())
