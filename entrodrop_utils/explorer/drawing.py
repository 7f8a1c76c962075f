"""What the page draws, as plain values: every number comes from one ranking, with the settings that it was computed from."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from .. import scoring
from ..claims import published_figures
from ..evaluation import Estimate
from ..generation import ModelSize
from ..residual import KINDS, SubBlock
from .choice import Choice
from .loaded import NOTHING
from .settings import Settings
from .state import Pin, Ranking

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


def unit(values: Iterable[float]) -> float:
    """Where the symmetric logarithmic scale of importance turns linear: the size of a typical small value."""
    sizes = sorted(abs(value) for value in values)
    return max(sizes[len(sizes) // 4], 1e-9)


def map_of(ranking: Ranking) -> dict:
    """The map: for each kind and layer the score, its place on the scale from -1 to 1, and the ranks by all metrics measured."""
    settings, loaded, rows = ranking.settings, ranking.loaded, {}
    ranks = {metric: known for metric in scoring.METRICS if (known := loaded.known("ranks", settings, metric))}
    for kind in KINDS:
        values = {s: ranking.importance[s] for s in loaded.sub_blocks[kind]}
        scale = unit(values.values())
        scaled = {s: math.copysign(math.log1p(abs(value) / scale), value) for s, value in values.items()}
        most = max(map(abs, scaled.values())) or 1
        rows[kind] = [
            {
                "layer": s.layer,
                "score": f"{value:.4g}",
                "shade": round(scaled[s] / most, 3),
                "ranks": {metric.replace("_", " "): known[s] for metric, known in ranks.items()},
                "alone": f"{alone.mean:+.3f} nats" if (alone := loaded.increase([s], settings)) else "",
            }
            for s, value in values.items()
        ]
    unit_name = " (nats)" if scoring.is_entropy(scoring.METRICS[settings.metric]) else ""
    what = "entropy increase, " if unit_name else ""
    protected = sorted({s.layer for s in ranking.candidates} - {s.layer for s in ranking.order})
    return {
        "title": f"{what}{settings.measure}{unit_name}, ranked on {settings.calibration}",
        "layers": loaded.depth,
        "kind": settings.kind,
        "rows": rows,
        "protected": protected,
    }


def choice_of(ranking: Ranking, choice: Choice) -> dict:
    """The selection: what is dropped and what was set by hand, the slider, and the code that recreates it."""
    low, high = choice.limits
    return {
        "dropped": [list(s) for s in choice.dropped],
        "hand": [list(s) for s in choice.by_hand],
        "n": choice.n,
        "least": low,
        "most": high,
        "said": choice.described(ranking.settings.measure),
        "counted": described(ranking, choice.dropped),
    }


def described(ranking: Ranking, drop: Sequence[SubBlock]) -> str:
    """The selection in words."""
    counts = {kind: sum(s.kind == kind for s in drop) for kind in KINDS}
    named = [kind for kind in KINDS if counts[kind]] or [ranking.settings.kind]
    return "without " + " and ".join(count_in_words(counts[kind], len(ranking.loaded.sub_blocks[kind]), kind) for kind in named)


def curves_of(ranking: Ranking, choice: Choice, pins: Sequence[Pin]) -> dict:
    """Entropy along the depth, dense and pruned, and loss increase against the number dropped, where it was measured."""
    settings, loaded = ranking.settings, ranking.loaded
    pruned = loaded.known("curve", choice.dropped, settings)
    low, high = choice.limits
    lines = [
        {"name": choice.origin or settings.measure, "points": _points(ranking, {n: choice.at(n) for n in range(low, high + 1)})}
    ]
    for pin in pins:
        if pin.order and pin.settings.kind == settings.kind and pin.order != tuple(choice.order):
            sets = {n: pin.order[:n] for n in range(len(pin.order) + 1)}
            if pin.settings.measure not in [line["name"] for line in lines]:
                lines.append({"name": pin.settings.measure, "metric": pin.settings.metric, "points": _points(ranking, sets)})
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
        "most": high,
    }


def _points(ranking: Ranking, sets: dict[int, Sequence[SubBlock]]) -> list[list[float | int | None]]:
    """(number dropped, loss increase in nats) of the sets that were measured."""
    known = {n: ranking.loaded.increase(drop, ranking.settings) for n, drop in sets.items()}
    return [[n, *_numbers([more.mean])] for n, more in known.items() if more]


def random_counts(ranking: Ranking) -> list[int]:
    """The numbers at which random choices are measured for the curve."""
    total = len(ranking.order)
    return sorted({max(1, round(total * eighths / 8)) for eighths in range(1, 7)})


def table_of(ranking: Ranking, choice: Choice, pins: Sequence[Pin]) -> list[dict]:
    """A row for the dense model, the selection and each pinned one: its name and a text for each column, None where unmeasured."""
    settings, drop = ranking.settings, choice.dropped
    rows = [("dense", (), settings), (f"now: {choice.described(settings.measure)}", tuple(drop), settings)]
    rows += [(pin.name, pin.drop, pin.settings) for pin in pins]
    return [
        {
            "name": name,
            "set": described(ranking, drop) if drop else "nothing dropped",
            "ranked": f"ranked on {made.calibration}" if drop else "",
            "cells": cells(ranking, drop, made),
        }
        for name, drop, made in rows
    ]


def cells(ranking: Ranking, drop: Sequence[SubBlock], made: Settings) -> dict[str, str | None]:
    """The numbers of one selection as text; None for what was not measured, "–" for what does not exist.

    Args:
        made: the settings that the selection was made under, whose calibration text a repair is fitted on.
    """
    loaded, settings = ranking.loaded, ranking.settings
    dense, cost, more = loaded.known("cost", (), settings), loaded.known("cost", drop, settings), loaded.increase(drop, settings)
    whole, size = loaded.known("size", ()), loaded.known("size", drop)
    rate, better = loaded.known("speed", drop), loaded.better_than(drop, settings)
    repaired = loaded.known("repaired", drop, settings, made)
    mended = repaired and dense and repaired is not NOTHING and Estimate.of(repaired.per_window - dense.loss.per_window)
    share = {name: "" for name in ModelSize._fields}
    if drop and size and whole:
        share = {name: f" ({getattr(size, name) / getattr(whole, name) - 1:+.0%})" for name in share}
    texts = {
        "loss": more and _with_error(more, "+.2f"),
        "kl": cost and _with_error(cost.kl, ".3f"),
        "perplexity": more and _short(cost.loss.perplexity) + (f" (×\u00a0{_short(math.exp(more.mean))})" if drop else ""),
        "repaired": _with_error(mended, "+.2f") if mended else None,
        "parameters": size and f"{size.parameters / 1e6:.1f} M{share['parameters']}",
        "cache": size and f"{size.cache * CONTEXT / 1e6:.1f} MB{share['cache']}",
        "speed": rate and f"{rate:.0f}",
        "random": better and f"{better[0].estimate:.0%} of {better[1]} [{better[0].low:.0%}, {better[0].high:.0%}]",
    }
    missing = {"loss": not drop, "kl": not drop, "repaired": not drop or repaired is NOTHING, "random": not loaded.draws(drop)}
    return texts | {name: "–" for name, absent in missing.items() if absent}


def _with_error(estimate: Estimate, spec: str) -> str:
    return f"{estimate.mean:{spec}}\u00a0±\u00a0{estimate.stderr:{spec.lstrip('+')}}"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 1e4 else f"{value:.2g}".replace("e+0", "e").replace("e+", "e")


def _numbers(values: Iterable[float]) -> list[float | None]:
    """Numbers that JSON can hold."""
    return [round(float(value), 5) if math.isfinite(value) else None for value in values]


def reading_of(ranking: Ranking, choice: Choice) -> dict:
    """One's own text, or the prompt: its tokens with their losses and the likeliest next tokens, dense and pruned."""
    settings, loaded = ranking.settings, ranking.loaded
    text = settings.pasted.strip() or settings.prompt
    dense, pruned = loaded.known("reading", (), text), loaded.known("reading", choice.dropped, text)
    if dense is None or pruned is None:
        return {"tokens": [], "dense": [], "pruned": []}
    losses = [_numbers(reading.losses) for reading in (dense, pruned)]
    nexts = [[[[token, round(p, 3)] for token, p in row] for row in reading.candidates] for reading in (dense, pruned)]
    return {"tokens": [list(token) for token in zip(dense.tokens, *losses, strict=True)], "dense": nexts[0], "pruned": nexts[1]}


def ghosts() -> list[dict]:
    """The published lists of dropped layers of other models: kind, name, and the depth of each from 0 to 1."""
    try:
        table = published_figures("others")
    except ValueError:  # the package without its repository
        return []
    lists = table[table.metric.isin(["first dropped first", "layers"]) & table.value.str.fullmatch(r"[\d ]+")].astype(
        {"n_total": int}
    )
    ghosts = []
    for row in lists.itertuples():
        layers = [int(layer) for layer in row.value.split()]
        name = f"{row.method} on {row.model}: {count_in_words(len(layers), int(row.n_total), row.unit)}"
        ghosts.append({"name": name, "kind": row.unit, "depths": [(n + 0.5) / row.n_total for n in layers]})
    return ghosts
