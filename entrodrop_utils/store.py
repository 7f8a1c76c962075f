"""What was computed once and serves again: tables under data/cache, each under a key of all that it depends on.

Scores and losses are pure functions of weights, tokens, settings and code, so all four are in the key and nothing ever has to be
invalidated. A long run that is stopped goes on from here; deleting the folder (``make clean``) costs time only.
"""

import ast
import functools
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path

import pandas as pd
import torch
import xxhash
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn

from .profiles import DATA

PACKAGE = Path(__file__).parent
CACHE = DATA / "cache"


def digest(tensor: Tensor) -> str:
    """A hash of a tensor's dtype, shape and values."""
    plain = tensor.detach().cpu().contiguous()
    values = xxhash.xxh3_128_hexdigest(plain.flatten().view(torch.uint8).numpy())  # as fast as memory: a model has many bytes
    return f"{plain.dtype} {tuple(plain.shape)} {values}"


def fingerprint(model: nn.Module) -> str:
    """A hash of a model as it is now: class, config, devices and every weight, so a dropped sub-block shows.

    Raises:
        NotCacheable: weights that are nowhere (on the meta device), or hooks, which can change all it computes.
    """
    if any(part._forward_hooks or part._forward_pre_hooks for part in model.modules()):
        raise NotCacheable("hooks change what the model computes")
    config = model.config.to_dict()
    config.pop("_name_or_path", None)  # where it was read from changes nothing
    parts = [torch.__version__, type(model).__name__, json.dumps(config, sort_keys=True, default=str)]
    parts += [str(model.config._attn_implementation), str(getattr(model, "hf_device_map", ""))]
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:  # a weight that has two places comes once
        parts.append(f"{name} {weight.device.type} {digest(_fetched(model, name) if weight.is_meta else weight)}")
    return key(*parts)


def _fetched(model: nn.Module, name: str) -> Tensor:
    """A weight that waits on disk or in memory until its module is needed."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if not has_offloaded_params(module):
        raise NotCacheable(f"the weight {name} is on no device")
    with align_module_device(module, "cpu"):
        return getattr(module, own)


class NotCacheable(ValueError):
    """Something has no key: it is computed anew each time."""


def key(*parts: object) -> str:
    """A hash of strings and numbers, in order."""
    return hashlib.sha256("\x00".join(map(str, parts)).encode()).hexdigest()


@functools.cache
def code(*modules: str, package: Path = PACKAGE) -> str:
    """A hash of the source of modules of this package and of all that they import from it, directly or through others.

    Imports are read from the source, those inside functions too, so a change anywhere below a number gives it another key.
    """
    files: dict[str, bytes] = {}
    waiting = [package / f"{module}.py" for module in modules]
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


def name(function: Callable) -> str:
    """A function of this package as a string, with the settings of a partial and, where it has one, its attribute ``about``.

    Raises:
        NotCacheable: a function from elsewhere, whose code is not known.
    """
    if about := getattr(function, "about", None):  # of a wrapper: what it does, and to which function
        return f"{about[0]} of {name(about[1])}"
    if isinstance(function, functools.partial):
        settings = [*map(repr, function.args), *(f"{k}={v!r}" for k, v in sorted(function.keywords.items()))]
        return f"{name(function.func)}({', '.join(settings)})"
    where = getattr(function, "__module__", None) or ""
    if not where.startswith(f"{__package__}."):
        raise NotCacheable(f"{function!r} is not a function of {__package__}")
    return f"{where}.{function.__qualname__}"


def base(model: nn.Module, *modules: str) -> str | None:
    """The key of what these modules compute from a model; None for a model that has none: nothing of it is kept."""
    with suppress(NotCacheable):
        return key(code(*modules), fingerprint(model))
    return None


def under(base: str | None, *parts: object) -> str | None:
    """The key of something that depends on these parts as well; a function goes by its ``name``. None where anything has no key."""
    with suppress(NotCacheable):
        return base and key(base, *(name(part) if callable(part) else part for part in parts))
    return None


def load(folder: str, of: str | None) -> pd.DataFrame | None:
    """The table that was kept under this key, or None."""
    path = CACHE / folder / f"{of}.parquet"
    return pd.read_parquet(path) if of and path.exists() else None


def keep(folder: str, of: str | None, table: pd.DataFrame) -> None:
    """Keep a table under this key, in one step: a run that is killed leaves no half of one."""
    if not of:
        return
    path = CACHE / folder / f"{of}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".unfinished")
    os.close(handle)
    try:
        table.to_parquet(unfinished, index=False)
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def by_set(
    folder: str, of: str | None, sets: Collection[str], compute: Callable[[list[str]], pd.DataFrame], done: Callable[[], None]
) -> pd.DataFrame:
    """The rows of each of these sets (column ``set``): those kept under this key, and the others, computed and kept beside them.

    Args:
        compute: the rows of the sets that are missing.
        done: called for each set that was there.
    """
    table = load(folder, of)
    have = set() if table is None else set(table.set)
    if missing := [one for one in sets if one not in have]:
        new = compute(missing)
        table = new if table is None else pd.concat([table, new], ignore_index=True)
        keep(folder, of, table)
    for _ in have.intersection(sets):
        done()
    return table[table.set.isin(list(sets))]
