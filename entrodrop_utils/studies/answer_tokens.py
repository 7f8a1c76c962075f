"""Which tokens of right answers a pruned model loses: the digits of a calculation, or the words around them.

Few tokens of ordinary text are parts of a calculation, so held-out loss says little about them. Here the model reads the task's own
prompts and the right answers. ``python -m entrodrop_utils.studies.answer_tokens MODEL`` writes
``data/results/MODEL/answer_tokens.csv`` and beside it what was run; notebook 10 shows it. A stopped run continues from the cache.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import cache, search
from ..families.self_check import measuring
from ..layerwise import DropSet, LayerwiseForward, set_name
from ..models import load_model
from ..paths import RESULTS
from ..profile import DEFAULT_MODEL, DEFAULT_TEXT, slug
from ..progress import progress
from ..record import run_record, write_recorded
from ..statistics import Interval, interval_text, mean_interval, paired_difference
from ..tasks.harness import worked_answers
from ..text import text_digest, tokens_with, windows
from .methods import layers_text
from .speed import device_name
from .writing import DIGIT, FRACTIONS, METRICS, SCORED, attention_choices, searched_texts

FILE = "answer_tokens.csv"
KINDS = {True: "digits", False: "other tokens"}
NOTHING_TO_LOSE = Interval(np.nan, np.nan, np.nan)  # where the dense model ranks no token first


@measuring
def answer_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answers: Sequence[tuple[str, str]], sets: Iterable[DropSet]
) -> pd.DataFrame:
    """The model's loss at each token of right answers, without each set of sub-blocks; layers that sets share run once.

    Args:
        answers: prompts and right answers, as ``worked_answers`` returns them.
    Returns:
        set (its name), item, token (its place in the answer), digit (whether it has one), nll (nats), first (whether the model
        ranks it first).
    """
    named, tables = {set_name(drop_set): drop_set for drop_set in sets}, []
    key = cache.model_key(model, "studies.answer_tokens")
    for item, (prompt, answer) in enumerate(progress(answers, "answers")):
        before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in (prompt, answer))
        ids = torch.tensor([before + after])
        digit = tokens_with(DIGIT, ids[:, len(before) :], tokenizer)[0].numpy()

        def compute(missing: list[str], ids=ids, digit=digit, start: int = len(before)) -> pd.DataFrame:
            layerwise, targets = LayerwiseForward(model, ids.to(model.device)), ids[0, start:].to(model.device)
            rows = []
            for drop_set, state in layerwise.last_states([named[name] for name in missing]):
                logits = layerwise.logits(state[:, start - 1 : -1])[0].float()
                nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none").cpu().numpy()
                first = (logits.argmax(-1) == targets).cpu().numpy()
                columns = {"set": set_name(drop_set), "token": range(len(nll)), "digit": digit, "nll": nll, "first": first}
                rows.append(pd.DataFrame(columns))
            return pd.concat(rows, ignore_index=True)

        entry = cache.subkey(key, cache.tensor_digest(ids), len(before))
        tables.append(cache.rows_by_set("answer_tokens", entry, named, compute, lambda: None).assign(item=item))
    return pd.concat(tables, ignore_index=True)


def lost_tokens(tokens: pd.DataFrame, drop_set: DropSet) -> list[dict[str, object]]:
    """For digits and for other tokens: what a set costs at them.

    Args:
        tokens: of ``answer_tokens``, with the dense model among the sets.
    Returns:
        tokens (their kind), items (answers that have some), count, increase (of the loss, nats per token) and lost (the share of
        the tokens that the dense model ranks first and the pruned one does not), each with its interval over items.
    """
    rows = []
    for digit, kind in KINDS.items():
        of_kind = tokens[tokens.digit == digit].set_index(["item", "token"])
        if of_kind.empty:  # a task without numbers
            continue
        dense, pruned = (of_kind[of_kind.set == set_name(one)].sort_index() for one in ((), drop_set))
        losses = [of_set.nll.groupby("item").mean() for of_set in (pruned, dense)]
        increase = paired_difference(*(loss.to_numpy(dtype=float) for loss in losses))
        shares = (~pruned["first"][dense["first"]]).groupby("item").mean().to_numpy(dtype=float)
        lost = mean_interval(shares).within(0.0, 1.0) if len(shares) else NOTHING_TO_LOSE
        row = {"tokens": kind, "items": len(losses[0]), "count": len(dense)}
        row |= dict(zip(("increase", "low", "high"), increase, strict=True))
        rows.append(row | dict(zip(("lost", "lost_low", "lost_high"), lost, strict=True)))
    return rows


def measure_answers(
    name: str, task: str, items: int, precision: str, text: str = "", fractions: Sequence[float] = FRACTIONS[:1]
) -> pd.DataFrame:
    """Measure a model and write the table.

    Args:
        task: with free answers, of lm-evaluation-harness.
        text: on which lazy greedy searches too, as for ``measure_writing``.
        fractions: of the attention layers, that are dropped.
    Returns:
        metric (or method), n_dropped, n_layers, dropped (layers), what ``lost_tokens`` returns, precision, device.
    """
    start = time.monotonic()
    model, tokenizer = load_model(name)
    answers = worked_answers(task, items)
    scored, searched = windows(DEFAULT_TEXT, "calibration", tokenizer, *SCORED), searched_texts(tokenizer, text)
    choices = attention_choices(model, scored, searched, fractions, METRICS)
    n_layers = len(search.candidates(model, "attention"))
    del model  # a large one is in memory once
    model, _ = load_model(name, dtype=precision)
    tokens = answer_tokens(model, tokenizer, answers, choices.values())
    rows = []
    for (method, n), drop_set in choices.items():
        if not n:  # the dense model, with which the others are compared
            continue
        own = {"metric": method, "n_dropped": n, "n_layers": n_layers, "dropped": layers_text(drop_set)}
        about = {"precision": precision, "device": device_name(model.device)}
        rows += [own | row | about for row in lost_tokens(tokens, drop_set)]
    settings = {"model": name, "text": DEFAULT_TEXT, "precision": precision, "task": task, "items": items}
    settings |= {"search text": Path(text).name} if text else {}
    hashes = [text_digest(ids) for ids in (scored, *(ids for ids, _ in searched.values()))]
    table = pd.DataFrame(rows)
    write_recorded(RESULTS / slug(name) / FILE, table, run_record(settings, name, hashes, time.monotonic() - start))
    return table


def lost_table(table: pd.DataFrame) -> pd.DataFrame:
    """What every method costs each model at digits and at other tokens, as text, from the committed tables."""
    increase, lost = ["increase", "low", "high"], ["lost", "lost_low", "lost_high"]
    texts = {"loss increase": interval_text(table, increase), "lost": interval_text(table, lost, ".1%")}
    shown = table.assign(**texts).pivot_table([*texts], ["model", "n_dropped", "metric"], "tokens", aggfunc="first", sort=False)
    return shown[[(value, kind) for value in texts for kind in KINDS.values()]].rename_axis(columns=[None, None])


def lost_sentences(table: pd.DataFrame) -> list[str]:
    """For each model and number, the share of the right answers' digits that each method loses."""
    lines = []
    for (model, n), rows in table[table.tokens == KINDS[True]].groupby(["model", "n_dropped"], sort=False):
        shares = zip(rows.metric, interval_text(rows, ["lost", "lost_low", "lost_high"], ".1%"), strict=True)
        by_method = ", ".join(f"{share} by {method}" for method, share in shares)
        number = f"Without {n} of {rows.n_layers.iloc[0]} attention layers {model}"
        each = (rows["count"] / rows["items"]).iloc[0]
        lines.append(f"{number} loses, of the digits in right answers ({each:.0f} in each): {by_method}.")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Measure which tokens of right answers a model loses with its attention layers."""
    parser = argparse.ArgumentParser(prog="python -m entrodrop_utils.studies.answer_tokens", description=main.__doc__)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="as for load_model")
    parser.add_argument("--task", default="gsm8k", help="of lm-evaluation-harness, with free answers")
    parser.add_argument("--items", type=int, default=10, help="of the task")
    parser.add_argument("--text", default="", help="on which lazy greedy searches too, such as the task's training part")
    parser.add_argument(
        "--fractions", nargs="+", type=float, default=FRACTIONS[:1], help="of the attention layers, that are dropped"
    )
    parser.add_argument("--precision", default="bfloat16", help="of the weights while the model reads: float32 or bfloat16")
    chosen = parser.parse_args(arguments)
    table = measure_answers(chosen.model, chosen.task, chosen.items, chosen.precision, chosen.text, chosen.fractions)
    print(table.round(3).to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
