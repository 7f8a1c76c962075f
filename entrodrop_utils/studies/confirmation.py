"""Lazy greedy on models and texts on which its shortlist was not chosen, beside the methods that it competes with.

``python -m entrodrop_utils.studies.confirmation MODEL --text TEXT`` writes ``data/results/MODEL/confirm/07_confirmation.csv``
after every kind and count, and beside it what was run; the folder's name has the text where it is not the default. A stopped run
continues from the cache. Notebook 10 shows every case, notebook 07 whether the rule wins on every decoder.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .. import search
from ..models import load_model
from ..paths import RESULTS
from ..profile import DEFAULT_MODEL, DEFAULT_TEXT, Profile
from ..record import run_record, write_recorded
from ..scoring import resolve
from ..selection import count_of
from ..statistics import Interval, comparison
from ..text import text_digest, windows
from .methods import KIND_NAMES
from .search_study import (
    EVOLUTION,
    OURS,
    RANDOM_DRAW,
    SEARCHES,
    against_ours,
    difference_text,
    joined_choices,
    judged,
    random_sets,
    rankings,
    scores_of,
)

FILE = "07_confirmation.csv"
SIZE = "confirm"
SHARES = {"attention": (0.375, 0.25, 0.125), "mlp": (0.25,)}  # kind -> shares dropped, the most first
SEARCH_TEXT, SCORE_TEXT, HELD_OUT_TEXT = (3, 32), (8, 128), (6, 64)  # windows and tokens, the amounts of notebook 07
SHARES_HELP = "dropped of each kind, the most first, such as attention=0.375,0.25 mlp=0.25"
SECOND_DOMAIN = "english"
SCORES = resolve(("bucket", "knn", "cosine", "norm_ratio"))
RIVALS = ("single drops", EVOLUTION, "norm_ratio", "cosine", "bucket", "knn")
AIM = ("cosine", "norm_ratio", EVOLUTION)  # the methods below which the rule is meant to be on every decoder
Texts = list[Int[Tensor, "_ _"]]  # windows and tokens of each draw


def confirm(
    name: str,
    text: str = DEFAULT_TEXT,
    label: str = "",
    draws: int = 2,
    evolved: Iterable[str] = (),
    shares: Mapping[str, Sequence[float]] = SHARES,
    held_out_windows: int = HELD_OUT_TEXT[0],
    precision: str | None = None,
) -> pd.DataFrame:
    """Every method on a model and a calibration text, judged on that text's evaluation part and on another domain.

    Args:
        text: calibration text, as for ``windows``.
        label: what the results call it; empty for its own name.
        draws: draws of calibration text.
        evolved: kinds on which EvoPress runs too, with the passes that lazy greedy spent.
        shares: kind -> shares of its sub-blocks that are dropped.
        held_out_windows: of each domain.
        precision: of the weights; None as for ``load_model``. In bfloat16 rounding can decide between layers that cost the same.
    Returns:
        The columns of ``against_ours`` without ``share``, and ``dropped``: the layers that each draw chose, the draws separated by
        semicolons.
    """
    label, evolved, start = label or text, set(evolved), time.monotonic()
    path = RESULTS / Profile(model=name, size=SIZE, text=label).folder / FILE
    model, tokenizer = load_model(name, dtype=precision)
    short, long, held_out = study_texts(tokenizer, text, label, draws, held_out_windows)
    hashes = [text_digest(ids) for ids in (*short, *long, *held_out.values())]
    tables, measured = [], {}
    for kind, of_kind in shares.items():
        searches = ["Fisher", "single drops", OURS, *([EVOLUTION] if kind in evolved else [])]
        for share in of_kind:
            n = [count_of(share, len(search.candidates(model, kind)))]
            parts = [
                rankings(model, long, scores_of(SCORES, information=False), [kind], n),
                rankings(model, short, {method: SEARCHES[method] for method in searches}, [kind], n),
                random_sets(model, [kind], n, 3),
            ]
            choices, losses = judged(model, joined_choices(parts), held_out)
            sets = choices[choices.domain == label].groupby("method").dropped.agg("; ".join)
            table = against_ours(choices, losses).drop(columns="share")
            tables.append(table.assign(dropped=table.method.map(sets)))
            measured.setdefault(kind, []).append(share)
            settings = study_settings(name, label, draws, evolved, measured, held_out_windows)
            settings["precision"] = str(model.dtype).removeprefix("torch.")
            write_recorded(path, pd.concat(tables), run_record(settings, name, hashes, time.monotonic() - start))
    return pd.concat(tables, ignore_index=True)


def study_texts(
    tokenizer: PreTrainedTokenizerBase | None, text: str, label: str, draws: int, held_out_windows: int
) -> tuple[Texts, Texts, dict[str, Int[Tensor, "_ _"]]]:
    """For every draw short windows to search on and long ones to score; and by domain held-out windows of the text, which is called
    ``label``, and of another.
    """
    short, long = (
        [windows(text, "calibration", tokenizer, *amount, draw) for draw in range(draws)] for amount in (SEARCH_TEXT, SCORE_TEXT)
    )
    domains = {label: text, SECOND_DOMAIN: SECOND_DOMAIN}
    held_out = {
        domain: windows(text, "evaluation", tokenizer, held_out_windows, HELD_OUT_TEXT[1]) for domain, text in domains.items()
    }
    return short, long, held_out


def study_settings(
    name: str, text: str, draws: int, evolved: Iterable[str], shares: Mapping[str, Sequence[float]], held_out_windows: int
) -> dict[str, object]:
    """What was chosen for a study: its model, text, amounts and shares."""
    return {
        "model": name,
        "text": text,
        "windows and tokens": {
            "search": SEARCH_TEXT,
            "scores": SCORE_TEXT,
            "held out": (held_out_windows, HELD_OUT_TEXT[1]),
        },
        "calibration draws": draws,
        "EvoPress on": sorted(set(evolved) & set(shares)),
        "shares dropped": dict(shares),
    }


def confirmations() -> pd.DataFrame:
    """The committed tables of all models and texts: model, text (of calibration), and the columns of ``confirm``."""
    tables = []
    for path in sorted(RESULTS.glob(f"*/{SIZE}*/{FILE}")):
        text = path.parent.name.removeprefix(SIZE).removeprefix("-") or DEFAULT_TEXT
        table = pd.read_csv(path)
        tables.append(table.assign(model=path.parts[-3], text=text, own=table.domain == text))
    return pd.concat(tables, ignore_index=True)


def rival_table(table: pd.DataFrame, own: bool = True) -> pd.DataFrame:
    """What each rival costs more than lazy greedy, nats per token with its interval; above zero lazy greedy is better.

    Args:
        table: as ``confirmations`` returns it.
        own: on the evaluation part of the calibration text; False: on the other domain.
    """
    rows = table[table.own == own].sort_values(["model", "text", "kind", "n_dropped"])
    case = ["model", "text", "kind", "n_dropped"]
    shown = rows.assign(value=difference_text(rows)).pivot_table("value", case, "method", aggfunc="first")
    ours = rows[rows.method == OURS].set_index(case).increase.map("{:.2f}".format)
    return shown.reindex(columns=[name for name in RIVALS if name in shown]).assign(**{OURS: ours}).fillna("–")


def decided(table: pd.DataFrame) -> pd.DataFrame:
    """In how many cases lazy greedy is better, worse or undecided, by rival. A case is a model, text, domain, kind and count.

    Returns:
        method, better, worse, undecided, cases, share_of_tokens (spent by the rival, in those of lazy greedy).
    """
    case = ["model", "text", "domain", "kind", "n_dropped"]
    spent = table[table.method == OURS].set_index(case).tokens
    rows = table[table.method.isin(RIVALS)]
    words = [comparison(row.low, row.high) for row in rows.itertuples()]
    part = rows.tokens.to_numpy() / spent.loc[list(rows[case].itertuples(index=False, name=None))].to_numpy()
    rows = rows.assign(word=words, part=part)
    counts = (
        pd.crosstab(rows.method, rows.word)
        .reindex(columns=["better", "worse", "undecided"], fill_value=0)
        .rename_axis(columns=None)
    )
    counts = counts.assign(cases=counts.sum(axis=1), share_of_tokens=rows.groupby("method").part.mean())
    return counts.reindex([name for name in RIVALS if name in counts.index]).reset_index()


def aim_table(table: pd.DataFrame) -> pd.DataFrame:
    """In how many cases lazy greedy costs less than each method of ``AIM``, by model, text and kind.

    Returns:
        model, text, kind, method, cases (domains and counts), same (the same set, or equal in every window), less and more (of the
        cases, by the mean), better and worse (decided by the interval).
    """
    rows = table[table.method.isin(AIM)]
    less, more = rows.difference > 0, rows.difference < 0
    marks = {"cases": 1, "same": ~less & ~more, "less": less, "more": more, "better": rows.low > 0, "worse": rows.high < 0}
    counts = rows.assign(**marks).groupby(["model", "text", "kind", "method"], sort=False)[list(marks)].sum().reset_index()
    return counts.astype(dict.fromkeys(marks, int))


def aim_sentences(table: pd.DataFrame) -> list[str]:
    """Whether lazy greedy costs less than each method of ``AIM`` in every case, and where it does not."""
    counts, lines = aim_table(table), []
    for method, rows in counts.groupby("method", sort=False):
        total, exceptions = rows.sum(numeric_only=True), rows[rows.less < rows.cases]
        where = [
            f"{row.model} on {row.text}, {KIND_NAMES[row.kind]}, {row.cases - row.less} of {row.cases}"
            for row in exceptions.itertuples()
        ]
        lines.append(
            f"{OURS} costs less than {method} in {total.less} of {total.cases} cases (decided in {total.better}), the same in "
            f"{total.same}, more in {total.more} (decided in {total.worse}); not less: {'; '.join(where) or 'nowhere'}."
        )
    return lines


def confirmation_sentences(table: pd.DataFrame) -> list[str]:
    """Whether the rule is confirmed: the cases against rivals outside ``AIM``, and intervals where most attention layers go."""
    counts = decided(table)
    better = counts[(counts.better > counts.cases / 2) & (counts.worse == 0)].method
    others = counts.method[~counts.method.isin(better)]
    lines = [
        f"{OURS} is better in most cases and worse in none than: {', '.join(better) or 'none'}; not than: {', '.join(others)}."
    ]
    for row in counts[~counts.method.isin(AIM)].itertuples():
        lines.append(f"{OURS} against {row.method}: better in {row.better} of {row.cases} cases, worse in {row.worse}.")
    rows = table[table.own & (table.kind == "attention") & table.method.isin(["cosine", "norm_ratio", "single drops"])]
    for (model, text), of_model in rows.groupby(["model", "text"], sort=False):
        most = of_model[of_model.n_dropped == of_model.n_dropped.max()]
        costs = ", ".join(f"{row.method} {Interval(row.difference, row.low, row.high):.2f}" for row in most.itertuples())
        number = f"{most.n_dropped.iloc[0]} {KIND_NAMES['attention']}"
        lines.append(f"{model}, {text}: without {number} the others cost more than {OURS} by, in nats: {costs}.")
    return lines


def shares_argument(text: str) -> tuple[str, tuple[float, ...]]:
    """A kind and its shares dropped, from the command line.

    Raises:
        argparse.ArgumentTypeError: an unknown kind, or shares that are not numbers above 0 and below 1.

    >>> shares_argument("attention=0.375,0.25")
    ('attention', (0.375, 0.25))
    """
    kind, _, listed = text.partition("=")
    try:
        shares = tuple(map(float, listed.split(",")))
    except ValueError:
        shares = ()
    if kind not in KIND_NAMES or not shares or not all(0 < share < 1 for share in shares):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no kind of {', '.join(KIND_NAMES)} with shares between 0 and 1, such as attention=0.375,0.25"
        )
    return kind, shares


def main(arguments: list[str] | None = None) -> int:
    """Confirm the recommended search on a model and a text, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m entrodrop_utils.studies.confirmation", description=main.__doc__)
    parser.add_argument("name", nargs="?", default=DEFAULT_MODEL, help="as for load_model, a registered name")
    parser.add_argument("--text", default=DEFAULT_TEXT, help="calibration text, a name or a file")
    parser.add_argument("--label", default="", help="what the results call the text")
    parser.add_argument("--draws", type=int, default=2, help="draws of calibration text")
    parser.add_argument("--evolved", nargs="*", default=[], choices=[*KIND_NAMES], help="kinds on which EvoPress runs too")
    parser.add_argument("--shares", nargs="*", type=shares_argument, default=[*SHARES.items()], help=SHARES_HELP)
    parser.add_argument("--windows", type=int, default=HELD_OUT_TEXT[0], help="held-out windows of each domain")
    parser.add_argument("--precision", help="of the weights: float32 or bfloat16; without it that of the model's registered entry")
    chosen = parser.parse_args(arguments)
    shares = dict(chosen.shares)
    table = confirm(chosen.name, chosen.text, chosen.label, chosen.draws, chosen.evolved, shares, chosen.windows, chosen.precision)
    print(table[table.method != RANDOM_DRAW].drop(columns="dropped").round(3).to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
