"""The promise to keep a share of the performance: the largest set that keeps it, and whether it holds on other text."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ..cache import function_name, tensor_digest
from ..dropping import dropped
from ..evaluation import perplexity
from ..families.self_check import measuring
from ..iterative import prune_until, share_interval_of
from ..profile import short_hash
from ..residual import SubBlock
from ..scoring import Metric
from ..selection import PUBLISHED_PROTECTED
from ..statistics import verdict

Promise = tuple[str, str, str, float]  # measure, kind, method, promised share
Process = tuple[list[SubBlock], pd.DataFrame]  # the set that is dropped, and the log of prune_until
LIKELIHOOD, ACCURACY = MEASURED_BY = ("likelihood", "accuracy")
NOT_SHOWN = "not shown"


@measuring
def next_token_accuracy(model: PreTrainedModel, windows: Int[Tensor, "window token"]) -> Float[np.ndarray, "window"]:
    """The share of each window's next tokens that the model ranks first."""
    hits = [(model(ids[None], use_cache=False).logits[0, :-1].argmax(-1) == ids[1:]).double().mean() for ids in windows]
    return torch.stack(hits).cpu().numpy()


def processes(
    model: PreTrainedModel,
    ranking: Int[Tensor, "sequence token"],
    validation: Int[Tensor, "window token"],
    methods: Mapping[tuple[str, str], Metric | list[SubBlock]],
    promises: Sequence[float],
    protected: Sequence[int] = PUBLISHED_PROTECTED,
    folder: Path | None = None,
) -> dict[Promise, Process]:
    """``prune_until`` for every measure, kind, method and promised share.

    Args:
        ranking: calibration text, which ranks the sub-blocks anew at every step of a metric.
        methods: (kind, name) -> a metric, or an order that is followed as it is.
        folder: of the logs, from which a stopped run continues, and which the promises of one process share.
    """
    measures = {LIKELIHOOD: validation, ACCURACY: partial(next_token_accuracy, windows=validation)}
    results = {}
    for (measure, measured), ((kind, name), method), promised in product(measures.items(), methods.items(), promises):
        about = ", ".join(map(str, method)) if isinstance(method, list) else function_name(method)
        run = short_hash(f"{tensor_digest(ranking)} {tensor_digest(validation)} {about} {sorted(protected)}")
        log = folder and folder / f"{measure}-{kind}-{name.replace(' ', '-')}-{run}.json"
        chosen_by = method if isinstance(method, list) else {name: method}
        arguments = (model, ranking, measured, chosen_by, kind if kind != "mixed" else "attention", promised)
        results[measure, kind, name, promised] = prune_until(*arguments, protected=protected, log=log)
    return results


def promise_table(
    model: PreTrainedModel, evaluation: Int[Tensor, "window token"], results: Mapping[Promise, Process]
) -> pd.DataFrame:
    """Every promise on text that has chosen nothing.

    Returns:
        measure, kind, method, promised, n_dropped, dropped (layers, first dropped first), passes (sequences run in all), verdict
        (of the evaluation text: holds, does not hold, inconclusive; or not shown: no set keeps it with confidence), validation
        and validation_low (the share of the set on validation text and its lower bound; where no set is shown, those of the
        first drop), evaluation, evaluation_low and evaluation_high (share on evaluation text with its interval).
    """
    performance = {
        LIKELIHOOD: lambda smaller: perplexity(smaller, evaluation).per_window,
        ACCURACY: lambda smaller: next_token_accuracy(smaller, evaluation),
    }
    measured: dict[tuple, np.ndarray] = {}

    def of_set(measure: str, sub_blocks: list[SubBlock]) -> np.ndarray:
        key = (measure, *sorted(sub_blocks))
        if key not in measured:
            with dropped(model, sub_blocks):
                measured[key] = performance[measure](model)
        return measured[key]

    rows = []
    for promise, (chosen, log) in results.items():
        measure, promised = promise[0], promise[-1]
        step = log.iloc[max(len(chosen), 1) - 1]
        kept, outcome = (np.nan, np.nan, np.nan), NOT_SHOWN
        if chosen:
            kept = share_interval_of(of_set(measure, chosen), of_set(measure, []), measure == LIKELIHOOD)
            outcome = verdict(kept.low, kept.high, promised)
        layers = " ".join(str(sub_block.layer) for sub_block in chosen)
        rows.append((*promise, len(chosen), layers, log.passes.iloc[-1], outcome, step.retention, step.low, *kept))
    columns = ["measure", "kind", "method", "promised", "n_dropped", "dropped", "passes", "verdict", "validation", "validation_low"]
    return pd.DataFrame(rows, columns=[*columns, "evaluation", "evaluation_low", "evaluation_high"])
