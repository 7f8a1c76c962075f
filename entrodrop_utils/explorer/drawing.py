"""What the page draws, as plain values: every number comes from one ranking, with the settings that it was computed from."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from .. import scoring
from ..claims import published_lists
from ..generation import ModelSize
from ..residual import KINDS
from .choice import Choice, Ranking
from .loaded import NOTHING

CHOSEN = "#BE1E3C"  # the colour of what is chosen: no metric's and no kind's (figures.COLOURS, KIND_COLOURS)
CONTEXT = 1024  # tokens of context that the size of the cache is stated for
NAMES = {"attention": "attention layer", "mlp": "MLP", "block": "block"}


def columns(n_tokens: int) -> dict[str, str]:
    """The columns of the table. A perplexity is a level, which depends on how many tokens each one has before it."""
    return {
        "loss": "loss increase (nats per token)",
        "kl": "KL to dense (nats per token)",
        "perplexity": f"perplexity in windows of up to {n_tokens} tokens",
        "repaired": "loss increase after linear repair",
        "parameters": "parameters",
        "cache": f"KV cache at {CONTEXT:,} tokens",
        "speed": "tokens per second",
        "random": "better than random choices",
    }


def count_in_words(n: int, total: int, kind: str) -> str:
    """A number of sub-blocks in words."""
    return f"{n} of {total} {NAMES[kind]}s"


def in_words(choice: Choice) -> str:
    """What is dropped, counted by kind."""
    counts = {kind: sum(s.kind == kind for s in choice.dropped) for kind in KINDS}
    named = [kind for kind in KINDS if counts[kind]] or [choice.settings.kind]
    parts = (count_in_words(counts[kind], len(choice.ranking.loaded.sub_blocks[kind]), kind) for kind in named)
    return f"without {' and '.join(parts)}"


def map_of(ranking: Ranking) -> dict:
    """The map: for each kind and layer the score, its place on a scale from -1 to 1, and the ranks by all metrics measured.

    The scale is symmetric and logarithmic; it turns linear at the size of a typical small value.
    """
    settings, loaded, rows = ranking.settings, ranking.loaded, {}
    known = {metric: loaded.known("scores", settings, metric) for metric in scoring.METRICS}
    ranks = {metric.replace("_", " "): scores.rank for metric, scores in known.items() if scores}
    for kind, sub_blocks in loaded.sub_blocks.items():
        values = np.array([ranking.importance[s] for s in sub_blocks])
        small = max(np.sort(abs(values))[len(values) // 4], 1e-9)
        scaled = np.sign(values) * np.log1p(abs(values) / small)
        shades = scaled / (abs(scaled).max() or 1)
        rows[kind] = [
            {
                "layer": s.layer,
                "score": f"{value:.4g}",
                "shade": round(float(shade), 3),
                "ranks": {metric: rank[s] for metric, rank in ranks.items()},
                "alone": f"{alone.mean:+.3f} nats" if (alone := loaded.increase([s], settings)) else "",
            }
            for s, value, shade in zip(sub_blocks, values, shades, strict=True)
        ]
    named = f"entropy increase, {settings.measure} (nats)" if settings.entropy == settings.metric else settings.measure
    protected = sorted(loaded.protected & {s.layer for s in ranking.candidates})
    title = f"{named}, ranked on {settings.calibration}"
    return {"title": title, "layers": loaded.depth, "kind": settings.kind, "rows": rows, "protected": protected}


def choice_of(choice: Choice) -> dict:
    """The selection: what is dropped and what was set by hand, and the slider."""
    low, high = choice.limits
    sets = {"dropped": [list(s) for s in choice.dropped], "hand": [list(s) for s in choice.by_hand]}
    return sets | {"n": choice.n, "least": low, "most": high, "said": choice.made_by, "counted": in_words(choice)}


def curves_of(choice: Choice, pins: Sequence[Choice]) -> dict:
    """Entropy along the depth, dense and pruned, and loss increase against the number dropped, where it was measured."""
    ranking, settings, loaded = choice.ranking, choice.settings, choice.ranking.loaded
    pruned = loaded.known("curve", choice.dropped, settings)
    lines = [{"name": choice.origin or settings.measure, "points": _points(ranking, choice)}]
    for pin in pins:
        other = not pin.by_hand and pin.settings.kind == settings.kind and pin.ranking.order != ranking.order
        if other and pin.settings.measure not in [line["name"] for line in lines]:
            lines.append({"name": pin.settings.measure, "metric": pin.settings.metric, "points": _points(ranking, pin)})
    return {
        "entropy": settings.entropy.replace("_", " "),
        "dense": _numbers(ranking.curve),
        "pruned": None if pruned is None or not choice.dropped else _numbers(pruned),
        "lines": lines,
        "random": [
            [n, *_numbers(np.quantile(values, [0, 0.5, 1])), len(values)]
            for n in range(1, len(ranking.order) + 1)
            if (values := loaded.random_increases(ranking.order[:n], settings))
        ],
        "evaluation": settings.evaluation,
        "most": choice.limits[1],
    }


def _points(ranking: Ranking, choice: Choice) -> list[list[float | int | None]]:
    """(number dropped, loss increase in nats) of the numbers that were measured."""
    low, high = choice.limits
    known = {n: ranking.loaded.increase(choice.at(n), ranking.settings) for n in range(low, high + 1)}
    return [[n, *_numbers([more.mean])] for n, more in known.items() if more]


def random_counts(ranking: Ranking) -> list[int]:
    """The numbers at which random choices are measured for the curve."""
    return sorted({max(1, round(len(ranking.order) * eighths / 8)) for eighths in range(1, 7)})


def table_of(choice: Choice, pins: Sequence[Choice]) -> list[dict]:
    """A row for the dense model, the choice and each pinned one: its name and a text for each column, None where unmeasured."""
    rows = {"dense": Choice(choice.ranking, 0), f"now: {choice.made_by}": choice}
    return [
        {
            "name": name,
            "set": in_words(row) if row.dropped else "nothing dropped",
            "ranked": f"ranked on {row.settings.calibration}" if row.dropped else "",
            "cells": cells(choice.ranking, row),
        }
        for name, row in [*rows.items(), *((pin.name, pin) for pin in pins)]
    ]


def cells(ranking: Ranking, choice: Choice) -> dict[str, str | None]:
    """The numbers of a choice, evaluated as a ranking is, as text; None for what was not measured, "–" for what does not exist."""
    loaded, settings, drop = ranking.loaded, ranking.settings, choice.dropped
    dense, cost, more = loaded.known("cost", (), settings), loaded.known("cost", drop, settings), loaded.increase(drop, settings)
    whole, size = loaded.known("size", ()), loaded.known("size", drop)
    rate, better = loaded.known("speed", drop), loaded.better_than(drop, settings)
    repaired = loaded.known("repaired", drop, settings, choice.settings)
    share = {name: "" for name in ModelSize._fields}
    if drop and size and whole:
        share = {name: f" ({getattr(size, name) / getattr(whole, name) - 1:+.0%})" for name in share}
    texts = {
        "loss": more and f"{more:+.2f}",
        "kl": cost and f"{cost.kl:.3f}",
        "perplexity": more and _short(cost.loss.perplexity) + (f" (× {_short(math.exp(more.mean))})" if drop else ""),
        "repaired": f"{repaired - dense.loss:+.2f}" if repaired and dense and repaired is not NOTHING else None,
        "parameters": size and f"{size.parameters / 1e6:.1f} M{share['parameters']}",
        "cache": size and f"{size.cache * CONTEXT / 1e6:.1f} MB{share['cache']}",
        "speed": rate and f"{rate:.0f}",
        "random": better and f"{better[0].estimate:.0%} of {better[1]} [{better[0].low:.0%}, {better[0].high:.0%}]",
    }
    missing = {"loss": not drop, "kl": not drop, "repaired": not drop or repaired is NOTHING, "random": not loaded.draws(drop)}
    kept_together = {name: said and said.replace(" ± ", "\u00a0±\u00a0").replace("× ", "×\u00a0") for name, said in texts.items()}
    return kept_together | {name: "–" for name, absent in missing.items() if absent}


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 1e4 else f"{value:.2g}".replace("e+0", "e").replace("e+", "e")


def _numbers(values: Iterable[float]) -> list[float | None]:
    """Numbers that JSON can hold."""
    return [round(float(value), 5) if math.isfinite(value) else None for value in values]


def reading_of(choice: Choice) -> dict:
    """One's own text, or the prompt: its tokens with their losses and the likeliest next tokens, dense and pruned."""
    text = choice.settings.pasted.strip() or choice.settings.prompt
    readings = [choice.ranking.loaded.known("reading", drop, text) for drop in ((), choice.dropped)]
    if not all(readings):
        return {"tokens": [], "dense": [], "pruned": []}
    tokens = zip(readings[0].tokens, *(_numbers(reading.losses) for reading in readings), strict=True)
    dense, pruned = ([[[token, round(p, 3)] for token, p in row] for row in reading.candidates] for reading in readings)
    return {"tokens": [list(token) for token in tokens], "dense": dense, "pruned": pruned}


def ghosts() -> list[dict]:
    """The published lists of dropped layers of other models: kind, name, and the depth of each from 0 to 1."""
    try:
        lists = published_lists()
    except ValueError:  # the package without its repository
        return []
    names = [f"{row.method} on {row.model}: {count_in_words(len(row.layers), row.n_total, row.unit)}" for row in lists.itertuples()]
    depths = [[(layer + 0.5) / row.n_total for layer in row.layers] for row in lists.itertuples()]
    return [{"name": n, "kind": kind, "depths": d} for n, kind, d in zip(names, lists.unit, depths, strict=True)]
