"""What an export wrote, and what its target keeps and loses."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Exported:
    """A written export; its text says what the target does with it.

    Attributes:
        target: the program that reads it.
        path: the file or folder.
        architecture: the name under which the target loads it.
        nbytes: its size.
        layers: of the dense model.
        kv_layers: for how many layers the target keeps keys and values.
        kv_bytes_per_token: of all of them, at 16 bits a number.
        zeros: whether branches of zeros stand for some that were dropped.
        notes: what else takes time or memory there.
    """

    target: str
    path: Path
    architecture: str
    nbytes: int
    layers: int
    kv_layers: int
    kv_bytes_per_token: int
    zeros: bool = False
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.nbytes / 1e6:.1f} MB for {self.target}, architecture {self.architecture}.",
            f"Keys and values: {self.kv_layers} of {self.layers} layers, {self.kv_bytes_per_token} bytes a token at 16 bits.",
        ]
        if self.zeros:
            lines.append("Branches of zeros stand for what was dropped: nothing is faster or smaller than dense.")
        return "\n".join([*lines, *self.notes])


class ExportMismatch(RuntimeError):
    """What was written does not hold the model: a defect of the exporter. It is removed again."""
