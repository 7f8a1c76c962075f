"""Ridge regression from sums over tokens, whose memory does not grow with the text, and the settings of a fit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

SPLIT = 4  # every fourth window chooses the penalty


@dataclass(frozen=True)
class FitSettings:
    """How all sub-blocks are fitted.

    Attributes:
        penalties: of the squared weights, in units of the mean square of the features.
        rank: of the map; None for any.
        constant: whether the map has a constant term.
    """

    penalties: tuple[float, ...]
    rank: int | None = None
    constant: bool = True


@dataclass
class BranchFit:
    """The map of one sub-block, its penalty, and the share of variance that it leaves."""

    maps: dict[str, Tensor]
    penalty: float
    left: float


class Sums:
    """Sums over tokens of products of features (the last one is constant) and targets, in float64."""

    def __init__(self):
        self.gram, self.cross, self.squares = 0, 0, 0.0

    def add(self, features: Float[Tensor, "token feature"], targets: Float[Tensor, "token dim"]) -> None:
        """Add the tokens of a window."""
        self.gram += features.T @ features
        self.cross += features.T @ targets
        self.squares += float(targets.square().sum())

    def __add__(self, other: "Sums") -> "Sums":
        both = Sums()
        both.gram, both.cross, both.squares = self.gram + other.gram, self.cross + other.cross, self.squares + other.squares
        return both

    def solve(self, penalty: float, constant: bool = True) -> Float[Tensor, "feature dim"]:
        """The weights with the least squared error plus ``penalty`` times their squares; that of the constant is free, or zero."""
        penalties = torch.full((len(self.gram),), penalty, dtype=torch.float64, device=self.gram.device)
        penalties[-1] = 0
        matrix = self.gram + penalties.diag()
        if constant:
            return torch.linalg.solve(matrix, self.cross)
        return torch.nn.functional.pad(torch.linalg.solve(matrix[:-1, :-1], self.cross[:-1]), (0, 0, 0, 1))

    def error(self, weights: Float[Tensor, "feature dim"]) -> float:
        """The squared error of these weights."""
        return float(self.squares - 2 * (weights * self.cross).sum() + (weights * (self.gram @ weights)).sum())

    @property
    def unit(self) -> float:
        """The sum over tokens of the mean square of the features, apart from the constant."""
        return float(self.gram.diagonal()[:-1].sum()) / max(1, len(self.gram) - 1)


def add_window(sums: Sequence[Sums], number: int, features: Tensor, targets: Tensor) -> None:
    """Add a window's tokens to the sums that fit, or to those that choose the penalty; no features: only the constant.

    Args:
        features: (token, feature), or with zero features.
        targets: (token, dim).
    """
    features, targets = (t.cpu() if t.device.type == "mps" else t for t in (features, targets))  # which has no float64
    targets = targets.double()
    whole = torch.cat([features.double(), targets.new_ones(len(targets), 1)], 1)
    sums[number % SPLIT == SPLIT - 1].add(whole, targets)


def solved(sums: Sequence[Sums], settings: FitSettings) -> BranchFit:
    """The map from the sums that fit and those that choose the penalty."""
    fitting, choosing = sums
    errors = [choosing.error(fitting.solve(penalty * fitting.unit, settings.constant)) for penalty in settings.penalties]
    penalty = settings.penalties[min(range(len(errors)), key=errors.__getitem__)]
    spread = choosing.squares - float((choosing.cross[-1] ** 2).sum() / choosing.gram[-1, -1])
    whole = fitting + choosing
    weights = whole.solve(penalty * whole.unit, settings.constant)
    slope, bias = weights[:-1].T, weights[-1]
    maps = {"bias": bias, "weight": slope} if len(slope.T) else {"bias": bias}
    if settings.rank:
        n, total = whole.gram[-1, -1], whole.gram[:-1, -1]
        covariance = whole.gram[:-1, :-1] - total.outer(total) / n
        basis = torch.linalg.eigh(slope @ covariance @ slope.T).eigenvectors[:, -settings.rank :]
        mean = slope @ total / n
        maps = {"bias": bias + mean - basis @ (basis.T @ mean), "down": basis.T @ slope, "up": basis}
    return BranchFit(maps, penalty, min(errors) / spread if spread > 0 else math.nan)
