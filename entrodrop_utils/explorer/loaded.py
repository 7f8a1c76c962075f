"""One model in memory with all that was measured on it: nothing is measured twice."""

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import text
from ..cached_scoring import cached_score, entropy_curve
from ..dropping import dropped
from ..evaluation import Estimate, IncrementalLosses, perplexity
from ..generation import ModelSize, Reading, continue_text, decoding_rate, model_size, read_text
from ..layerwise import DropSet
from ..models import check_model, load_model
from ..profile import DEFAULT_TEXT
from ..progress import report_step
from ..repairing import repair
from ..residual import KINDS, SubBlock, find
from ..selection import PUBLISHED_PROTECTED, matched_draws, one_shot, protected_layers
from ..statistics import Interval, share_interval
from .settings import PROMPT, Settings

NEW_TOKENS = 24  # of generated text
DRAWS = 20  # random choices of one size that a choice is compared with
MAX_STATES = 256 << 20  # bytes of states inside pruned models that are kept for the next choice
NOTHING = Estimate(math.nan, math.nan, np.empty(0))  # what cannot be measured
# What a result depends on, where that is less than its arguments
KEYS: dict[str, Callable[..., object]] = {
    "cost": lambda drop, settings: (drop, settings.source),
    "curve": lambda drop, settings: (drop, settings.scored_by(settings.entropy)),
    "ranks": lambda settings, metric: settings.scored_by(metric),
    "scores": lambda settings, metrics: tuple(map(settings.scored_by, metrics)),
    "repaired": lambda drop, settings, made: (drop, made.calibration_key, settings.source),
}


class Cost(NamedTuple):
    """The cost of a selection on evaluation text."""

    loss: Estimate
    kl: Estimate


def _key(what: str, arguments: Sequence) -> tuple:
    """What a result of the method ``what`` is kept under. The order of sub-blocks does not matter."""
    plain = [tuple(sorted(value)) if isinstance(value, (list, tuple)) else value for value in arguments]
    return what, KEYS[what](*plain) if what in KEYS else tuple(plain)


def computed_once(method: Callable) -> Callable:
    """The method computes alone with the model, and each result only once; named arguments do not change the result."""

    @functools.wraps(method)
    def kept(self, *arguments, **how):
        key = _key(method.__name__, arguments)
        with self.alone():
            if key not in self._results:
                with torch.inference_mode():
                    self._results[key] = method(self, *arguments, **how)
            return self._results[key]

    return kept


class LoadedModel:
    """A model, its tokenizer, and its results; ``known`` answers at once, all other methods may take a while.

    These wait for each other, as a model without some sub-blocks is the model itself for a while.

    Raises:
        ValueError: a model that does not exist, or that predicts no next token.
        ModelUnavailable: the model is not available.
    """

    def __init__(self, name: str, n_sequences: int, n_tokens: int, seed: int = 0):
        check_model(name)
        report_step(f"loading {name}", 0, None)
        self.name, self.n_sequences, self.n_tokens, self.seed = name, n_sequences, n_tokens, seed
        self.model, self.tokenizer = load_model(name)
        if not self.model.can_generate():
            raise ValueError(
                f"{name} is an encoder ({type(self.model).__name__}): it predicts no next token, so there is no loss to show; "
                "notebook A2 measures encoders"
            )
        self.sub_blocks = {kind: find(self.model, kind) for kind in KINDS}
        self.depth = len(self.sub_blocks["block"])
        self._model_lock, self._queue = threading.Lock(), threading.Lock()
        self._losses: dict[str, IncrementalLosses] = {}  # by evaluation text
        self._results: dict[tuple, object] = {}
        protected = protected_layers(PUBLISHED_PROTECTED, self.depth)
        pools = {kind: [s for s in self.sub_blocks[kind] if s.layer not in protected] for kind in KINDS}
        self._sets = functools.cache(lambda *counts: matched_draws(dict(zip(KINDS, counts, strict=True)), pools, DRAWS, seed))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Alone with the model. Who waits holds the queue, so that a thread with much to do cannot come back before it."""
        with self._queue:
            self._model_lock.acquire()
        try:
            yield
        finally:
            self._model_lock.release()

    def known(self, what: str, *arguments: object):
        """The result of the method ``what`` with these arguments; None while there is none."""
        return self._results.get(_key(what, arguments))

    # --- text

    def calibration(self, settings: Settings) -> Int[Tensor, "sequence token"]:
        """The windows that sub-blocks are ranked on."""
        return self._windows(settings, "ranking", settings.text, "calibration")

    def evaluation(self, settings: Settings) -> Int[Tensor, "sequence token"]:
        """The windows that a cost is measured on."""
        return self._windows(settings, "evaluation", DEFAULT_TEXT, "evaluation")

    def _windows(self, settings: Settings, role: str, source: str, part: str) -> Int[Tensor, "sequence token"]:
        if settings.role == role:
            return text.pasted_windows(settings.pasted, self.tokenizer, self.n_sequences, self.n_tokens)
        return text.windows(source, part, self.tokenizer, self.n_sequences, self.n_tokens, self.seed)

    # --- ranking

    @computed_once
    def scores(self, settings: Settings, metrics: Sequence[str]) -> pd.DataFrame:
        """These metrics, as they are set, of every sub-block; those measured before come from the cache on disk."""
        return cached_score(self.model, self.calibration(settings), {name: settings.configured(name) for name in metrics})

    @computed_once
    def ranks(self, settings: Settings, metric: str) -> dict[SubBlock, int]:
        """The place of every sub-block among those of its kind, 1 for the most redundant, by a metric as it is set."""
        scores = cached_score(self.model, self.calibration(settings), {metric: settings.configured(metric)})
        return {s: rank for kind in KINDS for rank, s in enumerate(one_shot(scores, metric, kind, protected=()), start=1)}

    @computed_once
    def curve(self, drop: Sequence[SubBlock], settings: Settings) -> Float[np.ndarray, "endpoint"]:
        """Mean entropy at each of the 2 L + 1 endpoints, nats; a dropped sub-block passes the stream unchanged."""
        return entropy_curve(self.model, self.calibration(settings), settings.configured(settings.entropy), drop)

    # --- cost

    @computed_once
    def cost(self, drop: Sequence[SubBlock], settings: Settings) -> Cost:
        """Loss and divergence from the dense model on the evaluation text."""
        if settings.source not in self._losses:
            if old := [source for source in self._losses if source]:  # of the texts, only the default and the newest stay
                self._losses.pop(old[0]).keep()
            self._losses[settings.source] = IncrementalLosses(self.model, self.evaluation(settings), MAX_STATES)
        return Cost(*self._losses[settings.source](drop))

    def increase(self, drop: Sequence[SubBlock], settings: Settings) -> Estimate | None:
        """How much more loss than the dense model, window by window, where both were measured."""
        dense, cost = self.known("cost", (), settings), self.known("cost", drop, settings)
        return Estimate.of(cost.loss.per_window - dense.loss.per_window) if cost and dense else None

    def keep(self) -> None:
        """Write the costs that are new since the last call to the cache on disk."""
        for losses in list(self._losses.values()):
            losses.keep()

    def draws(self, drop: Sequence[SubBlock]) -> list[DropSet]:
        """Random choices of as many sub-blocks of the same kinds, from the layers that are not protected."""
        kinds = [kind for _, kind in drop]
        return self._sets(*(kinds.count(kind) for kind in KINDS))

    def random_increases(self, drop: Sequence[SubBlock], settings: Settings) -> list[float]:
        """The loss increases of the random choices of this size that were measured; none before the fifth."""
        known = [more.mean for draw in self.draws(drop) if (more := self.increase(draw, settings))]
        return known if len(known) >= 5 else []

    def better_than(self, drop: Sequence[SubBlock], settings: Settings) -> tuple[Interval, int] | None:
        """The share of the random choices measured so far that cost more loss, and their number; None before the fifth."""
        own, others = self.increase(drop, settings), self.random_increases(drop, settings)
        return (share_interval(np.array(others) > own.mean), len(others)) if own and others else None

    @computed_once
    def size(self, drop: Sequence[SubBlock]) -> ModelSize:
        """Parameters, and bytes of keys and values per token."""
        with dropped(self.model, drop) as model:
            return model_size(model)

    @computed_once
    def speed(self, drop: Sequence[SubBlock]) -> float:
        """Tokens per second of greedy generation."""
        with dropped(self.model, drop) as model:
            return decoding_rate(model, self.tokenizer, PROMPT)

    @computed_once
    def repaired(self, drop: Sequence[SubBlock], settings: Settings, made: Settings) -> Estimate:
        """Loss on the evaluation text with a linear repair; nan where there is none, as for whole blocks.

        Args:
            made: the settings that the selection was made under; the repair is fitted on their calibration text.
        """
        if drop and not any(s.kind == "block" for s in drop):
            with suppress(ValueError):  # a text of too few windows
                maps = repair(self.model, drop, self.calibration(made))
                with dropped(self.model, drop, maps) as model:
                    return perplexity(model, self.evaluation(settings))
        return NOTHING

    # --- text that is generated and read

    @computed_once
    def continuation(self, drop: Sequence[SubBlock], prompt: str, hear: Callable[[str], None] = lambda _: None) -> str:
        """The greedy continuation of the prompt; ``hear`` is called with what there is of it after each token."""
        with dropped(self.model, drop) as model:
            return continue_text(model, self.tokenizer, prompt, NEW_TOKENS, hear)

    @computed_once
    def reading(self, drop: Sequence[SubBlock], said: str) -> Reading:
        """The loss of every token of a text and the likeliest next ones, without these sub-blocks."""
        with dropped(self.model, drop) as model:
            return read_text(model, self.tokenizer, said)
