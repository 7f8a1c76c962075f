"""Every way to choose with every repair, on the domain of the fit and on others: the full grid behind notebook 09.

``python -m entrodrop_utils.studies.repair_grid MODEL`` writes ``data/results/MODEL/grid/09_grid.csv``, and the losses of windows,
after every step. They are also in the cache, so a stopped run continues.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import pandas as pd
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from .. import cache, search
from ..cached_scoring import cached_score
from ..dropping import Repair, dropped
from ..evaluation import losses_by_set, perplexity
from ..families.decoder import decoder_layers
from ..layerwise import DropSet, set_name
from ..models import load_model
from ..paths import DATA
from ..profile import DEFAULT_MODEL, DEFAULT_TEXT, Profile
from ..progress import progress
from ..repairing import folds_by_set, maps_by_how, rank_for_repair, repair
from ..residual import SubBlock, find
from ..selection import PUBLISHED_PROTECTED, protected_layers
from ..text import windows
from .methods import METHOD_COLUMNS, RANDOM, Choice, Method, drop_order, drop_sets, layers_text, numbers_dropped
from .repair_study import HOWS, LEFT, NONE, SINGLE, Losses, by_domain, repair_table
from .search_study import OURS

SIZE, FILE, WINDOWS = "grid", "09_grid.csv", "09_grid_windows.csv"
CASES = {"attention": (0.375, 0.25), "mlp": (0.25,), "block": (0.25,)}  # kind -> shares dropped
DENSE = "dense"
SCORES = ("bucket", "knn", "cosine", "norm_ratio")
REPAIRS = {"attention": (*HOWS, "fold", "scale"), "mlp": (*HOWS, "fold", "scale"), "block": ("fold", "scale", "patch")}
DRAWN = {"attention": "linear", "mlp": "linear", "block": "fold"}  # the repair of random choices
DOMAINS = ("docs", "code", "english", "spanish", "wikitext")
SCORED, FITTED, CHOSEN, HELD_OUT = (24, 256), (20, 256), (4, 64), (6, 64)  # windows and tokens
N_MAGNITUDES = 4  # windows that scale and patch compare the size of the stream on
Fit = Callable[[Sequence[DropSet]], Mapping[DropSet, Repair]]


def grid_orders(
    model: PreTrainedModel,
    scores: pd.DataFrame,
    kind: str,
    n: int,
    draws: int,
    validation: Int[Tensor, "window token"],
    maps: Mapping[str, Repair],
) -> dict[tuple[str, Method], list[SubBlock]]:
    """The sub-blocks of a kind in the order of every way to choose; those by true cost are measured on validation text.

    Args:
        n: how many the recommended search drops.
        maps: of ``maps_by_how``, with which the cost left is ranked; without any, it is not.
    """
    every = find(model, kind)
    kept = protected_layers(PUBLISHED_PROTECTED, len(every))
    free = [s for s in every if s.layer not in kept]
    scored = [*map(Method, SCORES), *(Method(RANDOM, RANDOM, draw=i) for i in range(draws))]
    orders = {m: drop_order(scores, kind, m) for m in scored}
    orders[Method(SINGLE)] = rank_for_repair(model, free, validation)
    if maps:
        orders[Method(LEFT)] = rank_for_repair(model, free, validation, maps["linear"])
    orders[Method(OURS)] = search.lazy_greedy(model, validation, n, kind).order
    return {(kind, method): order for method, order in orders.items()}


def whole_losses(
    model: PreTrainedModel, ids: Int[Tensor, "window token"], sets: Iterable[DropSet], fit: Fit, about: Sequence[object]
) -> pd.DataFrame:
    """set, window, nll of every set with a repair of its own, which is fitted only where the losses are not in the cache.

    Args:
        about: what the fit depends on, besides the model.
    """
    key = cache.subkey(cache.model_key(model, "repairing.fit", "evaluation"), *about, cache.tensor_digest(ids))
    known = cache.read("repaired", key)
    tables = [] if known is None else [known]
    named = {set_name(drop_set): drop_set for drop_set in sets}
    missing = {name: drop_set for name, drop_set in named.items() if known is None or name not in set(known.set)}
    fits = fit(list(missing.values())) if missing else {}
    for name, drop_set in progress(missing.items(), "evaluating repaired models"):
        with dropped(model, drop_set, fits[drop_set]):
            values = perplexity(model, ids).per_window
        tables.append(pd.DataFrame({"set": name, "window": range(len(values)), "nll": values}))
        cache.write("repaired", key, pd.concat(tables, ignore_index=True))
    table = pd.concat(tables, ignore_index=True)
    table = table[table.set.isin(list(named))]
    return table.assign(set=table.set.map(named))


def grid(name: str, text: str = DEFAULT_TEXT, domains: Sequence[str] = DOMAINS, draws: int = 5) -> pd.DataFrame:
    """Measure every way to choose with every repair, and write the tables as they grow.

    Args:
        text: of the scores and the fit.
        domains: whose evaluation parts are measured.
        draws: random choices of each kind and number.
    Returns:
        The columns of ``repair_table``, and ``dropped``: the layers.
    """
    profile = Profile(model=name, size=SIZE, text=text, output=str(DATA))
    model, tokenizer = load_model(name)
    fit_text = windows(text, "calibration", tokenizer, *FITTED)
    validation = windows(text, "validation", tokenizer, *CHOSEN)
    held_out = [windows(domain, "evaluation", tokenizer, *HELD_OUT) for domain in domains]
    ids = held_out[0].new_tensor([window for part in held_out for window in part.tolist()])
    scores = cached_score(model, windows(text, "calibration", tokenizer, *SCORED), SCORES, kinds=[*CASES])
    digest, few = cache.tensor_digest(fit_text), fit_text[:N_MAGNITUDES]
    losses: Losses = {}
    choices: dict[Choice, DropSet] = {}

    def add(repaired: str, measured: pd.DataFrame) -> None:
        for key, by_set in by_domain(measured, repaired, domains).items():
            losses.setdefault(key, {}).update(by_set)
        write_grid(profile, losses, choices, text)

    def sized(sets: Sequence[DropSet], how: str) -> dict[DropSet, Repair]:
        return {drop_set: repair(model, drop_set, few, how) for drop_set in sets}

    def measure(kind: str, sets: Sequence[DropSet], hows: Sequence[str], maps: Mapping[str, Repair]) -> None:
        add(NONE, losses_by_set(model, ids, [(), *sets]))
        for how in hows:
            if how in maps:
                add(how, losses_by_set(model, ids, sets, maps[how]))
            elif how == "fold":
                add(how, whole_losses(model, ids, sets, lambda of: folds_by_set(model, of, fit_text), (how, digest)))
            else:
                about = (how, cache.tensor_digest(few))
                add(how, pd.concat([whole_losses(model, ids, [drop_set], partial(sized, how=how), about) for drop_set in sets]))

    drawn = {}
    for kind, shares in CASES.items():
        counts = sorted(set(numbers_dropped(shares, len(decoder_layers(model))).values()))
        maps = maps_by_how(model, find(model, kind), fit_text) if DRAWN[kind] == "linear" else {}
        of_kind = drop_sets(grid_orders(model, scores, kind, max(counts), draws, validation, maps), counts)
        choices |= of_kind
        ranked = dict.fromkeys(s for (_, m, _), s in of_kind.items() if m.rule != RANDOM)
        drawn[kind] = list(dict.fromkeys(s for s in of_kind.values() if s not in ranked)), maps
        measure(kind, list(ranked), REPAIRS[kind], maps)
    for kind, (sets, maps) in drawn.items():
        if sets:
            measure(kind, sets, [DRAWN[kind]], maps)
    return write_grid(profile, losses, choices, text)


def write_grid(profile: Profile, losses: Losses, choices: Mapping[Choice, DropSet], fitted_on: str) -> pd.DataFrame:
    """Write the table of costs, and the losses of windows, a row a set with a repair on a domain."""
    table = repair_table(losses, choices, fitted_on)
    layers = {(kind, *method, n): layers_text(drop_set) for (kind, method, n), drop_set in choices.items()}
    keys = table[["kind", *METHOD_COLUMNS, "n_dropped"]].itertuples(index=False, name=None)
    table = table.assign(dropped=[layers[key] for key in keys])
    profile.write(table, FILE)
    rows = [
        {"repair": name, "domain": domain, "set": f"{drop_set[0].kind} {layers_text(drop_set)}" if drop_set else DENSE}
        | {f"window {i}": value for i, value in enumerate(values.nll)}
        for (name, domain), by_set in losses.items()
        for drop_set, values in by_set.items()
    ]
    profile.write(pd.DataFrame(rows), WINDOWS)
    return table


def _parsed(kind: str, layers: str) -> DropSet:
    return tuple(SubBlock(int(layer), kind) for layer in layers.split())


def committed_grid(profile: Profile) -> tuple[Losses, dict[Choice, DropSet]] | None:
    """The losses and choices of the committed grid of a model; None where there is none."""
    table, per_window = (profile.committed(file, SIZE) for file in (FILE, WINDOWS))
    if table is None or per_window is None:
        return None
    losses: Losses = {}
    values = per_window.filter(like="window ").to_numpy()
    for row, nll in zip(per_window.itertuples(), values, strict=True):
        drop_set = () if row.set == DENSE else _parsed(*row.set.split(maxsplit=1))
        losses.setdefault((row.repair, row.domain), {})[drop_set] = pd.DataFrame({"nll": nll})
    choices = {}
    for row in table.itertuples():
        method = Method(row.metric, row.rule, row.first_token, row.draw)
        choices[row.kind, method, row.n_dropped] = _parsed(row.kind, str(row.dropped))
    return losses, choices


def main(arguments: list[str] | None = None) -> int:
    """Measure the full grid of choices and repairs of a model, and print its mean costs."""
    parser = argparse.ArgumentParser(prog="python -m entrodrop_utils.studies.repair_grid", description=main.__doc__)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="as for load_model")
    parser.add_argument("--text", default=DEFAULT_TEXT, help="of the scores and the fit")
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS), help="texts whose evaluation parts are measured")
    parser.add_argument("--draws", type=int, default=5, help="random choices of each kind and number")
    chosen = parser.parse_args(arguments)
    table = grid(chosen.model, chosen.text, chosen.domains, chosen.draws)
    means = table.pivot_table("increase", ["kind", "n_dropped", "metric"], ["in_domain", "repair"])
    print(means.round(2).to_string())
    return 0


if __name__ == "__main__":
    sys.exit(main())
