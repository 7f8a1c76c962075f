"""EntroDrop's iterative process with a promise: drop, score again, and stop before too much of the performance is lost."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.optimize import brentq
from torch import Generator, Tensor, randn
from transformers import PreTrainedModel

from . import cache
from .cached_scoring import cached_score
from .dropping import dropped
from .evaluation import perplexity
from .families.decoder import decoder_layers
from .families.self_check import measuring
from .files import write_text
from .progress import progress
from .residual import SubBlock, find
from .scoring import Metric, is_entropy, resolve
from .selection import PUBLISHED_PROTECTED, protected_layers, scores_by_layer
from .statistics import CONFIDENCE, Interval, mean_ends


@measuring
def prune_until(
    model: PreTrainedModel,
    windows: Int[Tensor, "sequence token"],
    validation: Int[Tensor, "window length"] | Callable[[PreTrainedModel], np.ndarray],
    metric: str | Mapping[str, Metric] | Sequence[SubBlock] = "bucket",
    kind: str = "attention",
    retention: float = 0.95,
    confidence: float = 0.95,
    protected: Iterable[int] = PUBLISHED_PROTECTED,
    log: str | Path | None = None,
    losses: bool = False,
) -> tuple[list[SubBlock], pd.DataFrame]:
    """The largest set that the iterative process (arXiv 2504.03794) drops while it keeps a share of the dense performance.

    Each step scores the remaining sub-blocks, drops the least informative and measures, until the measured share is below the
    promised one. The validation text has chosen the set, so evaluation text must decide whether the promise holds.

    Args:
        windows: calibration text, which ranks the sub-blocks anew after every drop.
        validation: text on which performance is exp(-loss), so that the share is dense over pruned perplexity; or a function of the
            model that gives one performance per item (accuracies), whose mean over the dense model's mean is the share.
        metric: a registered name, or a mapping with one metric; or an order of sub-blocks that a search found, which is followed as
            it is, whatever ``kind`` and ``protected`` say.
        retention: the promised share, 0 to 1.
        confidence: of the one-sided lower bound over validation windows (or items), by Student's t: of the mean of
            (pruned - promised share x dense), and for the loss of the mean difference.
        protected: layers that are never dropped; negative ones count from the end.
        log: a JSON file, rewritten after each step. A run that was stopped continues from it, and so does a run that promises
            another share: the steps are the same.
        losses: whether a function given as ``validation`` returns losses in nats, as text does, and not accuracies.
    Returns:
        The longest beginning of the process whose lower bound keeps the promise, first dropped first; and the log: step, layer,
        kind, score, retention, low, the passes (of one sequence each) and tokens spent so far, chosen. The last step is the one
        that broke the promise, or that left nothing to drop.
    Raises:
        ValueError: a share, confidence, metric, kind or layer that does not exist; text that is both calibration and validation;
            fewer than two windows or items; a log of another run; a model from which nothing can be dropped, as ``dropped``.
    """
    if not 0 <= retention <= 1:
        raise ValueError(f"cannot promise a retention of {retention}: it is a share of the dense model's performance, 0 to 1")
    if not 0 < confidence < 1:
        raise ValueError(f"cannot give a confidence of {confidence}: it lies between 0 and 1, both excluded")
    order = None if isinstance(metric, (str, Mapping)) else [SubBlock(*sub_block) for sub_block in metric]
    metrics = {} if order is not None else resolve([metric] if isinstance(metric, str) else metric)
    if order is None and len(metrics) != 1:
        raise ValueError(f"one metric ranks the sub-blocks, got {', '.join(map(str, metrics)) or 'none'}")
    if by_text := isinstance(validation, Tensor):
        _check_disjoint(windows, validation)
    measure = (lambda smaller: perplexity(smaller, validation).per_window) if by_text else validation
    by_loss = by_text or losses
    kept = protected_layers(protected, len(decoder_layers(model)))
    candidates = [sub_block for sub_block in find(model, kind) if sub_block.layer not in kept] if order is None else order
    log = None if log is None else Path(log).expanduser()
    run = {} if log is None else _identity(model, windows, validation, metrics, kind, kept, order)
    steps = [] if log is None else _read_log(log, run)
    chosen: list[SubBlock] = []
    rows: list[tuple] = []
    for number in progress(range(len(candidates) + 1), f"dropping {kind} until {retention:g}"):
        if number == len(steps):
            if number == 0:
                step = _measure(model, [], measure)
            elif order is None:
                step = _step(model, windows, metrics, candidates, chosen, measure)
            else:
                step = _next(model, order, number, measure)
            if step is None:
                break
            steps.append(step)
            if log is not None:
                write_text(log, json.dumps({"run": run, "steps": steps}))
        if number:  # step 0 is the dense model
            step, dense = steps[number], steps[0]
            chosen.append(SubBlock(step["layer"], step.get("kind", kind)))
            # The lower end of this interval is the one-sided bound, which lies above the share where confidence is below one half
            share, low, _ = share_interval_of(np.array(step["values"]), np.array(dense["values"]), by_loss, 2 * confidence - 1)
            spent = [sum(s[unit] for s in steps[: number + 1]) for unit in ("passes", "tokens")]
            rows.append((number, *chosen[-1], step["score"], share, low, *spent))
            if not share >= retention:  # also where a loss is not a number
                break
    table = pd.DataFrame(rows, columns=["step", "layer", "kind", "score", "retention", "low", "passes", "tokens"])
    n = max(table.step[(table.retention >= retention) & (table.low >= retention)], default=0)
    return chosen[:n], table.assign(chosen=table.step <= n)


def share_interval_of(
    pruned: Float[np.ndarray, " unit"], dense: Float[np.ndarray, " unit"], by_loss: bool, confidence: float = CONFIDENCE
) -> Interval:
    """The share of the dense model's performance that is left, with its interval over windows or items, by Student's t.

    Args:
        pruned: losses if ``by_loss``, else accuracies; ``dense`` are those of the dense model on the same units.
    Returns:
        exp of the mean loss difference; or a ratio of means with Fieller's interval: every share r for which the mean of
        pruned - r x dense is not shown to differ from zero.
    """
    if by_loss:
        ends = mean_ends(dense - pruned, confidence)
        return Interval(float(np.exp((dense - pruned).mean())), *(float(np.exp(end)) for end in ends))
    if not dense.mean() > 0:
        return Interval(0.0, 0.0, 0.0)
    share = float(pruned.mean() / dense.mean())
    lower, upper = (lambda r, end=end: float(mean_ends(pruned - r * dense, confidence)[end]) for end in (0, 1))
    # Both fall with r: the lower end from 0 to the share, the upper end beyond it
    low = 0.0 if lower(0.0) <= 0 else share if lower(share) > -1e-12 else float(brentq(lower, 0.0, share))
    beyond = 2 * share + 2
    high = np.inf if upper(beyond) > 0 else share if upper(share) < 1e-12 else float(brentq(upper, share, beyond))
    return Interval(share, low, high)


def _next(model: PreTrainedModel, order: list[SubBlock], number: int, measure: Callable) -> dict | None:
    """Drop the first ``number`` of an order; None where they cannot go together, an error where not even the first can."""
    if number > 1 and not _can_be_dropped(model, order[:number]):
        return None
    layer, kind = order[number - 1]
    return {"layer": layer, "kind": kind, "score": float(number), **_measure(model, order[:number], measure)}


def _step(model, windows, metrics: dict[str, Metric], candidates: list[SubBlock], chosen: list[SubBlock], measure) -> dict | None:
    """Drop the least informative remaining sub-block, by the scores of the model as it is now; None where none can be dropped."""
    remaining = [s for s in candidates if s not in chosen and _can_be_dropped(model, [*chosen, s])]
    if not remaining:
        with dropped(model, candidates[:1] if not chosen else []):  # raises the reason where not even a first can be dropped
            return None
    (name,), (kind,) = metrics, {sub_block.kind for sub_block in remaining}
    with dropped(model, chosen):
        mean = scores_by_layer(cached_score(model, windows, metrics, [kind]), name, kind).mean()
    # Without some blocks the others are numbered anew
    place = [layer for layer in range(len(decoder_layers(model))) if SubBlock(layer, "block") not in chosen]
    mean = mean.set_axis([place[layer] for layer in mean.index]).reindex([sub_block.layer for sub_block in remaining])
    layer = int(mean.sort_values(kind="stable").index[0])
    step = {"layer": layer, "score": float(mean[layer]), **_measure(model, [*chosen, SubBlock(layer, kind)], measure)}
    return step | {"passes": step["passes"] + len(windows), "tokens": step["tokens"] + windows.numel()}


def _can_be_dropped(model: PreTrainedModel, sub_blocks: list[SubBlock]) -> bool:
    try:
        with dropped(model, sub_blocks):
            return True
    except ValueError:
        return False


def _measure(model: PreTrainedModel, sub_blocks: list[SubBlock], measure: Callable) -> dict:
    """Performance without these sub-blocks, one value per window or item, and the passes and tokens spent on it."""
    shapes = []

    def count(_, args: tuple, kwargs: dict) -> None:
        shapes.append(next(x for x in (*args, *map(kwargs.get, ("input_ids", "inputs_embeds"))) if x is not None).shape[:2])

    with dropped(model, sub_blocks):
        handle = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            values = np.asarray(measure(model), dtype=float)
        finally:
            handle.remove()
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"need the performance on at least two windows or items, one value each, got shape {values.shape}")
    return {"values": values.tolist(), "passes": sum(n for n, _ in shapes), "tokens": sum(n * length for n, length in shapes)}


def _check_disjoint(windows: Int[Tensor, "sequence token"], validation: Int[Tensor, "window length"]) -> None:
    """Refuse validation text that is also calibration text. Windows start documents, so one may be the beginning of another."""
    length = min(windows.shape[1], validation.shape[1])
    calibration = set(map(tuple, windows[:, :length].tolist()))
    if n_shared := sum(tuple(window) in calibration for window in validation[:, :length].tolist()):
        raise ValueError(
            f"{n_shared} of {len(validation)} validation windows are in the calibration text: take them from another part of it"
        )


def _identity(
    model, windows, validation, metrics: dict[str, Metric], kind: str, kept: set[int], order: list[SubBlock] | None
) -> dict[str, object]:
    """Everything that the steps depend on. A metric is known by its name and a value, a function that measures by its name."""
    states = randn(2, windows.shape[1], 16, generator=Generator().manual_seed(0))
    ranked = [f"{name}: {float(metric(*states[: 1 if is_entropy(metric) else 2])):.6g}" for name, metric in metrics.items()]
    function_name = getattr(validation, "__qualname__", type(validation).__qualname__)
    return {
        "model": cache.fingerprint(model),
        "calibration text": cache.tensor_digest(windows),
        "validation": cache.tensor_digest(validation) if isinstance(validation, Tensor) else function_name,
        "metric": ranked[0] if order is None else ", ".join(map(str, order)),
        "kind": kind,
        "protected layers": sorted(kept),
    }


def _read_log(log: Path, run: dict[str, object]) -> list[dict]:
    """The steps of the run's log; none where there is no file."""
    if not log.exists():
        return []
    try:
        content = json.loads(log.read_text(encoding="utf-8"))
        differing, steps = [key for key, value in run.items() if content["run"].get(key) != value], content["steps"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{log} is no log of prune_until: name another file, or delete it") from error
    if differing:
        raise ValueError(f"{log} is the log of another run (with another {', '.join(differing)}): name another file, or delete it")
    return steps
