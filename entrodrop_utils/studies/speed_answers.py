"""What notebook 08 shows of the committed measurements of speed: tables, figures and sentences."""

from collections.abc import Mapping, Sequence

import pandas as pd
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel

from ..claims import published_figures
from ..evaluation import losses_by_set
from ..figures import GREY, KIND_COLOURS, KIND_MARKERS, headed_panels, label_ends
from ..paths import RESULTS
from ..profile import slug
from ..residual import KINDS, SubBlock
from ..statistics import interval_text, paired_difference, verdict
from .methods import KIND_NAMES
from .speed import measured_setting

PHASES = {"decode": "decoding", "prefill": "reading the prompt"}
GOAL = 0.95  # of the ideal speed-up
SAVED = {"decode_speedup": "decoding, times as fast", "cache_saved": "KV cache saved (%)"}


def speeds_of(model: PreTrainedModel, name: str, device: str, batch: int, tokens: int) -> tuple[pd.DataFrame, str]:
    """The committed table of ``speed.bench``, or where it lacks the setting this one measured now; and which of the two it is."""
    committed = committed_speeds(name, device)
    if committed is not None and len(setting(committed, batch, tokens)):
        return committed, f"committed measurements: speed-{device}.csv"
    return measured_setting(model, batch, tokens, rounds=2), "measured in this run, in two rounds: make bench measures more"


def measured_models(device: str = "cpu") -> dict[str, pd.DataFrame]:
    """Every model with a committed table of speeds on such a device."""
    return {path.parent.name: pd.read_csv(path) for path in sorted(RESULTS.glob(f"*/speed-{device}.csv"))}


def committed_speeds(name: str, device: str = "cpu") -> pd.DataFrame | None:
    """The committed table of ``speed.bench`` of a model; None where there is none."""
    path = RESULTS / slug(name) / f"speed-{device}.csv"
    return pd.read_csv(path) if path.exists() else None


def longest_prompt(name: str, device: str = "cpu", batch: int = 1) -> pd.DataFrame | None:
    """The committed speeds of a model at its longest measured prompt; None where there are none."""
    table = committed_speeds(name, device)
    return None if table is None else _at_longest(table, batch)


def _at_longest(table: pd.DataFrame, batch: int) -> pd.DataFrame:
    return setting(table, batch, table[table.batch == batch].tokens.max())


def setting(table: pd.DataFrame, batch: int, tokens: int) -> pd.DataFrame:
    """The rows of one batch size and prompt length."""
    return table[(table.batch == batch) & (table.tokens == tokens)].reset_index(drop=True)


def ideal_table(table: pd.DataFrame) -> pd.DataFrame:
    """The share of the ideal speed-up that every variant reaches, lowest first, and whether it is at least ``GOAL``.

    Returns:
        phase, kind, n_dropped, batch, tokens, of_ideal, low, high, verdict.
    """
    rows = []
    for phase in PHASES:
        for row in table[table.kind != "dense"].to_dict("records"):
            shares = [row[f"{phase}_of_ideal{end}"] for end in ("", "_low", "_high")]
            rows.append((phase, row["kind"], row["n_dropped"], row["batch"], row["tokens"], *shares, verdict(*shares[1:], GOAL)))
    columns = ["phase", "kind", "n_dropped", "batch", "tokens", "of_ideal", "low", "high", "verdict"]
    return pd.DataFrame(rows, columns=columns).sort_values("of_ideal", ignore_index=True)


def speed_figure(rows: pd.DataFrame, title: str) -> Figure:
    """The speed-up of decoding and prefill against the number dropped, with intervals; dashed: the ideal of each kind."""
    figure, axes = headed_panels(title, 2, 2.9, sharey=True)
    for axis, (phase, name) in zip(axes, PHASES.items(), strict=True):
        for kind in KINDS:
            part = rows[rows.kind == kind]
            estimate, ends = part[f"{phase}_speedup"], (part[f"{phase}_speedup_low"], part[f"{phase}_speedup_high"])
            _points(axis, kind, part.n_dropped, estimate, *ends)
            ideal = estimate / part[f"{phase}_of_ideal"]
            axis.plot(part.n_dropped, ideal, "--", color=KIND_COLOURS[kind], linewidth=0.9, label="_ideal")
        axis.axhline(1, color=GREY, linewidth=0.8)
        axis.set(title=name, xlabel="dropped of each kind", xticks=sorted(set(rows.n_dropped) - {0}))
        axis.margins(x=0.05)
    axes[0].set_ylabel("times as fast as the dense model")
    label_ends(axes[1])
    return figure


def price_table(
    model: PreTrainedModel, held_out: Int[Tensor, "window token"], orders: Mapping[str, Sequence[SubBlock]], rows: pd.DataFrame
) -> pd.DataFrame:
    """The loss increase of the sets whose speed was measured: the first so many sub-blocks of each order.

    Args:
        orders: kind -> its sub-blocks, first dropped first.
        rows: one setting of the table of speeds.
    Returns:
        kind, n_dropped, increase (nats per token), low, high, decode_speedup, prefill_speedup, cache_saved, weights_saved.
    """
    dense = rows[rows.kind == "dense"].iloc[0]
    shown = rows[rows.kind.isin(orders)].reset_index(drop=True)
    sets = [tuple(sorted(orders[row.kind][: row.n_dropped])) for row in shown.itertuples()]
    losses = losses_by_set(model, held_out, [(), *sets])
    by_set = {name: group.sort_values("window").nll.to_numpy() for name, group in losses.groupby("set")}
    increases = pd.DataFrame([paired_difference(by_set[name], by_set[()]) for name in sets], columns=["increase", "low", "high"])
    prices = pd.concat([shown[["kind", "n_dropped"]], increases, shown[["decode_speedup", "prefill_speedup"]]], axis=1)
    return prices.assign(
        cache_saved=1 - shown.cache_bytes / dense.cache_bytes, weights_saved=1 - shown.weight_bytes / dense.weight_bytes
    )


def price_figure(prices: pd.DataFrame, title: str) -> Figure:
    """The loss increase against the speed-up of decoding and against the share of the KV cache saved, a line per kind."""
    figure, axes = headed_panels(title, 2, 2.9, sharey=True)
    for axis, (column, name) in zip(axes, SAVED.items(), strict=True):
        for kind in KINDS:
            if column == "cache_saved" and kind == "mlp":
                continue  # an MLP has no cache
            part = prices[prices.kind == kind]
            x = 100 * part[column] if column == "cache_saved" else part[column]
            _points(axis, kind, x, part.increase, part.low, part.high)
        axis.set(xlabel=name)
    axes[0].set_ylabel("loss increase (nats per token)")
    axes[0].legend(fontsize=8, loc="upper right")
    return figure


def _points(axis: Axes, kind: str, x: pd.Series, y: pd.Series, low: pd.Series, high: pd.Series) -> None:
    """The line of a kind with intervals at its points."""
    colour = KIND_COLOURS[kind]
    axis.plot(x, y, color=colour, marker=KIND_MARKERS[kind], markersize=4, label=KIND_NAMES[kind])
    axis.errorbar(x, y, (y - low, high - y), color=colour, fmt="none", elinewidth=1.2)


def price_title(prices: pd.DataFrame) -> str:
    """Which kind costs least per measured speed: the loss increase of each kind at the smallest speed-up that all kinds reach."""
    reached = min(rows.decode_speedup.max() for _, rows in prices.groupby("kind"))
    cheapest = {kind: rows[rows.decode_speedup >= reached].increase.min() for kind, rows in prices.groupby("kind", sort=False)}
    ranked = sorted(cheapest, key=cheapest.get)
    costs = ", ".join(f"{KIND_NAMES[kind]} {cheapest[kind]:.1f}" for kind in ranked)
    return f"Loss increase for decoding {reached:.2f} times as fast (nats): {costs}"


def memory_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Weights and KV cache of every variant of one setting, in MB (millions of bytes) and as shares of the dense model's."""
    dense = rows[rows.kind == "dense"].iloc[0]
    names = ["dense" if row.kind == "dense" else f"{row.n_dropped} {KIND_NAMES[row.kind]} less" for row in rows.itertuples()]
    return pd.DataFrame(
        {
            "variant": names,
            "weights (MB)": (rows.weight_bytes / 1e6).round().astype(int),
            "of dense": [f"{100 * value:.3g}%" for value in rows.weight_bytes / dense.weight_bytes],
            "KV cache (MB)": rows.cache_bytes / 1e6,
            "of dense KV": [f"{100 * value:.3g}%" for value in rows.cache_bytes / dense.cache_bytes],
        }
    ).set_index("variant")


def settings_table(table: pd.DataFrame, n_dropped: int, kind: str = "attention") -> pd.DataFrame:
    """The speed-up of one variant at every batch size and prompt length, and its share of the ideal."""
    rows = table[(table.kind == kind) & (table.n_dropped == n_dropped)]
    shown = {"batch": rows.batch, "prompt tokens": rows.tokens}
    for phase in PHASES:
        for name, column in (("speed-up", "speedup"), ("of ideal", "of_ideal")):
            columns = [f"{phase}_{column}{end}" for end in ("", "_low", "_high")]
            shown[f"{phase} {name}"] = interval_text(rows, columns)
    return pd.DataFrame(shown).set_index(["batch", "prompt tokens"])


def served_table(model: str) -> pd.DataFrame:
    """The exported files of a model in llama.cpp, where their speed was measured: reported KV cache, and speed-ups.

    Other models have no such table: it is empty.
    """
    path = RESULTS / slug(model) / "export.csv"
    rows = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["drop", "type", "kv_bytes", "generation_speedup"])
    rows = rows[rows.generation_speedup.notna()]
    shown = {"dropped": rows["drop"], "weights": rows.type, "KV cache (MB)": rows.kv_bytes / 1e6}
    for name, column in {"reading, times as fast": "prompt_speedup", "writing, times as fast": "generation_speedup"}.items():
        shown[name] = interval_text(rows, [f"{column}{end}" for end in ("", "_low", "_high")]) if len(rows) else []
    return pd.DataFrame(shown).set_index("dropped")


def published_speed() -> pd.DataFrame:
    """What others report: model, method, dropped, and the speed-up in per cent."""
    rows = published_figures("others")
    rows = rows[rows.metric.str.contains("speed")]
    rows = rows.assign(dropped=[f"{row.n_dropped} of {row.n_total:.0f} {row.unit}" for row in rows.itertuples()])
    return rows.set_index("model")[["method", "dropped", "value", "note"]].rename(columns={"value": "speed-up (%)"})


def bench_table(table: pd.DataFrame, what: str, against: str = "", where: str = "") -> pd.DataFrame:
    """The ratios of ``make bench`` whose name, reference and setting contain these patterns, with intervals and devices."""
    part = table[table.reference.notna()]
    for column, pattern in (("what", what), ("reference", against), ("setting", where)):
        part = part[part[column].str.contains(pattern)]
    return pd.DataFrame(
        {
            "setting": part.setting,
            "against": part.reference,
            "ms": [f"{float(f'{ms:.3g}'):g}" for ms in part.ms],
            "times as fast": interval_text(part, ["ratio", "low", "high"], ".3g"),
            "measured on": part.device.map(_name),
        }
    ).set_index(part.what)


def _name(device: str) -> str:
    """A device without its number of threads, which differs between the rows of a table, or its memory."""
    return device.rpartition(", ")[0] or device


def committed_bench(device: str = "cpu") -> pd.DataFrame:
    """The committed table of ``make bench``.

    Raises:
        FileNotFoundError: there is none.
    """
    path = RESULTS / f"bench-{device}.csv"
    if not path.exists():
        raise FileNotFoundError(f"nothing is measured on {device}: run make bench DEVICE={device} first")
    return pd.read_csv(path)


def growth_lines(table: pd.DataFrame) -> list[str]:
    """How the time and memory of estimators and scores grow, under each device; the slope is 1 where time is proportional."""
    lines = []
    for device, rows in table.groupby("device", sort=False):
        slopes, memory = (rows[rows.setting.str.startswith(word)] for word in ("slope", "memory"))
        texts = interval_text(slopes, ["ratio", "low", "high"])
        of_device = [f"{row.what}, {row.setting}: {text}" for row, text in zip(slopes.itertuples(), texts, strict=True)]
        of_device += [f"{row.what}, {row.setting}: {row.reference_mib:.0f} and {row.mib:.0f}" for row in memory.itertuples()]
        lines += [f"On {_name(device)}:", *of_device] if of_device else []
    return lines


def models_table(device: str = "cpu", batch: int = 1) -> pd.DataFrame:
    """Decoding without half of each kind, at the longest prompt that was measured, for every model with a committed table."""
    rows = []
    for model, table in measured_models(device).items():
        longest = _at_longest(table, batch)
        before = 1 / longest[longest.kind == "dense"].decode_seconds.item()
        for kind in KINDS:
            row = longest[longest.kind == kind].iloc[-1]
            speedup = (row[f"decode_speedup{end}"] for end in ("", "_low", "_high"))
            rows.append((model, f"{row.n_dropped} {KIND_NAMES[kind]}", row.tokens, before, 1 / row.decode_seconds, *speedup))
    columns = ["model", "less", "prompt tokens", "dense tokens/s", "tokens/s", "estimate", "low", "high"]
    shown = pd.DataFrame(rows, columns=columns)
    shown["times as fast"] = interval_text(shown, ["estimate", "low", "high"])
    return shown.drop(columns=["estimate", "low", "high"]).round(1).set_index(["model", "less"])


def speed_title(rows: pd.DataFrame) -> str:
    """The speed-up of decoding without most blocks and most attention layers, as a sentence."""
    blocks, attention = (rows[rows.kind == kind].iloc[-1] for kind in ("block", "attention"))
    shares = f"without {blocks.n_dropped} blocks {blocks.decode_speedup:.2f}"
    return f"Decoding {shares}, without {attention.n_dropped} attention layers {attention.decode_speedup:.2f} times as fast"


def speed_sentences(rows: pd.DataFrame, prices: pd.DataFrame, measured: pd.DataFrame) -> list[str]:
    """What the run says beside its finding."""
    reached = {phase: measured[measured.kind != "dense"][f"{phase}_of_ideal"] for phase in PHASES}
    ideal = " and ".join(f"{values.median():.0%} ({PHASES[phase]})" for phase, values in reached.items())
    largest = prices.loc[prices.decode_speedup.idxmax()]
    return [
        f"Median share of the ideal speed-up over all settings: {ideal}.",
        f"{price_title(prices)}.",
        f"Fastest: {largest.n_dropped} {KIND_NAMES[largest.kind]} less, {largest.decode_speedup:.2f} times as fast, for "
        f"{largest.increase:.1f} nats [{largest.low:.1f}, {largest.high:.1f}] without repair.",
        f"Measured on {rows.device.iloc[0]}, {rows.dtype.iloc[0]}, {rows.rounds.iloc[0]} rounds.",
    ]
