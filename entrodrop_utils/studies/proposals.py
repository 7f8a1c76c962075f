"""Whether a score helps as a proposal: lazy greedy that searches only the sub-blocks which a score ranks first.

``python -m entrodrop_utils.studies.proposals MODEL`` writes ``data/results/MODEL/confirm/07_proposals.csv`` after every kind and
count, and beside it what was run. Notebook 07 shows it. A stopped run continues from the cache.
"""

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial

import pandas as pd

from .. import search
from ..models import load_model
from ..paths import RESULTS
from ..profile import DEFAULT_MODEL, DEFAULT_TEXT, slug
from ..progress import progress
from ..record import run_record, write_recorded
from ..scoring import is_entropy
from ..search import SearchResult
from ..selection import count_of
from ..statistics import interval_text
from ..text import text_digest
from .confirmation import SCORES, SHARES, SHARES_HELP, SIZE, shares_argument, study_settings, study_texts
from .search_study import GREEDY, OURS, Search, against_ours, judged, rankings

FILE = "07_proposals.csv"
PROPOSED, SHORTLIST = 1.5, 2  # proposals for each sub-block dropped; of these, how many are measured in a step
CHEAP = ("cosine", "norm_ratio")  # scores that also propose from the few tokens of the search
AT_RANDOM, ALL = "at random", "all, shorter list"
SEARCHED: dict[str, Search] = {
    OURS: search.lazy_greedy,
    GREEDY: search.greedy,
    ALL: partial(search.lazy_greedy, shortlist=SHORTLIST),
}
HELD_OUT_WINDOWS = 8


def among_first(ranking: SearchResult) -> Search:
    """Lazy greedy among the first of a ranking, ``PROPOSED`` times as many as are dropped; it spends what both spend."""

    def search_proposals(model, ids, n: int, kind: str) -> SearchResult:
        chosen = search.lazy_greedy(model, ids, n, kind, SHORTLIST, among=ranking.order[: math.ceil(PROPOSED * n)])
        return SearchResult(chosen.order, chosen.passes + ranking.passes, chosen.tokens + ranking.tokens)

    return search_proposals


def proposals(
    name: str, draws: int = 3, shares: Mapping[str, Sequence[float]] = SHARES, held_out_windows: int = HELD_OUT_WINDOWS
) -> pd.DataFrame:
    """Lazy greedy with all sub-blocks and with proposals by scores and at random, judged on two domains.

    Args:
        draws: draws of calibration text; random proposals differ between them.
        shares: kind -> shares of its sub-blocks that are dropped.
        held_out_windows: of each domain.
    Returns:
        The columns of ``against_ours``, and the same difference from random proposals: random_difference, random_low, random_high
        (nats per token; below zero better than random proposals).
    """
    start = time.monotonic()
    model, tokenizer = load_model(name)
    short, long, held_out = study_texts(tokenizer, DEFAULT_TEXT, DEFAULT_TEXT, draws, held_out_windows)
    hashes = [text_digest(ids) for ids in (*short, *long, *held_out.values())]
    tables, measured = [], {}
    for kind, share in progress([(kind, share) for kind, of_kind in shares.items() for share in of_kind], "proposals"):
        n, parts = count_of(share, len(search.candidates(model, kind))), []
        for draw in range(draws):
            orders = {name: search.by_score(model, long[draw], None, kind, {name: score}) for name, score in SCORES.items()}
            orders |= {f"{name}, short": search.by_score(model, short[draw], None, kind, name) for name in CHEAP}
            orders[AT_RANDOM] = search.random_draw(model, short[draw], None, kind, seed=[draw])
            methods = SEARCHED | {name: among_first(order) for name, order in orders.items()}
            parts.append(rankings(model, [short[draw]], methods, [kind], [n]).assign(draw=draw))
        choices, losses = judged(model, pd.concat(parts, ignore_index=True), held_out)
        table, from_random = (against_ours(choices, losses, reference) for reference in (OURS, AT_RANDOM))
        tables.append(table.assign(**{f"random_{end}": from_random[end] for end in ("difference", "low", "high")}))
        measured.setdefault(kind, []).append(share)
        settings = study_settings(name, DEFAULT_TEXT, draws, (), measured, held_out_windows)
        record = run_record(settings, name, hashes, time.monotonic() - start)
        write_recorded(RESULTS / slug(name) / SIZE / FILE, pd.concat(tables), record)
    return pd.concat(tables, ignore_index=True)


def committed_proposals() -> pd.DataFrame:
    """The committed tables of all models, the default one first: model, and the columns of ``proposals``."""
    paths = sorted(RESULTS.glob(f"*/{SIZE}/{FILE}"), key=lambda path: path.parts[-3] != slug(DEFAULT_MODEL))
    return pd.concat([pd.read_csv(path).assign(model=path.parts[-3]) for path in paths], ignore_index=True)


def proposal_table(table: pd.DataFrame) -> pd.DataFrame:
    """What every proposal costs a model more than lazy greedy with all sub-blocks, on the domain of the calibration text.

    Returns:
        A column for each kind and count; in how many cases (domain, kind, count) the proposal is decidedly better and worse than a
        random one; and its tokens as a share of greedy's.
    """
    rows = table[table.method != OURS]
    own = rows[rows.domain == DEFAULT_TEXT].assign(value=lambda own: interval_text(own, ["difference", "low", "high"]))
    shown = own.pivot_table("value", "method", ["kind", "n_dropped"], aggfunc="first", sort=False)
    by_method = rows.groupby("method", sort=False)
    counts = {
        "better than random": by_method.random_high.agg(lambda high: _share(high < 0)),
        "worse": by_method.random_low.agg(lambda low: _share(low > 0)),
    }
    return shown.assign(**counts, tokens=by_method.share.mean().map("{:.0%}".format))


def _share(decided: pd.Series) -> str:
    return f"{decided.sum()} of {len(decided)}"


def proposal_sentences(table: pd.DataFrame) -> list[str]:
    """In how many cases (model, score, domain, kind, count) entropies and similarities propose decidedly better and worse than
    chance, and cost more than lazy greedy.
    """
    scores = table[~table.method.isin([OURS, GREEDY, ALL, AT_RANDOM])]
    entropic = scores.method.isin([name for name, score in SCORES.items() if is_entropy(score)])
    return [
        f"Proposals by {name}: better than random ones in {_share(rows.random_high < 0)} cases, worse in "
        f"{(rows.random_low > 0).sum()}; costlier than lazy greedy in {(rows.low > 0).sum()}."
        for name, rows in {"entropy": scores[entropic], "similarity": scores[~entropic]}.items()
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure proposals on a model, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m entrodrop_utils.studies.proposals", description=main.__doc__)
    parser.add_argument("name", nargs="?", default=DEFAULT_MODEL, help="as for load_model, a registered name")
    parser.add_argument("--draws", type=int, default=3, help="draws of calibration text")
    parser.add_argument("--shares", nargs="*", type=shares_argument, default=[*SHARES.items()], help=SHARES_HELP)
    chosen = parser.parse_args(arguments)
    table = proposals(chosen.name, chosen.draws, dict(chosen.shares))
    print(table.round(3).to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
