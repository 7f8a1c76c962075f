"""What collapses first as attention layers are dropped: likelihood, accuracy on tasks, varied text, or recall over a distance.

``python -m entrodrop_utils.studies.collapse MODEL`` writes ``data/results/MODEL/collapse.csv`` after every pruned model, and beside
it what was run; notebook 05 shows it. What was measured is kept in the cache, so a run that was stopped continues.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import cache, search
from ..dropping import dropped
from ..evaluation import losses_by_set
from ..families.self_check import measuring
from ..layerwise import DropSet, set_name
from ..models import load_model
from ..paths import RESULTS
from ..profile import DEFAULT_MODEL, DEFAULT_TEXT, slug
from ..progress import progress
from ..record import run_record, write_recorded
from ..selection import count_of
from ..statistics import Interval, half_sampling, interval_text, paired_difference
from ..tasks import task_scores_by_set
from ..tasks.local_tasks import NAMES as LOCAL_TASKS
from ..tasks.retention import Retention, above_chance
from ..text import repeated, text_digest, windows
from .methods import layers_text
from .search_study import ON_REPEATED, OURS, REPEATED_TEXT
from .writing import repeated_shares

FILE = "collapse.csv"
SHARES = (0.125, 0.25, 0.375)  # of the attention layers
SEARCH_TEXT, SCORE_TEXT = (3, 32), (4, 128)  # as notebook 05: calibration windows and tokens of lazy greedy and of cosine
ON_LONG = f"{OURS}, long text"  # as much text as is read twice
HELD_OUT, PROMPT, NEW = (6, 64), 32, 48  # evaluation windows as notebook 05; tokens of a prompt, and that continue it
DISTANCES, SEGMENT, WARM, RECALLED = (32, 128, 512), 32, 4, 12  # tokens; scored after WARM of the copy; windows of each distance
PROMPTS = 12  # whose continuations are searched for repetition
TASKS, ITEMS = tuple(name for name in LOCAL_TASKS if name != "induction"), 25
LIKELIHOOD, TASK, VARIED = "likelihood", "task accuracy", "varied text"
HALF = 0.5  # share of the dense model's value at which an ability counts as lost


def recall_windows(random: Int[Tensor, "window token"], distance: int, segment: int = SEGMENT) -> Int[Tensor, "window token2"]:
    """Windows of random tokens whose last ``segment`` tokens repeat those that stood ``distance`` tokens before.

    Args:
        random: at least ``1 + distance + segment`` tokens a window. The first token, where models look that attend to nothing, is
            not repeated.
    Raises:
        ValueError: a distance shorter than the segment, or windows that are too short.

    >>> import torch
    >>> recall_windows(torch.arange(9)[None], distance=4, segment=2).tolist()
    [[0, 1, 2, 3, 4, 1, 2]]
    """
    if distance < segment or random.shape[1] < 1 + distance + segment:
        raise ValueError(
            f"cannot repeat {segment} tokens at a distance of {distance} in windows of {random.shape[1]}: the distance is at least "
            f"the segment, and a window has {1 + distance + segment} tokens or more"
        )
    ids = random[:, : 1 + distance + segment].clone()
    ids[:, 1 + distance :] = ids[:, 1 : 1 + segment]
    return ids


@measuring
def recalled_shares(
    model: PreTrainedModel, ids: Int[Tensor, "window token"], segment: int = SEGMENT, warm: int = WARM
) -> Float[np.ndarray, " window"]:
    """The share of the last ``segment - warm`` tokens of each window that the model ranks first.

    On ``recall_windows`` it is recall: a model that does not see the first copy guesses among all tokens. The first ``warm``
    tokens of the copy tell the model which one it repeats.
    """
    shares = []
    for window in ids.to(model.device).split(1):
        logits = model(window, use_cache=False, logits_to_keep=segment - warm + 1).logits[:, :-1]
        shares.append(float((logits.argmax(-1) == window[:, warm - segment :]).double().mean()))
    return np.array(shares)


def kept(values: Float[np.ndarray, " unit"], dense: Float[np.ndarray, " unit"]) -> Interval:
    """The mean of values as a share of the dense mean on the same units, with its interval; nan where the latter is zero."""
    return half_sampling(lambda pruned, whole: float(pruned / whole) if whole else np.nan, values, dense).within(0.0, np.inf)


def calibration_texts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Int[Tensor, "_ _"]]:
    """The calibration windows of each method: lazy greedy on three texts, and cosine."""

    def text(n_windows: int, n_tokens: int) -> Int[Tensor, "_ _"]:
        return windows(DEFAULT_TEXT, "calibration", tokenizer, n_windows, n_tokens)

    twice = repeated(text(*REPEATED_TEXT))
    return {OURS: text(*SEARCH_TEXT), ON_LONG: text(*twice.shape), ON_REPEATED: twice, "cosine": text(*SCORE_TEXT)}


def attention_orders(model: PreTrainedModel, texts: Mapping[str, Int[Tensor, "_ _"]], n: int) -> dict[str, DropSet]:
    """The ``n`` attention layers that each method drops on its text, first dropped first."""
    orders = {method: search.lazy_greedy(model, ids, n).order for method, ids in texts.items() if method != "cosine"}
    orders["cosine"] = search.by_score(model, texts["cosine"], n, metric="cosine").order
    return {method: tuple(order) for method, order in orders.items()}


def generated_values(
    model: PreTrainedModel, drop_set: DropSet, texts: Mapping[str, Int[Tensor, "window token"]], key: str | None
) -> dict[str, np.ndarray]:
    """Ability -> one value per window: the share of recalled tokens by distance, and of pieces of a continuation that are new.

    Args:
        texts: name of the ability -> its windows; ``VARIED`` has the prompts.
        key: of the cache.
    """

    def compute(_: list[str]) -> pd.DataFrame:
        rows = []
        with dropped(model, drop_set):
            for name, ids in texts.items():
                values = 1 - repeated_shares(model, ids, NEW) if name == VARIED else recalled_shares(model, ids)
                rows += [(set_name(drop_set), name, i, value) for i, value in enumerate(values)]
        return pd.DataFrame(rows, columns=["set", "ability", "window", "value"])

    table = cache.rows_by_set("abilities", key, [set_name(drop_set)], compute, lambda: None)
    return {name: rows.sort_values("window").value.to_numpy() for name, rows in table.groupby("ability", sort=False)}


def collapse(
    name: str,
    shares: Sequence[float] = SHARES,
    distances: Sequence[int] = DISTANCES,
    prompts: int = PROMPTS,
    tasks: Sequence[str] = TASKS,
) -> pd.DataFrame:
    """Measure a model, and write the table as it grows and beside it what was run.

    Args:
        shares: of the attention layers, that are dropped.
        distances: tokens between a text and its copy.
        prompts: whose continuations are searched for repetition; with 0, none is measured.
        tasks: as for ``task_scores``; without any, no accuracy is measured.
    Returns:
        method, n_dropped, n_layers, dropped (layers), ability, units (windows or items), value (mean), kept, low, high (the share
        of the dense model's value that is kept, with its interval over units: exp of minus the loss increase for the likelihood,
        above chance for the accuracy on tasks).
    """
    start = time.monotonic()
    model, tokenizer = load_model(name)
    n_layers = len(search.candidates(model, "attention"))
    counts = sorted({count_of(share, n_layers) for share in shares})
    calibration = calibration_texts(tokenizer)
    orders = attention_orders(model, calibration, counts[-1])
    sets = {(method, n): tuple(sorted(order[:n])) for n in (0, *counts) for method, order in orders.items()}
    longest = windows("random", "evaluation", tokenizer, RECALLED, 1 + max(distances) + SEGMENT)
    texts = {f"recall over {distance} tokens": recall_windows(longest, distance) for distance in distances}
    if prompts:
        texts[VARIED] = windows(DEFAULT_TEXT, "evaluation", tokenizer, prompts, PROMPT)
    held_out = windows(DEFAULT_TEXT, "evaluation", tokenizer, *HELD_OUT)
    key = cache.subkey(cache.model_key(model, "studies.collapse"), *map(cache.tensor_digest, texts.values()))
    hashes = [text_digest(ids) for ids in (*calibration.values(), *texts.values(), held_out)]
    settings = {"model": name, "text": DEFAULT_TEXT, "shares dropped": shares, "distances": distances, "prompts": prompts}
    settings |= {"tasks": tasks, "items": ITEMS if tasks else 0}
    dense, of_set = generated_values(model, (), texts, key), {}
    for drop_set in progress(dict.fromkeys(sets.values()), "pruned models"):
        losses = {s: rows.nll.to_numpy() for s, rows in losses_by_set(model, held_out, [(), drop_set]).groupby("set")}
        likelihood = np.exp([-end for end in paired_difference(losses[drop_set], losses[()])])[[0, 2, 1]]
        rows = [(LIKELIHOOD, len(held_out), np.exp(-losses[drop_set].mean()), *likelihood)]
        if tasks:
            scores, items = task_scores_by_set(model, tokenizer, tasks, dict.fromkeys([(), drop_set]), ITEMS)
            retention, units = Retention.of(scores, items, above_chance(scores)), len(items[["part", "item"]].drop_duplicates())
            accuracy = retention.mean[retention.sets.index(drop_set)]
            rows.append((TASK, units, accuracy, *retention.share([drop_set], above=True)))
        for ability, values in generated_values(model, drop_set, texts, key).items():
            rows.append((ability, len(values), values.mean(), *kept(values, dense[ability])))
        of_set[drop_set] = pd.DataFrame(rows, columns=["ability", "units", "value", "kept", "low", "high"])
        parts = []
        for (method, n), chosen in sets.items():
            if chosen in of_set:
                layers = layers_text(orders[method][:n])
                about = {"method": method, "n_dropped": n, "n_layers": n_layers, "dropped": layers}
                parts.append(of_set[chosen].assign(**about)[[*about, *of_set[chosen].columns]])
        table = pd.concat(parts, ignore_index=True)
        write_recorded(RESULTS / slug(name) / FILE, table, run_record(settings, name, hashes, time.monotonic() - start))
    return table


def committed_collapse(name: str) -> pd.DataFrame | None:
    """The committed table of a model; None where it has not been measured."""
    path = RESULTS / slug(name) / FILE
    return pd.read_csv(path) if path.exists() else None


def committed_near(names: Iterable[str], share: float) -> pd.DataFrame:
    """The committed tables of some models at the number nearest to a share of the attention layers, with a column model."""
    tables = []
    for name in names:
        if (table := committed_collapse(name)) is not None:
            pruned = table[table.n_dropped > 0]
            distance = (pruned.n_dropped / pruned.n_layers - share).abs()
            tables.append(pruned[distance == distance.min()].assign(model=name))
    columns = ["method", "n_dropped", "n_layers", "ability", "kept", "low", "high", "model"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def recall_table(table: pd.DataFrame) -> pd.DataFrame:
    """What every method keeps of each model's abilities, as text, from ``committed_near``."""
    table = table.assign(kept=interval_text(table, ["kept", "low", "high"]))
    rows = ["model", "n_dropped", "method"]
    return table.pivot_table("kept", rows, "ability", aggfunc="first", sort=False).rename_axis(columns=None)


def recall_sentence(table: pd.DataFrame, ability: str = "recall over 128 tokens") -> str:
    """In how many models of ``committed_near`` a search on repeated text keeps more of an ability, and in how many less."""
    by_method = table[table.ability == ability].set_index("model")
    twice, short = (by_method[by_method.method == method] for method in (ON_REPEATED, OURS))
    more, less = (twice.low > short.high).sum(), (twice.high < short.low).sum()
    return (
        f"Lazy greedy on repeated text keeps more {ability} than on short windows in {more} of {len(twice)} models, and less in "
        f"{less} (intervals that do not overlap)."
    )


def collapse_sentences(table: pd.DataFrame) -> list[str]:
    """For every method, what each ability keeps at the count where the likelihood first falls below a half, or at the largest."""
    lines = []
    for method, rows in table.groupby("method", sort=False):
        likelihood = rows[rows.ability == LIKELIHOOD].sort_values("n_dropped")
        below = likelihood[likelihood.kept < HALF]
        n = int((below if len(below) else likelihood.tail(1)).n_dropped.iloc[0])
        at = rows[rows.n_dropped == n].sort_values("kept")
        shares = ", ".join(f"{row.ability} {Interval(row.kept, row.low, row.high):.2f}" for row in at.itertuples())
        lines.append(f"{method}, {n} of {rows.n_layers.iloc[0]} attention layers: kept of the dense model's value: {shares}.")
    return lines


def main(arguments: Iterable[str] | None = None) -> int:
    """Measure what a model loses first as its attention layers are dropped."""
    parser = argparse.ArgumentParser(prog="python -m entrodrop_utils.studies.collapse", description=main.__doc__)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="as for load_model")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of the attention layers, that are dropped")
    parser.add_argument("--distances", nargs="*", type=int, default=DISTANCES, help="tokens between a text and its copy")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="whose continuations are searched for repetition")
    parser.add_argument("--tasks", nargs="*", default=TASKS, help="tasks whose accuracy is measured")
    chosen = parser.parse_args(arguments)
    table = collapse(chosen.model, chosen.shares, chosen.distances, chosen.prompts, chosen.tasks)
    print(table.round(3).to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
