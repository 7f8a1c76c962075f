"""Accuracy of pruned models on tasks: which sets are compared, retention with intervals, comparisons, claims and the figure."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import pandas as pd
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.stats import norm
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import figures
from ..claims import BENCHMARKS, HOME_MADE, claim_row, published_figures
from ..claims import COLUMNS as CLAIM_COLUMNS
from ..dropping import Repair
from ..evaluation import losses_by_set
from ..layerwise import DropSet, set_name
from ..repairing import maps_by_how
from ..scoring import METRICS, is_entropy
from ..selection import PUBLISHED_PROTECTED, one_shot
from ..statistics import Interval, comparison, ends, interval_text
from ..tasks import task_scores_by_set
from ..tasks.local_tasks import is_local_task, task_cards
from ..tasks.retention import Retention, above_chance, accuracies
from .methods import KIND_NAMES, RANDOM, Choice, Method, drop_orders, drop_sets, losses_of, place_of, with_labels

BEST_OTHER = "best other"  # stands for the metric, of those that are not named, with the least loss on validation text
RANDOM_MEAN = "random (mean)"  # the random choices of a kind and number together
DENSE = Method("dense", "none")
PAPER_COUNT = ("retention", "retention_low", "retention_high")
ABOVE_CHANCE = ("retention_above_chance", "above_chance_low", "above_chance_high")
COLUMNS = ["metric", "rule", "draw", "best_other", "kind", "n_dropped", "task", "task_metric", "value", "stderr", "chance", "n"]
COLUMNS += ["retention", "retention_above_chance", *PAPER_COUNT[1:], *ABOVE_CHANCE[1:], "note"]


class Retentions(NamedTuple):
    """Both counts of the accuracy that is left: over all tasks, and above chance; None where no task is above chance."""

    paper: Retention
    above_chance: Retention | None

    @classmethod
    def of(cls, scores: pd.DataFrame, answers: pd.DataFrame, seed: int = 0) -> "Retentions":
        """From the two tables of ``task_scores_by_set``."""
        tasks = above_chance(scores)
        chance = Retention.of(scores, answers, tasks, seed) if tasks else None
        return cls(Retention.of(scores, answers, seed=seed), chance)


def tasks_table(tasks: Sequence[str], items: Mapping[str, int]) -> pd.DataFrame:
    """What each task measures: task, measures, chance, available (items; empty for public tasks), items (those used)."""
    table = pd.DataFrame({"task": tasks}).merge(task_cards().rename(columns={"items": "available"}), how="left")
    measures = table.measures.fillna("a public benchmark, as lm-evaluation-harness defines it")
    used = [items[task] for task in tasks]
    return table.assign(measures=measures, available=table.available.astype("Int64"), items=used).set_index("task")


def losses_by_metric(
    model: PreTrainedModel,
    windows: Int[Tensor, "window token"],
    scores: pd.DataFrame,
    metrics: Sequence[str],
    n: int,
    protected: Sequence[int] = PUBLISHED_PROTECTED,
) -> pd.DataFrame:
    """Loss on these windows without the ``n`` attention layers that each metric drops first: metric, nll; least loss first."""
    sets = {metric: tuple(sorted(one_shot(scores, metric, "attention", n, protected))) for metric in metrics}
    by_set = losses_of(losses_by_set(model, windows, sets.values())) if sets else {}
    losses = [(metric, by_set[drop_set].nll.mean()) for metric, drop_set in sets.items()]
    return pd.DataFrame(losses, columns=["metric", "nll"]).sort_values("nll", ignore_index=True)


def choices_by_kind(
    scores: pd.DataFrame, methods: Sequence[Method], counts: Mapping[str, Sequence[int]], protected: Sequence[int], seed: int
) -> tuple[dict[Choice, DropSet], list[Method]]:
    """The set that every method drops, for each count of each kind, and the methods that are not applicable."""
    orders, refused = drop_orders(scores, [kind for kind in counts if counts[kind]], methods, protected, seed)
    choices = {}
    for kind, numbers in counts.items():
        choices |= drop_sets({key: order for key, order in orders.items() if key[0] == kind}, numbers)
    return choices, refused


def accuracy_table(
    scores: pd.DataFrame, retentions: Retentions, choices: Mapping[Choice, DropSet], best_other: str | None = None
) -> pd.DataFrame:
    """The dense model and every choice: one row for each task and task metric, and the task "mean" with both retentions.

    Args:
        scores: the first table of ``task_scores_by_set``.
        best_other: the metric that stands for ``BEST_OTHER``.
    Returns:
        metric, rule, draw, best_other (whether the metric was chosen by its loss), kind (empty for the dense model), n_dropped,
        task, task_metric, value, stderr, chance, n, retention, retention_above_chance (of tasks where the dense model is above
        chance), retention_low, retention_high, above_chance_low, above_chance_high, note (why a task was not measured).
    """
    names = scores.set.map(set_name)
    dense = scores[names == ""].set_index(["task", "metric"]).value
    table = scores.join(dense.rename("dense"), on=["task", "metric"])
    counts = table.metric.str.startswith("acc")
    usable = counts & table.task.isin(above_chance(scores))
    above = (table.value - table.chance) / (table.dense - table.chance)
    table = table.assign(retention=(table.value / table.dense).where(counts), retention_above_chance=above.where(usable))
    by_set = dict(list(table.drop(columns="set").rename(columns={"metric": "task_metric"}).groupby(names)))
    parts = []
    for (kind, method, n), drop_set in {("", DENSE, 0): (), **choices}.items():
        rows = pd.concat([by_set[set_name(drop_set)], pd.DataFrame([_mean_row(retentions, drop_set)])])
        named = {"metric": method.metric, "rule": method.rule, "draw": method.draw, "best_other": method.metric == best_other}
        parts.append(rows.assign(**named, kind=kind, n_dropped=n))
    return pd.concat(parts, ignore_index=True).reindex(columns=COLUMNS)


def with_repaired(
    accuracy: pd.DataFrame,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    items: Mapping[str, int],
    choices: Mapping[Choice, DropSet],
    repair: Repair,
    seed: int = 0,
) -> pd.DataFrame:
    """The table of ``accuracy_table`` with a row for each of these choices after a repair: metric "cosine, repaired".

    Args:
        repair: of all sub-blocks of the choices, as ``linear_repair`` returns it.
    """
    sets = list(choices.values())
    scores, answers = task_scores_by_set(model, tokenizer, tasks, [(), *sets], items, repair)
    named = {(kind, m._replace(metric=f"{m.metric}, repaired"), n): drop_set for (kind, m, n), drop_set in choices.items()}
    table = accuracy_table(scores, Retentions.of(scores, answers, seed), named)
    return pd.concat([accuracy, table[table.metric != DENSE.metric]], ignore_index=True)


def linear_repair(model: PreTrainedModel, sets: Iterable[DropSet], windows: Int[Tensor, "sequence token"]) -> Repair:
    """The linear repair of every sub-block of these sets, fitted on calibration windows."""
    return maps_by_how(model, {sub_block for drop_set in sets for sub_block in drop_set}, windows, ["linear"])["linear"]


def _mean_row(retentions: Retentions, drop_set: DropSet) -> dict[str, object]:
    """Mean accuracy over the tasks and both retentions with their intervals."""
    paper, chance = retentions
    at = paper.sets.index(drop_set)
    row = {"task": "mean", "task_metric": "accuracy", "value": paper.mean[at], "stderr": paper.means[:, at].std()}
    row |= {"chance": paper.chance, "note": "", **dict(zip(PAPER_COUNT, paper.share([drop_set]), strict=True))}
    return row | (dict(zip(ABOVE_CHANCE, chance.share([drop_set], above=True), strict=True)) if chance else {})


def counted_accuracies(accuracy: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``accuracy_table`` that enter the mean: one accuracy for each task, normed by length where the task has that."""
    return accuracy.loc[accuracies(accuracy[["task", "task_metric"]].rename(columns={"task_metric": "metric"})).index]


def dense_table(accuracy: pd.DataFrame, model: str = "") -> pd.DataFrame:
    """The dense model's accuracy on every task: task, task_metric, value, stderr, chance, n, above chance (yes or no).

    Args:
        model: a name in the table of published model cards, which adds the column "model card".
    """
    rows = counted_accuracies(accuracy[(accuracy.metric == DENSE.metric) & (accuracy.task != "mean")]).set_index("task")
    above = (rows.value - rows.chance > 2 * rows.stderr).map({True: "yes", False: "no"})
    table = rows[["task_metric", "value", "stderr", "chance", "n"]].astype({"n": int}).assign(**{"above chance": above})
    if model:
        cards = published_figures("model_cards")
        card = cards[cards.model == model].set_index("task").value.map("{:.3f}".format)
        table["model card"] = card.reindex(table.index).fillna("")
    return table


def floor(accuracy: pd.DataFrame) -> float:
    """The retention of guessing: the mean chance of the tasks over the dense model's mean accuracy."""
    dense = accuracy[(accuracy.metric == DENSE.metric) & (accuracy.task == "mean")].iloc[0]
    return float(dense.chance / dense.value)


def selection_bias(accuracy: pd.DataFrame) -> float:
    """How far the choice of tasks as above chance inflates the dense model's mean above chance on the same items, as a share of it.

    The expectation of a normal accuracy, given that it exceeds chance by two standard errors, less its mean, which is taken to be
    the measured value.
    """
    dense = dense_table(accuracy)
    dense = dense[dense["above chance"] == "yes"]
    excess = dense.value - dense.chance
    threshold = 2 - excess / dense.stderr  # in standard errors from the mean
    return float((dense.stderr * norm.pdf(threshold) / norm.sf(threshold)).mean() / excess.mean())


def evidence_of(accuracy: pd.DataFrame) -> str:
    """What a table of accuracies was measured on: the kind of tasks, their number and that of their items."""
    dense = dense_table(accuracy)
    kind = HOME_MADE if all(map(is_local_task, dense.index)) else BENCHMARKS
    return f"{kind}: {len(dense)} tasks, {dense.n.sum()} items"


def unmeasured(accuracy: pd.DataFrame) -> list[str]:
    """The tasks whose data are not on the machine."""
    return accuracy[accuracy.note.fillna("") != ""].task.unique().tolist()


def task_by_task(accuracy: pd.DataFrame, kind: str, n: int) -> pd.DataFrame:
    """Accuracy of the dense model and of every method without ``n`` sub-blocks: a row per method, a column per task, then the mean
    and both retentions. Random choices are averaged.
    """
    rows = accuracy[(accuracy.metric == DENSE.metric) | (accuracy.kind == kind) & (accuracy.n_dropped == n)]
    rows = with_labels(rows.assign(first_token=True))
    rows["method"] = rows.method.where(rows.rule != RANDOM, RANDOM_MEAN)
    means = rows[rows.task == "mean"].groupby("method")[["value", PAPER_COUNT[0], ABOVE_CHANCE[0]]].mean()
    tasks = counted_accuracies(rows[rows.task != "mean"]).pivot_table(index="method", columns="task", values="value", sort=False)
    return tasks.join(means.set_axis(["mean", "retention", "above chance"], axis=1))


def mean_rows(accuracy: pd.DataFrame) -> pd.DataFrame:
    """The means over tasks of every pruned model, with the column ``method`` in front."""
    means = accuracy[(accuracy.task == "mean") & (accuracy.metric != DENSE.metric)]
    return with_labels(means.assign(first_token=True))


def retention_sentences(accuracy: pd.DataFrame, n: int, metrics: Sequence[str]) -> str:
    """Both retentions without ``n`` attention layers by each metric in one shot, beside that of guessing, as text."""
    dense, rows = dense_table(accuracy), _headline_rows(accuracy, n, metrics)
    paper, above = (
        ", ".join(f"{text} by {metric}" for metric, text in zip(rows.metric, interval_text(rows, columns, ".0%"), strict=True))
        for columns in (PAPER_COUNT, ABOVE_CHANCE)
    )
    n_above = (dense["above chance"] == "yes").sum()
    return (
        f"Retention on {evidence_of(accuracy)}: {paper or 'not measured'}; guessing keeps {floor(accuracy):.0%}. "
        f"Above chance, {n_above} tasks: {above or 'not measured'}."
    )


def _headline_rows(accuracy: pd.DataFrame, n: int, metrics: Sequence[str]) -> pd.DataFrame:
    """The means of ``mean_rows`` without ``n`` attention layers by these metrics in one shot."""
    means = mean_rows(accuracy)
    return means[(means.kind == "attention") & (means.n_dropped == n) & (means.rule == "one-shot") & means.metric.isin(metrics)]


def headline_sentence(accuracy: pd.DataFrame, n: int, n_layers: int, metric: str, model: str, promised: float) -> str:
    """The retention without ``n`` attention layers by a metric, beside that of guessing and the paper's promise."""
    kept = Interval(*_headline_rows(accuracy, n, [metric])[list(PAPER_COUNT)].iloc[0])
    kind, _, amount = evidence_of(accuracy).partition(": ")
    tasks = f"{amount.split()[0]} {kind}"
    return (
        f"Without {n} of {n_layers} attention layers by {metric}, {model} keeps {kept:.0%} of its accuracy on {tasks}; "
        f"guessing keeps {floor(accuracy):.0%}, the paper promises over {promised:.0%}."
    )


def grouped(choices: Mapping[Choice, DropSet]) -> dict[Choice, list[DropSet]]:
    """The sets of every kind, method and count; the random draws together, as draw 0."""
    groups: dict[Choice, list[DropSet]] = {}
    for (kind, method, n), drop_set in choices.items():
        groups.setdefault((kind, method._replace(draw=0), n), []).append(drop_set)
    return groups


def retention_difference(retention: Retention, sets: Sequence[DropSet], reference: Sequence[DropSet]) -> Interval:
    """The retention of some sets minus that of others, paired over items."""
    difference = retention.share(sets).estimate - retention.share(reference).estimate
    return Interval(difference, *map(float, ends(retention.draws(sets) - retention.draws(reference))))


def accuracy_points(retention: Retention, sets: Sequence[DropSet], reference: Sequence[DropSet]) -> Interval:
    """The mean accuracy of some sets minus that of others, in points, paired over items."""
    points = 100 * retention.mean[retention.sets.index(())]
    return Interval(*(float(value * points) for value in retention_difference(retention, sets, reference)))


def accuracy_differences(retention: Retention, choices: Mapping[Choice, DropSet], reference: Method) -> pd.DataFrame:
    """Every method against the reference at the same kind and count.

    Returns:
        kind, method, metric, n_dropped, points (difference of mean accuracy; above zero the method is better), low, high, verdict.
    """
    groups, rows = grouped(choices), []
    for (kind, method, n), sets in groups.items():
        if method != reference and (kind, reference, n) in groups:
            points = accuracy_points(retention, sets, groups[kind, reference, n])
            label = RANDOM_MEAN if method.rule == RANDOM else method.label
            rows.append((kind, label, method.metric, n, *points, comparison(points.low, points.high)))
    return pd.DataFrame(rows, columns=["kind", "method", "metric", "n_dropped", "points", "low", "high", "verdict"])


def place_among_choices(accuracy: pd.DataFrame) -> pd.DataFrame:
    """Where every method lies among the random choices of the same kind and number, by mean accuracy on the same items.

    Args:
        accuracy: as ``accuracy_table`` returns it.
    Returns:
        kind, n_dropped, method, metric, rule, draws (their number), share (of the random choices that are less accurate), low, high
        (Wilson's interval: it covers the drawing of choices and not that of items), verdict: better or worse than most random
        choices, or undecided.
    """
    means, rows = mean_rows(accuracy), []
    for (kind, n), group in means.groupby(["kind", "n_dropped"]):
        draws = group[group.rule == RANDOM].value.to_numpy()
        for row in group[group.rule != RANDOM].itertuples() if len(draws) else ():
            rows.append((kind, n, row.method, row.metric, row.rule, *place_of(draws < row.value)))
    columns = ["kind", "n_dropped", "method", "metric", "rule", "draws", "share", "low", "high", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def place_sentence(places: pd.DataFrame, n: int, metrics: Sequence[str]) -> str:
    """Which share of the random choices of ``n`` attention layers each metric beats in one shot, as text."""
    rows = places[
        (places.kind == "attention") & (places.n_dropped == n) & (places.rule == "one-shot") & places.metric.isin(metrics)
    ]
    if rows.empty:
        return f"No random choice of {n} attention layers was measured."
    texts = interval_text(rows, ["share", "low", "high"], ".0%")
    shares = ", ".join(f"{text} less accurate than {metric}" for metric, text in zip(rows.metric, texts, strict=True))
    return f"Of {rows.draws.iloc[0]} random choices of {n} attention layers: {shares}."


def retention_figure(accuracy: pd.DataFrame, metrics: Sequence[str], n: int, n_layers: int, promised: float) -> Figure:
    """Retention of every pruned model with its interval, as the paper counts and above chance, beside that of guessing.

    Args:
        n: the number of attention layers that the title is about.
    """
    means = mean_rows(accuracy)
    means = means[((means.rule == "one-shot") & means.metric.isin(metrics)) | (means.rule == RANDOM)]
    groups = sorted(means.groupby(["kind", "n_dropped"]), key=lambda group: (list(KIND_NAMES).index(group[0][0]), group[0][1]))
    kept, guessing = _headline_rows(accuracy, n, metrics)[PAPER_COUNT[0]], floor(accuracy)
    span = f"{kept.min():.0%} to {kept.max():.0%}" if len(kept) else "an unknown share"
    title = f"Without {n} of {n_layers} attention layers {span} of accuracy stays; guessing keeps {guessing:.0%}"
    order = [*metrics, RANDOM]
    named = {
        f"{count} of {n_layers} {KIND_NAMES[kind]}": rows.sort_values("metric", key=lambda m: m.map(order.index))
        for (kind, count), rows in groups
    }
    figure, axes = figures.headed_panels(title, 2, panel_height(named), sharey=True)
    dense = dense_table(accuracy)
    names = f"as the paper counts it ({len(dense)} tasks)", f"above chance ({(dense['above chance'] == 'yes').sum()} tasks)"
    for axis, name, columns, floor_of in zip(axes, names, (PAPER_COUNT, ABOVE_CHANCE), (guessing, 0.0), strict=True):
        draw_retentions(axis, named, columns, dict.fromkeys(named, floor_of), promised)
        axis.set_title(name)
    figure.supxlabel(f"share of the dense model's accuracy that stays; dashed: {promised:.0%}", fontsize=9)
    return figure


def panel_height(groups: Mapping[str, pd.DataFrame]) -> float:
    """The height in inches of a panel of ``draw_retentions``."""
    return max(2.6, 1.0 + 0.2 * sum(1 + rows.metric.nunique() for rows in groups.values()))


def draw_retentions(
    axis: Axes, groups: Mapping[str, pd.DataFrame], columns: Sequence[str], guessing: Mapping[str, float], promised: float
) -> None:
    """Retention by metric below the name of each group, over the grey floor of guessing; random choices are ticks.

    Args:
        groups: the means of ``mean_rows`` by name.
        columns: of the retention and its interval.
        guessing: the retention of guessing, by name.
    """
    labels: list[str] = []
    bands: dict[str, tuple[int, int]] = {}
    for name, group in groups.items():
        labels.append(name)
        for metric, rows in group.groupby("metric", sort=False):
            _draw_retention(axis, len(labels), rows, columns)
            labels.append(metric)
        bands[name] = len(labels) - group.metric.nunique() - 1, len(labels)
    low, high = axis.get_xlim()
    left = min([low, *(guessing[name] - 0.4 * (high - guessing[name]) for name in groups)])
    written: set[float] = set()
    for name, (first, last) in bands.items():
        axis.fill_betweenx([first - 0.6, last - 0.4], left, guessing[name], color="#ededed", linewidth=0)
        if guessing[name] not in written:
            axis.text(guessing[name], first, "guessing ", ha="right", va="center", fontsize=8, color="#555555")
            written.add(guessing[name])
    axis.axvline(promised, color="black", linewidth=0.8, linestyle="--")
    axis.set(xlim=(left, high), ylim=(len(labels) - 0.4, -0.6))
    axis.set_yticks(range(len(labels)), labels)
    for label in axis.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in groups else "normal")
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.grid(False, axis="y")


def _draw_retention(axis: Axes, place: int, rows: pd.DataFrame, columns: Sequence[str]) -> None:
    """The retention of one metric with its interval, or of the random draws as ticks."""
    metric = rows.metric.iloc[0]
    colour = figures.COLOURS.get(metric, figures.GREY)
    for estimate, low, high in rows[list(columns)].itertuples(index=False):
        if metric == RANDOM:
            axis.plot([estimate], [place], "|", color=figures.GREY, markersize=10)
        else:
            axis.plot([low, high], [place, place], color=colour, linewidth=3, alpha=0.5)
            axis.plot([estimate], [place], "o", color=colour, markersize=6)


def accuracy_claims(
    retentions: Retentions,
    choices: Mapping[Choice, DropSet],
    metrics: Sequence[str],
    reference: str,
    compared: tuple[float, int],
    headline: tuple[float, int],
    promised: float,
    places: pd.DataFrame,
    evidence: str,
) -> pd.DataFrame:
    """The paper's claims about accuracy: entropy against the reference and random choices, the promised retention, attention
    against MLP.

    Args:
        metrics: those that rank in one shot.
        compared: the fraction at which attention is compared with MLP, and the number of sub-blocks that it is.
        headline: the fraction of attention layers for which the paper promises a retention, and their number.
        places: of ``place_among_choices``.
        evidence: of ``evidence_of``.
    Returns:
        The columns of a claim; a claim is left out where its number of sub-blocks was not measured.
    """
    groups = {(kind, method.metric, n): sets for (kind, method, n), sets in grouped(choices).items() if method.rule == "one-shot"}
    entropies, rows = [metric for metric in metrics if is_entropy(METRICS[metric])], []
    for metric, (share, n) in product(entropies, (compared, headline)):
        if ("attention", metric, n) in groups and ("attention", reference, n) in groups:
            points = accuracy_points(retentions.paper, groups["attention", metric, n], groups["attention", reference, n])
            text = f"{metric} beats {reference} at {100 * share:g}% of attention layers; measured: points of mean accuracy"
            rows.append(claim_row(text, "abstract", "better", points, evidence=evidence))
    for metric, (share, n) in product(entropies, (compared, headline)):
        of_metric = (places.metric == metric) & (places.rule == "one-shot")
        for row in places[of_metric & (places.kind == "attention") & (places.n_dropped == n)].itertuples():
            text = f"{metric} beats random choices at {100 * share:g}% of attention layers; measured: share of draws less accurate"
            place = Interval(row.share, row.low, row.high)
            rows.append(claim_row(text, "implied", "", place, 0.5, f"{evidence}; {row.draws} draws"))
    for metric, retention in product(metrics, filter(None, retentions)):
        if ("attention", metric, headline[1]) in groups:
            above = retention is retentions.above_chance
            kept = retention.share(groups["attention", metric, headline[1]], above)
            layers = f"{100 * headline[0]:g}% of attention layers"
            what = " above chance" * above
            text = f"dropping {layers} by {metric} keeps {promised:.0%} of accuracy{what}; measured: retention{what}"
            published = "> 0.95" if metric in entropies and not above else ""
            guessing = retention.chance / retention.mean[retention.sets.index(())]
            amount = evidence if above else f"{evidence}; guessing keeps {guessing:.0%}"
            rows.append(claim_row(text, "results", published, kept, promised, amount))
    for metric in metrics:
        sets = [groups.get((kind, metric, compared[1])) for kind in ("attention", "mlp")]
        if all(sets):
            text = f"attention is more redundant than MLP ({100 * compared[0]:g}% by {metric}); measured: difference of retention"
            difference = retention_difference(retentions.paper, *sets)
            rows.append(claim_row(text, "results", "more redundant", difference, evidence=evidence))
    return pd.DataFrame(rows, columns=list(CLAIM_COLUMNS))
