"""Facts about a model before anything is dropped: bits per byte, cost of each sub-block, and massive activations."""

import itertools
import json
import lzma
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
import transformers
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..claims import published_figures
from ..dropping import dropped
from ..evaluation import losses_by_set, perplexity
from ..figures import KIND_COLOURS, KIND_MARKERS, panels
from ..models import KNOWN
from ..models.sources import MANIFEST, folder
from ..paths import RESULTS
from ..profile import DEFAULT_SIZE, Profile, slug
from ..progress import progress
from ..residual import KINDS, capture, find
from ..statistics import interval_table
from ..text import text_digest, windows
from ..text.harvest import package_files

XZ, XZ_PRIMED = "xz", "xz, after similar text"
SOURCE_CODE = "source code"
FILES_PER_PASSAGE = 20  # source files that are looked at; many are too short for a passage
LOSS, DISTANCE = "loss increase (nats)", "embedding distance (1 - cosine)"
KIND_NAMES = {"attention": "attention", "mlp": "MLP", "block": "block"}
LINES = (("#0072B2", "o-"), ("#D55E00", "s--"), ("#000000", "D:"), ("#009E73", "v-."))


def registered_models() -> pd.DataFrame:
    """The models with a short name: model (index), what it is, licence, source, MB, sha256 (its beginning), results.

    ``results`` lists the notebooks with committed tables at the default size.
    """
    rows = []
    for name, known in KNOWN.items():
        digest = known.get("sha256") or next(iter(known.get("wheels", {}).values()), "")
        numbers = {file.name.split("_")[0] for file in (RESULTS / name / DEFAULT_SIZE).glob("*_*.csv")}
        origin = (known["about"], known["licence"], known["source"], known["megabytes"])
        rows.append((name, *origin, digest[:12], " ".join(sorted(numbers))))
    columns = ["model", "what it is", "licence", "source", "MB", "sha256", "results"]
    return pd.DataFrame(rows, columns=columns).set_index("model")


def weight_files(model: str) -> pd.DataFrame:
    """The files of weights that were made from a download: file, MB, sha256; empty for a model that is used as it was published."""
    manifest = folder(model) / MANIFEST
    files = json.loads(manifest.read_text())["files"] if manifest.exists() else {}
    rows = [(file, size / 1e6, digest) for file, (size, digest) in files.items() if file.endswith(".safetensors")]
    return pd.DataFrame(rows, columns=["file", "MB", "sha256"])


def with_committed(profile: Profile, table: pd.DataFrame, name: str) -> pd.DataFrame:
    """A table of this run and, below it, the committed tables of the other models at the default size, with a column ``model``."""
    own = slug(profile.model)
    others = sorted({path.parts[-3] for path in RESULTS.glob(f"*/{DEFAULT_SIZE}/{name}")} - {own})
    committed = [profile.committed(name, DEFAULT_SIZE, other).assign(model=other) for other in others]
    return pd.concat([table.assign(model=own), *committed], ignore_index=True)


def reading_passages(text: str, n_passages: int, n_bytes: int, n_prior: int, seed: int = 0) -> pd.DataFrame:
    """Passages of equal length in bytes, which are the same for every tokenizer: text, prior, passage.

    There are three texts: the held-out part of ``text``, source code of the installed packages without its docstrings, and the
    held-out passages with their words in random order. ``prior`` marks other passages of the same kind, which a compressor reads
    before; for ``text`` these are ``n_prior`` passages of its calibration part.
    """
    rng = np.random.default_rng(seed)
    files = rng.permutation([file for _, file in package_files()])[: FILES_PER_PASSAGE * n_passages]
    code = [source for file in files if len(source := _without_docstrings(file)) > 2 * n_bytes]
    code = [source[len(source) // 2 :][:n_bytes] for source in code]
    held_out = _byte_windows(text, "evaluation", n_passages, n_bytes, seed)
    prior = _byte_windows(text, "calibration", n_prior, n_bytes, seed)
    shuffled = [" ".join(rng.permutation(passage.split())) for passage in held_out]
    rows = [(text, False, passage) for passage in held_out] + [(text, True, passage) for passage in prior]
    rows += [(SOURCE_CODE, i >= n_passages, passage) for i, passage in enumerate(code)]
    name = f"{text}, words shuffled"
    rows += [(name, False, passage) for passage in shuffled] + [(name, True, passage) for passage in prior]
    return pd.DataFrame(rows, columns=["text", "prior", "passage"])


def _without_docstrings(path: Path) -> str:
    return re.sub(r'("""|\'\'\').*?\1', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def _byte_windows(text: str, part: str, n_passages: int, n_bytes: int, seed: int) -> list[str]:
    """Windows of a text whose tokens are bytes."""
    ids = windows(text, part, lambda passage: SimpleNamespace(input_ids=list(passage.encode())), n_passages, n_bytes, seed)
    return [bytes(row.tolist()).decode(errors="ignore") for row in ids]


def passage_table(passages: pd.DataFrame) -> pd.DataFrame:
    """The texts of ``reading_passages``: text (index), passages, beginning of the first one, KB of prior passages."""
    measured = passages[~passages.prior].groupby("text", sort=False).passage
    prior_bytes = passages[passages.prior].passage.str.len().groupby(passages.text).sum()
    table = pd.DataFrame({"passages": measured.size(), "beginning of the first": measured.first().str[:50].map(repr)})
    return table.assign(**{"prior KB": (prior_bytes / 1024).round()})


def reading_table(passages: pd.DataFrame, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Bits per byte of every text by the model, by xz, and by xz after it has read the prior passages.

    Returns:
        text, predictor, bits_per_byte, low, high, hash (of the bytes). A model without a language-modelling head has no rows.
    """
    measured, prior = (passages[passages.prior == part] for part in (False, True))
    tables = []
    if model.can_generate():
        values = [_bits_per_byte(passage, model, tokenizer) for passage in progress(measured.passage, "bits per byte")]
        per_passage = measured.assign(value=values, sequence=measured.groupby("text").cumcount())
        intervals = interval_table(per_passage, ["text"]).rename(columns={"mean": "bits_per_byte"})
        tables.append(intervals.assign(predictor=name))
    for text, rows in measured.groupby("text", sort=False):
        bits = [_xz_bits_per_byte(rows.passage, before) for before in ((), prior[prior.text == text].passage)]
        tables.append(pd.DataFrame({"text": text, "predictor": [XZ, XZ_PRIMED], "bits_per_byte": bits}))
    digests = measured.groupby("text").passage.agg(lambda part: text_digest(torch.tensor(list("".join(part).encode()))))
    table = pd.concat(tables, ignore_index=True).reindex(columns=["text", "predictor", "bits_per_byte", "low", "high"])
    return table.assign(hash=table.text.map(digests))


def _bits_per_byte(passage: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Bits per byte of a passage; its first token is not predicted, so neither it nor its bytes count."""
    ids = tokenizer(passage, return_tensors="pt").input_ids
    nats = perplexity(model, ids).mean * (ids.shape[1] - 1)
    first = tokenizer.decode(ids[0, :1], skip_special_tokens=True)
    return nats / np.log(2) / (len(passage.encode()) - len(first.encode()))


def _xz_bits_per_byte(passages: Iterable[str], prior: Iterable[str]) -> float:
    """Bits per byte that xz needs for some passages, beyond those it needs for the prior ones."""
    first, both = ("\n\n".join(part).encode() for part in (prior, [*prior, *passages]))
    return 8 * (len(lzma.compress(both, preset=9)) - len(lzma.compress(first, preset=9))) / (len(both) - len(first))


def same_bytes(profile: Profile, bits: pd.DataFrame, name: str) -> pd.DataFrame:
    """Bits per byte of every model that was measured on the same bytes: one row per predictor, one column per text."""
    table = with_committed(profile, bits, name)
    table = table[table.hash.isin(bits.hash)].drop_duplicates(["text", "predictor"])
    return table.pivot_table(index="predictor", columns="text", values="bits_per_byte", sort=False)


def samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    n_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> pd.DataFrame:
    """One sampled continuation of each prompt: prompt (index), continuation. A model without a language-modelling head has none."""
    transformers.set_seed(seed)
    settings = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "max_new_tokens": n_tokens}
    rows = []
    for prompt in prompts if model.can_generate() else ():
        ids = tokenizer(prompt, return_tensors="pt").to(model.device)
        output = model.generate(**ids, **settings, pad_token_id=tokenizer.eos_token_id)
        rows.append((prompt, repr(tokenizer.decode(output[0, ids.input_ids.shape[1] :], skip_special_tokens=True))))
    return pd.DataFrame(rows, columns=["prompt", "continuation"]).set_index("prompt")


def card_table(profile: Profile, size: str) -> pd.DataFrame:
    """The accuracies on the model's card beside those of the dense model that notebook 04 measured at one size.

    A task of the card that is a mean of tasks (``arc_easy+arc_challenge``) is compared with the mean of the same tasks.

    Returns:
        task (index), card, shots, protocol, measured, stderr, difference, task_metric, chance, n. The columns from ``measured`` on
        are empty where the size has no accuracy of the task.
    """
    card = published_figures("model_cards")
    card = card[card.model == slug(profile.model)].set_index("task").rename(columns={"value": "card"})
    rows = [_measured_accuracy(task, _dense_accuracies(profile, size)) for task in card.index]
    columns = ["measured", "stderr", "task_metric", "chance", "n"]
    table = card.join(pd.DataFrame(rows, columns=columns, index=card.index))
    table = table.assign(difference=table.measured - table.card, n=table.n.astype("Int64"))
    return table[["card", "shots", "protocol", "measured", "stderr", "difference", "task_metric", "chance", "n"]]


def card_sentence(table: pd.DataFrame) -> str:
    """How many accuracies in the table of ``card_table`` agree with the card."""
    n_compared = int(table.difference.notna().sum())
    if not n_compared:
        return "No accuracy of the model card was measured."
    n_close = int((table.difference.abs() <= 2 * table.stderr).sum())
    return f"{n_close} of the {n_compared} accuracies that were measured are within two standard errors of the model card."


def _dense_accuracies(profile: Profile, size: str) -> pd.DataFrame:
    """The accuracy of the dense model on every task, normalised by length where the task has that: a row per task (index)."""
    table = profile.committed("04_accuracy.csv", size)
    if table is None:
        return pd.DataFrame(columns=["value", "stderr", "task_metric", "chance", "n"])
    rows = table[(table.metric == "dense") & table.task_metric.isin(["acc", "acc_norm"])]
    return rows.sort_values("task_metric").drop_duplicates("task", keep="last").set_index("task")


def _measured_accuracy(task: str, accuracies: pd.DataFrame) -> tuple:
    """Mean accuracy over the parts of a task, its standard error, metric, chance and number of items."""
    parts = task.split("+")
    if not set(parts) <= set(accuracies.index):
        return (np.nan, np.nan, "", np.nan, pd.NA)
    rows = accuracies.loc[parts]
    stderr = np.sqrt((rows.stderr.astype(float) ** 2).sum()) / len(parts)
    return (rows.value.mean(), stderr, "/".join(rows.task_metric.unique()), rows.chance.mean(), rows.n.sum())


def single_drop_costs(model: PreTrainedModel, held_out: Int[Tensor, "window token"]) -> pd.DataFrame:
    """The cost of dropping each sub-block alone: kind, layer, sequence, value.

    The cost is the loss increase in nats per token; for a model without a language-modelling head it is the distance (1 - cosine)
    by which the sentence embedding, the mean of the last states, moves.
    """
    singles = [sub_block for kind in KINDS for sub_block in find(model, kind)]
    if model.can_generate():
        losses = losses_by_set(model, held_out, [(), *((sub_block,) for sub_block in singles)])
        by_set = {drop_set: rows.sort_values("window").nll.to_numpy() for drop_set, rows in losses.groupby("set")}
        costs = [by_set[sub_block,] - by_set[()] for sub_block in singles]
    else:
        whole, costs = _embeddings(model, held_out), []
        for sub_block in progress(singles, "dropping each sub-block"):
            with dropped(model, [sub_block]):
                costs.append((1 - (_embeddings(model, held_out) * whole).sum(-1)).double().cpu().numpy())
    rows = [(s.kind, s.layer, i, value) for s, values in zip(singles, costs, strict=True) for i, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["kind", "layer", "sequence", "value"])


@torch.inference_mode()
def _embeddings(model: PreTrainedModel, held_out: Int[Tensor, "window token"]) -> Float[Tensor, "window dim"]:
    """The mean of the last states of each window, of length one."""
    return torch.nn.functional.normalize(model.base_model(held_out.to(model.device)).last_hidden_state.mean(1), dim=-1)


def depth_table(costs: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The mean cost of every sub-block: kind, layer, measure, cost, stderr, low, high."""
    table = interval_table(costs, ["kind", "layer"]).rename(columns={"mean": "cost"})
    stderr = costs.groupby(["kind", "layer"]).value.sem().rename("stderr").reset_index()
    table = table.merge(stderr, on=["kind", "layer"]).assign(measure=measure)
    return table[["kind", "layer", "measure", "cost", "stderr", "low", "high"]]


def largest_activations(
    model: PreTrainedModel, calibration: Int[Tensor, "window token"], massive_value: float = 100.0, massive_ratio: float = 1000.0
) -> pd.DataFrame:
    """The largest activation in the output of every layer, in every window.

    Returns:
        layer, window, token, dimension, value, median (of the absolute activations), n_massive: how many exceed ``massive_value``
        and ``massive_ratio`` times the median (arXiv 2402.17762).
    """
    rows = []
    for window, ids in enumerate(progress(calibration, "largest activations")):

        def record(endpoint: int, state: Tensor, window=window) -> None:
            if endpoint and endpoint % 2 == 0:  # the output of a layer
                x = state[0].float()
                size, (token, dimension) = x.abs(), divmod(int(x.abs().argmax()), x.shape[-1])
                median = float(size.median())
                n_massive = int(((size > massive_value) & (size > massive_ratio * median)).sum())
                rows.append((endpoint // 2 - 1, window, token, dimension, float(x[token, dimension]), median, n_massive))

        with capture(model, record), torch.inference_mode():
            model.base_model(ids[None].to(model.device))
    return pd.DataFrame(rows, columns=["layer", "window", "token", "dimension", "value", "median", "n_massive"])


def massive_table(
    activations: pd.DataFrame, calibration: Int[Tensor, "window token"], tokenizer: PreTrainedTokenizerBase
) -> pd.DataFrame:
    """The largest activation of every layer's output over all windows.

    Returns:
        layer, token, text (of the token), dimension, value, median, ratio, massive_per_window, on_first_token: the share of the
        windows whose largest activation is on the first token.
    """
    by_layer = activations.groupby("layer")
    table = activations.loc[activations.value.abs().groupby(activations.layer).idxmax()].set_index("layer")
    table["text"] = [repr(tokenizer.decode(calibration[w, t])) for w, t in zip(table.window, table.token, strict=True)]
    table["ratio"] = table.value.abs() / table["median"]
    table["massive_per_window"] = by_layer.n_massive.mean()
    table["on_first_token"] = by_layer.token.agg(lambda token: (token == 0).mean())
    columns = ["token", "text", "dimension", "value", "median", "ratio", "massive_per_window", "on_first_token"]
    return table[columns].reset_index()


def massive_layers(activations: pd.DataFrame) -> list[int]:
    """The layers whose output holds a massive activation in every window, in order."""
    everywhere = (activations.n_massive > 0).groupby(activations.layer).all()
    return [int(layer) for layer in everywhere.index[everywhere]]


def cost_ranks(depth: pd.DataFrame, layer: int) -> pd.DataFrame:
    """The cost of one layer's sub-blocks, and their rank among those of their kind: kind (index), layer, cost, low, high, rank."""
    ranked = depth.assign(rank=depth.groupby("kind").cost.rank(ascending=False, method="min").astype(int))
    return ranked[ranked.layer == layer].set_index("kind")[["layer", "cost", "low", "high", "rank"]]


def depth_figure(depth: pd.DataFrame) -> Figure:
    """The cost of dropping each sub-block alone, one panel per model; ``depth`` has a column ``model``."""
    groups = list(depth.groupby("model", sort=False))
    figure, axes = panels(len(groups), 1, height=1.9)
    for axis, (name, table) in zip(axes, groups, strict=True):
        for kind, shift in zip(KIND_NAMES, (-0.2, 0, 0.2), strict=True):
            rows = table[table.kind == kind]
            bars = [(rows.cost - rows.low).clip(0), (rows.high - rows.cost).clip(0)]
            style = {"fmt": KIND_MARKERS[kind], "color": KIND_COLOURS[kind], "label": KIND_NAMES[kind], "elinewidth": 0.8}
            axis.errorbar(rows.layer + shift, rows.cost, bars, **style)
        axis.set_yscale("symlog", linthresh=0.1, subs=(3,))
        axis.set(title=name, ylabel=table.measure.iloc[0].replace(" (", "\n("))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.locator_params(axis="x", integer=True)
    axes[-1].set_xlabel("layer of the dropped sub-block")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def massive_figure(massive: pd.DataFrame, massive_ratio: float = 1000.0) -> Figure:
    """Largest activation and attention on the first token against the depth; ``massive`` has columns ``model`` and
    ``attention_on_first``.
    """
    figure, (left, right) = panels(1, 2)
    for (name, rows), (colour, line) in zip(massive.groupby("model", sort=False), itertools.cycle(LINES), strict=False):
        passed = (rows.layer + 1) / len(rows)
        left.plot(passed, rows.ratio, line, color=colour, label=name)
        right.plot(passed, rows.attention_on_first, line, color=colour)
    left.axhline(massive_ratio, color="#777777", linewidth=0.8)
    left.set(yscale="log", title="largest activation / median", xlabel="fraction of the layers passed")
    right.set(ylim=(0, 1), title="attention on the first token", xlabel="fraction of the layers passed")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def summary_table(depth: pd.DataFrame, massive: pd.DataFrame) -> pd.DataFrame:
    """One column per model: the median cost of each kind, the costliest sub-block, the largest activation, the attention sink."""
    columns = {}
    for name, rows in depth.groupby("model", sort=False):
        activations = massive[massive.model == name]
        worst, largest = rows.loc[rows.cost.idxmax()], activations.loc[activations.ratio.idxmax()]
        median = rows.groupby("kind").cost.median()
        column = {"cost is measured as": worst.measure} | {
            f"median cost, {KIND_NAMES[kind]}": f"{median[kind]:.3f}" for kind in KINDS
        }
        column["costliest sub-block"] = f"{sub_block_name(worst)}: {worst.cost:.3g}"
        column["largest activation"] = f"{abs(largest.value):,.0f}, {largest.ratio:,.0f} times the median"
        column["its layer and token"] = f"layer {largest.layer}, token {largest.token}"
        column["attention on the first token"] = f"{activations.attention_on_first.mean():.0%}"
        columns[name] = column
    return pd.DataFrame(columns)


def sub_block_name(row: pd.Series) -> str:
    """A sub-block in a sentence: MLP 0, attention 3."""
    return f"{KIND_NAMES[row.kind]} {row.layer}"


def model_finding(name: str, text: str, bits: pd.DataFrame, depth: pd.DataFrame) -> str:
    """The finding as a sentence: bits per byte of held-out text, or for an encoder its costliest sub-block."""
    predictors = bits[bits.text == text].set_index("predictor")
    if name not in predictors.index:
        worst = depth.loc[depth.cost.idxmax()]
        moved = f"{worst.cost:.2f} [{worst.low:.2f}, {worst.high:.2f}]"
        return (
            f"{name} has no language-modelling head; its sentence embedding moves most ({moved}) without {sub_block_name(worst)}."
        )
    own, xz = predictors.loc[name], predictors.bits_per_byte[XZ_PRIMED]
    measured = f"{own.bits_per_byte:.2f} bits per byte [{own.low:.2f}, {own.high:.2f}]"
    return f"{name} predicts held-out {text} at {measured}; the compressor xz needs {xz:.2f} after similar text."
