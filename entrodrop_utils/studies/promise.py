"""The promise to keep a share of the performance: the largest set that keeps it, and whether it holds on other text."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..cache import function_name, tensor_digest
from ..dropping import dropped
from ..families.decoder import decoder_layers
from ..families.self_check import measuring
from ..iterative import prune_until, share_interval_of
from ..profile import short_hash
from ..progress import progress
from ..residual import SubBlock, find
from ..scoring import Metric
from ..selection import PUBLISHED_PROTECTED
from ..statistics import Interval, interval_text, verdict

Promise = tuple[str, str, str, float]  # measure, kind, method, promised share
Process = tuple[list[SubBlock], pd.DataFrame]  # the set that is dropped, and the log of prune_until
LIKELIHOOD, ACCURACY = MEASURED_BY = ("likelihood", "accuracy")
NOT_SHOWN = "not shown"


@measuring
def next_tokens(model: PreTrainedModel, windows: Int[Tensor, "window token"]) -> dict[str, Float[np.ndarray, " window"]]:
    """Mean loss (likelihood, nats) and share of next tokens that the model ranks first (accuracy) of each window."""
    values = {measure: [] for measure in MEASURED_BY}
    for ids in progress(windows.to(model.device), "next tokens"):
        logits, labels = model(ids[None], use_cache=False).logits[0, :-1].float(), ids[1:]
        values[LIKELIHOOD].append(float(cross_entropy(logits, labels)))
        values[ACCURACY].append(float((logits.argmax(-1) == labels).double().mean()))
    return {measure: np.array(of_windows) for measure, of_windows in values.items()}


def _kept(model: PreTrainedModel, windows: Tensor, measure: str, kept: dict) -> Float[np.ndarray, " window"]:
    """``next_tokens`` of a model from which something is dropped; one that was measured before is not run again."""
    left = (tuple(map(id, decoder_layers(model))), *(tuple(find(model, kind)) for kind in ("attention", "mlp")))
    if left not in kept:
        kept[left] = next_tokens(model, windows)
    return kept[left][measure]


def processes(
    model: PreTrainedModel,
    ranking: Int[Tensor, "sequence token"],
    validation: Int[Tensor, "window token"],
    methods: Mapping[tuple[str, str], Metric | list[SubBlock]],
    promises: Sequence[float],
    protected: Sequence[int] = PUBLISHED_PROTECTED,
    folder: Path | None = None,
) -> dict[Promise, Process]:
    """``prune_until`` for every measure, kind, method and promised share. A set that one process measured is not run by another.

    Args:
        ranking: calibration text, which ranks the sub-blocks anew at every step of a metric.
        methods: (kind, name) -> a metric, or an order that is followed as it is.
        folder: of the logs, from which a stopped run continues, and which the promises of one process share.
    """
    results, kept = {}, {}
    for measure, ((kind, name), method), promised in product(MEASURED_BY, methods.items(), promises):
        measured = partial(_kept, windows=validation, measure=measure, kept=kept)
        about = ", ".join(map(str, method)) if isinstance(method, list) else function_name(method)
        run = short_hash(f"{tensor_digest(ranking)} {tensor_digest(validation)} {about} {sorted(protected)}")
        log = folder and folder / f"{measure}-{kind}-{name.replace(' ', '-')}-{run}.json"
        chosen_by = method if isinstance(method, list) else {name: method}
        settings = {"protected": protected, "log": log, "losses": measure == LIKELIHOOD}
        results[measure, kind, name, promised] = prune_until(model, ranking, measured, chosen_by, kind, promised, **settings)
    return results


def promise_table(
    model: PreTrainedModel, evaluation: Int[Tensor, "window token"], results: Mapping[Promise, Process]
) -> pd.DataFrame:
    """Every promise on text that has chosen nothing.

    Returns:
        measure, kind, method, promised, n_dropped, dropped (layers, first dropped first), passes (sequences run), verdict
        (of the evaluation text: holds, does not hold, inconclusive; or not shown: no set keeps it with confidence), validation
        and validation_low (the share of the set on validation text and its lower bound; where no set is shown, those of the
        first drop), evaluation, evaluation_low and evaluation_high (share on evaluation text with its interval).
    """

    kept_before: dict = {}

    def of_set(measure: str, sub_blocks: list[SubBlock]) -> np.ndarray:
        with dropped(model, sub_blocks):
            return _kept(model, evaluation, measure, kept_before)

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


def display_table(table: pd.DataFrame) -> pd.DataFrame:
    """The table of ``promise_table`` for a page: shares with intervals as text."""
    low = [f"{100 * row.validation:.3g}%, at least {100 * row.validation_low:.3g}%" for row in table.itertuples()]
    shares = ["evaluation", "evaluation_low", "evaluation_high"]
    judged = [f"{text} %" for text in interval_text(100 * table[shares], shares, ".3g")]
    judged = np.where(table.n_dropped > 0, judged, "")
    shown = table[["measure", "kind", "method", "promised", "n_dropped", "dropped"]]
    return shown.assign(promised=[f"{p:.0%}" for p in table.promised], validation=low, evaluation=judged, verdict=table.verdict)


def promise_finding(table: pd.DataFrame, n_layers: int) -> str:
    """The finding, in at most 30 words: the largest set that keeps the largest promise, and by likelihood how far it reaches."""
    strict = table[table.promised == table.promised.max()]
    best = strict.loc[strict.n_dropped.idxmax()]
    share = f"{best.promised:.0%} of the dense {best.measure}"
    if not best.n_dropped:
        return f"No set is shown to keep {share}: one drop keeps {best.validation:.1%}, at least {best.validation_low:.1%}."
    kept = Interval(best.evaluation, best.evaluation_low, best.evaluation_high)
    return (
        f"Under a promise of {share}, {best.method} drops {best.n_dropped} of {n_layers} {best.kind} sub-blocks and keeps "
        f"{kept:.1%} on evaluation text."
    )
