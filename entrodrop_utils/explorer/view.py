"""The panels and the table of the explorer, for the page and for the rendered notebook."""

import base64
import html
import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import figures
from ..residual import SubBlock
from .state import CONTEXT, Explorer

KEPT, DROPPED = figures.COLOURS["bucket"], figures.COLOURS["knn"]
COMPUTING, MISSING = (
    "computing …",
    "not measured",
)  # what stands where a number will be, and where none will be unless it is asked for
NAMES = {"attention": "attention layer", "mlp": "MLP", "block": "block"}


def picture(
    explorer: Explorer,
    drop: Sequence[SubBlock],
    counts: dict[int, Sequence[SubBlock]],
    missing: str = MISSING,
    bars_too: bool = True,
) -> Figure:
    """Entropy curve, importance, and what dropping costs: perplexity and KL of the selections in ``counts`` that were measured."""
    figure, axes = figures.panels(2, 2) if bars_too else figures.panels(1, 3, height=2.1)
    curve(axes[0], explorer)
    if bars_too:
        bars(axes[1], explorer, drop)
    costs(axes[-2], explorer, drop, counts, missing, "perplexity", lambda cost: cost.loss.perplexity)
    costs(axes[-1], explorer, drop, counts, missing, "KL to dense (nats)", lambda cost: cost.kl.mean)
    return figure


def curve(axis: Axes, explorer: Explorer) -> None:
    """Entropy of the residual stream against the layers passed."""
    ranking = explorer.ranking
    axis.plot([position / 2 for position in range(len(ranking.curve))], ranking.curve, color=KEPT)
    axis.set(title=f"{ranking.entropy} entropy", xlabel="layers passed", ylabel="entropy (nats)")


def bars(axis: Axes, explorer: Explorer, drop: Sequence[SubBlock]) -> None:
    """Importance of every sub-block, the dropped ones hatched."""
    importance = explorer.ranking.importance
    for gone, colour, hatch in ((False, KEPT, ""), (True, "white", "//////")):
        heights = {s.layer: value for s, value in importance.items() if (s in drop) == gone}
        edge = DROPPED if gone else KEPT
        axis.bar(list(heights), list(heights.values()), color=colour, edgecolor=edge, hatch=hatch, linewidth=0.6)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_yscale("symlog", linthresh=unit(importance))
    axis.yaxis.set_major_formatter("{x:g}")
    kind = NAMES[explorer.settings.kind]
    axis.set(title=f"each {kind} (hatched: {len(drop)} dropped)", xlabel="layer", ylabel=score_name(explorer))


def costs(axis: Axes, explorer: Explorer, drop: Sequence[SubBlock], counts: dict, missing: str, name: str, value) -> None:
    """A cost against the number dropped, as far as it has been measured; the selection is the square."""
    measured = {n: explorer.known(chosen)[1] for n, chosen in counts.items()}
    points = {n: value(cost) for n, cost in measured.items() if cost}
    axis.plot(list(points), list(points.values()), "o-", color=KEPT, markersize=3)
    axis.axvline(len(drop), color=DROPPED, linestyle=":")
    if here := explorer.known(drop)[1]:
        axis.plot([len(drop)], [value(here)], "s", color=DROPPED, markersize=7, fillstyle="none")
    else:
        axis.text(len(drop), 0.5, f" {missing}", transform=axis.get_xaxis_transform(), color=DROPPED)
    if name == "perplexity":
        figures.log_axis(axis)
    axis.set(
        title=f"{name.split(' (')[0]}, held-out text",
        xlabel="number dropped",
        ylabel=name,
        xlim=(-0.5, max(max(counts), len(drop)) + 0.5),
    )


def unit(importance: dict[SubBlock, float]) -> float:
    """Where the symmetric logarithmic scale of importance turns linear: the size of a typical small value."""
    sizes = sorted(abs(value) for value in importance.values())
    return max(sizes[len(sizes) // 4], 1e-9)


def score_name(explorer: Explorer) -> str:
    """What importance is, with its unit."""
    return "dH (nats)" if explorer.ranking.entropy == explorer.settings.metric else explorer.settings.metric.replace("_", " ")


def rows(explorer: Explorer, drop: Sequence[SubBlock], missing: str = MISSING) -> list[tuple[str, str, str]]:
    """(what, dense, pruned), each as far as it is known."""
    (dense_size, dense_cost, dense_text), (size, cost, told) = explorer.known(()), explorer.known(drop)

    def shown(value, form) -> str:
        return missing if value is None else form(value)

    def share(now: float | int, before: float | int | None) -> str:
        return f" ({now / before - 1:+.0%})" if before and drop else ""

    return [
        (
            "perplexity",
            shown(dense_cost, lambda c: f"{c.loss.perplexity:.1f}"),
            shown(cost, lambda c: f"{c.loss.perplexity:.1f}{share(c.loss.perplexity, dense_cost.loss.perplexity)}"),
        ),
        ("KL to the dense model", "0", shown(cost, lambda c: f"{c.kl.mean:.3f} ± {c.kl.stderr:.3f} nats per token")),
        (
            "parameters",
            shown(dense_size, lambda s: f"{s.parameters / 1e6:.1f} M"),
            shown(size, lambda s: f"{s.parameters / 1e6:.1f} M{share(s.parameters, dense_size and dense_size.parameters)}"),
        ),
        (
            f"KV cache at {CONTEXT:,} tokens",
            shown(dense_size, lambda s: f"{s.cache / 1e6:.1f} MB"),
            shown(size, lambda s: f"{s.cache / 1e6:.1f} MB{share(s.cache, dense_size and dense_size.cache)}"),
        ),
        (f"after “{explorer.settings.prompt}”", shown(dense_text, _line), shown(told, _line)),
    ]


def _line(told: str) -> str:
    return " ".join(told.split())


def markdown(explorer: Explorer, drop: Sequence[SubBlock]) -> str:
    """Dense beside pruned, as a table in Markdown."""
    cells = [[html.escape(cell).replace("|", "&#124;") for cell in row] for row in rows(explorer, drop)]
    head = f"| | dense | {without(explorer, drop)} |\n|---|---|---|"
    return "\n".join([head, *(f"| {' | '.join(row)} |" for row in cells)])


def without(explorer: Explorer, drop: Sequence[SubBlock]) -> str:
    """The selection in words."""
    return f"without {len(drop)} of {len(explorer.ranking.importance)} {NAMES[explorer.settings.kind]}s"


def table(explorer: Explorer, drop: Sequence[SubBlock], missing: str = MISSING) -> str:
    """Dense beside pruned, as HTML."""
    what = without(explorer, drop)
    lines = [
        f"<tr><th scope='row'>{html.escape(name)}</th><td>{html.escape(dense)}</td>"
        f"<td{' class=entrodrop-computing' if pruned == missing else ''}>{html.escape(pruned)}</td></tr>"
        for name, dense, pruned in rows(explorer, drop, missing)
    ]
    head = f"<tr><th></th><th scope='col'>{html.escape(explorer.settings.model)}</th><th scope='col'>{what}</th></tr>"
    return f"<table class='entrodrop-table'><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>"


def image(figure: Figure, alt: str) -> str:
    """A figure as an HTML picture that fits its place."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    source = base64.b64encode(png.getvalue()).decode()
    return f"<img style='max-width:100%;height:auto' alt='{html.escape(alt, quote=True)}' src='data:image/png;base64,{source}'>"
