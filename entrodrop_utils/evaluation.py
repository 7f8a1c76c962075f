"""What dropping costs on held-out text: loss, perplexity and divergence from the dense model, with standard errors."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import harness, local_tasks, store
from .dropping import dropped
from .progress import progress, step
from .replay import BATCH, Bar, Replay, Set, distinct, written
from .sub_blocks import SubBlock, layers

KEPT = 1 << 30  # bytes of states inside pruned models that Remembered keeps


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
    twice, or was evaluated before on this model and text, is not evaluated again. The order inside a set does not matter; the empty
    set is the dense model.

    Returns:
        set (the sorted tuple of its sub-blocks), window, nll, kl (nats per token).
    """
    _checked(windows)
    chosen, batches = distinct(model, sets), _batches(windows)
    named = {written(one): one for one in chosen}
    found, first = [], 0
    with Bar(len(chosen) * len(batches), "evaluating sets") as done:
        base = store.base(model, "evaluation")
        for ids in batches:

            def compute(missing: list[str], ids=ids) -> pd.DataFrame:
                return _losses(model, ids.to(model.device), [named[name] for name in missing], check=ids is batches[0], done=done)

            losses = store.by_set("losses", store.under(base, store.digest(ids)), named, compute, done)
            found.append(losses.assign(window=losses.window + first))
            first += len(ids)
    table = pd.concat(found, ignore_index=True)
    return table.assign(set=table.set.map(named))


def _losses(model: PreTrainedModel, ids: Int[Tensor, "window token"], sets: list[Set], check: bool, done) -> pd.DataFrame:
    """Loss and divergence of every window of one batch without each set: set (written), window, nll, kl."""
    replay, rows = Replay(model, ids, check), []
    ((_, dense),) = replay.ends([()])
    reference = _Reference(ids, replay.logits(dense))
    for one, state in replay.ends(sets):
        nll, kl = reference.compare(replay.logits(state))
        rows.extend((written(one), i, float(nll[i]), float(kl[i])) for i in range(len(ids)))
        done()
    return pd.DataFrame(rows, columns=["set", "window", "nll", "kl"])


def tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: Iterable[str], limit: int | Mapping[str, int] | None = None
) -> pd.DataFrame:
    """Scores of a model on tasks of lm-evaluation-harness, or on the suite's own (``local_tasks.NAMES``).

    Args:
        limit: at most so many items a task, or of each task by name; a group of tasks shares them.
    Returns:
        task, metric, value, stderr (the harness's own), chance (the accuracy of a guess; nan where there is none), n, note (why
        there is no value, where the data cannot be had).
    Raises:
        ValueError: a task that does not exist.
    """
    return task_sweep(model, tokenizer, names, [()], limit)[0].drop(columns="set")


def task_sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Iterable[str],
    sets: Iterable[Sequence[SubBlock]],
    limit: int | Mapping[str, int] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``tasks`` for the model without each of many sets of sub-blocks, doing once what they share; and every single item.

    Returns:
        set, then the columns of ``tasks``; and set, task, part (of a group), metric, item, value, which pairs sets item by item.
    """
    names = list(names)
    own = str(local_tasks.build()) if any(map(local_tasks.owns, names)) else ""
    harness.check(names, own)
    lm, scores, items = harness.Answers(model, tokenizer, sets), [], []
    for name in names:
        try:
            found, single = harness.evaluate(lm, name, limit.get(name) if isinstance(limit, Mapping) else limit, own)
            scores.append(found.assign(note=""))
            items.append(single.rename(columns={"task": "part"}).assign(task=name))
        except harness.Unavailable as error:
            scores.append(pd.DataFrame({"set": lm.sets, "task": name, "metric": "", "n": 0, "note": str(error)}))
    columns = ["set", "task", "metric", "value", "stderr", "chance", "n", "note"]
    single = pd.concat(items, ignore_index=True) if items else pd.DataFrame()
    return (
        pd.concat(scores, ignore_index=True).reindex(columns=columns),
        single.reindex(columns=["set", "task", "part", "metric", "item", "value"]),
    )


class Remembered:
    """Loss and divergence of one set of sub-blocks after another, on the same windows: what one has computed serves the next.

    Kept are the dense model's states and predictions, every result, and the newest states inside pruned models.
    """

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, windows: Int[Tensor, "window token"]):
        _checked(windows)
        self.model, self.states = model, {}
        self.replays = [Replay(model, ids.to(model.device)) for ids in progress(_batches(windows), "the dense model")]
        dense = [replay.logits(state) for replay in self.replays for _, state in replay.ends([()])]
        self.references = [_Reference(replay.ids, one) for replay, one in zip(self.replays, dense, strict=True)]
        self.found = {(): self._compared(dense)}

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
