"""The settings of the explorer: one value, checked when it is changed, that every result carries with it."""

import functools
import inspect
from dataclasses import dataclass, replace
from typing import Literal

from .. import scoring
from ..profile import DEFAULT_MODEL, DEFAULT_TEXT
from ..residual import KINDS, Kind

PROMPT = "The entropy of a random variable is"
CURVE = "bucket"  # the entropy curve where the metric is a similarity and has none of its own
OPTIONS = {"bins": (int, 2, 1000), "k": (int, 1, 1000), "alpha": (float, 0.05, 100)}  # of a metric: type, least, greatest
ROLES = ("reading", "ranking", "evaluation")


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
    prompt: str = PROMPT
    seed: int = 0

    def changed(self, **wanted: object) -> "Settings":
        """These settings with some changed; a metric that is changed comes with its own default order.

        Raises:
            ValueError: a value that a setting cannot have, with those that it can.

        >>> Settings().changed(metric="knn", k="30").k
        30
        """
        known = {"kind": KINDS, "metric": tuple(scoring.METRICS), "role": ROLES}
        for name, value in list(wanted.items()):
            if name in known and value not in known[name]:
                raise ValueError(f"{name} cannot be {value!r}: choose one of {', '.join(known[name])}")
            if name in OPTIONS:
                wanted[name] = _number(name, value, *OPTIONS[name])
        new = replace(self, **wanted)
        if new.metric != self.metric and "alpha" not in wanted and "alpha" in new.options():
            new = replace(new, alpha=float(inspect.signature(scoring.METRICS[new.metric]).parameters["alpha"].default))
        return new

    def options(self, name: str = "") -> list[str]:
        """Which of bins, k and alpha a metric has."""
        have = inspect.signature(scoring.METRICS[name or self.metric]).parameters
        return [option for option in OPTIONS if option in have]

    def configured(self, name: str = "") -> scoring.Metric:
        """A metric as it is set."""
        name = name or self.metric
        metric = functools.partial(scoring.METRICS[name], **{option: getattr(self, option) for option in self.options(name)})
        return metric if self.first else scoring.without_first(metric)

    @property
    def entropy(self) -> str:
        """The estimator of the entropy curve."""
        return self.metric if scoring.is_entropy(scoring.METRICS[self.metric]) else CURVE

    @property
    def measure(self) -> str:
        """The metric in words, with its options."""
        options = ", ".join(f"{option} {getattr(self, option):g}" for option in self.options())
        return (
            self.metric.replace("_", " ") + (f" ({options})" if options else "") + ("" if self.first else " without first tokens")
        )

    @property
    def calibration_key(self) -> tuple[str, str]:
        """What the calibration windows depend on: the source, or one's own text."""
        return ("", self.pasted) if self.role == "ranking" else (self.text, "")

    @property
    def source(self) -> str:
        """What the evaluation windows depend on: one's own text, or empty for the default."""
        return self.pasted if self.role == "evaluation" else ""

    def scored_by(self, name: str) -> tuple:
        """What the scores by a metric depend on."""
        return (self.calibration_key, name, self.first, *(getattr(self, option) for option in self.options(name)))

    @property
    def calibration(self) -> str:
        """The calibration text in words."""
        return "your own text" if self.role == "ranking" else self.text

    @property
    def evaluation(self) -> str:
        """The evaluation text in words."""
        return "your own text" if self.role == "evaluation" else f"held-out {DEFAULT_TEXT}"


def _number(name: str, value: object, kind: type, least: float | int, greatest: float | int) -> float | int:
    try:
        number = kind(str(value))
    except ValueError:
        number = None
    if number is None or not least <= number <= greatest:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} must be {what} from {least} to {greatest}, not {str(value)[:20]!r}")
    return number
