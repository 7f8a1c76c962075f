"""``score`` and ``entropies`` with the on-disk cache: a metric that was measured before on the same model and text is read."""

import functools
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import cache, scoring
from .dropping import dropped
from .processes import n_processes, split_map
from .residual import SubBlock
from .scoring import Metric, is_entropy


def measure_cached(
    model: nn.Module, windows: Int[Tensor, "sequence token"], metrics: Mapping[Hashable, Metric], kinds: Sequence[str], label: str
) -> dict[Hashable, pd.DataFrame]:
    """``scoring.measure``, which runs only for the metrics that are not in the cache."""
    base = cache.subkey(cache.model_key(model, "scoring"), cache.tensor_digest(windows))
    entries = {key: cache.subkey(base, metric, "" if is_entropy(metric) else tuple(kinds)) for key, metric in metrics.items()}
    tables = {key: cache.read("scores", entry) for key, entry in entries.items()}
    if missing := {key: metric for key, metric in metrics.items() if tables[key] is None}:
        for key, table in _measure_split(model, windows, missing, kinds, label).items():
            tables[key] = table
            cache.write("scores", entries[key], table)
    return tables


def _measure_split(
    model: nn.Module, windows: Int[Tensor, "sequence token"], metrics: Mapping[Hashable, Metric], kinds: Sequence[str], label: str
) -> dict[Hashable, pd.DataFrame]:
    """``scoring.measure`` with the windows split over the processes."""

    def measured(process: int) -> dict[Hashable, pd.DataFrame]:
        own = range(process, len(windows), n_processes())
        tables = scoring.measure(model, windows[process :: n_processes()], metrics, kinds, label) if own else {}
        return {key: table.assign(sequence=table.sequence.map(own.__getitem__)) for key, table in tables.items()}

    parts = split_map(measured, range(n_processes()))
    tables = {key: pd.concat([part[key] for part in parts if part]) for key in metrics}
    return {key: table.sort_values("sequence", kind="stable", ignore_index=True) for key, table in tables.items()}


cached_score = functools.partial(scoring.score, measure=measure_cached)
cached_entropies = functools.partial(scoring.entropies, measure=measure_cached)


def entropy_curve(
    model: nn.Module, windows: Int[Tensor, "sequence token"], metric: Metric, sub_blocks: Iterable[SubBlock] = ()
) -> Float[np.ndarray, " endpoint"]:
    """Mean entropy at each of the 2 L + 1 endpoints of the model without some sub-blocks, nats.

    A dropped sub-block passes the stream unchanged. The pruned model has no endpoint inside a dropped block; there, the curve has
    the value before the block.
    """
    gone = set(sub_blocks)
    if not gone:
        return cached_entropies(model, windows, {"curve": metric}).groupby("endpoint").value.mean().to_numpy()
    with dropped(model, gone) as pruned:
        mean = scoring.entropies(pruned, windows, {"curve": metric}).groupby("endpoint").value.mean().to_numpy()
    values, rest = [mean[0]], list(mean[1:])
    while rest or SubBlock(len(values) // 2, "block") in gone:
        values += [values[-1]] * 2 if SubBlock(len(values) // 2, "block") in gone else [rest.pop(0), rest.pop(0)]
    return np.array(values)
