"""Scores: every metric of every sub-block on every calibration sequence, from one forward pass per sequence."""

import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn

from .entropy import ESTIMATORS, shared
from .families.self_check import measuring
from .progress import progress
from .residual import KINDS, SubBlock, capture, check_tokens, endpoints, find
from .similarity import SIMILARITIES

Metric = Callable[..., Tensor]  # an entropy takes one state; a similarity takes a sub-block's input and output
METRICS: dict[str, Metric] = {**ESTIMATORS, **SIMILARITIES}
MAX_THREADS = 8  # each estimate holds its own temporary tensors


def configured(name: str, **settings: int | float) -> Metric:
    """A registered metric with those of these settings that it has: ``configured("knn", bins=40, k=50)`` is knn with k = 50.

    Raises:
        ValueError: an unknown metric.
    """
    (metric,) = resolve([name]).values()
    parameters = inspect.signature(metric).parameters
    changed = {key: value for key, value in settings.items() if key in parameters and value != parameters[key].default}
    return functools.partial(metric, **changed) if changed else metric


def without_first(metric: Metric) -> Metric:
    """The metric without the first token of each sequence, which is the attention sink of most decoders."""

    @functools.wraps(metric)
    def shortened(*states: Tensor) -> Tensor:
        return metric(*(state[..., 1:, :] for state in states))

    shortened.about = ("without the first token", metric)
    return shortened


def first_tokens(metric: Metric, n: int) -> Metric:
    """The metric of the first ``n`` tokens of each sequence; in a causal model these are the states of a window of ``n`` tokens.

    Raises:
        ValueError: on a call with fewer tokens.
    """

    @functools.wraps(metric)
    def shortened(*states: Tensor) -> Tensor:
        if states[0].shape[-2] < n:
            raise ValueError(f"{n} tokens were asked for, the sequences have {states[0].shape[-2]}: use longer windows")
        return metric(*(state[..., :n, :] for state in states))

    shortened.about = (f"the first {n} tokens", metric)
    return shortened


def resolve(metrics: Iterable[str] | Mapping[Hashable, Metric]) -> dict[Hashable, Metric]:
    """Name -> metric, from registered names or from a mapping (``{"bucket40": partial(bucket, bins=40)}``).

    Raises:
        ValueError: an unknown name, with the list of registered ones.
    """
    if isinstance(metrics, Mapping):
        return dict(metrics)
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"unknown metric {', '.join(map(repr, unknown))}: choose from {', '.join(METRICS)}")
    return {name: METRICS[name] for name in metrics}


def is_entropy(metric: Metric) -> bool:
    """Whether a metric takes one state (an entropy, whose increase is the score) or a sub-block's input and output."""
    return sum(p.default is p.empty for p in inspect.signature(metric).parameters.values()) == 1


@measuring
def measure(
    model: nn.Module, windows: Int[Tensor, "sequence token"], metrics: Mapping[Hashable, Metric], kinds: Sequence[str], label: str
) -> dict[Hashable, pd.DataFrame]:
    """Every metric of every window: for an entropy by endpoint, for a similarity by kind and layer.

    The states of one window are held at a time. Each state's metrics run in one thread with one core, so a value does not depend on
    the number of threads.

    Returns:
        metric -> endpoint, sequence, value; or kind, layer, sequence, value.
    """
    check_tokens(model, windows)
    _check_metrics(metrics, windows.shape[-1])
    similarities = [key for key, metric in metrics.items() if not is_entropy(metric)]
    sub_blocks = [sub_block for kind in kinds for sub_block in find(model, kind)] if similarities else []
    rows: dict[Hashable, list[tuple]] = {key: [] for key in metrics}
    n_threads = min(torch.get_num_threads(), MAX_THREADS) if model.device.type == "cpu" else 1
    with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for sequence, window in enumerate(progress(windows, label)):
            stream: list[Tensor] = []
            with capture(model, lambda _, state, stream=stream: stream.append(state[0].clone())):
                model.base_model(window[None].to(model.device), use_cache=False)
            for endpoint, values in enumerate(pool.map(functools.partial(_entropies, metrics), stream)):
                for key, value in values.items():
                    rows[key].append((endpoint, sequence, value))
            changes = pool.map(functools.partial(_similarities, metrics, stream), sub_blocks)
            for sub_block, values in zip(sub_blocks, changes, strict=True):
                for key, value in values.items():
                    rows[key].append((*reversed(sub_block), sequence, value))
    columns = {key: ["kind", "layer"] if key in similarities else ["endpoint"] for key in metrics}
    return {key: pd.DataFrame(rows[key], columns=[*columns[key], "sequence", "value"]) for key in metrics}


def _check_metrics(metrics: Mapping[Hashable, Metric], tokens: int) -> None:
    """Let the registered metrics refuse windows of so many tokens, as knn does with a larger k, before the model runs."""
    states = torch.randn(2, tokens, 4, generator=torch.Generator().manual_seed(0))
    for metric in metrics.values():
        inner = metric
        while inner not in METRICS.values() and inner is not None:
            inner = getattr(inner, "func", None) or getattr(inner, "__wrapped__", None)
        if inner is not None:
            metric(*states[: 1 if is_entropy(metric) else 2])


@torch.inference_mode()
def _entropies(metrics: Mapping[Hashable, Metric], state: Tensor) -> dict[Hashable, float]:
    with shared():
        return {key: float(metric(state)) for key, metric in metrics.items() if is_entropy(metric)}


@torch.inference_mode()
def _similarities(metrics: Mapping[Hashable, Metric], stream: list[Tensor], sub_block: SubBlock) -> dict[Hashable, float]:
    x, y = (stream[endpoint] for endpoint in endpoints(sub_block))
    x = x.to(y.device)
    with shared():
        return {key: float(metric(x, y)) for key, metric in metrics.items() if not is_entropy(metric)}


def score(
    model: nn.Module,
    windows: Int[Tensor, "sequence token"],
    metrics: Iterable[str] | Mapping[Hashable, Metric] = ("bucket", "knn", "cosine"),
    kinds: Iterable[str] = KINDS,
    labels: Sequence[str] = ("metric",),
    measure: Callable[..., dict] = measure,
) -> pd.DataFrame:
    """Every metric of every sub-block on every calibration sequence; the smaller the value, the more redundant the sub-block.

    The score of an entropy is the increase H(out) - H(in) in nats (EntroDrop, arXiv 2504.03794), the score of a similarity is the
    change of the state. One forward pass per window, without logits.

    Args:
        metrics: registered names, or a mapping from a name to a metric.
        labels: the columns that name a metric; with more than one, the keys of ``metrics`` are tuples of as many values.
        measure: computes the values; ``cached_scoring`` passes one that keeps them on disk.
    Returns:
        kind, layer, *labels, sequence, value.
    Raises:
        ValueError: an unknown metric or kind, or tokens that the model cannot read.

    >>> scores = score(model, windows, ["bucket", "cosine"], kinds=["attention"])
    >>> list(scores.columns), len(scores) == 2 * n_layers * len(windows)
    (['kind', 'layer', 'metric', 'sequence', 'value'], True)
    """
    chosen, kinds = resolve(metrics), tuple(kinds)
    tables = measure(model, windows, chosen, kinds, "scoring")
    value = {key: table.set_index(list(table.columns[:-1])).value.to_dict() for key, table in tables.items()}
    rows = []
    for sub_block in (sub_block for kind in kinds for sub_block in find(model, kind)):
        start, end = endpoints(sub_block)
        for key, metric in chosen.items():
            named = (sub_block.kind, sub_block.layer, *(key if len(labels) > 1 else [key]))
            for sequence in range(len(windows)):
                if is_entropy(metric):
                    increase = value[key][end, sequence] - value[key][start, sequence]
                    rows.append((*named, sequence, increase))
                else:
                    rows.append((*named, sequence, value[key][sub_block.kind, sub_block.layer, sequence]))
    return pd.DataFrame(rows, columns=["kind", "layer", *labels, "sequence", "value"])


def entropies(
    model: nn.Module,
    windows: Int[Tensor, "sequence token"],
    estimators: Iterable[str] | Mapping[Hashable, Metric] = tuple(ESTIMATORS),
    labels: Sequence[str] = ("estimator",),
    measure: Callable[..., dict] = measure,
) -> pd.DataFrame:
    """Entropy of the residual stream at each of its 2 L + 1 endpoints; arguments as for ``score``.

    Returns:
        endpoint, *labels, sequence, value (nats).
    Raises:
        ValueError: an unknown estimator, or a similarity.

    >>> curve = entropies(model, windows, ["bucket"]).groupby("endpoint").value.mean()
    >>> len(curve) == 2 * n_layers + 1
    True
    """
    chosen = resolve(estimators)
    if wrong := [str(key) for key, metric in chosen.items() if not is_entropy(metric)]:
        raise ValueError(f"{', '.join(wrong)} compares two states and has no value at one endpoint: use score")
    tables = measure(model, windows, chosen, (), "entropy of the stream")
    named = [(key if len(labels) > 1 else (key,), table) for key, table in tables.items()]
    parts = [table.assign(**dict(zip(labels, values, strict=True))) for values, table in named]
    return pd.concat(parts)[["endpoint", *labels, "sequence", "value"]]
