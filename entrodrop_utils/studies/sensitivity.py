"""How the ranking of the attention layers, the choice and its cost depend on the settings of the estimate.

The reference of a metric has the run's parameters; a setting changes one factor of it. The agreement of the two is Kendall's tau of
their rankings, and the overlap of their choices. The cost of a setting is the loss increase of the model without the chosen layers.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import kendalltau
from torch import Tensor
from transformers import PreTrainedModel

from ..cached_scoring import cached_score
from ..claims import claim, claim_row
from ..entropy import ESTIMATORS
from ..evaluation import losses_by_set
from ..families.decoder import decoder_layers
from ..figures import COLOURS, MARKERS, panels
from ..layerwise import DropSet
from ..residual import SubBlock
from ..scoring import Metric, configured, first_tokens, without_first
from ..selection import NoFallingStage, one_shot, protected_layers, two_stage
from ..statistics import Interval, bootstrap_means, ends, paired_difference
from ..text import text_digest, windows
from .methods import losses_of

KIND = "attention"
PARAMETERS = ("bins", "k", "alpha")
GROUPS = dict.fromkeys(PARAMETERS, "parameter") | {"text": "text", "tokens": "tokens"}
ALL = "all"  # the mean of the groups
PAPER = ("bucket", "knn")
ALTERNATIVES = ("renyi", "gaussian", "matrix_renyi")
ALTERNATIVES_NAME = "Renyi, Gaussian and matrix-based Renyi entropy"
SOURCE = "estimators"  # the part of the paper that makes the claims


class Setting(NamedTuple):
    """A factor, its value and the metric.

    Attributes:
        factor: "reference", a parameter of the estimator, "tokens" (per estimate), "first token", "formula", "text",
            "long windows", "sequences" (how many), "documents" (which), "rule".
        setting: the factor's value.
        metric: a registered metric.
    """

    factor: str
    setting: str
    metric: str


LABELS = Setting._fields
Tables = Mapping[Setting, Float[np.ndarray, "sequence layer"]]
Orders = Mapping[Setting, list[SubBlock]]
Sets = Mapping[Setting, DropSet]
Losses = Mapping[DropSet, pd.DataFrame]  # window, nll, kl
# Measures by draws: tau, then the overlap of every count; the estimate first, then its bootstrap draws
Agreement = Float[np.ndarray, "measure draw"]


def reference_of(metric: str) -> Setting:
    """The setting of a metric with the run's parameters."""
    return Setting("reference", "default", metric)


def settings_of(factor: str, setting: object, metrics: Mapping[str, Metric]) -> dict[Setting, Metric]:
    """One setting of every metric."""
    return {Setting(factor, str(setting), name): metric for name, metric in metrics.items()}


def length_settings(factor: str, lengths: Iterable[int], metrics: Mapping[str, Metric]) -> dict[Setting, Metric]:
    """The metrics of the first tokens of each window, for each length.

    In a causal model the states of the first n tokens do not depend on the tokens after them.
    """
    return {Setting(factor, str(n), name): first_tokens(metric, n) for n in lengths for name, metric in metrics.items()}


def one_pass_settings(
    metrics: Mapping[str, Metric], tried: Mapping[str, tuple[str, Sequence[float]]], lengths: Iterable[int], k: int
) -> dict[Setting, Metric]:
    """The settings that one pass over the calibration text gives.

    Args:
        metrics: the metrics with the run's parameters.
        tried: metric -> its parameter and the values to try.
        lengths: tokens per estimate.
        k: neighbour of the official formula.
    """
    settings = {reference_of(name): metric for name, metric in metrics.items()}
    for name, (parameter, values) in tried.items():
        settings |= {Setting(parameter, f"{v:g}", name): configured(name, **{parameter: v}) for v in values}
    settings |= length_settings("tokens", lengths, metrics)
    settings |= settings_of("first token", "excluded", {name: without_first(metric) for name, metric in metrics.items()})
    return settings | settings_of("formula", "official", {"knn": configured("knn", k=k, official=True)})


def score_settings(
    model: PreTrainedModel,
    windows: Int[Tensor, "sequence token"],
    settings: Mapping[Setting, Metric],
    kinds: Iterable[str] = (KIND,),
) -> pd.DataFrame:
    """kind, layer, factor, setting, metric, sequence, value."""
    return cached_score(model, windows, settings, kinds, labels=LABELS)


def available_texts(
    sources: Iterable[str], tokenizer, n_sequences: int, n_tokens: int, seed: int = 0
) -> tuple[dict[str, Int[Tensor, "sequence token"]], dict[str, str]]:
    """Calibration windows of every text that is available, and the reason for every one that is not."""
    texts, missing = {}, {}
    for source in sources:
        try:
            texts[source] = windows(source, "calibration", tokenizer, n_sequences, n_tokens, seed)
        except ValueError as error:
            missing[source] = str(error)
    return texts, missing


def text_table(texts: Mapping[str, Int[Tensor, "sequence token"]], missing: Mapping[str, str]) -> pd.DataFrame:
    """text, windows, hash; a text that is not available has 0 windows, and the reason in place of the hash."""
    rows = [(source, len(ids), text_digest(ids)) for source, ids in texts.items()]
    rows += [(source, 0, f"not available: {reason}") for source, reason in missing.items()]
    return pd.DataFrame(rows, columns=["text", "windows", "hash"])


def pool_scores(
    model: PreTrainedModel, rest: Int[Tensor, "sequence token"], metrics: Mapping[str, Metric], scores: pd.DataFrame
) -> pd.DataFrame:
    """The reference settings of some metrics on the calibration text, as in ``scores``, and on the rest of the pool."""
    references = {reference_of(name): metric for name, metric in metrics.items()}
    first = scores[(scores.factor == "reference") & scores.metric.isin(list(metrics)) & (scores.kind == KIND)]
    more = score_settings(model, rest, references)
    return pd.concat([first, more.assign(sequence=more.sequence + first.sequence.max() + 1)])


def subset_scores(pool: pd.DataFrame, n_sequences: int, counts: Iterable[int], seed: int = 0) -> pd.DataFrame:
    """The scores of subsets of a pool of sequences, as settings: "sequences" are nested random subsets of each count, "documents"
    are the disjoint sets of ``n_sequences`` after the first.

    Args:
        pool: scores of the reference settings on the sequences 0 to n.
    """
    n_pool = pool.sequence.max() + 1
    shuffled = np.random.default_rng(seed).permutation(n_pool)
    subsets = [("sequences", n, shuffled[:n]) for n in counts if n <= n_pool]
    for draw in range(1, n_pool // n_sequences):
        subsets.append(("documents", draw, range(draw * n_sequences, (draw + 1) * n_sequences)))
    parts = [pool[pool.sequence.isin(chosen)].assign(factor=factor, setting=str(name)) for factor, name, chosen in subsets]
    return pd.concat([pool.head(0), *parts], ignore_index=True)


def layer_tables(scores: pd.DataFrame, protected: Sequence[int]) -> dict[Setting, Float[np.ndarray, "sequence layer"]]:
    """The scores of the attention layers that may be dropped, of every setting."""
    kept = protected_layers(protected, int(scores.layer.max()) + 1)
    rows = scores[(scores.kind == KIND) & ~scores.layer.isin(kept)]
    order = rows.sequence.unique()  # of the sequences in every table, on which the resampling depends
    return {
        Setting(*key): part.pivot_table(index="sequence", columns="layer", values="value").reindex(order).dropna().to_numpy()
        for key, part in rows.groupby(list(LABELS), sort=False)
    }


def orders_by_setting(scores: pd.DataFrame, protected: Sequence[int], n: int) -> dict[Setting, list[SubBlock]]:
    """The attention layers in the order in which every setting drops them, then those of the two-stage rule for every entropy.

    Raises:
        ValueError: fewer than ``n`` attention layers are not protected.
    """
    groups = {Setting(*key): rows for key, rows in scores.groupby(list(LABELS), sort=False)}
    for setting, rows in groups.items():
        one_shot(rows, setting.metric, KIND, n, protected)  # refuses too large a number
    orders = {setting: one_shot(rows, setting.metric, KIND, protected=protected) for setting, rows in groups.items()}
    entropies = [setting.metric for setting in groups if setting.factor == "reference" and setting.metric in ESTIMATORS]
    for name in entropies:
        with suppress(NoFallingStage):  # the rule is not applicable
            orders[Setting("rule", "two-stage", name)] = two_stage(groups[reference_of(name)], name, KIND)
    return orders


def sets_of_size(orders: Orders, n: int) -> dict[Setting, DropSet]:
    """The first ``n`` of every order that has as many."""
    return {setting: tuple(sorted(order[:n])) for setting, order in orders.items() if len(order) >= n}


def set_losses(model: PreTrainedModel, held_out: Int[Tensor, "window token"], sets: Sets) -> dict[DropSet, pd.DataFrame]:
    """The losses of the dense model and of every different set."""
    return losses_of(losses_by_set(model, held_out, [(), *sorted(set(sets.values()))]))


def _overlap(ranking: np.ndarray, reference: np.ndarray, n: int) -> float:
    """The share of the n smallest of one ranking that are among the n smallest of the other."""
    return len(set(np.argsort(ranking, kind="stable")[:n]) & set(np.argsort(reference, kind="stable")[:n])) / n


def agreements(tables: Tables, orders: Orders, counts: Sequence[int], draws: int = 200, seed: int = 0) -> dict[Setting, Agreement]:
    """The agreement of every setting with the reference of its metric.

    The sequences are resampled, the same ones on both sides where both were measured on the same text. The two-stage rule has the
    reference's ranking and another choice: its tau is 1, and it has no draws.
    """
    result = {}
    for setting, order in orders.items():
        reference = reference_of(setting.metric)
        if setting in tables:
            means = (
                np.vstack([values.mean(0), bootstrap_means(values, draws, seed)]) for values in (tables[setting], tables[reference])
            )
            pairs = list(zip(*means, strict=True))
            overlaps = [[_overlap(x, y, n) for x, y in pairs] for n in counts]
            result[setting] = np.array([[kendalltau(x, y).statistic for x, y in pairs], *overlaps])
        else:
            overlaps = [len({*order[:n]} & {*orders[reference][:n]}) / n for n in counts]
            result[setting] = np.tile(np.array([[1.0], *([share] for share in overlaps)]), 2)
    return result


def interval_of(values: Float[np.ndarray, "draw"]) -> Interval:
    """The estimate, which comes first, and its interval, which is widened to hold it: resampling tends to lower an agreement."""
    estimate, draws = values[0], values[1:][np.isfinite(values[1:])]
    low, high = ends(draws) if len(draws) else (np.nan, np.nan)
    return Interval(float(estimate), float(np.fmin(low, estimate)), float(np.fmax(high, estimate)))


def sensitivity_table(
    agreement: Mapping[Setting, Agreement], overlaps: Sequence[str], sets: Sets, losses: Losses, seed: int = 0
) -> pd.DataFrame:
    """One row per setting.

    Args:
        overlaps: names of the measures after tau.
    Returns:
        factor, setting, metric, kind, first_token, rule; each measure with _low and _high; loss_increase, loss_low, loss_high
        (against the dense model, nats per token, nan where the rule leaves too few layers), against_reference, against_low,
        against_high (against the choice of the reference).
    """
    measures = [f"{name}{end}" for name in ("tau", *overlaps) for end in ("", "_low", "_high")]
    costs = ["loss_increase", "loss_low", "loss_high", "against_reference", "against_low", "against_high"]
    rows = []
    for setting, values in agreement.items():
        row = [*setting, KIND, setting.factor != "first token", "two-stage" if setting.factor == "rule" else "one-shot"]
        row += [number for draws in values for number in interval_of(draws)]
        for reference in ((), sets[reference_of(setting.metric)]):
            row += loss_difference(losses, sets[setting], reference, seed) if setting in sets else [np.nan] * 3
        rows.append(row)
    return pd.DataFrame(rows, columns=[*LABELS, "kind", "first_token", "rule", *measures, *costs])


def loss_difference(losses: Losses, drop_set: DropSet, reference: DropSet, seed: int = 0) -> Interval:
    """Loss without one set minus loss without another, paired over windows."""
    return paired_difference(losses[drop_set].nll.to_numpy(), losses[reference].nll.to_numpy(), seed)


def robustness(agreement: Mapping[Setting, Agreement], tables: Tables) -> dict[tuple[str, str], Agreement]:
    """(metric, group) -> mean agreement over the settings of a group that differ from the reference; ``ALL`` is the mean of the
    groups, which count alike.
    """
    parts: dict[tuple[str, str], list[Agreement]] = {}
    for setting, values in agreement.items():
        if setting.factor in GROUPS and not np.array_equal(tables[setting], tables[reference_of(setting.metric)]):
            parts.setdefault((setting.metric, GROUPS[setting.factor]), []).append(values)
    result = {}
    for name in dict.fromkeys(setting.metric for setting in agreement):
        groups = [group for group in dict.fromkeys(GROUPS.values()) if (name, group) in parts]
        result |= {(name, group): np.mean(parts[name, group], axis=0) for group in groups}
        if groups:
            result[name, ALL] = np.mean([result[name, group] for group in groups], axis=0)
    return result


def robustness_table(robust: Mapping[tuple[str, str], Agreement]) -> pd.DataFrame:
    """metric, group, mean, low, high of tau."""
    rows = [(*key, *interval_of(values[0])) for key, values in robust.items()]
    return pd.DataFrame(rows, columns=["metric", "group", "mean", "low", "high"])


def robustness_summary(ranking: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Tau of every metric for display: mean and interval of each group, the lowest over its parameter, without the first token."""
    cells = [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in ranking[["mean", "low", "high"]].to_numpy()]
    summary = ranking.assign(cell=cells).pivot_table(index="metric", columns="group", values="cell", aggfunc="first", sort=False)
    own = table[table.factor.isin(PARAMETERS)].sort_values("tau", kind="stable").groupby("metric").head(1).set_index("metric")
    summary["lowest over parameter"] = own.tau.map("{:.2f}".format) + " (" + own.factor + " = " + own.setting + ")"
    summary["without first token"] = table[table.factor == "first token"].set_index("metric").tau.map("{:.2f}".format)
    return summary.fillna("")


def listed(values: pd.Series, form: str = "{}") -> str:
    """The entries of a series in words: "bucket 0.86, knn 0.73"; empty ones are left out, and no entry is "none"."""
    return ", ".join(f"{name} {form.format(value)}" for name, value in values.items() if value != "") or "none"


def advantage(robust: Mapping[tuple[str, str], Agreement], metrics: Iterable[str], others: Iterable[str]) -> Agreement:
    """How much more robust metrics are than others: mean difference over the groups for which both have settings."""
    differences = []
    for group in dict.fromkeys(GROUPS.values()):
        sides = [[robust[name, group] for name in names if (name, group) in robust] for names in (metrics, others)]
        if all(sides):
            differences.append(np.mean(sides[0], axis=0) - np.mean(sides[1], axis=0))
    if not differences:
        raise ValueError("there is nothing to compare: try another value of a parameter, another length or another text")
    return np.mean(differences, axis=0)


def loss_advantage(losses: Losses, sets: Sets, metrics: Iterable[str], others: Iterable[str]) -> Float[np.ndarray, "window"]:
    """How much more the choices of other metrics cost than those of some metrics, with the reference settings, in each window."""
    ours, theirs = ([losses[sets[reference_of(name)]].nll.to_numpy() for name in names] for names in (metrics, others))
    return np.mean(theirs, axis=0) - np.mean(ours, axis=0)


def choice_stability(agreement: Mapping[Setting, Agreement], sources: Iterable[str], metric: str) -> Float[np.ndarray, "draw"]:
    """Mean share of the choice that other texts choose again; nan if there are none."""
    shares = [agreement[Setting("text", source, metric)][-1] for source in sources]
    return np.mean(shares or [[np.nan, np.nan]], axis=0)


def sensitivity_claims(
    agreement: Mapping[Setting, Agreement],
    robust: Mapping[tuple[str, str], Agreement],
    losses: Losses,
    sets: Sets,
    share: str,
    texts: Sequence[str],
    metrics: Iterable[str],
    goal: float,
    seed: int = 0,
) -> pd.DataFrame:
    """The claims about robustness, about the loss, and about the texts for each of some metrics.

    Args:
        share: the share of the layers that is dropped, in words.
        texts: the texts that the claim about texts is about.
        goal: the share of the choice that they must choose again.
    """
    more = f"bucket and KNN are more robust than {ALTERNATIVES_NAME}; measured: difference in"
    loss = f"bucket and KNN choose better than {ALTERNATIVES_NAME}; measured: loss difference at {share}, nats per token"
    stable = "the choice is stable across calibration texts ({}); measured: share of the {} chosen again, goal {:g}"
    difference = advantage(robust, PAPER, ALTERNATIVES)
    rows = [
        claim_row(f"{more} tau", SOURCE, "", interval_of(difference[0])),
        claim_row(f"{more} overlap of the choice of {share}", SOURCE, "", interval_of(difference[-1])),
        claim(loss, SOURCE, loss_advantage(losses, sets, PAPER, ALTERNATIVES), seed=seed),
    ]
    for name in metrics:
        measured = interval_of(choice_stability(agreement, texts, name))
        rows.append(claim_row(stable.format(name, share, goal), SOURCE, "", measured, goal))
    return pd.DataFrame(rows)


def estimator_operations(metric: str, n_tokens: int, dim: int) -> float:
    """Multiply-adds of one estimate, to leading order."""
    least = min(n_tokens, dim)
    return {
        "bucket": 6 * n_tokens * dim,
        "knn": n_tokens**2 * (dim + 8),
        "renyi": n_tokens**2 * (dim + 16),
        "gaussian": n_tokens * dim * least + least**3 / 3,
        "matrix_renyi": n_tokens * dim * least + 4 / 3 * least**3,
        "cosine": 3 * n_tokens * dim,
    }[metric]


def setting_costs(table: pd.DataFrame, tables: Tables, model: PreTrainedModel, n_tokens: int) -> pd.DataFrame:
    """The settings of the sensitivity table that read the run's text, with two more columns: name (what it reads) and cost.

    The cost is counted, in billions of multiply-adds: parameters of the layers times tokens, and the estimates of all endpoints.
    """
    weights = sum(p.numel() for p in model.base_model.parameters()) - model.get_input_embeddings().weight.numel()
    n_endpoints, dim = 2 * len(decoder_layers(model)) + 1, model.config.hidden_size
    rows = table[table.factor.isin(["reference", "tokens", "long windows", "sequences", *PARAMETERS])]
    names, costs = [], []
    for setting in (Setting(*key) for key in rows[list(LABELS)].itertuples(index=False)):
        length = int(setting.setting) if setting.factor in ("tokens", "long windows") else n_tokens
        n_sequences = len(tables[setting])
        parameter = f"{setting.factor} {setting.setting}, " if setting.factor in PARAMETERS else ""
        names.append(f"{setting.metric}, {parameter}{n_sequences} x {length} tokens")
        estimates = n_endpoints * estimator_operations(setting.metric, length, dim)
        costs.append(n_sequences * (weights * length + estimates) / 1e9)
    return rows.assign(name=names, cost=costs)


def recommended(costs: pd.DataFrame, sets: Sets, losses: Losses, seed: int = 0) -> pd.Series:
    """The cheapest setting whose choice is statistically no worse than that of the most expensive one.

    Returns:
        recommended, cost, most_expensive, times_cheaper, loss_increase, difference (in loss from the most expensive), low, high.
    """
    rows = costs.sort_values(["cost", *LABELS])
    keys = [Setting(*key) for key in rows[list(LABELS)].itertuples(index=False)]
    differences = (loss_difference(losses, sets[key], sets[keys[-1]], seed) for key in keys)
    chosen, difference = next((i, d) for i, d in enumerate(differences) if d.low <= 0)  # the last one differs from itself by 0
    row, last = rows.iloc[chosen], rows.iloc[-1]
    values = [row["name"], row.cost, last["name"], last.cost / row.cost, row.loss_increase, *difference]
    names = ["recommended", "cost", "most_expensive", "times_cheaper", "loss_increase", "difference", "low", "high"]
    return pd.Series(values, index=names)


def recommendations(costs: pd.DataFrame, sets: Sets, losses: Losses, seed: int = 0) -> pd.DataFrame:
    """``recommended`` for the settings of every metric, and for all of them ("any")."""
    parts = {name: recommended(rows, sets, losses, seed) for name, rows in costs.groupby("metric", sort=False)}
    return pd.DataFrame(parts | {"any": recommended(costs, sets, losses, seed)}).T.rename_axis("metric").infer_objects()


def _trace(axis: Axes, x: Iterable[float], rows: pd.DataFrame, value: str, colour: str, marker: str, dash: str = "-") -> None:
    """A measure over settings with its intervals."""
    ends_of = [value.replace("_increase", "") + end for end in ("_low", "_high")]
    bars = np.abs(rows[ends_of].to_numpy().T - rows[value].to_numpy())
    axis.errorbar(x, rows[value], bars, color=colour, marker=marker, linestyle=dash, elinewidth=0.7, capsize=1.5)


def draw_parameters(table: pd.DataFrame, tried: Mapping[str, tuple[str, Sequence[float]]]) -> Figure:
    """Tau and loss increase against the parameter of each estimator."""
    figure, axes = panels(2, len(tried), height=2.1, sharey="row")
    cosine = table[(table.factor == "reference") & (table.metric == "cosine")].iloc[0]
    for top, bottom, (name, (parameter, _)) in zip(axes, axes[len(tried) :], tried.items(), strict=False):
        rows = table[(table.factor == parameter) & (table.metric == name)]
        _trace(top, range(len(rows)), rows, "tau", COLOURS[name], "o")
        _trace(bottom, range(len(rows)), rows, "loss_increase", COLOURS[name], "o")
        bottom.axhline(cosine.loss_increase, color="black", linewidth=0.8, linestyle=":")
        top.set(title=name, xticks=range(len(rows)), xticklabels=[], ylim=(-0.1, 1.05))
        bottom.set(xticks=range(len(rows)), xlabel=parameter)
        bottom.set_xticklabels(rows.setting, fontsize=7)
    axes[0].set_ylabel("tau")
    axes[len(tried)].set_ylabel("loss increase (nats)")
    cosine_line = Line2D([], [], color="black", linestyle=":")
    figure.legend([cosine_line], ["loss increase of cosine similarity"], loc="outside lower center")
    return figure


def draw_samples(table: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """Tau and loss increase of every metric over the settings of some factors (factor -> title)."""
    figure, axes = panels(2, len(titles), height=2.0, sharey="row", sharex="col")
    metrics = list(dict.fromkeys(table.metric))
    for row, value in enumerate(("tau", "loss_increase")):
        for axis, (factor, title) in zip(axes[row * len(titles) :], titles.items(), strict=False):
            axis.set_xticks([])  # stays so where no setting was measured
            dash, angle = ("", 35) if factor == "text" else ("-", 0)
            for i, name in enumerate(metrics):
                rows = table[(table.factor == factor) & (table.metric == name)]
                if len(rows):
                    _trace(axis, np.arange(len(rows)) + 0.06 * (i - 2.5), rows, value, COLOURS[name], MARKERS[name], dash)
                    ticks = [setting.replace(" (", "\n(") for setting in rows.setting]
                    axis.set_xticks(range(len(rows)), ticks, rotation=angle, fontsize=7)
            axis.set_title(title if row == 0 else "", fontsize=8)
    axes[0].set_ylabel("tau")
    axes[len(titles)].set_ylabel("loss increase (nats)")
    handles = [Line2D([], [], color=COLOURS[name], marker=MARKERS[name]) for name in metrics]
    figure.legend(handles, metrics, loc="outside lower center", ncols=len(metrics))
    return figure


def draw_robustness(robust: pd.DataFrame) -> Figure:
    """Mean tau of every metric over the settings of each group."""
    figure, (axis,) = panels(1, 1, height=2.6)
    metrics = list(dict.fromkeys(robust.metric))
    colours = (COLOURS["bucket"], COLOURS["knn"], COLOURS["gaussian"], COLOURS["cosine"])
    for i, (group, colour) in enumerate(zip((*dict.fromkeys(GROUPS.values()), ALL), colours, strict=True)):
        rows = robust[robust.group == group]
        y = np.array([metrics.index(name) for name in rows.metric]) + (i - 1.5) * 0.17
        bars = np.abs(rows[["low", "high"]].to_numpy().T - rows["mean"].to_numpy())
        axis.errorbar(rows["mean"], y, xerr=bars, fmt="os^D"[i], color=colour, label=group, elinewidth=0.8, capsize=1.5)
    axis.set_yticks(range(len(metrics)), metrics)
    axis.set_xlabel("mean tau with the reference")
    axis.invert_yaxis()
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
