"""On-disk cache of result tables, keyed by a hash of everything they depend on: weights, text, settings and code.

A changed input changes the key, so no entry ever has to be invalidated. A long run that was stopped continues from the cache;
deleting the folder (``make clean``) costs only time.
"""

import ast
import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path

import pandas as pd
import torch
import xxhash
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn

from .dropping import Repair
from .families.decoder import decoder_layers
from .files import replacing
from .paths import CACHE, PACKAGE
from .progress import notice

# transformers leaves hooks here that record attention or hidden states when asked to, and change nothing
RECORDERS = "transformers.utils.output_capturing"
# Attributes of any module, and the mark of how it was initialised
NO_SETTINGS = {*vars(nn.Module()), "_is_hf_initialized", "gradient_checkpointing"}


def tensor_digest(tensor: Tensor) -> str:
    """A hash of a tensor's dtype, shape and values."""
    plain = tensor.detach().cpu().contiguous()
    values = xxhash.xxh3_128_hexdigest(plain.flatten().view(torch.uint8).numpy())  # as fast as memory: a model has many bytes
    return f"{plain.dtype} {tuple(plain.shape)} {values}"


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's current state: class, config, devices and every weight. A dropped sub-block changes it.

    Raises:
        NotCacheable: weights on the meta device, or hooks, which can change any result.
    """
    hooks = (hook for part in model.modules() for held in (part._forward_hooks, part._forward_pre_hooks) for hook in held.values())
    if any(getattr(hook, "__module__", "") != RECORDERS for hook in hooks):
        raise NotCacheable("hooks change what the model computes")
    config = model.config.to_dict()
    config.pop("_name_or_path", None)  # the folder it was read from does not matter
    parts = [torch.__version__, type(model).__name__, json.dumps(config, sort_keys=True, default=str)]
    parts += [*_settings(model), str(getattr(model, "hf_device_map", ""))]
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:  # tied weights are listed once
        parts.append(f"{name} {weight.device.type} {tensor_digest(_fetched(model, name) if weight.is_meta else weight)}")
    return key(*parts)


def _settings(model: nn.Module) -> Iterator[str]:
    """What the config may not say: how each part attends, and the plain settings of the layers' modules (an adapter's scale)."""
    for name, part in model.named_modules():
        if config := getattr(part, "config", None):
            chosen = (getattr(config, f"_{what}_implementation", None) for what in ("attn", "experts"))
            yield " ".join(map(str, (name, *chosen)))
    with suppress(ValueError):  # a model without layers has none
        for name, part in decoder_layers(model).named_modules():
            for setting, value in sorted(vars(part).items()):
                if setting not in NO_SETTINGS and _is_plain(value):
                    yield f"{name}.{setting} {value}"


def _is_plain(value: object) -> bool:
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return all(map(_is_plain, parts)) if parts else isinstance(value, (bool, int, float, str))


def _fetched(model: nn.Module, name: str) -> Tensor:
    """A weight that is offloaded to disk or memory until its module runs."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if not has_offloaded_params(module):
        raise NotCacheable(f"the weight {name} is on no device")
    with align_module_device(module, "cpu"):
        return getattr(module, own)


class NotCacheable(ValueError):
    """A value without a key: it is computed every time."""


def key(*parts: object) -> str:
    """A hash of strings and numbers, in order."""
    return hashlib.sha256("\x00".join(map(str, parts)).encode()).hexdigest()


@functools.cache
def code(*modules: str, package: Path = PACKAGE) -> str:
    """A hash of the source of modules of this package and of every module of it that they import, transitively.

    Modules are dotted (``tasks.loglikelihoods``). Imports are read from the source, including those inside functions.
    """
    files: dict[str, bytes] = {}
    waiting = [package.joinpath(*module.split(".")).with_suffix(".py") for module in modules]
    while waiting:
        file = waiting.pop()
        if (name := file.relative_to(package).as_posix()) not in files:
            files[name] = file.read_bytes()
            waiting += _imported(file, package)
    return key(*(part for name in sorted(files) for part in (name, hashlib.sha256(files[name]).hexdigest())))


def _imported(file: Path, package: Path) -> Iterator[Path]:
    """The files of the package that one of its files imports, and the ``__init__`` of every sub-package on the way."""
    home = ".".join((package.name, *file.relative_to(package).parent.parts))
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), home)
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for root, *parts in (name.split(".") for name in names):
            if root == package.name:
                for end in range(1, len(parts) + 1):
                    path = package.joinpath(*parts[:end])
                    yield from (source for source in (path.with_suffix(".py"), path / "__init__.py") if source.is_file())


def function_name(function: Callable) -> str:
    """A function of this package as a string, with the settings of a partial and the ``about`` attribute of a wrapper.

    Raises:
        NotCacheable: a function from another package or from ``studies``, whose code is not part of the key.
    """
    if about := getattr(function, "about", None):  # what the wrapper does, and the function it wraps
        return f"{about[0]} of {function_name(about[1])}"
    if isinstance(function, functools.partial):
        settings = [*map(repr, function.args), *(f"{k}={v!r}" for k, v in sorted(function.keywords.items()))]
        return f"{function_name(function.func)}({', '.join(settings)})"
    where = getattr(function, "__module__", None) or ""
    if not where.startswith(f"{__package__}.") or where.startswith(f"{__package__}.studies."):
        raise NotCacheable(f"{function!r} is not a function of {__package__}, or one of a study")
    return f"{where}.{function.__qualname__}"


def model_key(model: nn.Module, *modules: str) -> str | None:
    """The key of everything that these modules compute from a model; None for a model without a key, which is never cached."""
    with suppress(NotCacheable):
        return key(code(*modules), fingerprint(model))
    return None


def repaired(base: str | None, repair: Repair | None) -> str | None:
    """The key of a value that also depends on what replaces dropped sub-blocks."""
    if repair is None:
        return base
    maps = (f"{s} {name} {tensor_digest(value)}" for s, own in repair.maps.items() for name, value in own.items())
    return subkey(base, *maps, *(f"{name} {tensor_digest(value)}" for name, value in repair.changed.items()))


def subkey(base: str | None, *parts: object) -> str | None:
    """The key of a value that also depends on these parts, functions included; None where one of them has no key."""
    with suppress(NotCacheable):
        return base and key(base, *(function_name(part) if callable(part) else part for part in parts))
    return None


def read(folder: str, entry: str | None) -> pd.DataFrame | None:
    """The table with this key; None if there is none, or if its file is damaged: it is then computed again and replaced."""
    if entry is None:
        return None
    path = CACHE / folder / f"{entry}.parquet"
    try:
        return pd.read_parquet(path, page_checksum_verification=True)  # a bit that flipped is an error, and not another number
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # a damaged file raises half a dozen kinds
        notice(f"{path} cannot be read ({type(error).__name__}): it is computed again")
        return None


def write(folder: str, entry: str | None, table: pd.DataFrame) -> None:
    """Keep a table under this key; without a key, or on a full or read-only disk, it is not kept."""
    if entry:
        try:
            with replacing(CACHE / folder / f"{entry}.parquet") as unfinished:
                table.to_parquet(unfinished, index=False, write_page_checksum=True)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else type(error).__name__  # its own text may name the file: one notice
            notice(f"results cannot be kept in {CACHE} ({reason}): they will be computed again next time")


def rows_by_set(
    folder: str, entry: str | None, sets: Collection[str], compute: Callable[[list[str]], pd.DataFrame], done: Callable[[], None]
) -> pd.DataFrame:
    """The rows of each of these sets (column ``set``): cached ones are read, the others are computed and added to the entry.

    Args:
        compute: returns the rows of the missing sets.
        done: called for each set that was cached.
    """
    table = read(folder, entry)
    cached = set() if table is None else set(table.set)
    if missing := [name for name in sets if name not in cached]:
        new = compute(missing)
        table = new if table is None else pd.concat([table, new], ignore_index=True)
        write(folder, entry, table)
    for _ in cached.intersection(sets):
        done()
    return table[table.set.isin(list(sets))]
