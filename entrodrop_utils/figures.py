"""One look for every figure and table, and one way to write a figure: PNG, SVG and the same picture, captioned, in the notebook."""

import io
import string
import textwrap
from collections.abc import Iterable
from pathlib import Path

import matplotlib.style
import numpy as np
import pandas as pd
from IPython.display import Image, Markdown, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.ticker import LogLocator, NullFormatter

from .profile import Profile

# Okabe and Ito's colour-blind-safe palette; every series also has its own dash or marker, so it survives black-and-white print.
COLOURS = {
    "bucket": "#0072B2",
    "knn": "#D55E00",
    "renyi": "#CC79A7",
    "gaussian": "#009E73",
    "matrix_renyi": "#E69F00",
    "cosine": "#000000",
    "norm_ratio": "#56B4E9",
    "angular": "#777777",
    "random": "#AAAAAA",
    "deepest first": "#8C6D1F",
}
MARKERS = dict(zip(COLOURS, "os^Dv*PX.d", strict=True))
KIND_COLOURS = {"attention": "#0072B2", "mlp": "#D55E00", "block": "#009E73", "mixed": "#000000"}
KIND_MARKERS = dict(zip(KIND_COLOURS, "osD^", strict=True))
STYLE = Path(__file__).with_name("entrodrop.mplstyle")
WIDTH = 7.0  # inches: two columns of a paper
HEADLINE = 88  # characters in a line of a figure's headline, at most
GREY = "#8a8a8a"  # of what is shown for context
MAX_ROWS = 12  # of a table in a notebook; its CSV has all of them


def panels(rows: int, columns: int, height: float = 2.4, empty: int = 0, **kwargs) -> tuple[Figure, list[Axes]]:
    """A figure of lettered panels, flat in reading order; the last ``empty`` ones are left blank, for a legend."""
    matplotlib.style.use(STYLE)
    figure = Figure(figsize=(WIDTH, height * rows))  # not pyplot's: those are shown at the end of the cell, without caption
    flat = list(figure.subplots(rows, columns, squeeze=False, **kwargs).flat)
    for axis in flat[len(flat) - empty :]:
        axis.axis("off")
    if len(flat) > 1:
        for letter, axis in zip(string.ascii_lowercase, flat[: len(flat) - empty], strict=False):
            axis.text(-0.02, 1.04, f"({letter})", transform=axis.transAxes, ha="right", va="bottom", fontsize=9, fontweight="bold")
    return figure, flat


def title_sentence(figure: Figure, sentence: str) -> None:
    """What the figure shows, as a sentence above it, in lines that the figure is wide enough for."""
    look, room = FontProperties(weight="bold", size=10), 0.986 * 72 * figure.get_figwidth()  # points
    for length in range(HEADLINE, 0, -1):
        lines = textwrap.wrap(sentence, length)
        if all(TextPath((0, 0), line, prop=look).get_extents().width <= room for line in lines):
            break
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontproperties=look)


def headed_panels(title: str, columns: int, height: float, **kwargs) -> tuple[Figure, list[Axes]]:
    """A row of panels under a sentence that says what they show."""
    matplotlib.style.use(STYLE)
    figure = Figure(figsize=(WIDTH, height))
    title_sentence(figure, title)
    return figure, list(figure.subplots(1, columns, squeeze=False, **kwargs).flat)


def band(axis: Axes, x: Iterable, table, label: str, colour: str, dash: str = "-") -> None:
    """A mean with its interval: ``table`` has the columns mean, low and high."""
    axis.plot(x, table["mean"], dash, color=colour, label=label)
    axis.fill_between(x, table["low"], table["high"], color=colour, alpha=0.18, linewidth=0)


def label_ends(axis: Axes, gap: float = 0.09, side: float = 1.0) -> None:
    """The label of every line at its last point, in its colour, in place of a legend.

    Labels are at least ``gap`` axis heights apart. Limits and scales must be set before.
    """
    lines = [line for line in axis.lines if not str(line.get_label()).startswith("_")]
    to_axis = axis.transData + axis.transAxes.inverted()
    ends = sorted((float(to_axis.transform((line.get_xdata()[-1], line.get_ydata()[-1]))[1]), i) for i, line in enumerate(lines))
    height = -np.inf
    for end, i in ends:
        height = max(end, height + gap)
        look = {"color": lines[i].get_color(), "fontsize": 8, "va": "center", "transform": axis.transAxes}
        axis.text(side + 0.01, height, lines[i].get_label(), **look)


def barcode(axis: Axes, chosen: Iterable[int], n_layers: int, height: float, colour: str) -> None:
    """The chosen layers as bars over the relative depth, on a row at ``height``; the other layers are pale."""
    width = 1 / n_layers
    for layers, shade in ((range(n_layers), "#eeeeee"), (chosen, colour)):
        axis.broken_barh([((layer + 0.05) * width, 0.9 * width) for layer in layers], (height - 0.38, 0.76), color=shade)


def log_axis(axis: Axes) -> None:
    """A logarithmic vertical axis with plain numbers at 1, 2 and 5."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def show_figure(figure: Figure, profile: Profile, name: str, caption: str) -> None:
    """Write ``name``.png and .svg under the run's figures and show the same picture with its caption, which is its alt text too."""
    folder = profile.output_folder / "figures" / profile.folder
    folder.mkdir(parents=True, exist_ok=True)
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    (folder / f"{name}.png").write_bytes(png.getvalue())
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
    display(
        Image(png.getvalue(), width=int(figure.get_figwidth() * matplotlib.rcParams["figure.dpi"]), alt=caption),
        Markdown(f"*{caption}*"),
    )


def show_table(table: pd.DataFrame) -> None:
    """Show the first ``MAX_ROWS`` rows of a table as text, and say how many there are if there are more.

    A column of numbers has as many decimals as its largest value needs for three digits, and no exponents; values above 999 are
    rounded to three digits. A missing value is an empty cell, and no cell is cut.
    """
    with pd.option_context("display.max_colwidth", None, "display.max_columns", None):
        display(table.head(MAX_ROWS).apply(three_digits))
    if len(table) > MAX_ROWS:
        display(Markdown(f"*{MAX_ROWS} of {len(table)} rows.*"))


def three_digits(values: pd.Series) -> pd.Series:
    """A column as text if it holds floating-point numbers: at most three digits, the same number of decimals, nan as nothing.

    A value that these decimals would make zero has one digit.

    >>> list(three_digits(pd.Series([4.9567, 0.25, float("nan")]))), list(three_digits(pd.Series([24583.1, 112.02, -0.043])))
    (['4.96', '0.25', ''], ['24600', '112', '-0.04'])
    """
    if not pd.api.types.is_float_dtype(values):
        return values.astype(object).where(values.notna(), "")
    largest = values.abs().max() if values.notna().any() else 0
    decimals = int(np.clip(2 - np.floor(np.log10(largest or 1)), 0, 6))

    def text(value: float) -> str:
        rounded = f"{float(f'{value:.3g}'):.{decimals}f}"
        return rounded if float(rounded) or not value else np.format_float_positional(float(f"{value:.1g}"), trim="-")

    return values.map(text, na_action="ignore").astype(object).where(values.notna(), "")
