"""The identity of a run (model, size, text and seed), its parameters, and the folders of its files."""

import hashlib
import itertools
import os
from collections.abc import Iterable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import get_origin

import pandas as pd
import yaml

from .files import write_table
from .paths import BUILD, RESULTS

# The runner sets this to the folder of a run. A notebook that a person runs writes to build/interactive.
OUTPUT = "ENTRODROP_OUTPUT"
DEFAULT_MODEL, DEFAULT_SIZE, DEFAULT_TEXT = "smollm2-135m-instruct", "default", "docs"


@dataclass(frozen=True)
class Profile:
    """One run of a notebook.

    Attributes:
        model: a registered name, a folder, a .gguf file or a hub name.
        size: the name of the run's parameters, which names its folder: a file of ``notebooks/sizes`` or ``default``.
        text: calibration text.
        seed: seed of every random choice.
        output: folder of the run's tables and figures; empty for the runner's folder, or ``build/interactive`` without the runner.
    """

    model: str = DEFAULT_MODEL
    size: str = DEFAULT_SIZE
    text: str = DEFAULT_TEXT
    seed: int = 0
    output: str = ""

    @classmethod
    def from_parameters(cls, namespace: MutableMapping[str, object]) -> "Profile":
        """The profile of a notebook, from its globals; all its annotated parameters are checked, and text is read as YAML.

        ``papermill -p fractions '[0.5]'`` passes a string, which becomes the list that the annotation asks for.

        Raises:
            ValueError: a value of another type than the parameter's annotation.
        """
        for name, kind in namespace.get("__annotations__", {}).items():
            namespace[name] = parameter_value(name, namespace[name], get_origin(kind) or kind)
        return cls(*(namespace[name] for name in ("model", "size", "text", "seed", "output")))

    @property
    def output_folder(self) -> Path:
        """The folder of the run's files, in which ``results`` and ``figures`` have a folder for each model and size."""
        return Path(self.output or os.environ.get(OUTPUT) or BUILD / "interactive").resolve()

    @property
    def folder(self) -> str:
        """``<model>/<size>``, the run's folder in data/results and figures; another text or seed is part of its name."""
        parts = [self.size]
        parts += [slug(self.text)] if self.text != DEFAULT_TEXT else []
        parts += [f"seed-{self.seed}"] if self.seed else []
        return f"{slug(self.model)}/{'-'.join(parts)}"

    def write(self, table: pd.DataFrame, name: str) -> None:
        """Write a table as CSV to the run's results, with six digits."""
        write_table(self.output_folder / "results" / self.folder / name, table)

    def committed(self, name: str, size: str | None = None, model: str | None = None) -> pd.DataFrame | None:
        """A committed table of this run's model and size, or of others; None where there is none."""
        path = RESULTS / slug(model or self.model) / (size or self.size) / name
        return pd.read_csv(path) if path.exists() else None

    def first_committed(self, model: str, *names: str, sizes: Iterable[str] = ()) -> pd.DataFrame | None:
        """The first of these committed tables of a model: all names at the first size, then at the next.

        Args:
            sizes: names of sizes; without any, that of this run and then the default one.
        Returns:
            the table with a column ``file`` (``name (size)``); None where there is none.
        """
        own = (self.folder.split("/")[1], DEFAULT_SIZE)
        for size, name in itertools.product(dict.fromkeys(sizes or own), names):
            if (table := self.committed(name, size, model)) is not None:
                return table.assign(file=f"{name} ({size})")
        return None


def parameter_value(name: str, value: object, kind: type) -> object:
    """A parameter's value in the type of its annotation.

    Raises:
        ValueError: it has another type.
    """
    if isinstance(value, str) and kind is not str:
        with suppress(yaml.YAMLError):  # the text itself is then refused below
            value = yaml.safe_load(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and isinstance(value, (int, float)):  # papermill reads a folder called 2024 as a number
        value = str(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"the parameter {name} must be of type {kind.__name__}, got {value!r}")
    return value


def slug(name: str) -> str:
    """A model's or text's name as a folder name. A hash tells it apart where the name alone cannot.

    The last parts of two paths may be equal, and signs that a folder name should not have are replaced. A file or folder whose name
    is already a folder name is taken as a name; the runner passes absolute paths.
    """
    plain = plain_name(name.replace("/", "--"))
    path = Path(name).expanduser()
    if plain != name and path.exists():
        return f"{plain_name(Path(os.path.abspath(path)).name)[:80]}-{short_hash(str(path.resolve()))}"
    return plain if plain == name.replace("/", "--").lower() else f"{plain}-{short_hash(name)}"


def plain_name(name: str) -> str:
    """A name in small letters without the signs that a folder name should not have."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip(".-").lower() or "unnamed"


def short_hash(content: str) -> str:
    """Eight characters that tell contents apart."""
    return hashlib.sha256(content.encode()).hexdigest()[:8]
