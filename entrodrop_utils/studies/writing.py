"""What a pruned model writes: answers to a task with free answers, and how much it repeats itself. Held-out loss shows neither.

``python -m entrodrop_utils.studies.writing MODEL`` writes ``data/results/MODEL/repetition.csv`` and, with the answers,
``generation.csv`` after every pruned model, and beside each table what was run. A run that was stopped continues from the cache.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import cache, search
from ..cached_scoring import cached_score
from ..claims import published_figures
from ..dropping import Repair, dropped
from ..families.self_check import measuring
from ..figures import COLOURS, GREY, MARKERS, headed_panels
from ..layerwise import DropSet, set_name
from ..models import load_model
from ..paths import RESULTS
from ..profile import DEFAULT_MODEL, DEFAULT_TEXT, slug
from ..progress import progress
from ..record import run_record, write_recorded
from ..repairing import repair
from ..selection import count_of, one_shot
from ..statistics import interval_text, mean_interval, paired_difference, share_interval
from ..tasks import task_scores_by_set
from ..text import repeated, text_digest, tokens_with, windows
from .methods import layers_text
from .search_study import ON_REPEATED, OURS, POINT_COLOURS, REPEATED_TEXT
from .speed import device_name

N_GRAM = 4  # tokens of the pieces whose repetition is counted
FRACTIONS = (0.125, 0.25, 0.375)  # of the attention layers
METRICS = ("cosine", "bucket")  # whose choices answer the task, as do those of lazy greedy; the first's smallest also repaired
CONTINUING = ("knn", "norm_ratio")  # whose choices only continue text
SCORED, SEARCHED, FITTED = (24, 256), (3, 32), (20, 256)  # calibration windows of the scores, of lazy greedy, of the linear repair
PROMPTS, NEW = (24, 64), 64  # prompts of evaluation text; tokens that continue them
DIGIT = r"\d"
SearchText = tuple[Int[Tensor, "_ _"], Bool[Tensor, "_ _"] | None]  # windows, and the tokens that count (None: all)
ANSWERS, REPETITION = "generation.csv", "repetition.csv"


@measuring
def repeated_shares(
    model: PreTrainedModel, prompts: Int[Tensor, "prompt token"], n_new: int, gram: int = N_GRAM
) -> Float[np.ndarray, " prompt"]:
    """The share of the ``gram``-token pieces of each prompt's greedy continuation that stood earlier in it."""
    mask = torch.ones_like(prompts)
    settings = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False, "pad_token_id": 0}
    texts = model.generate(prompts.to(model.device), attention_mask=mask.to(model.device), **settings)[:, prompts.shape[1] :]
    pieces = [[tuple(text[i : i + gram]) for i in range(len(text) - gram + 1)] for text in texts.tolist()]
    return np.array([1 - len(set(runs)) / len(runs) for runs in pieces])


def prompt_repetition(
    model: PreTrainedModel, drop_set: DropSet, prompts: Int[Tensor, "prompt token"], repaired: Repair | None = None
) -> Float[np.ndarray, " prompt"]:
    """The repeated share of the greedy continuation that a pruned model writes to each prompt, from the cache if it is there.

    Args:
        repaired: what stands in place of the dropped sub-blocks.
    """

    def compute(_: list[str]) -> pd.DataFrame:
        with dropped(model, drop_set, repaired):
            return pd.DataFrame({"set": set_name(drop_set), "repeated": repeated_shares(model, prompts, NEW)})

    entry = cache.subkey(cache.repaired(cache.model_key(model, "studies.writing"), repaired), cache.tensor_digest(prompts), NEW)
    return cache.rows_by_set("repetition", entry, [set_name(drop_set)], compute, lambda: None).repeated.to_numpy()


def answer_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drop_set: DropSet,
    task: str,
    items: int,
    repaired: Repair | None = None,
) -> list[dict[str, object]]:
    """One row for each metric of the task: task, task_metric, items, value (share of right answers) with Wilson's interval.

    Args:
        repaired: what stands in place of the dropped sub-blocks.
    Raises:
        ValueError: a task that does not exist.
        RuntimeError: its data are not on this machine.
    """
    scores, answers = task_scores_by_set(model, tokenizer, [task], [drop_set], items, repaired)
    if answers.empty:
        raise RuntimeError(f"{task} was not measured: {scores.note.iloc[0]}")
    rows = []
    for metric, of_metric in answers.groupby("metric", sort=False):
        values = dict(zip(("value", "low", "high"), share_interval(of_metric.value.to_numpy() > 0), strict=True))
        rows.append({"task": task, "task_metric": metric, "items": len(of_metric), **values})
    return rows


def searched_texts(tokenizer: PreTrainedTokenizerBase, text: str = "") -> dict[str, SearchText]:
    """The calibration text of each search before a model answers, by the name of the method.

    Args:
        text: on which lazy greedy searches too, with all of its tokens and with its digits alone.
    """
    short, once = (windows(DEFAULT_TEXT, "calibration", tokenizer, *amount) for amount in (SEARCHED, REPEATED_TEXT))
    texts: dict[str, SearchText] = {OURS: (short, None), ON_REPEATED: (repeated(once), None)}
    if text:
        own, name = windows(text, "calibration", tokenizer, *repeated(once).shape), Path(text).stem
        texts |= {f"{OURS}, {name}": (own, None), f"{OURS}, digits of {name}": (own, tokens_with(DIGIT, own, tokenizer))}
    return texts


def attention_choices(
    model: PreTrainedModel,
    scored: Int[Tensor, "window token"],
    searched: Mapping[str, SearchText],
    fractions: Sequence[float],
    metrics: Sequence[str] = METRICS + CONTINUING,
) -> dict[tuple[str, int], DropSet]:
    """(method, number) -> the attention layers that it drops; the dense model comes first, then small numbers.

    Args:
        scored: calibration text of the metrics, which choose in one shot.
        searched: that of lazy greedy, by the name of the method.
    """
    n_layers = len(search.candidates(model, "attention"))
    counts = [count_of(fraction, n_layers) for fraction in fractions]
    scores = cached_score(model, scored, metrics, ["attention"])
    orders = {
        method: search.lazy_greedy(model, ids, max(counts), "attention", counted=counted).order
        for method, (ids, counted) in searched.items()
    }
    choices: dict[tuple[str, int], DropSet] = {("dense", 0): ()}
    for n in counts:
        choices |= {(m, n): tuple(sorted(one_shot(scores, m, "attention", n))) for m in metrics}
        choices |= {(method, n): tuple(sorted(order[:n])) for method, order in orders.items()}
    return choices


def measure_writing(name: str, task: str, items: int, precision: str, text: str = "") -> dict[str, pd.DataFrame]:
    """Measure a model, and write each table as it grows; file -> table.

    Args:
        items: of the task; with 0 only repetition is measured.
        precision: of the weights while the model writes.
        text: on which lazy greedy searches too before the model answers, such as a file of the task's training part; once on all
            its tokens, and once on its digits.
    Returns:
        metric (or method), n_dropped, n_layers, dropped (layers), precision, device. Of answers what ``answer_rows`` returns. Of
        repetition the mean share over prompts and its interval (repeated, low, high), that less the dense model's (more, more_low,
        more_high), and prompts (their number).
    """
    start = time.monotonic()
    model, tokenizer = load_model(name)
    scored, fitted = (windows(DEFAULT_TEXT, "calibration", tokenizer, *amount) for amount in (SCORED, FITTED))
    searched = searched_texts(tokenizer, text)
    if not items:  # only answers compare the texts of the search
        searched = {OURS: searched[OURS]}
    prompts = windows(DEFAULT_TEXT, "evaluation", tokenizer, *PROMPTS)
    choices = attention_choices(model, scored, searched, FRACTIONS)
    fewest = next(key for key in choices if key[0] == METRICS[0])
    mended = f"{METRICS[0]}, repaired", fewest[1]
    repairs = {mended: repair(model, choices[fewest], fitted)}
    choices[mended] = choices[fewest]
    n_layers = len(search.candidates(model, "attention"))
    del model  # a large one is in memory once
    model, _ = load_model(name, dtype=precision)
    about = {"precision": precision, "device": device_name(model.device)}
    hashes = [text_digest(ids) for ids in (scored, fitted, *(ids for ids, _ in searched.values()), prompts)]
    dense = prompt_repetition(model, (), prompts)

    def repeating(drop_set: DropSet, repaired: Repair | None) -> list[dict[str, object]]:
        shares = prompt_repetition(model, drop_set, prompts, repaired) if drop_set else dense
        ends = dict(zip(("repeated", "low", "high"), mean_interval(shares).within(0.0, 1.0), strict=True))
        more = dict(zip(("more", "more_low", "more_high"), paired_difference(shares, dense), strict=True))
        return [ends | more | {"prompts": len(prompts)}]

    def answering(drop_set: DropSet, repaired: Repair | None) -> list[dict[str, object]]:
        return answer_rows(model, tokenizer, drop_set, task, items, repaired)

    def written(file: str, methods: Iterable[str], rows_of: Callable, **settings: object) -> pd.DataFrame:
        rows = []
        for (method, n), drop_set in progress([pair for pair in choices.items() if pair[0][0] in methods], file):
            own = {"metric": method, "n_dropped": n, "n_layers": n_layers, "dropped": layers_text(drop_set)}
            rows += [own | row | about for row in rows_of(drop_set, repairs.get((method, n)))]
            chosen = {"model": name, "text": DEFAULT_TEXT, "precision": precision, **settings}
            record = run_record(chosen, name, hashes, time.monotonic() - start)
            write_recorded(RESULTS / slug(name) / file, pd.DataFrame(rows), record)
        return pd.DataFrame(rows)

    few = ("dense", *METRICS, OURS, mended[0])
    tables = {REPETITION: written(REPETITION, (*few, *CONTINUING), repeating)}
    if items:
        asked = {"task": task, "items": items} | ({"search text": Path(text).name} if text else {})
        tables[ANSWERS] = written(ANSWERS, (*few, *searched), answering, **asked)
    return tables


def committed_tables(file: str, models: Iterable[str]) -> pd.DataFrame:
    """The committed tables of some models, as one with the column model in front; of each answer the first metric of its task."""
    tables = [pd.read_csv(path).assign(model=model) for model in models if (path := RESULTS / model / file).is_file()]
    if not tables:
        return pd.DataFrame(columns=["model", "metric", "n_dropped", "n_layers", "task", "value", "repeated", "low", "high"])
    table = pd.concat(tables)
    key = [name for name in ("model", "metric", "n_dropped", "task", "tokens") if name in table]
    return table.drop_duplicates(key)[["model", *table.columns.drop("model")]].reset_index(drop=True)


def answers_by_share(answers: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """An estimate and its interval as text: a row for each model and metric, in the column of the nearest of ``FRACTIONS``."""
    nearest = [min(FRACTIONS, key=lambda fraction: abs(row.n_dropped / row.n_layers - fraction)) for row in answers.itertuples()]
    share = [f"{fraction:.1%}" for fraction in nearest]
    table = answers.assign(share=share, text=interval_text(answers, columns, ".0%"))
    dense = table[table.metric == "dense"].set_index("model").text
    by_share = table[table.metric != "dense"].pivot_table("text", ["model", "metric"], "share", aggfunc="first", sort=False)
    by_share.insert(0, "0%", [dense[model] for model, _ in by_share.index])
    return by_share.rename_axis(columns=None)


def draw_repetition(table: pd.DataFrame, title: str) -> Figure:
    """The repeated share against the share of attention layers dropped: a panel for each model, the dense one in grey."""
    shown = table[~table.metric.str.contains("repaired")]
    groups = dict(iter(shown.groupby("model", sort=False)))
    figure, axes = headed_panels(title, len(groups), 2.9, sharey=True)
    methods, looks = [*METRICS, *CONTINUING, OURS], COLOURS | POINT_COLOURS
    for axis, (model, rows) in zip(axes, groups.items(), strict=True):
        dense = rows[rows.metric == "dense"].iloc[0]
        axis.axhspan(dense.low, dense.high, color=GREY, alpha=0.18, linewidth=0)
        axis.axhline(dense.repeated, color=GREY, linewidth=0.8)
        for i, method in enumerate(methods):
            own = rows[rows.metric == method]
            x = 100 * own.n_dropped / own.n_layers + 1.6 * (i - (len(methods) - 1) / 2)  # side by side
            ends = [own.repeated - own.low, own.high - own.repeated]
            look = {"color": looks[method], "marker": MARKERS.get(method, "D"), "label": method.replace("_", " ")}
            axis.errorbar(x, own.repeated, ends, linestyle="", markersize=4, linewidth=1, **look)
        axis.set_title(model.replace("-instruct", ""), fontsize=8)
        axis.set(xlabel="attention layers\ndropped (%)", xlim=(6, 44), xticks=[100 * share for share in FRACTIONS])
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes[0].set_ylabel("repeated pieces")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(methods))
    return figure


def repetition_sentence(table: pd.DataFrame) -> str:
    """How many pruned models repeat themselves decidedly more than the dense one, and how many less."""
    pruned = table[(table.metric != "dense") & ~table.metric.str.contains("repaired")]
    more, less = (pruned.more_low > 0).sum(), (pruned.more_high < 0).sum()
    return f"Of {len(pruned)} pruned models {more} repeat themselves more than the dense model and {less} less."


def answer_sentences(answers: pd.DataFrame) -> list[str]:
    """For each model the share of right answers of the dense model, and without the smallest number of attention layers."""
    lines = []
    for (model, task), rows in answers.groupby(["model", "task"], sort=False):
        texts = pd.Series(interval_text(rows, ["value", "low", "high"], ".0%"), index=rows.index)
        least = rows[(rows.metric != "dense") & (rows.n_dropped == rows.n_dropped[rows.n_dropped > 0].min())]
        kept = ", ".join(f"by {row.metric} {texts[row.Index]}" for row in least.itertuples())
        dense = texts[rows.metric == "dense"].iloc[0]
        lines.append(
            f"{model} answers {dense} of {rows['items'].iloc[0]} {task} items right; without {least.n_dropped.iloc[0]} of "
            f"{rows.n_layers.iloc[0]} attention layers chosen {kept}."
        )
    return lines


def published_answers() -> list[str]:
    """The published shares of right GSM8K answers of a dense and a pruned model, as sentences with their source."""
    table = published_figures("others")
    rows = table[table.metric == "GSM8K dense / pruned"]
    return [
        f"Published ({row.source}): {row.model} {' / '.join(f'{share}%' for share in row.value.split(' / '))} of GSM8K, dense / "
        f"without {int(row.n_dropped)} of {int(row.n_total)} attention layers."
        for row in rows.itertuples()
    ]


def main(arguments: list[str] | None = None) -> int:
    """Let a model and its pruned versions answer a task with free answers, and count their repetitions."""
    parser = argparse.ArgumentParser(prog="python -m entrodrop_utils.studies.writing", description=main.__doc__)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="as for load_model")
    parser.add_argument("--task", default="gsm8k", help="of lm-evaluation-harness")
    parser.add_argument("--items", type=int, default=100, help="of the task; 0 measures only repetition")
    parser.add_argument("--text", default="", help="on which lazy greedy searches too, such as the task's training part")
    parser.add_argument("--precision", default="bfloat16", help="of the weights while the model writes: float32 or bfloat16")
    chosen = parser.parse_args(arguments)
    for table in measure_writing(chosen.model, chosen.task, chosen.items, chosen.precision, chosen.text).values():
        print(table.round(3).to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
