"""One trained decoder under restricted attention: its loss, its entropy curve and its rankings under every attention pattern."""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ..attention import Rule, restricted
from ..cached_scoring import cached_score
from ..evaluation import perplexity
from ..families.decoder import decoder_layers
from ..residual import states
from ..scoring import Metric
from ..statistics import kendall_interval, mean_interval
from .architectures import FULL, LABELS, Curves, Entropy, sub_block_scores, summed_curves
from .curves import stages
from .methods import Method

FALL, LOSS, TAU = "fall", "loss above full attention", "tau with full attention"  # in nats, in nats per token, of two rankings


class PatternResult(NamedTuple):
    """A model under one attention pattern.

    Attributes:
        scores: kind, layer, metric, first_token, sequence, value.
        curves: the entropy of the residual stream.
        loss: of every held-out window, nats per token.
        largest: for some windows, which token has the largest activation after half of the layers.
    """

    scores: pd.DataFrame
    curves: Curves
    loss: Float[np.ndarray, "window"]
    largest: list[int]


def attention_patterns(width: int = 32) -> dict[str, Rule]:
    """The attention patterns: name -> which query may attend to which key, beside causality."""
    return {
        FULL: lambda query, key: key <= query,
        f"window of {width}": lambda query, key: query - key < width,
        f"window of {width} and first token": lambda query, key: (query - key < width) | (key == 0),
        "first token masked": lambda query, key: (key > 0) | (query == 0),
    }


def measure_patterns(
    model: PreTrainedModel,
    patterns: Mapping[str, Rule],
    metrics: Mapping[Entropy, Metric],
    windows: Int[Tensor, "sequence token"],
    curves: Curves,
    held_out: Int[Tensor, "window token"],
    n_largest: int,
) -> dict[str, PatternResult]:
    """A decoder under every attention pattern.

    Args:
        curves: the curves of ``windows`` under full attention; all patterns share their first point, the embeddings.
        n_largest: number of windows in which the token with the largest activation is located.
    """
    unrestricted = cached_score(model, windows, metrics, labels=LABELS)
    results, middle = {}, len(decoder_layers(model))  # an endpoint: there are two per layer
    for name, rule in patterns.items():
        with restricted(model, rule):
            scores = unrestricted if name == FULL else cached_score(model, windows, metrics, labels=LABELS)
            loss = perplexity(model, held_out).per_window
            streams = [states(model, window[None])[middle, 0] for window in windows[:n_largest]]
        results[name] = PatternResult(
            scores, summed_curves(scores, curves), loss, [int(state.abs().amax(-1).argmax()) for state in streams]
        )
    return results


def pattern_table(results: Mapping[str, PatternResult], seed: int = 0) -> pd.DataFrame:
    """What each attention pattern changes.

    Returns:
        attention, quantity (``FALL``, ``LOSS``, ``TAU``), kind, metric, first_token, value, low, high; no rows without results.
    """
    columns = ["attention", "quantity", "kind", "metric", "first_token", "value", "low", "high"]
    if not results:
        return pd.DataFrame(columns=columns)
    rows, full = [], results[FULL]
    metrics = full.scores[["metric", "first_token"]].drop_duplicates().itertuples(index=False, name=None)
    rankings = list(itertools.product(("attention", "mlp"), metrics))
    for name, result in results.items():
        rows += [(name, FALL, None, *entropy, *mean_interval(fall(values), seed)) for entropy, values in result.curves.items()]
        rows.append((name, LOSS, None, None, None, *mean_interval(result.loss - full.loss, seed)))
        for kind, metric in rankings:
            scores, reference = (sub_block_scores(table, *metric, kind) for table in (result.scores, full.scores))
            rows.append((name, TAU, kind, *metric, *kendall_interval(reference, scores, seed=seed)))
    return pd.DataFrame(rows, columns=columns)


def fall(values: Float[np.ndarray, "sequence endpoint"]) -> Float[np.ndarray, "sequence"]:
    """Nats by which each curve falls from the first layer's input to the layer input where the mean curve is lowest."""
    return values[:, 0] - values[:, 2 * boundary_layer(values.mean(0))]


def pattern_columns(variants: pd.DataFrame) -> pd.DataFrame:
    """``pattern_table`` for display: a row per quantity, a column per attention pattern, each value with its interval."""
    names = []
    for row in variants.itertuples():
        metric = Method(row.metric, first_token=row.first_token).label if row.quantity != LOSS else ""
        names.append({FALL: f"fall by {metric}", LOSS: LOSS, TAU: f"tau: {row.kind} by {metric}"}[row.quantity])
    values = [f"{row.value:.3g} [{row.low:.3g}, {row.high:.3g}]" for row in variants.itertuples()]
    table = variants.assign(name=names, shown=values)
    return table.pivot_table(index="name", columns="attention", values="shown", aggfunc="first", sort=False)


def pattern_sentences(variants: pd.DataFrame) -> list[str]:
    """Sentences: the fall of bucket entropy and the loss under each attention pattern; none for an empty table."""
    if variants.empty:
        return []
    falls = variants[(variants.quantity == FALL) & (variants.metric == "bucket")]
    falls = falls.pivot_table(index="attention", columns="first_token", values="value", sort=False)
    losses = variants[(variants.quantity == LOSS) & (variants.attention != FULL)]
    nats = [f"{name} {row[True]:.0f} ({row[False]:.0f})" for name, row in falls.iterrows()]
    costs = [f"{row.attention} {row.value:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in losses.itertuples()]
    return [
        f"Fall of bucket entropy in nats, and without the first token, by attention pattern: {', '.join(nats)}.",
        f"Loss above full attention in nats per token: {', '.join(costs)}.",
    ]
