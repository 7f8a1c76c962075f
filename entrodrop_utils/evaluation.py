"""The cost of dropping on held-out text: loss, perplexity and divergence from the dense model, with standard errors."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from . import cache
from .dropping import Repair, dropped
from .families.decoder import decoder_layers
from .families.self_check import evaluation_mode, measuring
from .layerwise import MAX_TOKENS, Bar, DropSet, LayerwiseForward, distinct_sets, set_name
from .processes import share_of, split_map
from .progress import progress, report_step
from .residual import SubBlock, check_tokens

ROWS = 4  # of logits that are compared at a time, in memory that stays in the processor's cache
MAX_BYTES = 1 << 30  # of the states inside pruned models that IncrementalLosses holds


@dataclass(frozen=True)
class Estimate:
    """A mean over windows, in nats per token, and its standard error over windows."""

    mean: float
    stderr: float
    per_window: Float[np.ndarray, " window"]

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(self.mean)

    @classmethod
    def of(cls, per_window: Float[np.ndarray, " window"]) -> "Estimate":
        """The estimate from one value per window; a single window has no standard error (nan)."""
        n = len(per_window)
        return cls(float(per_window.mean()), float(per_window.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan, per_window)

    def __sub__(self, other: "Estimate") -> "Estimate":
        """How much larger this is, window by window: both are of the same windows."""
        return Estimate.of(self.per_window - other.per_window)

    def __format__(self, spec: str) -> str:
        """The mean and its standard error, ``+0.50 ± 0.25`` under ``+.2f``."""
        spec = spec or ".4f"
        return f"{self.mean:{spec}} ± {self.stderr:{spec.lstrip('+')}}"

    def __str__(self) -> str:
        return format(self)


class Cost(NamedTuple):
    """The loss of a pruned model and its divergence from the dense one."""

    loss: Estimate
    kl: Estimate


def _check_windows(model: PreTrainedModel, windows: Tensor) -> None:
    check_tokens(model, windows)
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"need windows of at least two tokens (window, token), got shape {tuple(windows.shape)}")


def check_counted(windows: Tensor, counted: Tensor | None) -> None:
    """Raises ValueError unless ``counted`` has one truth value for each token, and a true one after the first in each window."""
    if counted is None:
        return
    if counted.shape != windows.shape or counted.dtype != torch.bool:
        raise ValueError(
            f"need a truth value for each of the tokens {tuple(windows.shape)}, got {counted.dtype} of {tuple(counted.shape)}"
        )
    if not (enough := counted[:, 1:].any(1)).all():
        raise ValueError(f"in window {int(enough.int().argmin())} of {len(windows)} no token counts: take longer windows")


def _batches(windows: Tensor) -> tuple[Tensor, ...]:
    return windows.split(max(1, MAX_TOKENS // windows.shape[1]))


class _Reference:
    """The dense model's predictions for one batch, with which a pruned model's logits are compared.

    Args:
        counted: the tokens whose prediction counts; None for all.
    """

    def __init__(
        self,
        ids: Int[Tensor, "batch token"],
        dense: Float[Tensor, "batch token vocab"],
        counted: Bool[Tensor, "batch token"] | None = None,
    ):
        self.targets = ids[:, 1:, None]
        self.counted = None if counted is None else counted[:, 1:].to(ids.device)
        log_p = dense[:, :-1].float().log_softmax(-1)
        self.p = log_p.exp()
        self.negentropy = torch.linalg.vecdot(self.p, log_p)
        # Not exactly 1 in float32; summed like the other terms, its rounding error cancels
        self.total = torch.linalg.vecdot(self.p, torch.ones_like(self.p))

    def compare(self, logits: Float[Tensor, "batch token vocab"]) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Mean next-token loss and mean KL(dense || pruned) of each window, over the tokens that count."""
        log_normaliser, expected = torch.empty_like(self.total), torch.empty_like(self.total)
        memory = self.p.new_empty(ROWS, self.p.shape[-1])
        for window, rows in enumerate(logits[:, :-1]):
            for start in range(0, len(rows), ROWS):
                part = slice(start, start + ROWS)
                values = rows[part].float()
                largest, own = values.amax(-1, keepdim=True), memory[: len(values)]
                log_normaliser[window, part] = torch.sub(values, largest, out=own).exp_().sum(-1).log_() + largest[:, 0]
                expected[window, part] = torch.mul(self.p[window, part], values, out=own).sum(-1)
        nll = log_normaliser - logits[:, :-1].gather(-1, self.targets).squeeze(-1).float()
        kl = self.negentropy - expected + log_normaliser * self.total
        if self.counted is None:
            return nll.mean(-1), kl.mean(-1)
        count = self.counted.sum(-1)
        return (nll * self.counted).sum(-1) / count, (kl * self.counted).sum(-1) / count


@measuring
def perplexity(model: PreTrainedModel, windows: Int[Tensor, "window token"]) -> Estimate:
    """Mean next-token loss (``.mean``, nats per token) with its standard error over windows, and ``.perplexity``.

    Raises:
        ValueError: windows of fewer than two tokens.

    >>> loss = perplexity(model, windows)
    >>> loss.perplexity == math.exp(loss.mean), len(loss.per_window) == len(windows)
    (True, True)
    """
    _check_windows(model, windows)
    losses = []
    for ids in progress(_batches(windows), "perplexity"):
        ids = ids.to(model.device)
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        # Flat: over a transposed view, float32 sums the vocabulary term by term, with an error of 1e-4 nats
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        losses.append(nll.view(len(ids), -1).mean(-1))
    return Estimate.of(torch.cat(losses).double().cpu().numpy())


@measuring
def divergence(dense_model: PreTrainedModel, model: PreTrainedModel, windows: Int[Tensor, "window token"]) -> Estimate:
    """Mean KL(dense || pruned) of the next-token distributions, nats per token, with its standard error over windows."""
    _check_windows(model, windows)
    divergences = []
    with evaluation_mode(model):
        for ids in progress(_batches(windows), "divergence"):
            ids = ids.to(dense_model.device)
            reference = _Reference(ids, dense_model(ids, use_cache=False).logits)
            divergences.append(reference.compare(model(ids.to(model.device), use_cache=False).logits.to(ids.device))[1])
    return Estimate.of(torch.cat(divergences).double().cpu().numpy())


@measuring
def losses_by_set(
    model: PreTrainedModel,
    windows: Int[Tensor, "window token"],
    sets: Iterable[Sequence[SubBlock]],
    repair: Repair | None = None,
) -> pd.DataFrame:
    """Loss and divergence of the model without each of many sets of sub-blocks, repaired if a repair is given.

    Batches of windows are split over the processes (``processes.split_map``). Two sets that agree on the first n layers share the
    states up to there. Repeated sets, and sets that were evaluated before on this model and text, are not evaluated again. The
    order inside a set does not matter; the empty set is the dense model.

    Returns:
        set (the sorted tuple of its sub-blocks), window, nll, kl (nats per token).
    """
    _check_windows(model, windows)
    named, batches = {set_name(drop_set): drop_set for drop_set in distinct_sets(model, sets)}, _batches(windows)
    base = cache.repaired(cache.model_key(model, "evaluation"), repair)
    with Bar(len(named) * len(share_of(len(batches))), "evaluating sets") as done:

        def measured(batch: int) -> pd.DataFrame:
            ids = batches[batch]

            def compute(missing: list[str]) -> pd.DataFrame:
                drop_sets = [named[name] for name in missing]
                return _losses(model, ids.to(model.device), drop_sets, repair, done)

            losses = cache.rows_by_set("losses", cache.subkey(base, cache.tensor_digest(ids)), named, compute, done)
            return losses.assign(window=losses.window + batch * len(batches[0]))

        table = pd.concat(split_map(measured, range(len(batches))), ignore_index=True)
    return table.assign(set=table.set.map(named))


def _losses(
    model: PreTrainedModel, ids: Int[Tensor, "window token"], sets: list[DropSet], repair: Repair | None, done
) -> pd.DataFrame:
    """Loss and divergence of every window of one batch without each set: set (its name), window, nll, kl."""
    layerwise, rows = LayerwiseForward(model, ids, repair), []
    reference = _Reference(ids, layerwise.logits(layerwise.last))
    for drop_set, state in layerwise.last_states(sets):
        nll, kl = reference.compare(layerwise.logits(state))
        rows.extend((set_name(drop_set), i, float(nll[i]), float(kl[i])) for i in range(len(ids)))
        done()
    return pd.DataFrame(rows, columns=["set", "window", "nll", "kl"])


class IncrementalLosses:
    """Loss and divergence of one set of sub-blocks after another on the same windows; later sets reuse the states of earlier ones.

    It holds the dense model's states and predictions, every result, and the newest states inside pruned models.

    Args:
        max_bytes: of the states inside pruned models.
        counted: the tokens whose prediction counts, at least one after the first in each window; None for all.
    Raises:
        ValueError: windows of fewer than two tokens, or as ``check_counted``.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: PreTrainedModel,
        windows: Int[Tensor, "window token"],
        max_bytes: int = MAX_BYTES,
        counted: Bool[Tensor, "window token"] | None = None,
    ):
        _check_windows(model, windows)
        check_counted(windows, counted)
        self.model, self.states, self.max_bytes = model, {}, max_bytes
        with evaluation_mode(model):
            batches = _batches(windows)
            self.forwards = [LayerwiseForward(model, ids.to(model.device)) for ids in progress(batches, "the dense model")]
            self.references, values = [], []
            parts = [None] * len(batches) if counted is None else _batches(counted)
            # One batch of logits at a time: they are as large as the predictions that stay
            for forward, part in zip(self.forwards, parts, strict=True):
                logits = forward.logits(forward.last)
                self.references.append(_Reference(forward.ids, logits, part))
                values.append(self.references[-1].compare(logits))
            self.results = {(): self._estimates(values)}

    @torch.inference_mode()
    def __call__(self, sub_blocks: Iterable[SubBlock]) -> Cost:
        """Loss and divergence without these sub-blocks. Raises ValueError as ``dropped``."""
        drop_set = tuple(sorted(sub_blocks))
        if drop_set not in self.results:
            with dropped(self.model, drop_set):  # refuses a set that cannot be dropped
                pass
            with evaluation_mode(self.model):
                values = [
                    reference.compare(forward.logits(self._last_state(i, drop_set)))
                    for i, (forward, reference) in enumerate(zip(self.forwards, self.references, strict=True))
                ]
                self.results[drop_set] = self._estimates(values)
        return self.results[drop_set]

    @staticmethod
    def _estimates(values: Iterable[tuple[Tensor, Tensor]]) -> Cost:
        """Loss and divergence of all windows, from those of each batch."""
        return Cost(*(Estimate.of(torch.cat(value).double().cpu().numpy()) for value in zip(*values, strict=True)))

    def _last_state(self, i: int, drop_set: DropSet) -> Tensor:
        """The state of batch ``i`` after the last layer, from the deepest layer whose input is known."""
        forward, depth = self.forwards[i], len(decoder_layers(self.model))
        above = [tuple(s for s in drop_set if s.layer < layer) for layer in range(depth + 1)]  # dropped before each layer
        layer = next(n for n in range(depth, -1, -1) if not above[n] or (i, n, above[n]) in self.states)
        state = self.states[i, layer, above[layer]] if above[layer] else forward.dense(layer)
        for n in range(layer, depth):
            report_step("perplexity and KL", i * depth + n, len(self.forwards) * depth)
            state = forward.layer(n, state, tuple(s for s in drop_set if s.layer == n))
            if above[n + 1]:
                self.states[i, n + 1, above[n + 1]] = state
        while len(self.states) * state.nbytes > self.max_bytes:
            del self.states[next(iter(self.states))]
        return state


class CachedLosses:
    """``IncrementalLosses`` whose results stay on disk: the model runs only for sets that no earlier run measured on this text."""

    def __init__(self, model: PreTrainedModel, windows: Int[Tensor, "window token"], max_bytes: int = MAX_BYTES):
        self.model, self.windows, self.max_bytes = model, windows, max_bytes
        self._entry = cache.subkey(cache.model_key(model, "evaluation"), cache.tensor_digest(windows))

    @cached_property
    def incremental(self) -> IncrementalLosses:
        """What measures; it holds the states."""
        return IncrementalLosses(self.model, self.windows, self.max_bytes)

    def __call__(self, sub_blocks: Iterable[SubBlock]) -> Cost:
        """Loss and divergence without these sub-blocks. Raises ValueError as ``dropped``."""
        drop_set = tuple(sorted(sub_blocks))

        def compute(names: list[str]) -> pd.DataFrame:
            loss, kl = self.incremental(drop_set)
            return pd.DataFrame({"set": names[0], "nll": loss.per_window, "kl": kl.per_window})

        rows = cache.rows_by_set("incremental", self._entry, [set_name(drop_set)], compute, lambda: None)
        return Cost(Estimate.of(rows.nll.to_numpy()), Estimate.of(rows.kl.to_numpy()))
