"""The explorer as a person sees it: widgets that ask state.Explorer in the background and draw what it says."""

import html
import os
import threading
from dataclasses import replace

import ipywidgets as w
from IPython.display import display

from .. import scoring, text
from ..models import KNOWN
from ..progress import HEADLESS
from ..residual import KINDS, SubBlock
from . import view
from .background import Background
from .bars import CSS, Bars
from .choice import Choice
from .state import Explorer, Settings

LABELS = {"description_width": "initial"}


class Page:
    """The widgets of one explorer; ``widget`` is what is shown. A move is drawn at once, its cost when it has been measured."""

    def __init__(self, explorer: Explorer):
        self.explorer, self.choice, self.busy = explorer, Choice([]), False
        self._suggested = ""
        self._drawing = threading.RLock()  # the page's events and the background both draw
        self._build(explorer.settings)
        self.background = Background(self._progress, self._failed)
        self._ask()

    def _build(self, now: Settings) -> None:
        wide = w.Layout(width="auto", flex="1 1 250px", margin="2px 12px 2px 0")
        every = {"style": LABELS, "continuous_update": False}
        self.fields = {
            "model": w.Combobox(
                value=now.model,
                options=[*KNOWN],
                description="model",
                placeholder="name, folder or hub name",
                layout=wide,
                **every,
            ),
            "kind": w.Dropdown(value=now.kind, options=KINDS, description="drop", style=LABELS, layout=w.Layout(width="150px")),
            "metric": w.Dropdown(
                value=now.metric, options=list(scoring.METRICS), description="by", style=LABELS, layout=w.Layout(width="150px")
            ),
            "bins": w.BoundedIntText(value=now.bins, min=2, max=1000, description="bins", layout=w.Layout(width="130px"), **every),
            "k": w.BoundedIntText(value=now.k, min=1, max=1000, description="neighbour k", layout=w.Layout(width="130px"), **every),
            "alpha": w.BoundedFloatText(
                value=now.alpha, min=0.05, max=100, step=0.5, description="order alpha", layout=w.Layout(width="130px"), **every
            ),
            "first": w.Checkbox(value=now.first, description="count the first token", indent=False, layout=w.Layout(width="170px")),
            "text": w.Combobox(
                value=now.text, options=[*text.OWN, *text.HUB], description="calibration text", layout=wide, **every
            ),
            "pasted": w.Textarea(
                placeholder="or paste a text of your own here",
                rows=2,
                layout=w.Layout(width="100%", margin="2px 12px 2px 0"),
                **every,
            ),
            "prompt": w.Text(
                value=now.prompt, description="prompt", layout=w.Layout(width="100%", margin="2px 12px 2px 0"), **every
            ),
        }
        self.what, self.fraction = w.Label(layout=w.Layout(width="260px")), w.FloatProgress(max=1, layout=w.Layout(width="220px"))
        self.stop = w.Button(description="Cancel", tooltip="Stop what is being computed", layout=w.Layout(width="90px"))
        self.said, self.bars, self.legend = w.HTML(), Bars(self._clicked), w.HTML()
        self.slider = w.IntSlider(min=0, max=1, description="number dropped", style=LABELS, layout=w.Layout(width="70%"))
        self.forget = w.Button(
            description="Follow the ranking", tooltip="Forget what was kept or dropped by hand", layout=w.Layout(width="160px")
        )
        self.table, self.picture = w.HTML(layout=w.Layout(width="100%")), w.HTML(layout=w.Layout(width="100%"))
        self.path = w.Text(description="folder", style=LABELS, layout=w.Layout(flex="1 1 auto", width="auto"))
        self.save = w.Button(description="Save pruned model", layout=w.Layout(width="160px"))
        self.export = w.Button(description="Export as code", layout=w.Layout(width="160px"))
        self.saved = self.answer = w.HTML()
        self.code = w.Textarea(rows=12, layout=w.Layout(width="100%", display="none"))
        f, wrap = self.fields, w.Layout(flex_flow="row wrap", width="100%")
        self.widget = w.VBox(
            [
                w.HTML(CSS, layout=w.Layout(display="none")),
                w.HBox([f["model"], f["kind"], f["metric"], f["bins"], f["k"], f["alpha"], f["first"]], layout=wrap),
                w.HBox([f["text"]], layout=wrap),
                f["pasted"],
                f["prompt"],
                w.HBox([self.what, self.fraction, self.stop]),
                self.said,
                self.legend,
                self.bars.widget,
                w.HBox([self.slider, self.forget], layout=wrap),
                self.table,
                self.picture,
                w.HBox([self.path, self.save, self.export], layout=w.Layout(width="100%")),
                self.saved,
                self.code,
            ],
            layout=w.Layout(padding="0 4px"),
        )
        for field in f.values():
            field.observe(self._ask, "value")
        f["metric"].observe(self._metric, "value")
        self.slider.observe(self._moved, "value")
        for button, action in (
            (self.stop, self._stopped),
            (self.forget, self._forgotten),
            (self.save, self._saved),
            (self.export, self._exported),
        ):
            button.on_click(action)
        self._options()

    def _options(self) -> None:
        have = self.explorer.settings.options(self.fields["metric"].value)
        for name in ("bins", "k", "alpha"):
            self.fields[name].layout.display = "" if name in have else "none"

    def _draw(self) -> None:
        """Everything that follows from the selection and can be drawn at once."""
        with self._drawing:
            if not self.explorer.ranking:
                return
            drop, settings = self.choice.dropped, self.explorer.settings
            self.bars.mark(drop, self.choice.by_hand)
            least, most = self.choice.limits
            self.slider.unobserve(self._moved, "value")
            self.slider.max = max(most, self.slider.value)
            self.slider.min, self.slider.value = least, self.choice.n
            self.slider.max = most
            self.slider.observe(self._moved, "value")
            self.forget.disabled = not self.choice.by_hand
            self.legend.value = (
                f"<b>{html.escape(view.score_name(self.explorer))} of every {view.NAMES[settings.kind]}</b>, logarithmic in both "
                "directions from zero; dropped ones are hatched. Click a bar to keep or drop it."
            )
            self.table.value = view.table(self.explorer, drop, view.COMPUTING if self.busy else view.MISSING)

    def _redraw_picture(self) -> None:
        drop = self.choice.dropped
        least, most = self.choice.limits
        counts = {n: self.choice.at(n) for n in range(least, most + 1)}
        missing = view.COMPUTING if self.busy else view.MISSING
        figure = view.picture(self.explorer, drop, counts, missing, bars_too=False)
        self.picture.value = view.image(figure, "Entropy curve, importance, perplexity and divergence against the number dropped")

    def _ask(self, *_) -> None:
        wanted = replace(self.explorer.settings, **{name: field.value for name, field in self.fields.items()})
        self._work(lambda: self._used(wanted))

    def _metric(self, _) -> None:
        self._options()
        self.fields["alpha"].value = 1.0 if self.fields["metric"].value == "matrix_renyi" else 4.0

    def _moved(self, change) -> None:
        self.choice.n = change["new"]
        self._work(self._measure)

    def _clicked(self, sub_block: SubBlock) -> None:
        self.choice.toggle(sub_block)
        self._work(self._measure)

    def _forgotten(self, _) -> None:
        self.choice = Choice(self.choice.order, self.choice.n)
        self._work(self._measure)

    def _saved(self, _) -> None:
        drop, path = self.choice.dropped, self.path.value

        def save() -> None:
            where = self.explorer.save(drop, path)
            self.saved.value = f"<p role='status'>Saved. <code>load_pruned({html.escape(repr(str(where)))})</code> reads it.</p>"
            self._measure()

        self._work(save, self.saved)

    def _exported(self, _) -> None:
        if self.explorer.ranking:
            self.code.value, self.code.layout.display = self.explorer.code(self.choice.dropped), ""

    def _stopped(self, _) -> None:
        self.background.cancel()

    def _work(self, job, answer: w.HTML | None = None) -> None:
        """Start a job, whose errors are shown in ``answer``: beside what was clicked."""
        self.busy, self.answer = True, answer or self.said
        self.said.value = self.saved.value = ""
        self._draw()
        self.background.do(job)

    def _used(self, wanted: Settings) -> None:
        ranking, drawn = self.explorer.use(wanted), self.bars.importance
        if (ranking.order, ranking.importance) != (self.choice.order, drawn):
            n = self.choice.n if ranking.importance.keys() == drawn.keys() else len(ranking.importance) // 4
            with self._drawing:
                self.choice = Choice(ranking.order, n)
                self.bars.draw(ranking.importance)
        self._draw()
        self._redraw_picture()
        self._measure()

    def _measure(self) -> None:
        """The selection first, each number drawn when it is there; then all other counts, nearest first, for moves to come."""
        explorer, drop, (least, most) = self.explorer, self.choice.dropped, self.choice.limits
        if self.path.value in ("", self._suggested):  # a folder that a person named stays
            self.path.value = self._suggested = explorer.folder(drop)
        for step in (explorer.size, explorer.cost, explorer.sample):
            for chosen in ((), drop):
                step(chosen)
                self._draw()
        self._redraw_picture()
        near = [self.choice.at(n) for n in sorted(range(least, most + 1), key=lambda n: abs(n - len(drop)))]
        for steps in ((explorer.size, explorer.cost), (explorer.sample,)):
            for chosen in near:
                known = explorer.known(chosen)[1]
                for step in steps:
                    step(chosen)
                if not known:
                    self._redraw_picture()

    def _progress(self, what: str, fraction: float | None) -> None:
        self.what.value = what
        self.fraction.value, self.fraction.bar_style = (fraction or 0), "info" if what else ""
        self.stop.disabled = not what
        if not what:
            self.busy = False
            self._draw()

    def _failed(self, sentence: str) -> None:
        self.answer.value = f"<p class='entrodrop-error' role='alert'>{html.escape(sentence)}</p>"

    def close(self) -> None:
        """End the background thread and let the model go."""
        self.background.close()


_shown: list[Page] = []


def show_explorer(explorer: Explorer) -> None:
    """Show the explorer where there is a person to use it: a notebook that runs headless shows nothing, as widgets would be dead.

    One page at a time: running the cell again ends the page before, whose model would stay in memory.
    """
    while _shown:
        _shown.pop().close()
    if not os.environ.get(HEADLESS):
        _shown.append(Page(explorer))
        display(_shown[0].widget)
