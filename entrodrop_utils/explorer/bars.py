"""Importance as a row of buttons: as high as the value, hatched when dropped, and a click keeps or drops."""

import math
from collections.abc import Callable, Collection

import ipywidgets as w

from ..residual import SubBlock
from .view import DROPPED, KEPT, unit

HEIGHT = 130  # pixels from the lowest bar to the highest
CSS = f"""<style>
.entrodrop-bar {{ padding: 0; margin: 0; min-width: 0; border-radius: 2px 2px 0 0; background: {KEPT}; }}
.entrodrop-bar.entrodrop-gone {{ border: 1px solid {DROPPED};
  background: repeating-linear-gradient(45deg, #fff 0 3px, {DROPPED} 3px 5px); }}
.entrodrop-layer {{ font-size: 11px; line-height: 14px; height: 16px; margin: 0; justify-content: center; overflow: visible; }}
.entrodrop-layer .widget-label, .entrodrop-layer.widget-label {{ text-align: center; }}
.entrodrop-table {{ border-collapse: collapse; font-size: 13px; line-height: 1.4; width: 100%; table-layout: fixed; }}
.entrodrop-table th, .entrodrop-table td {{ text-align: left; vertical-align: top; padding: 3px 8px; overflow-wrap: anywhere; }}
.entrodrop-table thead th {{ border-bottom: 1px solid #888; }}
.entrodrop-computing {{ color: #a33; font-style: italic; }}
.entrodrop-error {{ background: #fdecea; color: #7a1712; border-left: 4px solid #b3261e; padding: 4px 10px; line-height: 1.4; }}
</style>"""


class Bars:
    """A button for each sub-block over the number of its layer; ``widget`` is what is shown."""

    def __init__(self, clicked: Callable[[SubBlock], None]):
        self._clicked, self._buttons, self.importance = clicked, {}, {}
        self.widget = w.HBox(layout=w.Layout(width="100%", overflow="auto hidden", align_items="flex-end", padding="4px 0"))

    def draw(self, importance: dict[SubBlock, float]) -> None:
        """New bars, on a symmetric logarithmic scale: one sub-block often outweighs all others, and those are of interest."""
        scaled = {s: math.copysign(math.log1p(abs(value) / unit(importance)), value) for s, value in importance.items()}
        below = max(0.0, -min(scaled.values()))
        pixels = HEIGHT / (below + max(0.0, *scaled.values()) or 1)
        self.importance, self._buttons, columns = importance, {}, []
        for sub_block, value in scaled.items():
            height = max(6, round(abs(value) * pixels))  # low enough to look low, high enough to be hit
            foot = max(0, round(below * pixels) - (height if value < 0 else 0))
            bar = w.Button(layout=w.Layout(width="100%", height=f"{height}px", margin=f"0 0 {foot}px 0"))
            bar.add_class("entrodrop-bar")
            bar.on_click(lambda _, sub_block=sub_block: self._clicked(sub_block))
            self._buttons[sub_block] = bar
            label = w.Label(str(sub_block.layer), layout=w.Layout(width="100%"))
            label.add_class("entrodrop-layer")
            place = w.Layout(flex="1 1 0", min_width="19px", max_width="34px", margin="0 1px", overflow="visible")
            columns.append(w.VBox([bar, label], layout=place))
        self.widget.children = columns

    def mark(self, drop: Collection[SubBlock], by_hand: Collection[SubBlock]) -> None:
        """Show which are dropped; a bar's name says so too, for those who do not see it."""
        for sub_block, bar in self._buttons.items():
            gone = sub_block in drop
            (bar.add_class if gone else bar.remove_class)("entrodrop-gone")
            state = f"{'dropped' if gone else 'kept'}{' by hand' if sub_block in by_hand else ''}"
            bar.tooltip = f"{sub_block}: {self.importance[sub_block]:.4g}, {state}"
