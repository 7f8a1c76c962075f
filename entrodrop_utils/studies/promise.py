"""The promise to keep a share of the likelihood per token: the largest set that keeps it, and whether it holds on other text."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from ..cache import function_name, tensor_digest
from ..evaluation import losses_by_set
from ..iterative import prune_until
from ..profile import short_hash
from ..residual import SubBlock
from ..scoring import Metric
from ..selection import PUBLISHED_PROTECTED
from ..statistics import mean_interval, verdict
from .methods import losses_of

Promise = tuple[str, str, float]  # kind, metric, promised retention
Process = tuple[list[SubBlock], pd.DataFrame]  # the set that is dropped, and the log of prune_until
NOTHING = "nothing dropped"


def processes(
    model: PreTrainedModel,
    ranking: Int[Tensor, "sequence token"],
    validation: Int[Tensor, "window token"],
    metrics: Mapping[str, Metric],
    kinds: Sequence[str],
    promises: Sequence[float],
    protected: Sequence[int] = PUBLISHED_PROTECTED,
    folder: Path | None = None,
    seed: int = 0,
) -> dict[Promise, Process]:
    """``prune_until`` for every kind, metric and promised retention.

    Args:
        ranking: calibration text that ranks the sub-blocks anew at every step.
        folder: of the logs, from which a stopped run continues, and which the promises of one kind and metric share.
    """
    results = {}
    for kind, (name, metric), promised in product(kinds, metrics.items(), promises):
        run = short_hash(f"{tensor_digest(ranking)} {tensor_digest(validation)} {function_name(metric)} {sorted(protected)}")
        log = folder and folder / f"{kind}-{name}-{run}.json"
        arguments = (model, ranking, validation, {name: metric}, kind)
        results[kind, name, promised] = prune_until(*arguments, promised, protected=protected, log=log, seed=seed)
    return results


def promise_table(
    model: PreTrainedModel, evaluation: Int[Tensor, "window token"], results: Mapping[Promise, Process], seed: int = 0
) -> pd.DataFrame:
    """Every promise on text that has chosen nothing. Retention is exp(-increase of the loss), a mean over windows.

    Returns:
        kind, metric, promised, n_dropped, dropped (layers, first dropped first), first_drop (retention after the first drop, on
        validation text), passes (sequences run in all), verdict (of the evaluation text: holds, does not hold, inconclusive; or
        nothing dropped), validation and validation_low (retention of the set on validation text, and its lower bound),
        evaluation, evaluation_low and evaluation_high (on evaluation text, with its interval).
    """
    sets = {promise: tuple(sorted(dropped)) for promise, (dropped, _) in results.items()}
    by_set = losses_of(losses_by_set(model, evaluation, [(), *sets.values()]))
    rows = []
    for promise, (dropped, log) in results.items():
        layers = " ".join(str(sub_block.layer) for sub_block in dropped)
        row = (*promise, len(dropped), layers, log.retention.iloc[0], log.passes.iloc[-1])
        if dropped:
            last = log.iloc[len(dropped) - 1]
            kept = mean_interval(np.exp(by_set[()].nll.to_numpy() - by_set[sets[promise]].nll.to_numpy()), seed)
            rows.append((*row, verdict(kept.low, kept.high, promise[2]), last.retention, last.low, *kept))
        else:
            rows.append((*row, NOTHING, *[np.nan] * 5))
    columns = ["kind", "metric", "promised", "n_dropped", "dropped", "first_drop", "passes", "verdict", "validation"]
    columns += ["validation_low", "evaluation", "evaluation_low", "evaluation_high"]
    return pd.DataFrame(rows, columns=columns)
