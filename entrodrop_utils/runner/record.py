"""The record of a run: what was run, on which weights and texts, with which packages, and how long it took."""

import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import nbformat
import torch

from ..models.sources import weight_hashes
from ..paths import ROOT
from ..profile import Profile

PACKAGES = ("torch", "transformers", "datasets", "lm_eval", "numpy", "scipy", "gguf")
TEXT_HASH = re.compile(r"\bhash ([0-9a-f]{12})\b")  # as the notebooks print it


def run_record(
    notebook: nbformat.NotebookNode, name: str, profile: Profile, parameters: Mapping[str, object], seconds: float
) -> dict[str, object]:
    """What identifies a run and its results.

    Args:
        notebook: as it was rendered; the hashes of its texts are read from its output.
        name: of the notebook.
        parameters: those that differ from the notebook's own.
    Returns:
        notebook, model, size, text, seed, parameters, weights (file -> sha256; empty for a model that is used as published), texts
        (hashes of the token windows), packages, python, machine, seconds, commit (with "+" where files differ from it).
    """
    output = " ".join(str(out.get("text", "")) for cell in notebook.cells for out in cell.get("outputs", []))
    identity = {name: getattr(profile, name) for name in ("model", "size", "text", "seed")}
    return {
        "notebook": name,
        **identity,
        "parameters": {key: value for key, value in sorted(parameters.items()) if key not in identity},
        "weights": weight_hashes(profile.model),
        "texts": sorted(set(TEXT_HASH.findall(output))),
        "packages": {package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "machine": machine(),
        "seconds": round(seconds),
        "commit": commit(),
    }


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
