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
from ..evaluation import CachedLosses, Cost, Estimate, perplexity
from ..generation import ModelSize, Reading, continue_text, decoding_rate, model_size, read_text
from ..layerwise import DropSet
from ..models import check_model, load_model
from ..progress import report_step
from ..repairing import repair
from ..residual import KINDS, SubBlock, find
from ..selection import PUBLISHED_PROTECTED, matched_draws, one_shot, protected_layers
from ..statistics import Interval, share_interval
from .settings import Settings

NEW_TOKENS = 24  # of generated text
DRAWS = 20  # random choices of one size that a choice is compared with
MAX_STATES = 256 << 20  # bytes of states inside pruned models that are kept for the next choice
NOTHING = Estimate(math.nan, math.nan, np.empty(0))  # what cannot be measured
# What a result depends on, where that is less than its arguments
KEYS: dict[str, Callable[..., object]] = {
    "cost": lambda drop, settings: (drop, settings.evaluation_text),
    "curve": lambda drop, settings: (drop, settings.scored_by(settings.entropy)),
    "scores": lambda settings, metric: settings.scored_by(metric),
    "repaired": lambda drop, settings, made: (drop, made.calibration_text, settings.evaluation_text),
}


class Scores(NamedTuple):
    """One metric of every sub-block: the table of ``score``, its means, and the places among those of a kind, 1 the least."""

    table: pd.DataFrame
    mean: dict[SubBlock, float]
    rank: dict[SubBlock, int]


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
        self.protected = protected_layers(PUBLISHED_PROTECTED, self.depth)
        self._model_lock, self._queue = threading.Lock(), threading.Lock()
        self._results: dict[tuple, object] = {}
        # Of the evaluation texts the last two stay: their states take much memory
        windows = functools.partial(self._windows, part="evaluation")
        self._losses = functools.lru_cache(2)(lambda source: CachedLosses(self.model, windows(source), MAX_STATES))
        pools = {kind: [s for s in self.sub_blocks[kind] if s.layer not in self.protected] for kind in KINDS}
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

    def calibration(self, settings: Settings) -> Int[Tensor, "sequence token"]:
        """The windows that sub-blocks are ranked on."""
        return self._windows(settings.calibration_text, "calibration")

    def evaluation(self, settings: Settings) -> Int[Tensor, "sequence token"]:
        """The windows that a cost is measured on."""
        return self._windows(settings.evaluation_text, "evaluation")

    def _windows(self, source: tuple[str, str], part: str) -> Int[Tensor, "sequence token"]:
        named, pasted = source
        if not named:
            return text.pasted_windows(pasted, self.tokenizer, self.n_sequences, self.n_tokens)
        return text.windows(named, part, self.tokenizer, self.n_sequences, self.n_tokens, self.seed)

    @computed_once
    def scores(self, settings: Settings, metric: str) -> Scores:
        """A metric, as it is set, of every sub-block; what was measured before comes from the cache on disk."""
        table = cached_score(self.model, self.calibration(settings), {metric: settings.configured(metric)})
        mean = {SubBlock(int(layer), kind): value for (kind, layer), value in table.groupby(["kind", "layer"]).value.mean().items()}
        orders = [one_shot(table, metric, kind, protected=()) for kind in KINDS if self.sub_blocks[kind]]
        return Scores(table, mean, {s: place for order in orders for place, s in enumerate(order, start=1)})

    @computed_once
    def curve(self, drop: Sequence[SubBlock], settings: Settings) -> Float[np.ndarray, " endpoint"]:
        """Mean entropy at each of the 2 L + 1 endpoints, nats; a dropped sub-block passes the stream unchanged."""
        return entropy_curve(self.model, self.calibration(settings), settings.configured(settings.entropy), drop)

    @computed_once
    def cost(self, drop: Sequence[SubBlock], settings: Settings) -> Cost:
        """Loss and divergence from the dense model on the evaluation text."""
        return self._losses(settings.evaluation_text)(drop)

    def increase(self, drop: Sequence[SubBlock], settings: Settings) -> Estimate | None:
        """How much more loss than the dense model, window by window, where both were measured."""
        dense, cost = self.known("cost", (), settings), self.known("cost", drop, settings)
        return cost.loss - dense.loss if cost and dense else None

    def draws(self, drop: Sequence[SubBlock]) -> list[DropSet]:
        """Random choices of as many sub-blocks of the same kinds, from the layers that are not protected."""
        kinds = [kind for _, kind in drop]
        return self._sets(*map(kinds.count, KINDS))

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
            return decoding_rate(model, self.tokenizer, Settings.prompt)

    @computed_once
    def repaired(self, drop: Sequence[SubBlock], settings: Settings, made: Settings) -> Estimate:
        """Loss with a linear repair, fitted on the calibration text of ``made``; ``NOTHING`` where there is none, as for blocks."""
        if drop and not any(s.kind == "block" for s in drop):
            with suppress(ValueError):  # a text of too few windows
                maps = repair(self.model, drop, self.calibration(made))
                with dropped(self.model, drop, maps) as model:
                    return perplexity(model, self.evaluation(settings))
        return NOTHING

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
