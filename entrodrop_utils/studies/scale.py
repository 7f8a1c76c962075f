"""How the claims move with the size of the model: committed tables of several models, and the table that the paper published."""

from collections.abc import Iterable, Mapping
from itertools import combinations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..claims import SIZES, published_figures
from ..figures import COLOURS, GREY, headed_panels
from ..models import KNOWN
from ..paths import RESULTS
from ..profile import DEFAULT_TEXT, Profile
from ..statistics import Interval, interval_text, kendall_tau
from . import accuracy
from .methods import METHOD_COLUMNS, RANDOM

# The statements that are compared -> the pattern of their claim
STATEMENTS = {
    "bucket entropy beats cosine": r"^bucket beats cosine at 37\.5%.*measured: nats",
    "KNN entropy beats cosine": r"^knn beats cosine at 37\.5%.*measured: nats",
    "bucket entropy beats random choices": r"^bucket beats random choices at 37\.5%",
    "KNN entropy beats random choices": r"^knn beats random choices at 37\.5%",
    "attention is more redundant than MLPs, by cosine": r"more redundant than MLP \(37\.5% by cosine\).*measured: extra loss",
    "bucket entropy falls, then rises": r"^bucket entropy falls, then rises",
    "KNN entropy falls, then rises": r"^knn entropy falls, then rises",
    "bucket entropy is more robust than Renyi": r"^bucket is more robust than renyi",
    "KNN entropy is more robust than Renyi": r"^knn is more robust than renyi",
    "bucket entropy is more robust than Gaussian": r"^bucket is more robust than gaussian",
    "KNN entropy is more robust than Gaussian": r"^knn is more robust than gaussian",
}
PANELS = {  # of the figure: title -> words of its statements, and what its axis shows
    "against cosine": ("beats cosine", "nats per token saved"),
    "among random sets": ("beats random", "share of draws\nthat cost more"),
    "attention against MLPs": ("more redundant", "extra loss of dropping\nMLPs (nats)"),
}
BENCHMARK_RUNS = ("paper", "large", "xlarge")  # with public benchmarks
RUNS = tuple(size for size in SIZES if size != "paper")  # with the same amounts of text, and random choices that differ in number
LABEL = {"textcoords": "offset points", "fontsize": 8}
PAPER_TABLE = "mean accuracy of 13 benchmarks"


def models_by_size(claims: str = "02_claims.csv") -> dict[str, float]:
    """The registered models with these committed claims of one of ``RUNS`` -> millions of parameters, smallest first."""
    with_claims = {path.parts[-3] for size in RUNS for path in RESULTS.glob(f"*/{size}/{claims}")}
    sizes = {model: KNOWN[model]["parameters"] for model in with_claims & set(KNOWN)}
    return dict(sorted(sizes.items(), key=lambda item: item[1]))


def statements_by_size(profile: Profile, models: Mapping[str, float]) -> pd.DataFrame:
    """The statements about every model, from its committed claims.

    Args:
        models: name -> millions of parameters.
    Returns:
        statement, model, parameters (millions), measured, low, high, goal, verdict, evidence.
    """
    rows = []
    for model, parameters in models.items():
        tables = (profile.committed("claims.csv", size, model) for size in RUNS)
        claims = pd.concat([table for table in tables if table is not None])
        rows.append(_statements(claims).assign(model=model, parameters=parameters))
    columns = ["statement", "model", "parameters", "measured", "low", "high", "goal", "verdict", "evidence"]
    return pd.concat(rows, ignore_index=True)[columns]


def _statements(claims: pd.DataFrame) -> pd.DataFrame:
    """The first claim that fits each statement, in the order of ``STATEMENTS``."""
    fitting = {name: claims[claims.claim.str.contains(pattern, case=False)].head(1) for name, pattern in STATEMENTS.items()}
    return pd.concat(fitting, names=["statement"]).reset_index("statement")


def statements_by_text() -> pd.DataFrame:
    """The statements of committed runs on another text than the default one, beside those of the same run on the default text.

    Returns:
        model, size, text, statement, measured, low, high, verdict.
    """
    tables = []
    for path in sorted(RESULTS.glob("*/*-*/claims.csv")):
        model, (size, text) = path.parts[-3], path.parts[-2].split("-", 1)
        own = RESULTS / model / size / "claims.csv"
        if size in RUNS and own.is_file():
            texts = {DEFAULT_TEXT: own, text: path}
            tables += [_statements(pd.read_csv(file)).assign(model=model, size=size, text=name) for name, file in texts.items()]
    columns = ["model", "size", "text", "statement", "measured", "low", "high", "verdict"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def verdicts_by_text(statements: pd.DataFrame) -> pd.DataFrame:
    """Verdict and interval of every statement (rows) on every text (columns), as text."""
    values = interval_text(statements, ["measured", "low", "high"], ".3g")
    cells = statements.assign(cell=statements.verdict.str.cat(values, sep=": "))
    table = cells.pivot_table("cell", ["model", "statement"], "text", aggfunc="first", sort=False)
    return table.dropna().rename_axis(columns=None)  # a statement that was measured on all


def text_sentence(statements: pd.DataFrame) -> str:
    """Which statements have another verdict on another text, and of how many."""
    verdicts = statements.pivot_table("verdict", ["model", "statement"], "text", aggfunc="first", sort=False).dropna()
    other = verdicts[verdicts.ne(verdicts[DEFAULT_TEXT], axis=0).any(axis=1)]
    named = f": {'; '.join(statement for _, statement in other.index)}" if len(other) else ""
    texts = " and ".join([DEFAULT_TEXT, *verdicts.columns.drop(DEFAULT_TEXT)])
    return f"Calibrated and judged on {texts}, {len(other)} of {len(verdicts)} statements have different verdicts{named}."


def verdict_table(statements: pd.DataFrame) -> pd.DataFrame:
    """The verdict of every statement (rows) about every model (columns), and over all models."""
    table = statements.pivot_table("verdict", "statement", "model", aggfunc="first", sort=False)
    return table.fillna("not measured").assign(**{"over the models": [overall(row.dropna()) for _, row in table.iterrows()]})


def overall(verdicts: Iterable[str]) -> str:
    """Whether a statement holds for all, some or none of the models."""
    verdicts = list(verdicts)
    n = sum(verdict == "holds" for verdict in verdicts)
    if n == len(verdicts):
        return "holds for all"
    undecided = "inconclusive" in verdicts
    return f"holds for {n} of {len(verdicts)}" if n else "not shown for any" if undecided else "holds for none"


def size_figure(statements: pd.DataFrame, title: str) -> Figure:
    """Value and interval of the statements about costs, a panel for each kind, for every model from small to large."""
    sizes = statements.drop_duplicates("model").set_index("model").parameters
    figure, axes = headed_panels(title, len(PANELS), 1.3 + 0.42 * len(sizes), sharey=True)
    for axis, (heading, (words, label)) in zip(axes, PANELS.items(), strict=True):
        rows = statements[statements.statement.str.contains(words)]
        for row in rows.itertuples():
            metric = row.statement.split()[0].lower()
            place = sizes.index.get_loc(row.model) + {"bucket": -0.14, "knn": 0.14}.get(metric, 0)
            colour = COLOURS.get(metric, GREY)
            axis.plot([row.low, row.high], [place, place], color=colour, linewidth=2.5, alpha=0.6)
            axis.plot(row.measured, place, "o", color=colour, markersize=5)
            if metric in COLOURS and row.model == sizes.index[0]:
                axis.annotate(
                    row.statement.split()[0],
                    (row.measured, place),
                    (0, 5 if metric == "bucket" else -13),
                    color=colour,
                    ha="center",
                    **LABEL,
                )
        axis.axvline(rows.goal.iloc[0] if len(rows) else 0, color="black", linewidth=1)
        axis.set(title=heading, xlabel=label)
        axis.grid(False, axis="y")
    axes[0].set_xscale("symlog", linthresh=1)
    axes[0].set_xticks([-10, -1, 0, 1], ["-10", "-1", "0", "1"])
    axes[0].set_yticks(range(len(sizes)), [f"{model}\n{size:.0f} M" for model, size in sizes.items()])
    axes[0].set_ylim(len(sizes) - 0.5, -0.5)
    return figure


def cosine_title(statements: pd.DataFrame) -> str:
    """For how many models each entropy beats cosine, as a sentence."""
    rows = statements[statements.statement.str.contains("beats cosine")]
    won = rows.verdict.eq("holds").groupby(rows.statement, sort=False).agg(["sum", "size"])
    parts = [f"{name.split()[0]} entropy in {row['sum']} of {row['size']} models" for name, row in won.iterrows()]
    return f"Cosine loses to {' and to '.join(parts)}"


def cosine_sentence(statements: pd.DataFrame) -> str:
    """In how many cases entropy beats cosine, in which models, and by how much KNN does in the largest model."""
    rows = statements[statements.statement.str.contains("entropy beats cosine")]
    won, lost = (rows[rows.verdict == word] for word in ("holds", "does not hold"))
    winners = f" ({', '.join(won.model.unique())})" if len(won) else ""
    largest = rows[rows.statement.str.startswith("KNN")].iloc[-1]
    saved = Interval(largest.measured, largest.low, largest.high)
    return (
        f"At 37.5% of attention, entropy loses to cosine in {len(lost)} of {len(rows)} cases and wins in {len(won)}{winners}; in "
        f"the largest model KNN saves {saved:.2f} nats."
    )


def method_costs(profile: Profile, models: Iterable[str], kind: str = "attention") -> pd.DataFrame:
    """Loss of every method at its largest number of sub-blocks of a kind: a row per method, a column per model."""
    columns = {}
    for model in models:
        table = profile.first_committed(model, "02_pruning.csv", sizes=RUNS)
        rows = table[(table.kind == kind) & (table.rule != RANDOM)]
        columns[model] = rows[rows.n_dropped == rows.n_dropped.max()].set_index(METHOD_COLUMNS).nll
    return pd.DataFrame(columns)


def order_agreement(costs: pd.DataFrame) -> pd.DataFrame:
    """Kendall's tau between the orders of the methods in every two models: models, methods (in both), tau.

    The methods are no sample, so there is no interval.
    """
    rows = []
    for left, right in combinations(costs, 2):
        pair = costs[[left, right]].dropna()
        rows.append((f"{left}, {right}", len(pair), kendall_tau(*pair.to_numpy().T)))
    return pd.DataFrame(rows, columns=["models", "methods", "tau"])


def first_token_share(profile: Profile, models: Iterable[str]) -> pd.DataFrame:
    """The fall of bucket entropy with and without the first token of each window, and its largest step as a share of it.

    Returns:
        model, boundary (first layer of the rising stage), fall, fall_low, fall_high, share, without_first (the fall, in nats).
    """
    rows = []
    for model in models:
        stages = profile.first_committed(model, "01_stages.csv", sizes=RUNS)
        if stages is not None:
            own = stages[(stages.estimator == "bucket") & (stages.weights == "trained")].set_index("first_token")
            values = own.loc[True, ["boundary", "fall", "fall_low", "fall_high", "share"]]
            rows.append((model, *values, own.loc[False, "fall"]))
    columns = ["model", "boundary", "fall", "fall_low", "fall_high", "share", "without_first"]
    return pd.DataFrame(rows, columns=columns)


def published_retention() -> pd.DataFrame:
    """The paper's table for attention layers of Llama-3.1-8B: method, n_dropped, n_total, accuracy, retention, note.

    Its source is secondary and two of its cells are identical.
    """
    table = published_figures("others")
    table = table[table.metric == PAPER_TABLE].assign(accuracy=lambda rows: rows.value.astype(float))
    dense = table[table.method == "dense"].accuracy.item()
    rows = table[table.unit == "attention"].astype({"n_dropped": int, "n_total": int})
    rows = rows.assign(retention=rows.accuracy / dense)
    return rows[["method", "n_dropped", "n_total", "accuracy", "retention", "note"]].reset_index(drop=True)


def measured_retention(profile: Profile, models: Iterable[str]) -> pd.DataFrame:
    """Retention of accuracy on public benchmarks at 37.5% of attention layers, from the committed tables of notebook 04.

    Returns:
        model, n_dropped, method, metric, rule, retention, retention_low, retention_high, retention_above_chance, above_chance_low,
        above_chance_high, guessing (the retention of guessing), evidence; one row for each method and each random choice.
    """
    parts = []
    for model in models:
        table = profile.first_committed(model, "04_accuracy.csv", sizes=BENCHMARK_RUNS)
        if table is not None:
            means = accuracy.mean_rows(table)
            means = means[means.kind == "attention"]
            means = means[means.n_dropped == means.n_dropped.max()]
            amount = {"guessing": accuracy.floor(table), "evidence": accuracy.evidence_of(table)}
            parts.append(means.assign(model=model, **amount))
    columns = ["model", "n_dropped", "method", "metric", "rule", *accuracy.PAPER_COUNT]
    columns += ["retention_above_chance", *accuracy.ABOVE_CHANCE[1:], "guessing", "evidence"]
    return pd.concat(parts)[columns].reset_index(drop=True) if parts else pd.DataFrame(columns=columns)


def published_figure(published: pd.DataFrame, measured: pd.DataFrame, title: str) -> Figure:
    """The published retention against the share of attention layers dropped, and the measured one at 37.5%, by model.

    Args:
        measured: as ``measured_retention`` returns it; random choices are ticks, grey is guessing.
    """
    shown = measured[~measured.metric.str.contains("repaired")]
    groups = dict(iter(shown.groupby("model", sort=False)))
    figure, (axis, by_model) = headed_panels(title, 2, accuracy.panel_height(groups))
    axis.axhline(0.95, color="black", linewidth=0.8, linestyle="--")
    looks = {"EntroDrop": (COLOURS["bucket"], "o-"), "LLM-Drop (cosine)": (COLOURS["cosine"], "s--")}
    for method, (colour, style) in looks.items():
        rows = published[published.method == method]
        axis.plot(rows.n_dropped / rows.n_total, rows.retention, style, color=colour, markersize=5)
        x, y = rows.n_dropped.iloc[-1] / rows.n_total.iloc[-1], rows.retention.iloc[-1]
        axis.annotate(method.replace(" (", "\n("), (x, y), (6, 0), color=colour, va="center", **LABEL)
    axis.margins(y=0.12)
    axis.set(title="published, Llama-3.1-8B", xlabel="attention layers dropped (%)", ylabel="accuracy kept", xlim=(0.1, 0.74))
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    shares = np.unique(published.n_dropped / published.n_total)
    axis.set_xticks(shares, [f"{100 * share:g}" for share in shares])
    accuracy.draw_retentions(
        by_model, groups, accuracy.PAPER_COUNT, {name: rows.guessing.iloc[0] for name, rows in groups.items()}, 0.95
    )
    by_model.set(title="measured at 37.5%", xlabel="accuracy kept")
    return figure


def retention_lines(measured: pd.DataFrame) -> list[str]:
    """For each model the retention by cosine, bucket and KNN with intervals, beside that of guessing and of random choices."""
    lines = []
    for model, rows in measured.groupby("model", sort=False):
        named = rows[rows.metric.isin(["cosine", "bucket", "knn"]) & (rows.rule == "one-shot")]
        texts = zip(named.metric, interval_text(named, accuracy.PAPER_COUNT, ".0%"), strict=True)
        random = rows[rows.rule == RANDOM].retention
        drawn = f"; {len(random)} random choices {random.min():.0%} to {random.max():.0%}" if len(random) else ""
        kept = ", ".join(f"{metric} {text}" for metric, text in texts)
        n = rows.n_dropped.iloc[0]
        lines.append(f"{model} without {n} attention layers keeps: {kept}{drawn}; guessing {rows.guessing.iloc[0]:.0%}.")
    return lines


def scale_sentences(statements: pd.DataFrame, taus: pd.DataFrame) -> list[str]:
    """Sentences: which statements hold for all models, which for none, and whether the order of methods carries over."""
    table = verdict_table(statements)["over the models"]
    words = {"holds for all": "holds for all", "holds for none": "holds for none", "not shown for any": "is not shown for any"}
    lines = [
        f"Statement that {phrase}: {'; '.join(names)}."
        for word, phrase in words.items()
        if (names := list(table.index[table == word]))
    ]
    some = [f"{name} ({word.removeprefix('holds for ')})" for name, word in table.items() if " of " in word]
    lines += [f"Statement that holds for some: {'; '.join(some)}."] if some else []
    if len(taus):
        least, most = taus.loc[taus.tau.idxmin()], taus.loc[taus.tau.idxmax()]
        ends = [f"{row.tau:.2f} ({row.models})" for row in (least, most)]
        lines.append(f"Kendall's tau of the order of methods over {len(taus)} pairs of models: {' to '.join(dict.fromkeys(ends))}.")
    return lines
