"""What a pruned model writes: answers to a task with free answers, and how much it repeats itself. Held-out loss shows neither.

``python -m entrodrop_utils.studies.writing MODEL`` writes ``data/results/MODEL/generation.csv`` after every pruned model.
Answers are kept in the cache, so a run that was stopped continues.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cached_scoring import cached_score
from ..claims import published_figures
from ..dropping import Repair, dropped
from ..families.decoder import decoder_layers
from ..families.self_check import measuring
from ..files import write_text
from ..layerwise import DropSet
from ..models import load_model
from ..paths import RESULTS
from ..profile import DEFAULT_MODEL, DEFAULT_TEXT, slug
from ..repairing import repair
from ..selection import count_of, one_shot
from ..statistics import interval_text, mean_interval, share_interval
from ..tasks import task_scores_by_set
from ..text import windows
from .speed import device_name

N_GRAM = 4  # tokens of the pieces whose repetition is counted
FRACTIONS = (0.125, 0.25, 0.375)  # of the attention layers
METRICS = ("cosine", "bucket")
SCORED, FITTED = (24, 256), (20, 256)  # calibration windows of the scores and of the linear repair
PROMPTS, NEW = (24, 64), 64  # prompts of evaluation text; tokens that continue them
FILE = "generation.csv"
COLUMNS = ["metric", "n_dropped", "n_layers", "task", "task_metric", "items", "value", "low", "high"]
COLUMNS += ["repeated", "repeated_low", "repeated_high", "prompts", "precision", "device"]


@measuring
def repeated_shares(
    model: PreTrainedModel, prompts: Int[Tensor, "prompt token"], n_new: int, gram: int = N_GRAM
) -> Float[np.ndarray, "prompt"]:
    """The share of the ``gram``-token pieces of each prompt's greedy continuation that stood earlier in it."""
    mask = torch.ones_like(prompts)
    settings = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False, "pad_token_id": 0}
    texts = model.generate(prompts.to(model.device), attention_mask=mask.to(model.device), **settings)[:, prompts.shape[1] :]
    pieces = [[tuple(text[i : i + gram]) for i in range(len(text) - gram + 1)] for text in texts.tolist()]
    return np.array([1 - len(set(runs)) / len(runs) for runs in pieces])


def generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drop_set: DropSet,
    task: str,
    items: int,
    prompts: Int[Tensor, "prompt token"],
    repaired: Repair | None = None,
) -> list[dict[str, object]]:
    """One row for each metric of the task: task, task_metric, items, value (share of right answers) with Wilson's interval, and the
    mean repeated share of greedy continuations with its interval over prompts.

    Args:
        repaired: what stands in place of the dropped sub-blocks.
    Raises:
        ValueError: a task that does not exist.
        RuntimeError: its data are not on this machine.
    """
    scores, answers = task_scores_by_set(model, tokenizer, [task], [drop_set], items, repaired)
    if answers.empty:
        raise RuntimeError(f"{task} was not measured: {scores.note.iloc[0]}")
    with dropped(model, drop_set, repaired):
        repeated = mean_interval(repeated_shares(model, prompts, NEW))
    rows = []
    for metric, of_metric in answers.groupby("metric", sort=False):
        values = dict(zip(("value", "low", "high"), share_interval(of_metric.value.to_numpy() > 0), strict=True))
        pieces = dict(zip(("repeated", "repeated_low", "repeated_high"), repeated, strict=True))
        rows.append({"task": task, "task_metric": metric, "items": len(of_metric), **values, **pieces, "prompts": len(prompts)})
    return rows


def attention_choices(
    scores: pd.DataFrame, n_layers: int, metrics: Sequence[str], fractions: Sequence[float]
) -> dict[tuple[str, int], DropSet]:
    """(metric, number) -> the attention layers that it drops in one shot; the dense model comes first, then small numbers."""
    counts = [count_of(fraction, n_layers) for fraction in fractions]
    chosen = {(m, n): tuple(sorted(one_shot(scores, m, "attention", n))) for n in counts for m in metrics}
    return {("dense", 0): (), **chosen}


def generation(name: str, task: str, items: int, precision: str) -> pd.DataFrame:
    """Measure a model and write the table as it grows: ``COLUMNS``, with the weights in ``precision`` while it writes.

    The last rows are of the first metric's smallest choice with a linear repair: "cosine, repaired".
    """
    model, tokenizer = load_model(name)
    scores = cached_score(model, windows(DEFAULT_TEXT, "calibration", tokenizer, *SCORED), METRICS, ["attention"])
    n_layers = len(decoder_layers(model))
    choices = attention_choices(scores, n_layers, METRICS, FRACTIONS)
    first, fewest = METRICS[0], count_of(min(FRACTIONS), n_layers)
    mended = f"{first}, repaired"
    choices[mended, fewest] = choices[first, fewest]
    repairs = {mended: repair(model, choices[first, fewest], windows(DEFAULT_TEXT, "calibration", tokenizer, *FITTED))}
    del model  # a large one is in memory once
    model, _ = load_model(name, dtype=precision)
    prompts, rows = windows(DEFAULT_TEXT, "evaluation", tokenizer, *PROMPTS), []
    for (metric, n), drop_set in choices.items():
        own = {"metric": metric, "n_dropped": n, "n_layers": n_layers, "precision": precision, "device": device_name(model.device)}
        rows += [own | row for row in generated(model, tokenizer, drop_set, task, items, prompts, repairs.get(metric))]
        table = pd.DataFrame(rows, columns=COLUMNS)
        write_text(RESULTS / slug(name) / FILE, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    return table


def committed_answers(models: Iterable[str]) -> pd.DataFrame:
    """The committed tables of some models, as one: model, then ``COLUMNS``; of each answer the first metric of its task."""
    files = {model: RESULTS / model / FILE for model in models}
    tables = [pd.read_csv(file).assign(model=model) for model, file in files.items() if file.is_file()]
    table = pd.concat(tables) if tables else pd.DataFrame(columns=COLUMNS).assign(model="")
    return table.drop_duplicates(["model", "metric", "n_dropped", "task"])[["model", *COLUMNS]].reset_index(drop=True)


def answers_by_share(answers: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """An estimate and its interval as text: a row for each model and metric, a column for each share of attention layers."""
    share = (answers.n_dropped / answers.n_layers).map("{:.1%}".format)
    table = answers.assign(share=share, text=interval_text(answers, columns, ".0%"))
    dense = table[table.metric == "dense"].set_index("model").text
    by_share = table[table.metric != "dense"].pivot_table("text", ["model", "metric"], "share", aggfunc="first", sort=False)
    by_share.insert(0, "0%", [dense[model] for model, _ in by_share.index])
    return by_share.rename_axis(columns=None)


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
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--precision", default="bfloat16", help="of the weights while the model writes: float32 or bfloat16")
    chosen = parser.parse_args(arguments)
    print(generation(chosen.model, chosen.task, chosen.items, chosen.precision).round(3).to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
