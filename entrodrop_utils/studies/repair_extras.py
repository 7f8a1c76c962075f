"""Questions beside the grid of repairs: the first token's own constant, the closed loop by amount of text, and what training adds.

``python -m entrodrop_utils.studies.repair_extras MODEL`` reads the choices of ``data/results/MODEL/grid/09_grid.csv`` and writes
``09_first_token.csv``, ``09_loops.csv`` and ``09_healed.csv`` beside it. Training needs the extra ``heal``; a stopped training
continues.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ..dropping import Repair, dropped
from ..evaluation import perplexity
from ..families.decoder import decoder_layers
from ..families.self_check import measuring
from ..layerwise import DropSet
from ..models import load_model
from ..paths import BUILD, DATA
from ..profile import DEFAULT_MODEL, DEFAULT_TEXT, Profile, slug
from ..repairing import repair
from ..repairing.fit import LOOPS
from ..repairing.healing import heal
from ..residual import SubBlock, endpoints, layout_of, states
from ..statistics import mean_interval, paired_difference
from ..text import windows
from .methods import Choice, Method
from .repair_grid import DOMAINS, FITTED, HELD_OUT, SIZE, committed_grid
from .repair_study import SINGLE

FIRST, BY_LOOP, HEALED = "09_first_token.csv", "09_loops.csv", "09_healed.csv"
CHOSEN_BY = (Method("cosine"), Method(SINGLE))
AMOUNTS = (10, 20, 60)  # calibration windows on which both loops are fitted
HEAL_TOKENS, STEPS = 128, 60  # of each window that is trained on; steps of two windows


@measuring
def first_token_means(
    model: PreTrainedModel, drop_set: Iterable[SubBlock], text: Int[Tensor, "sequence token"]
) -> dict[SubBlock, Float[Tensor, " dim"]]:
    """What each branch adds to the stream at the first token of a window, in the mean over windows."""
    first = text[:, :1]  # nothing stands before it, so nothing else is needed
    stream = states(model, first.to(model.device))[..., 0, :]
    return {s: (stream[endpoints(s)[1]] - stream[endpoints(s)[0]]).mean(0) for s in drop_set}


def losses_with_first(
    model: PreTrainedModel, ids: Int[Tensor, "window token"], drop_set: DropSet, constant: Repair, means: Mapping[SubBlock, Tensor]
) -> Float[np.ndarray, " window"]:
    """The loss of every window with these means in place of the constant at the first token."""
    with dropped(model, drop_set, constant), ExitStack() as stack:
        for sub_block in drop_set:
            path = next(iter(layout_of(model).branch(sub_block.kind)))
            change = means[sub_block] - constant.maps[sub_block]["bias"].to(means[sub_block])

            def add(_, args, output, change=change):
                value = output[0] if isinstance(output, tuple) else output
                value[:, 0] += change.to(value)

            stack.callback(decoder_layers(model)[sub_block.layer].get_submodule(path).register_forward_hook(add).remove)
        return perplexity(model, ids).per_window


def first_token_table(
    model: PreTrainedModel,
    held_out: Mapping[str, Int[Tensor, "window token"]],
    choices: Mapping[Choice, DropSet],
    text: Int[Tensor, "sequence position"],
) -> pd.DataFrame:
    """What a mean of its own at the first token saves over one constant for all tokens.

    Returns:
        kind, metric, n_dropped, domain, constant and own (loss increase over the dense model), saved, low, high (paired over
        windows), nats per token.
    """
    rows, dense = [], {domain: perplexity(model, ids).mean for domain, ids in held_out.items()}
    for (kind, method, n), drop_set in choices.items():
        constant, means = repair(model, drop_set, text, "constant"), first_token_means(model, drop_set, text)
        for domain, ids in held_out.items():
            with dropped(model, drop_set, constant):
                plain = perplexity(model, ids).per_window
            own = losses_with_first(model, ids, drop_set, constant, means)
            costs = (plain.mean() - dense[domain], own.mean() - dense[domain])
            rows.append((kind, method.label, n, domain, *costs, *paired_difference(plain, own)))
    return pd.DataFrame(rows, columns=["kind", "metric", "n_dropped", "domain", "constant", "own", "saved", "low", "high"])


def loop_table(
    model: PreTrainedModel,
    held_out: Mapping[str, Int[Tensor, "window token"]],
    drop_set: DropSet,
    text: Int[Tensor, "sequence position"],
    amounts: Iterable[int] = AMOUNTS,
) -> pd.DataFrame:
    """The loss increase with linear maps of both loops, fitted on the first windows of a text.

    Args:
        amounts: numbers of these windows.
    Returns:
        windows, tokens (of the fit), domain, open and closed (loss increase over the dense model), saved (by the closed loop), low,
        high (paired over windows), nats per token.
    """
    rows, dense = [], {domain: perplexity(model, ids).mean for domain, ids in held_out.items()}
    for n in amounts:
        fits = [repair(model, drop_set, text[:n], "linear", loop) for loop in LOOPS]
        for domain, ids in held_out.items():
            losses = []
            for fitted in fits:
                with dropped(model, drop_set, fitted):
                    losses.append(perplexity(model, ids).per_window)
            costs = (values.mean() - dense[domain] for values in losses)
            rows.append((n, n * text.shape[1], domain, *costs, *paired_difference(*losses)))
    return pd.DataFrame(rows, columns=["windows", "tokens", "domain", *LOOPS, "saved", "low", "high"])


def healed_table(
    model: PreTrainedModel,
    held_out: Mapping[str, Int[Tensor, "window token"]],
    drop_set: DropSet,
    text: Int[Tensor, "sequence position"],
    folder: Path,
    steps: int = STEPS,
) -> pd.DataFrame:
    """The cost of a set with a fold, and with one that was healed after it.

    Args:
        folder: keeps the training, which continues from there.
    Returns:
        repair, domain, increase (over the dense model), low, high, saved (over the fold), saved_low, saved_high, in nats per token;
        steps, seconds (of processor time of the training, from the steps of this call).
    """
    done = torch.load(folder / "healing.pt", weights_only=True)["step"] if (folder / "healing.pt").is_file() else 0
    fold = repair(model, drop_set, text, "fold")
    start = time.process_time()
    healed = heal(model, drop_set, text[:, :HEAL_TOKENS], fold, steps, folder=folder)
    seconds = (time.process_time() - start) * steps / (steps - done) if steps > done else np.nan
    rows = []
    for domain, ids in held_out.items():
        dense, losses = perplexity(model, ids).per_window, {}
        for name, fitted in {"fold": fold, "fold, healed": healed}.items():
            with dropped(model, drop_set, fitted):
                losses[name] = perplexity(model, ids).per_window
            costs = (*mean_interval(losses[name] - dense), *paired_difference(losses["fold"], losses[name]))
            rows.append((name, domain, *costs, *((0, 0.0) if name == "fold" else (steps, seconds))))
    columns = ["repair", "domain", "increase", "low", "high", "saved", "saved_low", "saved_high", "steps", "seconds"]
    return pd.DataFrame(rows, columns=columns)


def main(arguments: list[str] | None = None) -> int:
    """Measure a constant of the first token's own, both loops, and a short training, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m entrodrop_utils.studies.repair_extras", description=main.__doc__)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="as for load_model")
    parser.add_argument("--only", choices=["first", "loops", "heal"], help="one of the three")
    chosen = parser.parse_args(arguments)
    profile = Profile(model=chosen.model, size=SIZE, output=str(DATA))
    if (known := committed_grid(profile)) is None:
        parser.error(f"there is no grid of {chosen.model}: run python -m entrodrop_utils.studies.repair_grid first")
    model, tokenizer = load_model(chosen.model)
    text = windows(DEFAULT_TEXT, "calibration", tokenizer, *FITTED)
    held_out = {domain: windows(domain, "evaluation", tokenizer, *HELD_OUT) for domain in DOMAINS}
    choices = {choice: drop_set for choice, drop_set in known[1].items() if choice[0] != "block" and choice[1] in CHOSEN_BY}
    most = max(n for kind, _, n in choices if kind == "attention")
    choices = {(kind, m, n): drop_set for (kind, m, n), drop_set in choices.items() if kind != "attention" or n == most}
    by_cosine, tables = choices["attention", CHOSEN_BY[0], most], {}
    if chosen.only in (None, "first"):
        tables[FIRST] = lambda: first_token_table(model, held_out, choices, text)
    if chosen.only in (None, "loops"):
        more = windows(DEFAULT_TEXT, "calibration", tokenizer, max(AMOUNTS), FITTED[1])
        tables[BY_LOOP] = lambda: loop_table(model, held_out, by_cosine, more)
    if chosen.only in (None, "heal"):
        tables[HEALED] = lambda: healed_table(model, held_out, by_cosine, text, BUILD / "healing" / slug(chosen.model))
    for file, measured in tables.items():
        table = measured()
        profile.write(table, file)
        print(table.round(3).to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
