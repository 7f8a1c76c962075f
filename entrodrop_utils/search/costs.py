"""What every search method shares: costs of sets on calibration text, counted in forward passes, and the ranking it returns."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from .. import cache
from ..dropping import check_drop_set
from ..evaluation import IncrementalLosses, check_counted
from ..families.decoder import decoder_layers
from ..families.self_check import evaluation_mode
from ..layerwise import MAX_TOKENS, DropSet, set_name
from ..progress import report_step
from ..residual import SubBlock, check_tokens, find

MEASURES = ("kl", "nll")
Kinds = str | Sequence[str]


class SearchResult(NamedTuple):
    """Sub-blocks in the order in which a method drops them, and what the search spent.

    Attributes:
        order: first dropped first. A method that searches the set of one size has no order inside it: its set is sorted.
        passes: forward passes of one calibration window through the whole model. Layers that several sets share count once, a
            dropped layer not at all, a backward pass as two.
        tokens: the passes times the tokens of their windows.
    """

    order: list[SubBlock]
    passes: float
    tokens: float


def candidates(model: PreTrainedModel, kinds: Kinds) -> list[SubBlock]:
    """The sub-blocks of these kinds that can be dropped one at a time, in order of depth.

    Raises:
        ValueError: an unknown kind, blocks together with their parts, or none that can be dropped.
    """
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if "block" in kinds and len(kinds) > 1:
        raise ValueError(f"cannot search {' and '.join(kinds)} together: a block is its attention layer and its MLP")
    present = sorted(sub_block for kind in kinds for sub_block in find(model, kind))
    if not (possible := [sub_block for sub_block in present if fits(model, [sub_block])]):
        raise ValueError(f"none of the {len(present)} sub-blocks of kind {' or '.join(kinds)} can be dropped from this model")
    return possible


def fits(model: PreTrainedModel, sub_blocks: Iterable[SubBlock]) -> bool:
    """Whether these sub-blocks can be dropped together: one attention layer must stay."""
    try:
        check_drop_set(model, sub_blocks)
    except ValueError:
        return False
    return True


def take(model: PreTrainedModel, order: Iterable[SubBlock], n: int | None) -> list[SubBlock]:
    """The first ``n`` sub-blocks of an order that can be dropped together, or all of them.

    Raises:
        ValueError: there are fewer than ``n``, or ``n`` is negative.
    """
    order, taken = list(order), []
    if n is not None and n < 0:
        raise ValueError(f"cannot drop {n} sub-blocks: name a number from 0")
    for sub_block in order:
        if len(taken) != n and fits(model, [*taken, sub_block]):
            taken.append(sub_block)
    if n is not None and len(taken) < n:
        raise ValueError(f"cannot drop {n} of {len(order)} sub-blocks: at most {len(taken)} can be dropped together")
    return taken


def shared_passes(sets: Iterable[DropSet], n_layers: int) -> float:
    """Forward passes of one window that the sets cost together: layers that they share count once, dropped blocks not at all."""
    nodes = {
        (layer, tuple(s for s in drop_set if s.layer <= layer))
        for drop_set in sets
        for layer in range(n_layers)
        if SubBlock(layer, "block") not in drop_set
    }
    return len(nodes) / n_layers


class SetCosts:
    """The cost of sets of sub-blocks on calibration windows: KL(dense || pruned), or the increase of the loss, nats per token.

    Sets that agree on the first layers share them, and no set is measured twice. What is in the on-disk cache counts as spent, so
    that a second run reports the same passes.

    Args:
        measure: "kl" or "nll".
        counted: the tokens whose prediction counts, such as those of ``text.tokens_with``; None for all.
    Raises:
        ValueError: an unknown measure, or as ``check_counted``.

    >>> costs = SetCosts(model, windows)
    >>> costs([[SubBlock(1, "mlp")], [SubBlock(2, "mlp")]]).shape == (2, len(windows))
    True
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Int[Tensor, "window token"],
        measure: str = "kl",
        counted: Bool[Tensor, "window token"] | None = None,
    ):
        if measure not in MEASURES:
            raise ValueError(f"unknown measure {measure!r}: choose one of {', '.join(MEASURES)}")
        check_tokens(model, windows)
        check_counted(windows, counted)
        self.model, self.windows, self.measure, self.counted = model, windows, measure, counted
        self.n_layers = len(decoder_layers(model))
        self.passes = float(len(windows))  # the dense model, with which all are compared
        self.costs: dict[DropSet, np.ndarray] = {}
        self.key = cache.model_key(model, "evaluation")
        if counted is not None:
            self.key = cache.subkey(self.key, cache.tensor_digest(counted))

    @property
    def tokens(self) -> float:
        """The tokens of the passes so far."""
        return self.passes * self.windows.shape[1]

    @cached_property
    def dense(self) -> IncrementalLosses:
        """The dense model's states and predictions, computed when a set is first measured."""
        return IncrementalLosses(self.model, self.windows, counted=self.counted)

    def __call__(self, sets: Iterable[Iterable[SubBlock]]) -> Float[np.ndarray, "set window"]:
        """The cost of every set in every window. Raises ValueError as ``dropped``."""
        drop_sets = [tuple(sorted(sub_blocks)) for sub_blocks in sets]
        if new := [drop_set for drop_set in dict.fromkeys(drop_sets) if drop_set not in self.costs]:
            for drop_set in new:
                check_drop_set(self.model, drop_set)
            self.passes += len(self.windows) * shared_passes(new, self.n_layers)
            self._measure({set_name(drop_set): drop_set for drop_set in ((), *new)})
        return np.stack([self.costs[drop_set] for drop_set in drop_sets])

    def ranking(self, order: list[SubBlock]) -> SearchResult:
        """An order with what was spent so far."""
        return SearchResult(order, self.passes, self.tokens)

    def mean(self, sets: Iterable[Iterable[SubBlock]]) -> Float[np.ndarray, "set"]:
        """The mean over windows of every set's cost."""
        return self(sets).mean(1)

    def _measure(self, named: Mapping[str, DropSet]) -> None:
        """Read or compute the losses of these sets, the empty one among them."""
        tables = []
        for number, ids in enumerate(self.windows.split(max(1, MAX_TOKENS // self.windows.shape[1]))):  # as losses_by_set

            def compute(missing: list[str], number: int = number) -> pd.DataFrame:
                return self._losses(number, [named[name] for name in missing])

            entry = cache.subkey(self.key, cache.tensor_digest(ids))
            rows = cache.rows_by_set("losses", entry, named, compute, lambda: None)
            tables.append(rows.pivot_table(self.measure, "set", "window"))
        losses = np.hstack([table.loc[list(named)] for table in tables])
        dense = losses[0] if self.measure == "nll" else 0.0
        self.costs |= zip(named.values(), losses - dense, strict=True)

    @torch.inference_mode()
    def _losses(self, number: int, sets: list[DropSet]) -> pd.DataFrame:
        """set (its name), window (of the batch), nll, kl."""
        forward, reference, rows = self.dense.forwards[number], self.dense.references[number], []
        with evaluation_mode(self.model):
            for done, (drop_set, state) in enumerate(forward.last_states(sets)):
                report_step("costs of sets", done, len(sets))
                nll, kl = reference.compare(forward.logits(state))
                rows += [(set_name(drop_set), i, float(nll[i]), float(kl[i])) for i in range(len(nll))]
        return pd.DataFrame(rows, columns=["set", "window", "nll", "kl"])
