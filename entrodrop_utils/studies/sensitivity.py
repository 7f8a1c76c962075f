"""How the ranking of the attention layers, the choice and its cost depend on the settings of the estimate.

The reference of a metric has the run's parameters; a setting changes one factor of it. The agreement of the two is Kendall's tau of
their rankings, and the overlap of their choices. The cost of a setting is the loss increase of the model without the chosen layers.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor
from transformers import PreTrainedModel

from ..cached_scoring import cached_score
from ..claims import CALIBRATION, HELD_OUT, claim_row
from ..entropy import ESTIMATORS
from ..evaluation import losses_by_set
from ..families.decoder import decoder_layers
from ..figures import COLOURS, GREY, MARKERS, panels
from ..layerwise import DropSet
from ..residual import SubBlock
from ..scoring import Metric, configured, first_tokens, without_first
from ..selection import one_shot, protected_layers, stage_boundary, two_stage
from ..statistics import Interval, half_interval, half_means, kendall_tau, paired_difference, verdict
from ..text import text_digest, windows
from .methods import losses_of

KIND = "attention"
PARAMETERS = ("bins", "k", "alpha")
GROUPS = dict.fromkeys(PARAMETERS, "parameter") | {"text": "text", "tokens": "tokens"}
ALL = "all"  # the mean of the groups
PAPER = ("bucket", "knn")
ALTERNATIVES = ("renyi", "gaussian", "matrix_renyi")
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


class Agreement(NamedTuple):
    """The agreement of a setting with its reference, or a mean of several.

    Attributes:
        draws: measures (tau, then the overlap of every count) by the estimate, which comes first, and its values on halves.
        n_units: sequences behind it, the smaller number of two samples; 0 where nothing was resampled.
    """

    draws: Float[np.ndarray, "measure draw"]
    n_units: int

    def interval(self, measure: int) -> Interval:
        """One measure with its interval; nan where nothing was resampled."""
        estimate, *halves = self.draws[measure]
        return half_interval(estimate, np.array(halves), self.n_units)


def mean_of(parts: Sequence[Agreement]) -> Agreement:
    """The mean of several agreements, half by half."""
    return Agreement(np.mean([part.draws for part in parts], axis=0), min(part.n_units for part in parts))


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
    setting, rows = next(iter(groups.items()))
    one_shot(rows, setting.metric, KIND, n, protected)  # refuses too large a number
    orders = {setting: one_shot(rows, setting.metric, KIND, protected=protected) for setting, rows in groups.items()}
    entropies = [setting.metric for setting in groups if setting.factor == "reference" and setting.metric in ESTIMATORS]
    falling = [name for name in entropies if stage_boundary(groups[reference_of(name)], name)]  # the rule needs a falling stage
    return orders | {Setting("rule", "two-stage", name): two_stage(groups[reference_of(name)], name, KIND) for name in falling}


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
    """The agreement of every setting with the reference of its metric, and on halves of the sequences.

    The halves are the same on both sides where both were measured on the same text. The two-stage rule has the reference's ranking
    and another choice: its tau is 1, and nothing is resampled.
    """
    result = {}
    for setting, order in orders.items():
        reference = reference_of(setting.metric)
        if setting in tables:
            pair = tables[setting], tables[reference]
            means = [np.vstack([values.mean(0), half_means(values, draws, seed)]) for values in pair]
            overlaps = [[_overlap(x, y, n) for x, y in zip(*means, strict=True)] for n in counts]
            taus = [kendall_tau(x, y) for x, y in zip(*means, strict=True)]
            result[setting] = Agreement(np.array([taus, *overlaps]), min(map(len, pair)))
        else:
            overlaps = [len({*order[:n]} & {*orders[reference][:n]}) / n for n in counts]
            result[setting] = Agreement(np.array([[1.0], *([share] for share in overlaps)]), 0)
    return result


def sensitivity_table(agreement: Mapping[Setting, Agreement], overlaps: Sequence[str], sets: Sets, losses: Losses) -> pd.DataFrame:
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
    for setting, found in agreement.items():
        row = [*setting, KIND, setting.factor != "first token", "two-stage" if setting.factor == "rule" else "one-shot"]
        row += [number for measure in range(len(found.draws)) for number in found.interval(measure)]
        for reference in ((), sets[reference_of(setting.metric)]):
            row += loss_difference(losses, sets[setting], reference) if setting in sets else [np.nan] * 3
        rows.append(row)
    return pd.DataFrame(rows, columns=[*LABELS, "kind", "first_token", "rule", *measures, *costs])


def loss_difference(losses: Losses, drop_set: DropSet, reference: DropSet) -> Interval:
    """Loss without one set minus loss without another, paired over windows."""
    return paired_difference(losses[drop_set].nll.to_numpy(), losses[reference].nll.to_numpy())


def robustness(agreement: Mapping[Setting, Agreement], tables: Tables) -> dict[tuple[str, str], Agreement]:
    """(metric, group) -> mean agreement over the settings of a group that differ from the reference; ``ALL`` is the mean of the
    groups, which count alike.
    """
    parts: dict[tuple[str, str], list[Agreement]] = {}
    for setting, found in agreement.items():
        if setting.factor in GROUPS and not np.array_equal(tables[setting], tables[reference_of(setting.metric)]):
            parts.setdefault((setting.metric, GROUPS[setting.factor]), []).append(found)
    result = {}
    for name in dict.fromkeys(setting.metric for setting in agreement):
        groups = [group for group in dict.fromkeys(GROUPS.values()) if (name, group) in parts]
        result |= {(name, group): mean_of(parts[name, group]) for group in groups}
        if groups:
            result[name, ALL] = mean_of([result[name, group] for group in groups])
    return result


def robustness_table(robust: Mapping[tuple[str, str], Agreement]) -> pd.DataFrame:
    """metric, group, mean, low, high of tau."""
    rows = [(*key, *found.interval(0)) for key, found in robust.items()]
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


def advantage(robust: Mapping[tuple[str, str], Agreement], metric: str, other: str) -> Agreement:
    """How much more robust a metric is than another: mean difference over the groups for which both have settings.

    Raises:
        ValueError: there is no such group.
    """
    pairs = [(robust.get((metric, group)), robust.get((other, group))) for group in dict.fromkeys(GROUPS.values())]
    pairs = [pair for pair in pairs if None not in pair]
    if not pairs:
        raise ValueError("there is nothing to compare: try another value of a parameter, another length or another text")
    return mean_of([Agreement(a.draws - b.draws, min(a.n_units, b.n_units)) for a, b in pairs])


def choice_stability(agreement: Mapping[Setting, Agreement], sources: Iterable[str], metric: str) -> Interval:
    """Mean share of the choice that other texts choose again; nan if there are none."""
    shares = [agreement[Setting("text", source, metric)] for source in sources]
    return mean_of(shares).interval(-1).within(0.0, 1.0) if shares else Interval(*[float("nan")] * 3)


def sensitivity_claims(
    agreement: Mapping[Setting, Agreement],
    robust: Mapping[tuple[str, str], Agreement],
    losses: Losses,
    sets: Sets,
    share: str,
    texts: Sequence[str],
    metrics: Iterable[str],
    goal: float,
    calibration: str,
    held_out: str,
) -> pd.DataFrame:
    """The claims about robustness and about the loss, for each of the paper's estimators against each alternative, and about the
    texts for each of some metrics.

    Args:
        share: the share of the layers that is dropped, in words.
        texts: the texts that the claim about texts is about.
        goal: the share of the choice that they must choose again.
        calibration, held_out: the amounts of text, in words.
    """
    pairs, rows, scored = list(product(PAPER, ALTERNATIVES)), [], f"{CALIBRATION}: {calibration}"
    for name, other in pairs:
        text = f"{name} is more robust than {other}; measured: difference in tau"
        rows.append(claim_row(text, SOURCE, "", advantage(robust, name, other).interval(0), 0, scored))
    for name, other in pairs:
        text = f"{name} chooses better than {other}; measured: loss difference at {share}, nats per token"
        difference = loss_difference(losses, *(sets[reference_of(metric)] for metric in (other, name)))
        rows.append(claim_row(text, SOURCE, "", difference, 0, f"{HELD_OUT}: {held_out}"))
    for name in metrics:
        text = f"the choice is stable across calibration texts ({name}); measured: share of the {share} chosen again, goal {goal:g}"
        rows.append(claim_row(text, SOURCE, "", choice_stability(agreement, texts, name), goal, scored))
    return pd.DataFrame(rows)


def claim_matrix(claims: pd.DataFrame) -> pd.DataFrame:
    """The claims about two estimators for display: a row for each quantity and alternative, a column for each of the paper's."""
    parts = claims.claim.str.extract(r"^(?P<metric>\w+) (?P<what>is more robust|chooses better) than (?P<other>\w+);")
    values = [f"{row.verdict}: {row.measured:+.2f} [{row.low:+.2f}, {row.high:+.2f}]" for row in claims.itertuples()]
    table = parts.assign(value=values).dropna()
    return table.pivot_table(index=["what", "other"], columns="metric", values="value", aggfunc="first", sort=False)


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


def recommended(costs: pd.DataFrame, sets: Sets, losses: Losses, margin: float) -> pd.Series:
    """The cheapest setting whose choice costs at most ``margin`` nats more than that of the most expensive one.

    Returns:
        recommended, cost, most_expensive, times_cheaper, loss_increase, drop_set and reference (the two choices).
    """
    rows = costs.sort_values(["cost", *LABELS])
    keys = [Setting(*key) for key in rows[list(LABELS)].itertuples(index=False)]
    differences = (loss_difference(losses, sets[key], sets[keys[-1]]).estimate for key in keys)
    chosen = next(i for i, difference in enumerate(differences) if difference <= margin)  # that of the last one is 0
    row, last = rows.iloc[chosen], rows.iloc[-1]
    values = [row["name"], row.cost, last["name"], last.cost / row.cost, row.loss_increase, sets[keys[chosen]], sets[keys[-1]]]
    names = ["recommended", "cost", "most_expensive", "times_cheaper", "loss_increase", "drop_set", "reference"]
    return pd.Series(values, index=names)


def recommendations(
    model: PreTrainedModel, costs: pd.DataFrame, sets: Sets, losses: Losses, others: Int[Tensor, "window token"], margin: float
) -> pd.DataFrame:
    """``recommended`` for the settings of every metric and for all of them ("any"), checked on other windows.

    Args:
        others: windows on which nothing was chosen.
    Returns:
        metric, recommended, cost, most_expensive, times_cheaper, loss_increase, difference, low, high (in loss from the most
        expensive one, on the other windows), verdict (whether the difference is below the margin).
    """
    parts = {name: recommended(rows, sets, losses, margin) for name, rows in costs.groupby("metric", sort=False)}
    table = pd.DataFrame(parts | {"any": recommended(costs, sets, losses, margin)}).T.rename_axis("metric").reset_index()
    measured = losses_of(losses_by_set(model, others, [*table.drop_set, *table.reference]))
    differences = [loss_difference(measured, *pair) for pair in zip(table.drop_set, table.reference, strict=True)]
    table = table.drop(columns=["drop_set", "reference"]).infer_objects()
    table[["difference", "low", "high"]] = differences
    return table.assign(verdict=[verdict(-row.high, -row.low, -margin) for row in table.itertuples()])


def _trace(axis: Axes, x: Iterable[float], rows: pd.DataFrame, value: str, colour: str, marker: str, dash: str = "-") -> None:
    """A measure over settings with its intervals."""
    ends_of = [value.replace("_increase", "") + end for end in ("_low", "_high")]
    bars = np.abs(rows[ends_of].to_numpy().T - rows[value].to_numpy())
    axis.errorbar(x, rows[value], bars, color=colour, marker=marker, linestyle=dash, elinewidth=0.7, capsize=1.5)


def draw_parameters(table: pd.DataFrame, tried: Mapping[str, tuple[str, Sequence[float]]]) -> Figure:
    """Tau against the parameter of each estimator; those of the paper are coloured."""
    figure, axes = panels(1, len(tried), height=2.2, sharey=True)
    for axis, (name, (parameter, _)) in zip(axes, tried.items(), strict=False):
        rows = table[(table.factor == parameter) & (table.metric == name)]
        _trace(axis, range(len(rows)), rows, "tau", COLOURS[name] if name in PAPER else GREY, "o")
        axis.set(title=name, xlabel=parameter, ylim=(-0.1, 1.1))
        axis.set_xticks(range(len(rows)), rows.setting, fontsize=8)
    axes[0].set_ylabel("tau")
    return figure


def draw_samples(table: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """Tau of every metric over the settings of some factors (factor -> title); the paper's estimators are coloured."""
    figure, axes = panels(2, 2, height=2.1, sharey=True)
    metrics = list(dict.fromkeys(table.metric))
    for axis, (factor, title) in zip(axes, titles.items(), strict=True):
        axis.set_xticks([])  # stays so where no setting was measured
        for i, name in enumerate(metrics):
            rows = table[(table.factor == factor) & (table.metric == name)]
            if len(rows):
                colour = COLOURS[name] if name in (*PAPER, "cosine") else GREY
                _trace(
                    axis,
                    np.arange(len(rows)) + 0.06 * (i - 2.5),
                    rows,
                    "tau",
                    colour,
                    MARKERS[name],
                    "" if factor == "text" else "-",
                )
                axis.set_xticks(range(len(rows)), rows.setting.str.replace(" (", "\n(", regex=False), fontsize=8)
        axis.set(title=title, ylim=(-0.1, 1.2))
    for axis in axes[::2]:
        axis.set_ylabel("tau")
    handles = [
        Line2D([], [], color=COLOURS[name] if name in (*PAPER, "cosine") else GREY, marker=MARKERS[name], label=name)
        for name in metrics
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(metrics))
    return figure


def draw_robustness(robust: pd.DataFrame) -> Figure:
    """Mean tau of every metric, the highest first, with that of each group as a tick; the paper's estimators are coloured."""
    figure, (axis,) = panels(1, 1, height=2.6)
    total = robust[robust.group == ALL].sort_values("mean", ascending=False)
    for y, row in enumerate(total.itertuples()):
        colour = COLOURS[row.metric] if row.metric in PAPER else GREY
        axis.plot([row.low, row.high], [y, y], color=colour, linewidth=4, alpha=0.5)
        axis.plot([row.mean], [y], "o", color=colour, markersize=6)
        axis.annotate(f"{row.mean:.2f}", (row.mean, y), (0, 7), textcoords="offset points", ha="center", fontsize=8)
        for group in robust[(robust.metric == row.metric) & (robust.group != ALL)].itertuples():
            axis.plot([group.mean], [y], "|", color="#555555", markersize=8)
    axis.set_yticks(range(len(total)), total.metric)
    axis.set(xlabel="mean tau with the reference; ticks: means of the groups of settings", ylim=(len(total) - 0.4, -0.6))
    return figure
