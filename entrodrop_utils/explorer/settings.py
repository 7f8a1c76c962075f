"""The settings of the explorer: one value, checked when it is changed, that every result carries with it."""

import inspect
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from .. import scoring
from ..profile import DEFAULT_MODEL, DEFAULT_TEXT
from ..residual import KINDS, Kind

CURVE = "bucket"  # the entropy curve where the metric is a similarity and has none of its own
ROLES = ("reading", "ranking", "evaluation")
CHOICES = {"kind": KINDS, "metric": tuple(scoring.METRICS), "role": ROLES}
OPTIONS = {"bins": (int, 2, 1000), "k": (int, 1, 1000), "alpha": (float, 0.05, 100)}  # of a metric: type, least, greatest


@dataclass(frozen=True)
class Settings:
    """What the page is set to.

    Attributes:
        first: whether the first token of each calibration window counts.
        text: source of the calibration windows.
        pasted: a text of the person's own; its tokens are shown with their losses.
        role: what else that text is for. It never ranks and evaluates at once: calibration and evaluation text stay apart.
    """

    model: str = DEFAULT_MODEL
    kind: Kind = "attention"
    metric: str = CURVE
    bins: int = 20
    k: int = 25
    alpha: float = 4.0
    first: bool = True
    text: str = DEFAULT_TEXT
    pasted: str = ""
    role: Literal["reading", "ranking", "evaluation"] = "reading"
    prompt: str = "The entropy of a random variable is"
    seed: int = 0

    def changed(self, **wanted: object) -> "Settings":
        """These settings with some changed; a metric that is changed comes with its own default order.

        Raises:
            ValueError: a value that a setting cannot have, with those that it can; TypeError a setting that does not exist.

        >>> Settings().changed(metric="knn", k="30").k
        30
        """
        new = replace(self, **{name: _checked(name, value) for name, value in wanted.items()})
        if new.metric != self.metric and "alpha" not in wanted and "alpha" in new.options():
            new = replace(new, alpha=float(inspect.signature(scoring.METRICS[new.metric]).parameters["alpha"].default))
        return new

    def options(self, name: str = "") -> list[str]:
        """Which of bins, k and alpha a metric has."""
        have = inspect.signature(scoring.METRICS[name or self.metric]).parameters
        return [option for option in OPTIONS if option in have]

    def configured(self, name: str) -> scoring.Metric:
        """A metric as it is set."""
        metric = scoring.configured(name, bins=self.bins, k=self.k, alpha=self.alpha)
        return metric if self.first else scoring.without_first(metric)

    def scored_by(self, name: str) -> tuple:
        """What the scores by a metric depend on."""
        return (self.calibration_text, name, self.first, *(getattr(self, option) for option in self.options(name)))

    @property
    def entropy(self) -> str:
        """The estimator of the entropy curve."""
        return self.metric if scoring.is_entropy(scoring.METRICS[self.metric]) else CURVE

    @property
    def measure(self) -> str:
        """The metric in words, with its options."""
        options = ", ".join(f"{option} {getattr(self, option):g}" for option in self.options())
        return self.metric.replace("_", " ") + f" ({options})" * bool(options) + " without first tokens" * (not self.first)

    @property
    def calibration_text(self) -> tuple[str, str]:
        """The source of the calibration windows, or the person's own text; the other is empty."""
        return ("", self.pasted) if self.role == "ranking" else (self.text, "")

    @property
    def evaluation_text(self) -> tuple[str, str]:
        """The same for the evaluation windows."""
        return ("", self.pasted) if self.role == "evaluation" else (DEFAULT_TEXT, "")

    @property
    def calibration(self) -> str:
        """The calibration text in words."""
        return self.calibration_text[0] or "your own text"

    @property
    def evaluation(self) -> str:
        """The evaluation text in words."""
        return f"held-out {DEFAULT_TEXT}" if self.evaluation_text[0] else "your own text"


def _checked(name: str, value: object) -> object:
    """The value that a setting gets, a number where it is one."""
    if value not in CHOICES.get(name, [value]):
        raise ValueError(f"{name} cannot be {value!r}: choose one of {', '.join(CHOICES[name])}")
    if name not in OPTIONS:
        return value
    kind, least, greatest = OPTIONS[name]
    with suppress(ValueError):
        if least <= (number := kind(str(value))) <= greatest:
            return number
    what = "a whole number" if kind is int else "a number"
    raise ValueError(f"{name} must be {what} from {least} to {greatest}, not {str(value)[:20]!r}")
