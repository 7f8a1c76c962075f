"""One trained decoder under restricted attention: windows of attention, and the first token hidden from the later ones."""

import itertools
from collections.abc import Mapping
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ..attention import Rule, attention_on, restricted
from ..cached_scoring import cached_entropies, cached_score
from ..evaluation import perplexity
from ..scoring import Metric, without_first
from ..statistics import Interval, interval_table, kendall_interval, mean_interval
from .architectures import FULL, LABELS, Curves, Entropy, sub_block_scores, summed_curves
from .curves import stages
from .methods import Method

MASKED = "first token hidden"
TOKENS = ("all tokens", "without the first token", "without the first two tokens")
FALL, LOSS, TAU = "fall", "loss above full attention", "tau with full attention"  # in nats, in nats per token, of two rankings


class PatternResult(NamedTuple):
    """A model under one attention pattern.

    Attributes:
        scores: kind, layer, metric, first_token, sequence, value.
        curves: the entropy of the residual stream.
        loss: of every held-out window, nats per token.
    """

    scores: pd.DataFrame
    curves: Curves
    loss: Float[np.ndarray, " window"]


def masked_first(model: PreTrainedModel, windows: Int[Tensor, "sequence token"], metrics: Mapping[str, Metric]) -> pd.DataFrame:
    """What tokens of a decoder make of its curves, when all tokens see the first one and when the later ones do not.

    A token that is hidden from the later ones cannot be their attention sink.

    Returns:
        attention (``FULL``, ``MASKED``), tokens (of ``TOKENS``), metric, endpoint, mean, low, high (over windows).
    """
    variants = {}
    for name, metric in metrics.items():
        for tokens in TOKENS:
            variants[tokens, name] = metric
            metric = without_first(metric)
    labels, tables = ["tokens", "metric"], []
    for attention in (FULL, MASKED):
        with restricted(model, hidden_first) if attention == MASKED else nullcontext():
            table = cached_entropies(model, windows, variants, labels)
        tables.append(interval_table(table, [*labels, "endpoint"]).assign(attention=attention))
    return pd.concat(tables, ignore_index=True)[["attention", *labels, "endpoint", "mean", "low", "high"]]


def sinks(model: PreTrainedModel, windows: Int[Tensor, "window token"]) -> pd.DataFrame:
    """The share of the later tokens' attention that the first and the second token receive: attention, token, layer, share."""
    tables = []
    for attention, (token, position) in itertools.product((FULL, MASKED), (("first", 0), ("second", 1))):
        with restricted(model, hidden_first) if attention == MASKED else nullcontext():
            shares = attention_on(model, windows, position)
        tables.append(pd.DataFrame({"attention": attention, "token": token, "layer": range(len(shares)), "share": shares}))
    return pd.concat(tables, ignore_index=True)


def hidden_first(query: Int[Tensor, "query 1"], key: Int[Tensor, "1 key"]) -> Bool[Tensor, "query key"]:
    """The rule that hides the first token from all later ones."""
    return (key > 0) | (query == 0)


def attention_patterns(width: int = 32) -> dict[str, Rule]:
    """The attention patterns: name -> which query may attend to which key, beside causality."""
    return {
        FULL: lambda query, key: key <= query,
        f"window of {width}": lambda query, key: query - key < width,
        f"window of {width} and first token": lambda query, key: (query - key < width) | (key == 0),
    }


def measure_patterns(
    model: PreTrainedModel,
    patterns: Mapping[str, Rule],
    metrics: Mapping[Entropy, Metric],
    windows: Int[Tensor, "sequence token"],
    curves: Curves,
    held_out: Int[Tensor, "window token"],
) -> dict[str, PatternResult]:
    """A decoder under every attention pattern.

    Args:
        curves: the curves of ``windows`` under full attention; all patterns share their first point, the embeddings.
    """
    unrestricted = cached_score(model, windows, metrics, labels=LABELS)
    results = {}
    for name, rule in patterns.items():
        with restricted(model, rule):
            scores = unrestricted if name == FULL else cached_score(model, windows, metrics, labels=LABELS)
            loss = perplexity(model, held_out).per_window
        results[name] = PatternResult(scores, summed_curves(scores, curves), loss)
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
        rows += [(name, FALL, None, *entropy, *stages(values, seed).fall) for entropy, values in result.curves.items()]
        rows.append((name, LOSS, None, None, None, *mean_interval(result.loss - full.loss)))
        for kind, metric in rankings:
            scores, reference = (sub_block_scores(table, *metric, kind) for table in (result.scores, full.scores))
            rows.append((name, TAU, kind, *metric, *kendall_interval(reference, scores, seed=seed)))
    return pd.DataFrame(rows, columns=columns)


def pattern_columns(variants: pd.DataFrame) -> pd.DataFrame:
    """``pattern_table`` for display: a row per quantity, a column per attention pattern, each value with its interval."""
    names = []
    for row in variants.itertuples():
        metric = Method(row.metric, first_token=row.first_token).label if row.quantity != LOSS else ""
        names.append({FALL: f"fall by {metric}", LOSS: LOSS, TAU: f"tau: {row.kind} by {metric}"}[row.quantity])
    values = [f"{Interval(row.value, row.low, row.high):.3g}" for row in variants.itertuples()]
    table = variants.assign(name=names, shown=values)
    return table.pivot_table(index="name", columns="attention", values="shown", aggfunc="first", sort=False)


def bucket_falls(variants: pd.DataFrame) -> str:
    """The fall of bucket entropy of all tokens under each attention pattern, in words."""
    rows = variants[(variants.quantity == FALL) & (variants.metric == "bucket") & (variants.first_token == True)]  # noqa: E712
    return ", ".join(f"{row.value:.0f} ({row.attention})" for row in rows.itertuples())


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
