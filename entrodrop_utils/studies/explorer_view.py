"""The same view as the page, as a figure and a table, for a rendered notebook."""

import html
import textwrap
from collections.abc import Sequence

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .. import figures
from ..explorer import drawing
from ..explorer.choice import Choice
from ..residual import KINDS

DASHES = ("-", "--", ":", "-.")
LONGEST = 40  # letters of a word in a cell that stay together
SCORES = LinearSegmentedColormap.from_list("scores", (figures.COLOURS["renyi"], "white", figures.COLOURS["bucket"]))


def picture(choice: Choice, pins: Sequence[Choice], title: str) -> Figure:
    """The map, the entropy curve of the dense and the pruned model, and what was measured of the cost."""
    matplotlib.style.use(figures.STYLE)
    figure = Figure(figsize=(figures.WIDTH, 5.2))
    figures.title_sentence(figure, title)
    axes = figure.subplot_mosaic([["map", "map"], ["entropy", "cost"]], height_ratios=(2, 3))
    sub_block_map(axes["map"], choice)
    curves = drawing.curves_of(choice, pins)
    entropy_curves(axes["entropy"], curves)
    cost_curves(axes["cost"], curves, choice)
    return figure


def sub_block_map(axis: Axes, choice: Choice) -> None:
    """Every sub-block in the colour of its score; dropped ones hatched, protected layers marked."""
    data = drawing.map_of(choice.ranking)
    shades = np.array([[cell["shade"] for cell in data["rows"][kind]] for kind in KINDS])
    axis.imshow(shades, cmap=SCORES, vmin=-1.1, vmax=1.1, aspect="auto")
    for layer, kind in choice.dropped:
        box = {"fill": False, "hatch": "//////", "edgecolor": drawing.CHOSEN, "linewidth": 1.2}
        axis.add_patch(Rectangle((layer - 0.5, KINDS.index(kind) - 0.5), 1, 1, **box))
    protected = data["protected"]
    axis.plot(protected, [-0.72] * len(protected), "v", color=figures.GREY, markersize=5, clip_on=False)
    axis.set_yticks(range(3), [{"mlp": "MLP"}.get(kind, kind) for kind in KINDS])
    axis.set_xlabel("layer")
    axis.set_title(f"{data['title']}\nblue: above zero; pink: below; hatched: dropped; triangle: protected by the rule", pad=14)
    axis.set(xlim=(-0.5, data["layers"] - 0.5), ylim=(2.5, -0.5))
    axis.grid(False)


def entropy_curves(axis: Axes, curves: dict) -> None:
    """Entropy of the residual stream against the layers passed, dense and pruned."""
    depth = np.arange(len(curves["dense"])) / 2
    for values, name, look in (
        (curves["dense"], "dense", {"color": figures.GREY, "linestyle": "--"}),
        (curves["pruned"], "pruned", {"color": drawing.CHOSEN}),
    ):
        if values is not None:
            axis.plot(depth, values, label=name, **look)
    axis.set(title=f"{curves['entropy']} entropy of the stream", xlabel="layers passed", ylabel="nats")
    axis.autoscale_view()  # the labels go where the lines end
    figures.label_ends(axis)


def cost_curves(axis: Axes, curves: dict, choice: Choice) -> None:
    """Loss increase against the number dropped: measured counts only, and the range of random choices where they were measured."""
    for n, low, middle, high, _ in curves["random"]:
        axis.plot([n, n], [low, high], color="#cccccc", linewidth=4, solid_capstyle="butt")
        axis.plot([n - 0.4, n + 0.4], [middle, middle], color=figures.GREY)
    for i, line in enumerate(curves["lines"]):
        colour = figures.COLOURS.get(line.get("metric"), drawing.CHOSEN)
        points = np.array(line["points"], dtype=float).reshape(-1, 2)
        for run in np.split(points, np.flatnonzero(np.diff(points[:, 0]) > 1) + 1):
            axis.plot(*run.T, f"o{DASHES[i % 4]}", color=colour, markersize=3)
        axis.plot(*points[-1:].T, color=colour, label=line["name"].split(" (")[0])
        here = points[points[:, 0] == choice.n] if i == 0 else points[:0]
        axis.plot(*here.T, "s", color=colour, markersize=7, fillstyle="none")
    axis.set(title=f"cost on {curves['evaluation']}", xlabel="number dropped", ylabel="loss increase (nats)")
    axis.autoscale_view()  # the labels go where the lines end
    figures.label_ends(axis)


def numbers(choice: Choice, pins: Sequence[Choice]) -> pd.DataFrame:
    """What ``picture`` draws: panel, series, kind, at (a layer, the layers passed, or the number dropped) and value."""
    curves, settings = drawing.curves_of(choice, pins), choice.settings
    rows = [("score", settings.measure, s.kind, s.layer, value) for s, value in choice.ranking.importance.items()]
    for name in ("dense", "pruned"):
        rows += [("entropy", name, "", i / 2, value) for i, value in enumerate(curves[name] or ())]
    for line in curves["lines"]:
        rows += [("loss increase", line["name"], settings.kind, n, value) for n, value in line["points"]]
    for n, *values, _ in curves["random"]:
        names = ("random, least", "random, median", "random, greatest")
        rows += [("loss increase", name, settings.kind, n, value) for name, value in zip(names, values, strict=True)]
    return pd.DataFrame(rows, columns=["panel", "series", "kind", "at", "value"])


def markdown(choice: Choice, pins: Sequence[Choice] = ()) -> str:
    """The table of the page in Markdown: a column for the dense model, the selection and each pinned one."""
    rows, loaded, prompt = drawing.table_of(choice, pins), choice.ranking.loaded, choice.settings.prompt
    names = [_cell(row["name"].removeprefix("now: ")) + (f"<br>{row['set']}" if row["ranked"] else "") for row in rows]
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(rows)}"]
    for column, label in drawing.columns(loaded.n_tokens).items():
        if any(row["cells"][column] not in (None, "–") for row in rows):
            lines.append(f"| {label} | {' | '.join(_cell(row['cells'][column] or 'not measured') for row in rows)} |")
    told = [loaded.known("continuation", drop, prompt) for drop in ((), choice.dropped, *(pin.dropped for pin in pins))]
    if any(told):
        lines.append(f"| after “{_cell(prompt)}” | {' | '.join(_cell(text or '') for text in told)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text that breaks no table: a long word, which a pruned model may write, can be broken over lines."""
    words = ("<wbr>".join(html.escape(part) for part in textwrap.wrap(word, LONGEST)) for word in text.split())
    return " ".join(words).replace("|", "&#124;")
