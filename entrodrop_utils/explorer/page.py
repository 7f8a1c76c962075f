"""The explorer as a person sees it: a widget that draws what ``state.Session`` holds; a thread measures what is missing."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import anywidget
import traitlets
from IPython.display import display

from .. import figures, scoring, text
from ..models import KNOWN, opening_cost
from ..profile import DEFAULT_MODEL, Profile
from ..progress import HEADLESS
from ..residual import KINDS, SubBlock
from . import drawing, sharing
from .background import Background, Cells, sentence
from .choice import Choice
from .settings import OPTIONS, ROLES
from .state import Explorer, Pin, Ranking, Session, sink_of

HERE = Path(__file__).parent
OFFERED = [name for name, model in KNOWN.items() if "encoder" not in model["about"]]  # those that predict a next token
CHOOSING = ("slide", "mark", "follow", "pin", "unpin")  # what changes the selection or the table: methods of Session


class ExplorerWidget(anywidget.AnyWidget):
    """The page in the browser. Python sets the traits; the browser draws them and sends messages (``do`` and its arguments)."""

    _esm = HERE / "explorer.js"
    _css = HERE / "explorer.css"
    lists = traitlets.Dict().tag(sync=True)  # what can be chosen, for good
    fields = traitlets.Dict().tag(sync=True)
    status = traitlets.Dict().tag(sync=True)
    map = traitlets.Dict().tag(sync=True)
    choice = traitlets.Dict().tag(sync=True)
    curves = traitlets.Dict().tag(sync=True)
    table = traitlets.List().tag(sync=True)
    reading = traitlets.Dict().tag(sync=True)
    said = traitlets.Dict().tag(sync=True)  # continuations, dense and pruned
    share = traitlets.Dict().tag(sync=True)  # code, folder, and what became of the last save


class Page:
    """One explorer with its widget. A move is drawn at once, its cost when it has been measured."""

    def __init__(self, explorer: Explorer, n: int | None = None, by_hand: dict[SubBlock, bool] | None = None):
        self.explorer, self.session = explorer, Session(explorer.settings)
        self._drawing = threading.RLock()
        self._phase, self._step, self._share, self._described, self._heard = "", ("", None), {}, {}, 0
        self.widget = ExplorerWidget(
            lists={
                "models": OFFERED,
                "kinds": list(KINDS),
                "metrics": {metric: explorer.settings.options(metric) for metric in scoring.METRICS},
                "limits": {name: [least, greatest] for name, (_, least, greatest) in OPTIONS.items()},
                "texts": [*text.OWN, *text.HUB],
                "roles": list(ROLES),
                "colours": {**figures.COLOURS, "chosen": drawing.CHOSEN},
                "columns": drawing.columns(explorer.n_tokens),
                "ghosts": drawing.ghosts(),
                "exports": list(sharing.RUNTIMES),
            }
        )
        self.widget.on_msg(lambda _, content, __: self.receive(content))
        self.cells = Cells()
        self.background = Background(self._progress, lambda error: self._failed(None, error))
        wish = ({} if n is None else {"n": n}) | ({"by_hand": by_hand} if by_hand else {})
        self._ask(wish=wish)

    # --- what a person does

    def receive(self, message: dict) -> None:
        """A message of the browser: ``do`` names what, the rest are its arguments."""
        arguments = {name: value for name, value in message.items() if name != "do"}
        self._heard += 1
        try:
            if message["do"] in CHOOSING:
                getattr(self.session, message["do"])(**arguments)
                self._chose()
            else:
                ask = {"set": self._ask, "cancel": self._cancel, "preset": self._preset, "about": self._about, "save": self._save}
                ask[message["do"]](**arguments)
        except Exception as error:
            self._failed(None, sentence(error))

    def _ask(self, wish: dict | None = None, **wanted: object) -> None:
        ticket = self.session.ask(wish, **wanted)
        if ticket is None:
            self._draw()
            return
        settings = self.session.fields

        def job() -> None:
            try:
                ranking = self.explorer.use(settings)
            except Exception as error:
                self._failed(ticket, sentence(error))
            else:
                if self.session.answer(ticket, ranking):
                    self.explorer.keep_only(ranking.loaded)
                    self._share = {}
                    self._measure()

        self._work(job, "scoring")

    def _cancel(self) -> None:
        self.session.cancel()
        self._phase = ""
        self.background.cancel()
        self._draw()

    def _preset(self, name: str) -> None:
        if not (shown := self.session.shown):
            return
        if name == "sink":  # its layer follows from a curve that may have to be measured

            def find_sink() -> None:
                self._ask(**self.session.preset("sink", sink_of(shown.loaded, shown.settings)))

            self.session.cancel()
            self._work(find_sink, "scoring")
        else:
            self._ask(**self.session.preset(name))

    def _about(self, model: str) -> None:
        self._described = {"model": model, "about": opening_cost(model)}
        self._draw_status()

    def _save(self, path: str, runtime: str = "", repaired: bool = False) -> None:
        ranking, choice = self.session.shown, self._chosen()

        def job() -> None:
            try:
                saved = sharing.save(ranking, choice, path, repaired, runtime)
                self._share = {"saved": str(saved) if runtime else f"Saved. load_pruned({str(saved)!r}) reads it."}
            except Exception as error:
                self._share = {"failed": sentence(error)}
            self._measure()

        if self.session.waiting or ranking is None:
            raise ValueError("wait for the new scores, or cancel them, before saving")
        self._share = {}
        self._work(job, "saving")

    # --- work in the background

    def _work(self, job: Callable[[], None], phase: str) -> None:
        self._phase, self._step = phase, ("", None)
        self._draw()
        self.background.do(job)

    def _chose(self) -> None:
        """Measure a new selection; one that is made while an answer is awaited is measured after that."""
        if self.session.waiting:
            self._draw()
        else:
            self._work(self._measure, "measuring")

    def _chosen(self) -> Choice:
        """The selection as it is now; a later move does not change it."""
        with self.session.lock:
            now = self.session.choice
            return Choice(now.order, now.n, now.by_hand, now.attention, now.origin)

    def _measure(self) -> None:
        """The selection first, each number drawn when it is there; then what a person may ask for next, as long as nobody asks."""
        ranking, choice, pins = self.session.shown, self._chosen(), list(self.session.pins)
        if ranking is None:
            return
        self._phase = "measuring"
        self._draw()
        try:
            for step in self._now(ranking, choice, pins):
                step()
                self._draw()
            self._phase = "ahead"
            for number, step in enumerate(self._ahead(ranking, choice, pins)):
                self.cells.wait()
                with suppress(ValueError):  # what cannot be measured, as knn with a k that does not fit the windows
                    step()
                if number % 4 == 3:
                    self._draw()
        finally:
            ranking.loaded.keep()

    def _now(self, ranking: Ranking, choice: Choice, pins: Sequence[Pin]) -> Iterator[Callable[[], object]]:
        """What the page shows of the selection and of the pinned ones."""
        loaded, settings, drop = ranking.loaded, ranking.settings, choice.dropped
        said = settings.pasted.strip() or settings.prompt
        for chosen in ((), drop, *(pin.drop for pin in pins)):
            yield partial(loaded.cost, chosen, settings)
            yield partial(loaded.size, chosen)
        yield partial(loaded.curve, drop, settings)
        for chosen in ((), drop):
            yield partial(loaded.reading, chosen, said)
        for name, chosen in (("dense", ()), ("pruned", drop)) if settings.prompt.strip() else ():
            yield partial(loaded.continuation, chosen, settings.prompt, hear=partial(self._hear, name))
        for pin in pins:
            yield partial(loaded.repaired, pin.drop, settings, pin.settings)

    def _ahead(self, ranking: Ranking, choice: Choice, pins: Sequence[Pin]) -> Iterator[Callable[[], object]]:
        """Speeds, and what moves to come will ask for: neighbouring counts, random choices, other metrics, single drops."""
        loaded, settings, (low, high), n = ranking.loaded, ranking.settings, choice.limits, choice.n
        sets = [choice.dropped, *(pin.drop for pin in pins)]
        for drop in ((), *sets):
            yield partial(loaded.speed, drop)
        near = [choice.at(count) for count in sorted(range(low, high + 1), key=lambda count: abs(count - n))]
        drops = [*near[:7], *(draw for drop in sets for draw in loaded.draws(drop)), *near[7:]]
        drops += [pin.order[:count] for pin in pins for count in range(len(pin.order) + 1)]
        drops += [[s] for kind in sorted(KINDS, key=lambda kind: kind != settings.kind) for s in loaded.sub_blocks[kind]]
        drops += [draw for count in drawing.random_counts(ranking) for draw in loaded.draws(ranking.order[:count])[:10]]
        yield from (partial(loaded.cost, drop, settings) for drop in drops[:7])
        for metric in scoring.METRICS:
            yield partial(loaded.ranks, settings, metric)
        yield partial(loaded.repaired, choice.dropped, settings, settings)
        yield from (partial(loaded.cost, drop, settings) for drop in drops[7:])

    def _hear(self, name: str, said: str) -> None:
        self.widget.said = {**self.widget.said, name: said}

    def _progress(self, what: str, fraction: float | None) -> None:
        self._step = (what, fraction)
        if not what:
            self._phase = ""
            self._draw()
        else:
            self._draw_status()

    def _failed(self, ticket: int | None, error: str) -> None:
        if self.session.fail(ticket, error):
            self._draw()

    # --- what is drawn

    def _draw_status(self) -> None:
        what, fraction = self._step
        self.widget.status = {
            "phase": self._phase,
            "what": what,
            "fraction": fraction,
            "waiting": self.session.waiting,
            "error": self.session.error,
            "about": self._described,
            "heard": self._heard,  # so that every message has an answer, also where nothing else changes
        }

    def _draw(self) -> None:
        """All traits from the session; ipywidgets sends those that changed."""
        with self._drawing, self.session.lock, self.widget.hold_sync():
            session, widget, shown = self.session, self.widget, self.session.shown
            widget.fields = asdict(session.fields) | {"options": session.fields.options()}
            self._draw_status()
            if shown is None:
                return
            choice, pins, settings = session.choice, session.pins, shown.settings
            widget.map = drawing.map_of(shown)
            widget.choice = drawing.choice_of(shown, choice)
            widget.curves = drawing.curves_of(shown, choice, pins)
            widget.table = drawing.table_of(shown, choice, pins)
            widget.reading = drawing.reading_of(shown, choice)
            told = {"dense": shown.loaded.known("continuation", (), settings.prompt)}
            told["pruned"] = shown.loaded.known("continuation", choice.dropped, settings.prompt)
            widget.said = {"prompt": settings.prompt, **{n: t for n, t in told.items() if t is not None}}
            widget.share = self._share | {
                "line": sharing.state_line(settings, choice),
                "code": sharing.drop_code(settings, choice),
                "folder": sharing.folder_name(shown, choice),
                "model": settings.model,
            }

    def close(self) -> None:
        """End the background thread and let the model go."""
        self.cells.close()
        self.background.close()


_shown: list[Page] = []


def show_explorer(explorer: Explorer, n: int | None = None, by_hand: dict[SubBlock, bool] | None = None) -> None:
    """Show the explorer where there is a person to use it: a notebook that runs headless shows nothing, as widgets would be dead.

    One page at a time: running the cell again ends the page before, whose model would stay in memory.

    Args:
        n: how many are dropped at first; a quarter if it is not given.
        by_hand: sub-block -> whether it is dropped whatever its rank.
    """
    while _shown:
        _shown.pop().close()
    if not os.environ.get(HEADLESS):
        _shown.append(Page(explorer, n, by_hand))
        display(_shown[0].widget)


def explore(
    model: str = DEFAULT_MODEL, n: int | None = None, drop: Sequence = (), keep: Sequence = (), **settings: object
) -> Explorer:
    """Show the explorer of a model in a given state: the line that its page shares.

    Args:
        n: how many sub-blocks are dropped; a quarter if it is not given.
        drop, keep: (layer, kind) of those that are dropped or kept by hand.
        settings: of ``Settings``.
    Raises:
        ValueError: a setting that cannot be; TypeError one that does not exist.
    """
    explorer = Explorer(Profile(model=model))
    explorer.settings = replace(explorer.settings.changed(**settings), model=model)
    by_hand = {SubBlock(*s): gone for some, gone in ((drop, True), (keep, False)) for s in some}
    show_explorer(explorer, n, by_hand)
    return explorer
