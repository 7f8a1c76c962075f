"""Which sub-blocks to drop, from scores or step by step: always an explicit list of sub-blocks, first dropped first."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from . import store
from .dropping import dropped
from .evaluation import perplexity
from .progress import progress
from .scoring import OFFICIAL_PROTECTED, Metric, bootstrap, depth, is_entropy, resolve, score
from .sub_blocks import SubBlock, find


def one_shot(
    scores: pd.DataFrame, metric: str, kind: str, n: int | None = None, protected: Iterable[int] = OFFICIAL_PROTECTED
) -> list[SubBlock]:
    """The ``n`` sub-blocks of one kind with the smallest mean score, smallest first.

    Args:
        scores: of ``scoring.score``.
        n: how many; None for all that may be dropped.
        protected: layers that are kept; negative ones count from the end. The default is that of the published code.
    Raises:
        ValueError: the scores do not hold this metric and kind; fewer than ``n`` may be dropped; a layer that does not exist.
    """
    mean = _sequences(scores, metric, kind).mean()
    kept = _kept(protected, int(scores.layer.max()) + 1)
    order = mean.drop(index=[layer for layer in mean.index if layer in kept]).sort_values(kind="stable")
    if n is not None and not 0 <= n <= len(order):
        raise ValueError(f"cannot drop {n} of {len(mean)} sub-blocks of kind {kind}: {len(order)} are not protected")
    return [SubBlock(int(layer), kind) for layer in order.index[:n]]


def stage_boundary(scores: pd.DataFrame, metric: str) -> int:
    """The first layer of the rising stage: where the mean entropy of the layer inputs turns from falling to rising.

    It is the layer whose input has the least entropy (arXiv 2504.03794); 0 where the curve never falls.
    The curve follows from the increases of the blocks, up to a constant that does not matter here.
    """
    increases = _sequences(scores, metric, "block").mean().to_numpy()
    return int(np.concatenate([[0], np.cumsum(increases)[:-1]]).argmin())  # what the last layer leaves is no layer's input


def two_stage(scores: pd.DataFrame, metric: str, kind: str, n: int | None = None) -> list[SubBlock]:
    """The paper's rule: keep every layer of the falling stage; in the rising stage the smallest entropy increase goes first.

    Raises:
        ValueError: as ``one_shot``; the scores must hold kind "block" as well, from which the stages are read.
    """
    return one_shot(scores, metric, kind, n, protected=range(stage_boundary(scores, metric)))


def _sequences(scores: pd.DataFrame, metric: str, kind: str) -> pd.DataFrame:
    chosen = scores[(scores.metric == metric) & (scores.kind == kind)]
    if chosen.empty:
        have = scores[["metric", "kind"]].drop_duplicates().agg(" of ".join, axis=1)
        raise ValueError(f"the scores do not hold {metric} of {kind}: they hold {', '.join(have)}")
    return chosen.pivot_table(index="sequence", columns="layer", values="value")


def _kept(protected: Iterable[int], layers: int) -> set[int]:
    """The protected layers, counted from the start."""
    protected = tuple(protected)
    if wrong := [layer for layer in protected if not -layers <= layer < layers]:
        raise ValueError(f"cannot protect layers {wrong}: there are {layers} layers")
    return {layer % layers for layer in protected}


def until(
    model: PreTrainedModel,
    windows: Int[Tensor, "sequence token"],
    search: Int[Tensor, "window length"] | Callable[[PreTrainedModel], np.ndarray],
    metric: str | Mapping[str, Metric] = "bucket",
    kind: str = "attention",
    retention: float = 0.95,
    confidence: float = 0.95,
    protected: Iterable[int] = OFFICIAL_PROTECTED,
    log: str | Path | None = None,
    seed: int = 0,
) -> tuple[list[SubBlock], pd.DataFrame]:
    """The largest set that the iterative process (arXiv 2504.03794) drops while a share of the dense model's performance stays.

    Score what is left, drop the least informative, measure, and so on until the measured share is below the promised one. The
    search text has chosen the set, so whether the promise holds is for the evaluation text to say.

    Args:
        windows: calibration text, which ranks the sub-blocks anew after every drop.
        search: text on which performance is exp(-loss), so that the share is dense over pruned perplexity; or a function of the
            model that gives one performance per item (accuracies), whose mean over the dense model's mean is the share.
        metric: a registered name, or one metric of one's own with its name.
        retention: the promised share, 0 to 1.
        confidence: of the one-sided bootstrap lower bound over search windows (or items), paired with the dense model's.
        protected: layers that are kept; negative ones count from the end.
        log: a JSON file, rewritten after each step. A run that was stopped goes on from it, and so does a run that promises another
            share: the steps are the same.
        seed: of the bootstrap.
    Returns:
        The longest beginning of the process whose lower bound keeps the promise, first dropped first. And its log: step, layer,
        kind, score, retention, low, the passes (of one sequence each) and tokens spent so far, chosen. The last step is the one
        that broke the promise, or that left nothing to drop.
    Raises:
        ValueError: a share, confidence, metric, kind or layer that does not exist; text that is both calibration and search; fewer
            than two windows or items; a log of another run; a model from which nothing can be dropped, as ``dropping.dropped``.
    """
    if not 0 <= retention <= 1:
        raise ValueError(f"cannot promise a retention of {retention}: it is a share of the dense model's performance, 0 to 1")
    if not 0 < confidence < 1:
        raise ValueError(f"cannot give a confidence of {confidence}: it lies between 0 and 1, both excluded")
    if len(one := resolve([metric] if isinstance(metric, str) else metric)) != 1:
        raise ValueError(f"one metric decides what goes next, got {', '.join(one) or 'none'}")
    if by_loss := isinstance(search, Tensor):
        _check_apart(windows, search)
    measure = (lambda smaller: perplexity(smaller, search).per_window) if by_loss else search
    kept = _kept(protected, depth(model))
    may = [sub_block for sub_block in find(model, kind) if sub_block.layer not in kept]
    run = {} if log is None else _identity(model, windows, search, one, kind, kept)
    steps = [] if log is None else _read(Path(log), run)
    chosen: list[SubBlock] = []
    rows: list[tuple] = []
    for number in progress(range(len(may) + 1), f"dropping {kind} until {retention:g}"):
        if number == len(steps):
            step = _step(model, windows, one, may, chosen, measure) if number else _measured(model, [], measure)
            if step is None:
                break
            steps.append(step)
            if log is not None:
                _write(Path(log), {"run": run, "steps": steps})
        if number:  # step 0 is the dense model
            step, dense = steps[number], steps[0]
            chosen.append(SubBlock(step["layer"], kind))
            values = np.array([step["values"], dense["values"]]).T
            draws = bootstrap(values, seed=seed)
            share, low = float(_share(values.mean(0), by_loss)), float(np.quantile(_share(draws.T, by_loss), 1 - confidence))
            spent = [sum(s[what] for s in steps[: number + 1]) for what in ("passes", "tokens")]
            rows.append((number, step["layer"], kind, step["score"], share, low, *spent))
            if not share >= retention:  # also where a loss is not a number
                break
    table = pd.DataFrame(rows, columns=["step", "layer", "kind", "score", "retention", "low", "passes", "tokens"])
    n = max(table.step[(table.retention >= retention) & (table.low >= retention)], default=0)
    return chosen[:n], table.assign(chosen=table.step <= n)


def _share(means: Float[np.ndarray, "2 *draw"], by_loss: bool) -> Float[np.ndarray, "*draw"] | float:
    """What is left of the dense model's performance, from the means of the pruned and of the dense model."""
    now, dense = means
    return np.exp(dense - now) if by_loss else now / np.where(dense > 0, dense, np.inf)


def _step(model, windows, metric: dict[str, Metric], may: list[SubBlock], chosen: list[SubBlock], measure) -> dict | None:
    """Drop the least informative of what is left, by the scores of the model as it is now; None where nothing may be dropped."""
    left = [sub_block for sub_block in may if sub_block not in chosen and _can_go(model, [*chosen, sub_block])]
    if not left:
        with dropped(model, may[:1] if not chosen else []):  # says why there is not even a first
            return None
    (name,), (kind,) = metric, {sub_block.kind for sub_block in left}
    with dropped(model, chosen):
        mean = _sequences(score(model, windows, metric, [kind]), name, kind).mean()
    # Without some blocks the others are counted anew
    place = [layer for layer in range(depth(model)) if SubBlock(layer, "block") not in chosen]
    mean = mean.set_axis([place[layer] for layer in mean.index]).reindex([sub_block.layer for sub_block in left])
    layer = int(mean.sort_values(kind="stable").index[0])
    step = {"layer": layer, "score": float(mean[layer]), **_measured(model, [*chosen, SubBlock(layer, kind)], measure)}
    return step | {"passes": step["passes"] + len(windows), "tokens": step["tokens"] + windows.numel()}


def _can_go(model: PreTrainedModel, sub_blocks: list[SubBlock]) -> bool:
    try:
        with dropped(model, sub_blocks):
            return True
    except ValueError:
        return False


def _measured(model: PreTrainedModel, sub_blocks: list[SubBlock], measure: Callable) -> dict:
    """Performance without these sub-blocks, one value per window or item, and what the model read for it."""
    read = []

    def count(_, args: tuple, kwargs: dict) -> None:
        read.append(next(x for x in (*args, *map(kwargs.get, ("input_ids", "inputs_embeds"))) if x is not None).shape[:2])

    with dropped(model, sub_blocks):
        handle = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            values = np.asarray(measure(model), dtype=float)
        finally:
            handle.remove()
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"need the performance on at least two windows or items, one value each, got shape {values.shape}")
    return {"values": values.tolist(), "passes": sum(n for n, _ in read), "tokens": sum(n * length for n, length in read)}


def _check_apart(windows: Int[Tensor, "sequence token"], search: Int[Tensor, "window length"]) -> None:
    """Refuse search text that ranks the sub-blocks too. Windows begin documents, so one may be the beginning of the other."""
    length = min(windows.shape[1], search.shape[1])
    seen = set(map(tuple, windows[:, :length].tolist()))
    if shared := sum(tuple(window) in seen for window in search[:, :length].tolist()):
        raise ValueError(f"{shared} of {len(search)} search windows are in the calibration text: take them from another part of it")


def _identity(model, windows, search, metric: dict[str, Metric], kind: str, kept: set[int]) -> dict[str, object]:
    """All that the steps depend on. A metric is known by its name and by a value, a function that measures by its name."""
    ((name, function),) = metric.items()
    states = torch.randn(2, windows.shape[1], 16, generator=torch.Generator().manual_seed(0))
    judge = store.digest(search) if isinstance(search, Tensor) else getattr(search, "__qualname__", type(search).__qualname__)
    return {
        "model": store.fingerprint(model),
        "calibration text": store.digest(windows),
        "search": judge,
        "metric": f"{name}: {float(function(*states[: 1 if is_entropy(function) else 2])):.6g}",
        "kind": kind,
        "protected layers": sorted(kept),
    }


def _read(log: Path, run: dict[str, object]) -> list[dict]:
    """The steps of the run's log, or none where there is no file."""
    if not log.exists():
        return []
    try:
        found = json.loads(log.read_text(encoding="utf-8"))
        differ, steps = [key for key, value in run.items() if found["run"].get(key) != value], found["steps"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{log} is no log of selection.until: name another file, or delete it") from error
    if differ:
        raise ValueError(f"{log} is the log of another run (with another {', '.join(differ)}): name another file, or delete it")
    return steps


def _write(log: Path, content: dict) -> None:
    """In one step: a run that is killed leaves the log as it was or with one step more."""
    log.parent.mkdir(parents=True, exist_ok=True)
    unfinished = log.with_name(f".{log.name}.unfinished")
    unfinished.write_text(json.dumps(content), encoding="utf-8")
    os.replace(unfinished, log)
