"""What dropping costs on held-out text: loss, perplexity and divergence from the dense model, with standard errors."""

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from .dropping import dropped
from .progress import progress, step
from .sub_blocks import SubBlock, layers

KEPT = 1 << 30  # bytes of states inside pruned models that Remembered keeps
BATCH = 512  # tokens whose logits are held at a time: 100 MB at a vocabulary of 49,152


@dataclass(frozen=True)
class Estimate:
    """A mean over windows, in nats per token, and its standard error over windows."""

    mean: float
    stderr: float
    per_window: Float[np.ndarray, "window"]

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(self.mean)

    @classmethod
    def of(cls, per_window: Float[np.ndarray, "window"]) -> "Estimate":
        """The estimate from one value per window; one window alone has no standard error (nan)."""
        n = len(per_window)
        return cls(float(per_window.mean()), float(per_window.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan, per_window)

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.stderr:.4f}"


def _checked(windows: Tensor) -> None:
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"need windows of at least two tokens (window, token), got shape {tuple(windows.shape)}")


def _batches(windows: Tensor) -> tuple[Tensor, ...]:
    return windows.split(max(1, BATCH // windows.shape[1]))


class _Reference:
    """What the dense model says about one batch, and how a pruned model's logits compare with it."""

    def __init__(self, ids: Int[Tensor, "batch token"], dense: Float[Tensor, "batch token vocab"]):
        self.targets = ids[:, 1:, None]
        log_p = dense[:, :-1].float().log_softmax(-1)
        self.p = log_p.exp()
        self.negentropy = torch.linalg.vecdot(self.p, log_p)
        # Not exactly 1 in float32, and what it lacks is multiplied by the normaliser: summed the same way, it cancels
        self.total = torch.linalg.vecdot(self.p, torch.ones_like(self.p))

    def compare(self, logits: Float[Tensor, "batch token vocab"]) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
        """Mean next-token loss and mean KL(dense || pruned) of each window."""
        logits = logits[:, :-1].float()
        log_normaliser = torch.logsumexp(logits, -1)
        nll = log_normaliser - logits.gather(-1, self.targets).squeeze(-1)
        kl = self.negentropy - torch.linalg.vecdot(self.p, logits) + log_normaliser * self.total
        return nll.mean(-1), kl.mean(-1)


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: Int[Tensor, "window token"]) -> Estimate:
    """Mean next-token loss (``.mean``, nats per token) with its standard error over windows, and ``.perplexity``."""
    _checked(windows)
    found = []
    for ids in progress(_batches(windows), "perplexity"):
        ids = ids.to(model.device)
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        found.append(torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none").mean(-1))
    return Estimate.of(torch.cat(found).double().cpu().numpy())


@torch.inference_mode()
def divergence(dense_model: PreTrainedModel, model: PreTrainedModel, windows: Int[Tensor, "window token"]) -> Estimate:
    """Mean KL(dense || pruned) of the next-token distributions, nats per token, with its standard error over windows."""
    _checked(windows)
    found = []
    for ids in progress(_batches(windows), "divergence"):
        ids = ids.to(dense_model.device)
        reference = _Reference(ids, dense_model(ids, use_cache=False).logits)
        found.append(reference.compare(model(ids.to(model.device), use_cache=False).logits.to(ids.device))[1])
    return Estimate.of(torch.cat(found).double().cpu().numpy())


@torch.inference_mode()
def sweep(model: PreTrainedModel, windows: Int[Tensor, "window token"], sets: Iterable[Sequence[SubBlock]]) -> pd.DataFrame:
    """Loss and divergence of the model without each of many sets of sub-blocks, doing once what they share.

    The sets form a tree over the layers: two that agree on the first n layers share the states up to there, and a set that is named
    twice is evaluated once. The order inside a set does not matter; the empty set is the dense model.

    Returns:
        set (the sorted tuple of its sub-blocks), window, nll, kl (nats per token).
    """
    _checked(windows)
    chosen = list(dict.fromkeys(tuple(sorted(one)) for one in sets))
    for one in chosen:
        with dropped(model, one):  # refuses what cannot be dropped before anything is computed
            pass
    depth = len(layers(model))
    by_layer = {one: [[] for _ in range(depth)] for one in chosen}
    for one in chosen:
        for sub_block in one:
            by_layer[one][sub_block.layer].append(sub_block)
    rows, first = [], 0
    batches = _batches(windows)
    with _Bar(len(chosen) * len(batches)) as done:
        for ids in batches:
            ids = ids.to(model.device)
            replay = _Replay(model, ids)
            reference = _Reference(ids, replay.dense)

            def walk(layer: int, state: Tensor, group: list, replay=replay, reference=reference, first=first) -> None:
                if layer == depth:
                    nll, kl = reference.compare(replay.logits(state))
                    rows.extend((group[0], first + i, float(nll[i]), float(kl[i])) for i in range(len(nll)))
                    done()
                    return
                ways: dict[tuple, list] = {}
                for one in group:
                    ways.setdefault(tuple(by_layer[one][layer]), []).append(one)
                for way, members in ways.items():
                    walk(layer + 1, replay.layer(layer, state, way), members)

            walk(0, replay.embedded, chosen)
            first += len(ids)
    return pd.DataFrame(rows, columns=["set", "window", "nll", "kl"])


class _Bar:
    """A progress bar advanced by calls, for work that is not a loop."""

    def __init__(self, total: int):
        self.steps = iter(progress(range(total), "evaluating sets"))
        next(self.steps, None)

    def __enter__(self):
        return lambda: next(self.steps, None)

    def __exit__(self, *_) -> None:
        self.steps.close()


class _Replay:
    """Runs one batch through single layers of a model, with the masks and positions of one whole forward pass.

    What a layer is given besides the state does not depend on what was dropped before it, so it is recorded once. A family in which
    that is not so, or whose layers pass on more than the state, is noticed: the dense model is replayed and compared first.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor):
        self.model, self.ids, self.calls = model, ids, []
        handles = [layer.register_forward_pre_hook(self._record, with_kwargs=True) for layer in layers(model)]
        try:
            self.dense = model(ids, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        self.embedded = self.calls[0][0]
        state = self.embedded
        for layer in range(len(self.calls)):
            state = self.layer(layer, state, ())
        if not torch.allclose(self.logits(state), self.dense, rtol=1e-3, atol=1e-3 * float(self.dense.abs().max())):
            raise RuntimeError(
                f"{type(model).__name__} cannot be evaluated layer by layer: its layers share more than their states"
            )

    def _record(self, _, args: tuple, kwargs: dict) -> None:
        kwargs = dict(kwargs)  # the layer still needs its own
        state, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        self.calls.append((state, rest, kwargs))

    def layer(self, index: int, state: Tensor, without: tuple[SubBlock, ...]) -> Tensor:
        """The state after a layer, without some of its sub-blocks."""
        if any(kind == "block" for _, kind in without):
            return state
        _, args, kwargs = self.calls[index]
        layer = layers(self.model)[index]
        with dropped(self.model, without) if without else nullcontext():
            output = layer(state, *args, **kwargs)
        self.more = output[1:] if isinstance(output, tuple) else None  # some families return more than the state
        return output if self.more is None else output[0]

    def logits(self, state: Tensor) -> Tensor:
        """Final norm and head of a state: a forward pass in which every layer hands on that state."""
        blocks = layers(self.model)
        before = [layer.__dict__.get("forward") for layer in blocks]  # set where a model is spread over devices
        handed_on = state if self.more is None else (state, *self.more)
        try:
            for layer in blocks:
                layer.forward = lambda *args, **kwargs: handed_on
            return self.model(self.ids, use_cache=False).logits
        finally:
            for layer, forward in zip(blocks, before, strict=True):
                layer.__dict__.pop("forward") if forward is None else setattr(layer, "forward", forward)


class Remembered:
    """Loss and divergence of one set of sub-blocks after another, on the same windows: what one has computed serves the next.

    Kept are the dense model's states and predictions, every result, and the newest states inside pruned models.
    """

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, windows: Int[Tensor, "window token"]):
        _checked(windows)
        self.model, self.states = model, {}
        self.replays = [_Replay(model, ids.to(model.device)) for ids in progress(_batches(windows), "the dense model")]
        self.references = [_Reference(replay.ids, replay.dense) for replay in self.replays]
        self.found = {(): self._compared([replay.__dict__.pop("dense") for replay in self.replays])}

    @torch.inference_mode()
    def __call__(self, sub_blocks: Iterable[SubBlock]) -> tuple[Estimate, Estimate]:
        """Loss and divergence without these sub-blocks. Raises ValueError as ``dropping.dropped``."""
        one = tuple(sorted(sub_blocks))
        if one not in self.found:
            with dropped(self.model, one):  # refuses what cannot be dropped
                pass
            self.found[one] = self._compared([replay.logits(self._last(i, one)) for i, replay in enumerate(self.replays)])
        return self.found[one]

    def _compared(self, logits: list[Tensor]) -> tuple[Estimate, Estimate]:
        values = zip(*(r.compare(one) for r, one in zip(self.references, logits, strict=True)), strict=True)
        return tuple(Estimate.of(torch.cat(value).double().cpu().numpy()) for value in values)

    def _last(self, i: int, one: tuple[SubBlock, ...]) -> Tensor:
        """The state of batch ``i`` after the last layer, from the deepest layer whose input is known."""
        replay, depth = self.replays[i], len(layers(self.model))
        before = [tuple(s for s in one if s.layer < layer) for layer in range(depth + 1)]  # what the state there has lost
        layer = next(n for n in range(depth, -1, -1) if not before[n] or (i, n, before[n]) in self.states)
        state = self.states[i, layer, before[layer]] if before[layer] else replay.calls[layer][0]
        for n in range(layer, depth):
            step("perplexity and KL", i * depth + n, len(self.replays) * depth)
            state = replay.layer(n, state, tuple(s for s in one if s.layer == n))
            if before[n + 1]:
                self.states[i, n + 1, before[n + 1]] = state
        while len(self.states) * state.nbytes > KEPT:
            del self.states[next(iter(self.states))]
        return state
