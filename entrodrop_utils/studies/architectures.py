"""Architectures side by side: entropy curves and rankings of trained models, and curves of untrained ones.

An entropy is named by its estimator and by whether the first token of each window counts.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, T5EncoderModel

from ..cached_scoring import cached_entropies
from ..claims import CALIBRATION, claim_row
from ..figures import COLOURS, GREY, band, barcode, label_ends, panels
from ..profile import Profile
from ..residual import states
from ..scoring import METRICS, Metric, configured
from ..selection import count_of
from ..statistics import curve_table, half_sampling
from .curves import curve_matrix, stage_claim, stages
from .methods import Method, first_token_variants

Entropy = tuple[str, bool]  # estimator, first_token
Curves = dict[Entropy, Float[np.ndarray, "sequence endpoint"]]

ENTROPY_NAMES: dict[Entropy, str] = {
    ("bucket", True): "bucket entropy",
    ("bucket", False): "bucket entropy without the first token",
    ("knn", True): "KNN entropy",
    ("knn", False): "KNN entropy without the first token",
}
LABELS = ("metric", "first_token")
FULL = "full"  # the attention pattern of the model itself
POSITIONS = ("input", "after attention")  # of a layer's endpoints; the last endpoint is the "output" of the last layer
PATTERN_LOOKS = [(GREY, "-"), (COLOURS["knn"], "-"), (COLOURS["bucket"], "--")]
VOCABULARY = 1000  # of the untrained models


# Curves


def bucket_and_knn(bins: int = 20, k: int = 25) -> dict[Entropy, Metric]:
    """The bucket and the KNN estimate, of all tokens and without the first one."""
    return first_token_variants({name: configured(name, bins=bins, k=k) for name in ("bucket", "knn")})


def ranking_metrics(bins: int = 20, k: int = 25) -> dict[Entropy, Metric]:
    """The same, and cosine."""
    return bucket_and_knn(bins, k) | {("cosine", True): METRICS["cosine"]}


def is_causal(model: PreTrainedModel, window: Int[Tensor, "1 token"]) -> bool:
    """Whether the state of the first token is the same when the last token is another."""
    changed = window.clone()
    changed[0, -1] ^= 1
    return torch.allclose(*(states(model, ids)[-1, :, 0] for ids in (window, changed)))


def measured_curves(model: PreTrainedModel, windows: Int[Tensor, "sequence token"], metrics: Mapping[Entropy, Metric]) -> Curves:
    """The entropy of the residual stream of every window at every endpoint."""
    table = cached_entropies(model, windows, metrics, labels=("estimator", "first_token"))
    return {(name, first): curve_matrix(table[(table.estimator == name) & (table.first_token == first)]) for name, first in metrics}


def sub_block_scores(scores: pd.DataFrame, metric: str, first_token: bool, *kinds: str) -> Float[np.ndarray, "sequence layer"]:
    """The scores of every window for all sub-blocks of these kinds, in order of depth."""
    rows = scores[(scores.metric == metric) & (scores.first_token == first_token) & scores.kind.isin(kinds)]
    return rows.pivot_table(index="sequence", columns=["layer", "kind"], values="value").to_numpy()


def summed_curves(scores: pd.DataFrame, curves: Curves) -> Curves:
    """The curves that follow from scores: the entropy of the embeddings, which ``curves`` hold, and the increases after it."""
    return {
        entropy: np.hstack([values[:, :1], sub_block_scores(scores, *entropy, "attention", "mlp")]).cumsum(1)
        for entropy, values in curves.items()
    }


def curve_rows(curves: Curves, family: str, weights: str = "trained", attention: str = FULL) -> pd.DataFrame:
    """Mean curves with their intervals over windows.

    Returns:
        family, weights (trained, random), attention, layer, position (input, after attention, output), estimator, first_token,
        entropy (nats), low, high.
    """
    tables = []
    for (estimator, first_token), values in curves.items():
        n_layers = values.shape[1] // 2
        places = [*itertools.product(range(n_layers), POSITIONS), (n_layers, "output")]
        table = pd.DataFrame(places, columns=["layer", "position"]).assign(estimator=estimator, first_token=first_token)
        tables.append(table.join(curve_table(values).rename(columns={"mean": "entropy"})))
    rows = pd.concat(tables, ignore_index=True).assign(family=family, weights=weights, attention=attention)
    names = ["family", "weights", "attention"]
    return rows[[*names, *rows.columns.drop(names)]]


def layers_passed(curves: pd.DataFrame) -> pd.Series:
    """The place of an endpoint in layers: half a layer is passed after its attention."""
    return curves.layer + (curves.position == "after attention") / 2


def above_input(curves: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Curves of which each starts at zero, the entropy of the first layer's input."""
    start = curves.groupby([*by, "estimator", "first_token"], sort=False).entropy.transform("first")
    return curves.assign(**{column: curves[column] - start for column in ("entropy", "low", "high")})


# Trained models: one is measured, the others are read


def trained_curves(profile: Profile, models: Iterable[str], measured: pd.DataFrame) -> pd.DataFrame:
    """Mean curves of trained models: those of ``measured``, and of every other model from its notebook 01, or else 06.

    Args:
        measured: as ``curve_rows`` returns it.
    Returns:
        the columns of ``measured``, file, depth (share of the model's depth).
    """
    tables = [measured.assign(file="measured here")]
    for model in not_measured(models, measured.family):
        table = profile.first_committed(model, "01_entropy_by_layer.csv", "06_curves.csv")
        if table is not None:
            table = table.assign(family=model, attention=FULL) if "family" not in table else table
            known = pd.MultiIndex.from_frame(table[["estimator", "first_token"]]).isin(list(ENTROPY_NAMES))
            tables.append(table[known & (table.family == model) & (table.weights == "trained") & (table.attention == FULL)])
    curves = pd.concat(tables, ignore_index=True)
    passed = layers_passed(curves)
    return curves.assign(depth=passed / passed.groupby(curves.family).transform("max"))


def trained_rankings(profile: Profile, models: Iterable[str], name: str, measured: pd.DataFrame) -> pd.DataFrame:
    """Importance and rank of every attention layer and MLP of trained models: of the model ``name`` as ``measured``, of every
    other model from its notebook 02, or else 06.

    Returns:
        family, file, kind, layer, metric, first_token, importance, rank (as a share, the smallest is dropped first), depth (share
        of the model's depth).
    """
    tables = [measured.assign(family=name, file="measured here")]
    for model in not_measured(models, [name]):
        table = profile.first_committed(model, "02_scores.csv", "06_scores.csv")
        if table is not None:
            tables.append(table.assign(family=model))
    rows = pd.concat(tables, ignore_index=True)
    known = pd.MultiIndex.from_frame(rows[["metric", "first_token"]]).isin(list(ranking_metrics()))
    rows = rows[known & rows.kind.isin(["attention", "mlp"])]
    groups = rows.groupby(["family", "kind", "metric", "first_token"])
    rank, n_layers = groups.importance.rank(pct=True), groups.layer.transform("size")
    columns = ["family", "file", "kind", "layer", "metric", "first_token", "importance"]
    return rows[columns].assign(rank=rank, depth=(rows.layer + 0.5) / n_layers)


def not_measured(models: Iterable[str], measured: Iterable[str]) -> list[str]:
    """The models that are not measured, each once."""
    return [model for model in dict.fromkeys(models) if model not in set(measured)]


def curve_claims(curves: Curves, amount: str, seed: int = 0) -> list[dict[str, object]]:
    """The claim that each entropy falls, then rises; the same statistic as in notebook 01. ``amount`` is that of the text."""
    pairs = ((name, stages(curves[entropy], seed)) for entropy, name in ENTROPY_NAMES.items())
    return [stage_claim(name, stage.fall, stage.verdict, amount) for name, stage in pairs]


def first_dropped_claims(scores: pd.DataFrame, amount: str, fraction: float = 0.25, seed: int = 0) -> list[dict[str, object]]:
    """The claim, for each estimator, that the attention layers with the least increase are deep: their mean depth exceeds 1/2.

    The layers are ranked again on every half of the windows.
    """
    rows = []
    for estimator in ("bucket", "knn"):
        values = sub_block_scores(scores, estimator, True, "attention")
        n_layers = values.shape[1]

        def depth(means: Float[np.ndarray, " layer"], n_layers=n_layers) -> float:
            return float((means.argsort()[: count_of(fraction, n_layers)].mean() + 0.5) / n_layers - 0.5)

        what = f"the {100 * fraction:.3g}% of attention layers with the least {ENTROPY_NAMES[estimator, True]} increase are deep"
        interval = half_sampling(depth, values, seed=seed)
        rows.append(claim_row(f"{what}; measured: mean depth less 1/2", "results", "", interval, 0, f"{CALIBRATION}: {amount}"))
    return rows


def shared_choices(rankings: pd.DataFrame, family: str, fraction: float = 0.25) -> str:
    """How many of the attention layers that bucket entropy drops first cosine drops too, as "2 of 8"."""
    rows = rankings[(rankings.family == family) & (rankings.kind == "attention") & rankings.first_token]
    n = count_of(fraction, rows.layer.nunique())
    bucket, cosine = (set(rows[rows.metric == metric].nsmallest(n, "importance").layer) for metric in ("bucket", "cosine"))
    return f"{len(bucket & cosine)} of {n}"


def ranking_summary(rankings: pd.DataFrame, fraction: float = 0.25) -> pd.DataFrame:
    """Where each ranking starts, and how it agrees with that by cosine.

    Returns:
        family, kind, method (the metric's label), depth (mean share of the depth of the fraction that is dropped first), tau
        (Kendall's, with the ranking by cosine).
    """
    labels = [
        Method(metric, first_token=first).label for metric, first in rankings[["metric", "first_token"]].itertuples(index=False)
    ]
    rankings = rankings.assign(method=labels)
    groups = rankings.groupby(["family", "kind", "method"], sort=False)[["importance", "depth"]]
    depth = groups.apply(lambda rows: rows.nsmallest(count_of(fraction, len(rows)), "importance").depth.mean())
    wide = rankings.pivot_table(index=["family", "kind", "layer"], columns="method", values="importance")
    tau = wide.groupby(["family", "kind"]).corr("kendall").cosine
    return depth.rename("depth").reset_index().merge(tau.rename("tau").reset_index(), on=["family", "kind", "method"])


# Untrained models


def untrained_models(n_layers: int = 12, dim: int = 128, seed: int = 0) -> dict[str, PreTrainedModel]:
    """Freshly initialised models of four families; their vocabulary has ``VOCABULARY`` tokens."""
    shape = {"hidden_size": dim, "num_hidden_layers": n_layers, "num_attention_heads": 4, "intermediate_size": 4 * dim}
    t5 = {"d_model": dim, "d_kv": dim // 4, "d_ff": 4 * dim, "num_layers": n_layers, "num_heads": 4}
    return {
        "GPT-2": _untrained("gpt2", seed, n_embd=dim, n_layer=n_layers, n_head=4),
        "GPT-NeoX (parallel)": _untrained("gpt_neox", seed, use_parallel_residual=True, **shape),
        "Mixtral (4 experts)": _untrained("mixtral", seed, num_key_value_heads=2, num_local_experts=4, **shape),
        "T5 encoder": _untrained("t5", seed, T5EncoderModel, **t5),
    }


def untrained_curves(
    models: Mapping[str, PreTrainedModel], windows: Int[Tensor, "sequence token"], metrics: Mapping[Entropy, Metric]
) -> dict[str, Curves]:
    """The curves of the untrained models; token ids are taken modulo ``VOCABULARY``."""
    return {family: measured_curves(model, windows % VOCABULARY, metrics) for family, model in models.items()}


def untrained_rows(untrained: Mapping[str, Curves]) -> pd.DataFrame:
    """``curve_rows`` of the untrained models: family -> its curves."""
    return pd.concat([curve_rows(curves, family, "random") for family, curves in untrained.items()])


def _untrained(
    family: str, seed: int, make: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config, **settings: object
) -> PreTrainedModel:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(AutoConfig.for_model(family, vocab_size=VOCABULARY, **special, **settings)).eval()


# Figures


def trained_figure(curves: pd.DataFrame, verdicts: Mapping[tuple[str, str], str]) -> Figure:
    """Bucket and KNN entropy (rows) of every family (columns) over the share of its depth, all tokens over those without the first.

    Args:
        curves: family, estimator, first_token, depth, entropy, low, high.
        verdicts: (family, estimator) -> the verdict on all tokens.
    """
    families = list(dict.fromkeys(curves.family))
    figure, axes = panels(2, len(families), height=1.7, sharex=True)
    for axis, (estimator, family) in zip(axes, itertools.product(("bucket", "knn"), families), strict=True):
        rows = curves[(curves.family == family) & (curves.estimator == estimator)].rename(columns={"entropy": "mean"})
        for first_token, colour, label in ((False, GREY, "without the first token"), (True, COLOURS[estimator], "all tokens")):
            line = rows[rows.first_token == first_token]
            band(axis, line.depth, line, label, colour)
        title = verdicts.get((family, estimator), "")
        axis.set_title(f"{family}\n{title}" if estimator == "bucket" else title, fontsize=9)
    for axis, name in zip(axes[:: len(families)], ("bucket", "KNN"), strict=True):
        axis.set_ylabel(f"{name} (nats)")
    figure.supxlabel("share of the depth", fontsize=9)
    return figure


def pattern_figure(curves: pd.DataFrame) -> Figure:
    """Bucket entropy of all tokens under every attention pattern; that of the model itself is grey."""
    figure, (axis,) = panels(1, 1, height=2.8)
    rows = curves[(curves.estimator == "bucket") & curves.first_token].rename(columns={"entropy": "mean"})
    for (attention, line), look in zip(rows.groupby("attention", sort=False), PATTERN_LOOKS, strict=True):
        band(axis, layers_passed(line), line, attention.replace(" and ", "\nand "), *look)
    axis.set(xlabel="layers passed", ylabel="bucket entropy (nats)")
    axis.set_xlim(0, layers_passed(rows).max())
    label_ends(axis, gap=0.12)
    return figure


def untrained_figure(curves: Mapping[str, Curves]) -> Figure:
    """The curves of every family (columns) and estimator (rows) above their input, of all tokens and without the first one."""
    figure, axes = panels(2, len(curves), height=1.7, sharex=True, sharey="row")
    for axis, (estimator, family) in zip(axes, itertools.product(("bucket", "knn"), curves), strict=True):
        for first_token, colour, dash, label in (
            (True, COLOURS["bucket"], "-", "all tokens"),
            (False, "#000000", "--", "no first token"),
        ):
            values = curves[family][estimator, first_token]
            table = curve_table(values - values[:, :1])
            band(axis, table.index / 2, table, label, colour, dash)
        axis.set(title=family if estimator == "bucket" else "", xlabel="layers passed" if estimator == "knn" else "")
    axes[0].set_ylabel("bucket (nats)")
    axes[len(curves)].set_ylabel("KNN (nats)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def family_barcodes(rankings: pd.DataFrame, fraction: float = 0.25) -> Figure:
    """Which attention layers and MLPs each ranking drops first, a fraction of them, as barcodes over the depth of each model."""
    shown = [Method("bucket"), Method("bucket", first_token=False), Method("knn"), Method("cosine")]
    rows = list(itertools.product(rankings.family.unique(), shown))
    heights = [i + i // len(shown) / 2 for i in range(len(rows))]
    figure, axes = panels(1, 2, height=0.7 + 0.22 * len(rows), sharey=True)
    for axis, kind in zip(axes, ("attention", "mlp"), strict=True):
        for height, (family, method) in zip(heights, rows, strict=True):
            part = rankings[(rankings.family == family) & (rankings.kind == kind)]
            part = part[(part.metric == method.metric) & (part.first_token == method.first_token)]
            first = part.nsmallest(count_of(fraction, len(part)), "importance").layer
            barcode(axis, first, len(part), height, COLOURS[method.metric])
        axis.set(title=kind.replace("mlp", "MLP"), xlabel="share of the depth", xlim=(0, 1))
        labels = [f"{family}:  {method.label}" if method == shown[0] else method.label for family, method in rows]
        axis.set_yticks(heights, labels)
        axis.grid(False)
    axes[0].invert_yaxis()
    return figure
