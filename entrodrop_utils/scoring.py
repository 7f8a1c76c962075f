"""One pass over the calibration text: every metric of every sub-block (or position) on every sequence."""

import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.stats import kendalltau
from torch import Tensor, nn

from . import store
from .entropy import ESTIMATORS, shared
from .progress import progress
from .residual import positions, watch
from .similarity import SIMILARITIES
from .sub_blocks import KINDS, find, layers

Metric = Callable[..., Tensor]  # of one state: an entropy; of two, a sub-block's input and output: a similarity
METRICS: dict[str, Metric] = {**ESTIMATORS, **SIMILARITIES}
AT_ONCE = 8  # states whose metrics are computed: each takes memory, and the model's own pass is not shared out
OFFICIAL_PROTECTED = (0, 1, -1)  # the layers that the published code never drops


def without_first(metric: Metric) -> Metric:
    """The metric without the first token of each sequence, which is the attention sink of most decoders."""

    @functools.wraps(metric)
    def shortened(*states: Tensor) -> Tensor:
        return metric(*(state[..., 1:, :] for state in states))

    shortened.about = ("without the first token", metric)
    return shortened


def first_tokens(metric: Metric, n: int) -> Metric:
    """The metric of the first ``n`` tokens of each sequence: in a causal model what windows of ``n`` tokens would give.

    Raises:
        ValueError: when it is called with fewer tokens.
    """

    @functools.wraps(metric)
    def shortened(*states: Tensor) -> Tensor:
        if states[0].shape[-2] < n:
            raise ValueError(f"{n} tokens are asked for, the sequences have {states[0].shape[-2]}: use longer windows")
        return metric(*(state[..., :n, :] for state in states))

    shortened.about = (f"the first {n} tokens", metric)
    return shortened


def resolve(metrics: Iterable[str] | Mapping[str, Metric]) -> dict[str, Metric]:
    """Name -> metric, from registered names or from a mapping of one's own (``{"bucket, 40 bins": partial(bucket, bins=40)}``).

    Raises:
        ValueError: an unknown name, with the list of those that exist.
    """
    if isinstance(metrics, Mapping):
        return dict(metrics)
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"unknown metric {', '.join(map(repr, unknown))}: choose from {', '.join(METRICS)}")
    return {name: METRICS[name] for name in metrics}


def is_entropy(metric: Metric) -> bool:
    """Whether a metric looks at one state (an entropy, whose increase is the score) rather than at input and output."""
    return sum(p.default is p.empty for p in inspect.signature(metric).parameters.values()) == 1


def _measure(model: nn.Module, windows: Int[Tensor, "sequence token"], metrics: dict, kinds: tuple, what: str) -> dict:
    """Name -> table of every metric: position (an entropy) or kind and layer (a similarity), sequence, value.

    What was measured before on this model and text is read from the store; the rest takes one forward pass a window.
    """
    base = store.under(store.base(model, "scoring"), store.digest(windows))
    keys = {name: store.under(base, metric, "" if is_entropy(metric) else kinds) for name, metric in metrics.items()}
    found = {name: store.load("scores", of) for name, of in keys.items()}
    if missing := {name: metric for name, metric in metrics.items() if found[name] is None}:
        for name, table in _pass(model, windows, missing, kinds, what).items():
            found[name] = table
            store.keep("scores", keys[name], table)
    return found


def _pass(model: nn.Module, windows: Int[Tensor, "sequence token"], metrics: dict, kinds: tuple, what: str) -> dict:
    """The metrics by one forward pass a window, each state's in a thread of its own: one estimate is too small for many cores.

    So a value does not depend on the number of threads. At most two states a thread and three more are alive at a time.
    """
    entropies = {name: metric for name, metric in metrics.items() if is_entropy(metric)}
    similarities = {name: metric for name, metric in metrics.items() if name not in entropies}
    rows: dict[str, list[tuple]] = {name: [] for name in metrics}
    ends = {}

    def noted(values: Future) -> None:
        for name, row in values.result():
            rows[name].append(row)

    for kind in kinds if similarities else ():
        for sub_block in find(model, kind):
            start, end = positions(sub_block)
            ends.setdefault(end, []).append((start, sub_block))
    threads = min(torch.get_num_threads(), AT_ONCE) if model.device.type == "cpu" else 1
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for sequence, window in enumerate(progress(windows, what)):
            alive: dict[int, Tensor] = {}
            measuring: deque[Future] = deque()

            def seen(position: int, state: Tensor, sequence=sequence, alive=alive, measuring=measuring) -> None:
                alive[position] = x = state[0].detach().clone()  # some models go on to change it in place
                alive.pop(position - 3, None)
                pairs = [(sub_block, alive[start]) for start, sub_block in ends.get(position, ())]
                measuring.append(pool.submit(_values, entropies, similarities, (position, sequence), x, pairs))
                if len(measuring) > 2 * threads:
                    noted(measuring.popleft())

            with watch(model, seen), torch.inference_mode():
                model.base_model(window[None].to(model.device), use_cache=False)
            for one in measuring:
                noted(one)
    of = {name: ["position"] if name in entropies else ["kind", "layer"] for name in metrics}
    return {name: pd.DataFrame(rows[name], columns=[*of[name], "sequence", "value"]) for name in metrics}


@torch.inference_mode()
def _values(entropies: dict, similarities: dict, at: tuple[int, int], x: Tensor, pairs: list[tuple]) -> list[tuple[str, tuple]]:
    """(name, row) of every metric of the state at a position of a sequence, and of the sub-blocks that end there."""
    with shared():
        found = [(name, (*at, float(metric(x)))) for name, metric in entropies.items()]
    for sub_block, before in pairs:
        row = sub_block.kind, sub_block.layer, at[1]
        found += [(name, (*row, float(metric(before, x)))) for name, metric in similarities.items()]
    return found


def entropies(
    model: nn.Module, windows: Int[Tensor, "sequence token"], estimators: Iterable[str] | Mapping[str, Metric] = tuple(ESTIMATORS)
) -> pd.DataFrame:
    """Entropy of the residual stream at each of its 2 L + 1 positions.

    Returns:
        position, estimator, sequence, value (nats).
    """
    chosen = resolve(estimators)
    if wrong := [name for name, metric in chosen.items() if not is_entropy(metric)]:
        raise ValueError(f"{', '.join(wrong)} compares two states and has no value at one position: use scoring.score")
    found = _measure(model, windows, chosen, (), "entropy of the stream")
    return pd.concat([found[name].assign(estimator=name) for name in chosen])[["position", "estimator", "sequence", "value"]]


def score(
    model: nn.Module,
    windows: Int[Tensor, "sequence token"],
    metrics: Iterable[str] | Mapping[str, Metric] = ("bucket", "knn", "cosine"),
    kinds: Iterable[str] = KINDS,
) -> pd.DataFrame:
    """Every metric of every sub-block on every calibration sequence; the smaller the value, the more redundant.

    For an entropy the value is the increase H(out) - H(in) in nats (arXiv 2504.03794), for a similarity the change of the
    state. One forward pass a window, without logits; states are freed as they are used.

    Returns:
        kind, layer, metric, sequence, value.
    Raises:
        ValueError: an unknown metric or kind.
    """
    chosen, kinds = resolve(metrics), tuple(kinds)
    found, rows = _measure(model, windows, chosen, kinds, "scoring"), []
    value = {name: table.set_index(list(table.columns[:-1])).value.to_dict() for name, table in found.items()}
    sequences = range(len(windows))
    for kind in kinds:
        for sub_block in find(model, kind):
            start, end = positions(sub_block)
            for name, metric in chosen.items():
                of = value[name]
                if is_entropy(metric):
                    values = [of[end, sequence] - of[start, sequence] for sequence in sequences]
                else:
                    values = [of[kind, sub_block.layer, sequence] for sequence in sequences]
                rows += [(kind, sub_block.layer, name, sequence, v) for sequence, v in enumerate(values)]
    return pd.DataFrame(rows, columns=["kind", "layer", "metric", "sequence", "value"])


def bootstrap(values: Float[np.ndarray, "sample *rest"], draws: int = 1000, seed: int = 0) -> Float[np.ndarray, "draw *rest"]:
    """Means of resampled sequences: the bootstrap distribution of the mean over the first axis."""
    values = np.asarray(values, dtype=float)
    count = np.random.default_rng(seed).multinomial(len(values), np.full(len(values), 1 / len(values)), size=draws)
    return np.tensordot(count / len(values), values, axes=1)


def interval(table: pd.DataFrame, by: list[str], seed: int = 0) -> pd.DataFrame:
    """Mean of ``value`` over sequences for each group, with its 95% bootstrap interval: *by, mean, low, high.

    The same resampled sequences serve every group, so that differences between groups can be compared.
    """
    wide = table.pivot_table(index="sequence", columns=by, values="value", sort=False)
    draws = bootstrap(wide.to_numpy(), seed=seed)
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return pd.DataFrame({"mean": wide.mean(), "low": low, "high": high}).reset_index()


def agreement(
    one: Float[np.ndarray, "sequence layer"], other: Float[np.ndarray, "sequence layer"], draws: int = 200, seed: int = 0
) -> tuple[float, float, float]:
    """Kendall's tau between the rankings of two scores of the same layers, with its 95% interval.

    Both scores are resampled together, sequence by sequence. Where a score is the same for all layers there is no ranking: nan.
    """
    pairs = zip(*(np.vstack([scores.mean(0), bootstrap(scores, draws, seed)]) for scores in (one, other)), strict=True)
    tau, *drawn = (kendalltau(a, b).statistic for a, b in pairs)
    return tau, *np.percentile(drawn, [2.5, 97.5])


def verdict(low: float, high: float, goal: float = 0.0) -> str:
    """Whether a claim that something exceeds the goal holds, given the 95% interval of that something."""
    return "holds" if low > goal else "does not hold" if high <= goal else "inconclusive"


def depth(model: nn.Module) -> int:
    """The number of decoder layers."""
    return len(layers(model))
