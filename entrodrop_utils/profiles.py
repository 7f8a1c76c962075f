"""What a run is: a model, a size, a text and a seed, checked before anything starts; and where its files go."""

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
MODELS = DATA / "models"
RESULTS = DATA / "results"
FIGURES = ROOT / "figures"
NOTEBOOKS = ROOT / "notebooks"
BUILD = ROOT / "build"

REGISTRY = tomllib.loads((DATA / "profiles.toml").read_text())
SIZES: dict[str, dict] = REGISTRY["sizes"]
# The runner names a run's own folder here; a notebook that a person runs writes beside nothing that is committed.
OUTPUT = "ENTRODROP_OUTPUT"
DEFAULT_MODEL, DEFAULT_SIZE, DEFAULT_TEXT = "smollm2-135m-instruct", "default", "docs"


@dataclass(frozen=True)
class Windows:
    """How much text one step reads: ``sequences`` windows of ``tokens`` tokens."""

    sequences: int
    tokens: int


@dataclass(frozen=True)
class Profile:
    """One run. ``calibration`` text ranks the sub-blocks, ``search`` text chooses, ``evaluation`` text says what it costs."""

    model: str
    size: str
    text: str
    seed: int
    calibration: Windows
    evaluation: Windows
    twin: Windows
    attention: Windows
    fractions: tuple[float, ...]
    random_draws: int
    search: Windows
    sensitivity: dict[str, Windows | int]
    accuracy: dict[str, list | dict | int]
    output: Path

    @classmethod
    def of(
        cls, model: str = DEFAULT_MODEL, size: str = DEFAULT_SIZE, text: str = DEFAULT_TEXT, seed: int = 0, output: str = ""
    ) -> "Profile":
        """The run of these names. Without ``output`` its files go under ``build/interactive``, so nothing committed is overwritten.

        Raises:
            ValueError: a size that does not exist, with the list of those that do.
        """
        if size not in SIZES:
            raise ValueError(f"unknown size {size!r}: choose one of {', '.join(SIZES)}")
        chosen = dict(SIZES[size])
        windows = {name: Windows(*chosen.pop(name)) for name in ("calibration", "search", "evaluation", "twin", "attention")}
        fractions = tuple(chosen.pop("fractions"))
        sensitivity = {k: Windows(*v) if isinstance(v, list) else v for k, v in chosen.pop("sensitivity").items()}
        folder = Path(output or os.environ.get(OUTPUT) or BUILD / "interactive")
        return cls(
            model, size, text, seed, fractions=fractions, sensitivity=sensitivity, output=folder.resolve(), **windows, **chosen
        )

    @property
    def folder(self) -> str:
        """``<model>/<size>``, the folder of this run under data/results and figures; a text of one's own is part of its name."""
        return f"{slug(self.model)}/{self.size}" + ("" if self.text == DEFAULT_TEXT else f"-{slug(self.text)}")

    @staticmethod
    def count(fraction: float, total: int) -> int:
        """A fraction of ``total`` sub-blocks as a number: at least one, and no more than the published code leaves unprotected."""
        return min(max(1, round(fraction * total)), max(1, total - 3))

    def counts(self, total: int) -> list[int]:
        """How many of ``total`` sub-blocks are dropped at each of the run's fractions."""
        return sorted({self.count(fraction, total) for fraction in self.fractions})

    def write(self, table: pd.DataFrame, name: str) -> None:
        """The table as CSV under this run's results; six digits, so that the same numbers are the same bytes."""
        path = self.output / "results" / self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(path, index=False, float_format="%.6g", lineterminator="\n")


def slug(name: str) -> str:
    """A model's or text's name as the name of a folder: the last part of a path, both parts of a hub name."""
    path = Path(name).expanduser()
    plain = path.resolve().name if path.exists() else name.replace("/", "--")
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in plain).strip(".-").lower() or "unnamed"
