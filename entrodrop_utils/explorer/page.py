"""The explorer as a person sees it: a widget that draws what ``state.Session`` holds; a thread measures what is missing."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
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
from .choice import Choice, Ranking, preset
from .settings import OPTIONS, ROLES
from .state import Explorer, Session

HERE = Path(__file__).parent
OFFERED = [name for name, model in KNOWN.items() if "encoder" not in model["about"]]  # those that predict a next token
CHOOSING = ("slide", "mark", "follow", "pin", "unpin")  # what changes the selection or the table: methods of Session
Step = Callable[[], object]


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
    """One explorer with its widget. A move is drawn at once, its cost when it has been measured.

    Args:
        start: the first choice in the ranking by the explorer's settings.
    """

    def __init__(self, explorer: Explorer, start: Callable[[Ranking], Choice] = Choice):
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
        self.cells, self.background = Cells(), Background(self._progress, partial(self._failed, None))
        self._ask(start)

    # --- what a person does

    def receive(self, message: dict) -> None:
        """A message of the browser: ``do`` names what, the rest are its arguments."""
        arguments = {name: value for name, value in message.items() if name != "do"}
        actions = {"set": self._ask, "cancel": self._cancel, "preset": self._preset, "about": self._about, "save": self._save}
        self._heard += 1
        try:
            if message["do"] in CHOOSING:
                getattr(self.session, message["do"])(**arguments)
                self._chose()
            else:
                actions[message["do"]](**arguments)
        except Exception as error:
            self._failed(None, sentence(error))

    def _ask(self, start: Callable[[Ranking], Choice] | None = None, **wanted: object) -> None:
        """Score with changed settings, and begin with a choice in the new ranking."""
        ticket, settings = self.session.ask(**wanted), self.session.fields

        def job() -> None:
            try:
                ranking = self.explorer.use(settings)
                answered = self.session.answer(ticket, ranking, start and start(ranking))
            except Exception as error:
                self._failed(ticket, sentence(error))
            else:
                if answered:
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
        if self.session.choice:
            wanted, start = preset(name, self.session.choice, seed=self._heard)
            self._ask(start, **wanted)

    def _about(self, model: str) -> None:
        self._described = {"model": model, "about": opening_cost(model)}
        self._draw_status()

    def _save(self, path: str, runtime: str = "", repaired: bool = False) -> None:
        choice = self.session.choice
        if self.session.waiting or choice is None:
            raise ValueError("wait for the new scores, or cancel them, before saving")

        def job() -> None:
            try:
                saved = sharing.save(choice, path, repaired, runtime)
                self._share = {"saved": str(saved) if runtime else f"Saved. load_pruned({str(saved)!r}) reads it."}
            except Exception as error:
                self._share = {"failed": sentence(error)}
            self._measure()

        self._share = {}
        self._work(job, "saving")

    # --- work in the background

    def _work(self, job: Step, phase: str) -> None:
        self._phase, self._step = phase, ("", None)
        self._draw()
        self.background.do(job)

    def _chose(self) -> None:
        """Measure a new choice; one that is made while an answer is awaited is measured after that."""
        if self.session.waiting:
            self._draw()
        else:
            self._work(self._measure, "measuring")

    def _measure(self) -> None:
        """The choice first, each number drawn when it is there; then what a person may ask for next, as long as nobody asks."""
        choice, pins = self.session.choice, self.session.pins
        if choice is None:
            return
        self._phase = "measuring"
        self._draw()
        for step in self._now(choice, pins):
            step()
            self._draw()
        self._phase = "ahead"
        for number, step in enumerate(self._ahead(choice, pins)):
            self.cells.wait()
            with suppress(ValueError):  # what cannot be measured, as knn with a k that does not fit the windows
                step()
            if number % 4 == 3:
                self._draw()

    def _now(self, choice: Choice, pins: Sequence[Choice]) -> Iterator[Step]:
        """What the page shows of the choice and of the pinned ones."""
        loaded, settings, drop = choice.ranking.loaded, choice.settings, choice.dropped
        for chosen in ((), drop, *(pin.dropped for pin in pins)):
            yield partial(loaded.cost, chosen, settings)
            yield partial(loaded.size, chosen)
        yield partial(loaded.curve, drop, settings)
        for chosen in ((), drop):
            yield partial(loaded.reading, chosen, settings.pasted.strip() or settings.prompt)
        for name, chosen in (("dense", ()), ("pruned", drop)) if settings.prompt.strip() else ():
            yield partial(loaded.continuation, chosen, settings.prompt, hear=partial(self._hear, name))
        for pin in pins:
            yield partial(loaded.repaired, pin.dropped, settings, pin.settings)

    def _ahead(self, choice: Choice, pins: Sequence[Choice]) -> Iterator[Step]:
        """Speeds, and what moves to come will ask for: neighbouring counts, random choices, other metrics, single drops."""
        ranking, loaded, settings, (low, high) = choice.ranking, choice.ranking.loaded, choice.settings, choice.limits
        sets = [choice.dropped, *(pin.dropped for pin in pins)]
        for drop in ((), *sets):
            yield partial(loaded.speed, drop)
        near = [choice.at(n) for n in sorted(range(low, high + 1), key=lambda n: abs(n - choice.n))]
        drops = [*near[:7], *(draw for drop in sets for draw in loaded.draws(drop)), *near[7:]]
        drops += [pin.ranking.order[:n] for pin in pins if not pin.by_hand for n in range(len(pin.ranking.order) + 1)]
        drops += [[s] for kind in sorted(KINDS, key=lambda kind: kind != settings.kind) for s in loaded.sub_blocks[kind]]
        drops += [draw for n in drawing.random_counts(ranking) for draw in loaded.draws(ranking.order[:n])[:10]]
        yield from (partial(loaded.cost, drop, settings) for drop in drops[:7])
        for metric in scoring.METRICS:
            yield partial(loaded.scores, settings, metric)
        yield partial(loaded.repaired, choice.dropped, settings, settings)
        yield from (partial(loaded.cost, drop, settings) for drop in drops[7:])

    def _hear(self, name: str, said: str) -> None:
        self.widget.said = {**self.widget.said, name: said}

    def _progress(self, what: str, fraction: float | None) -> None:
        self._step = (what, fraction)
        if what:
            self._draw_status()
        else:
            self._phase = ""
            self._draw()

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
            fields, choice, pins = self.session.fields, self.session.choice, self.session.pins
            self.widget.fields = asdict(fields) | {"options": fields.options()}
            self._draw_status()
            if choice is None:
                return
            prompt, loaded = choice.settings.prompt, choice.ranking.loaded
            drops = {"dense": (), "pruned": choice.dropped}
            told = {name: loaded.known("continuation", drop, prompt) for name, drop in drops.items()}
            self.widget.map = drawing.map_of(choice.ranking)
            self.widget.choice = drawing.choice_of(choice)
            self.widget.curves = drawing.curves_of(choice, pins)
            self.widget.table = drawing.table_of(choice, pins)
            self.widget.reading = drawing.reading_of(choice)
            self.widget.said = {"prompt": prompt, **{name: said for name, said in told.items() if said is not None}}
            self.widget.share = self._share | {
                "line": sharing.state_line(choice),
                "code": sharing.drop_code(choice),
                "folder": sharing.folder_name(choice),
                "model": choice.settings.model,
            }

    def close(self) -> None:
        """End the background thread and let the model go."""
        self.cells.close()
        self.background.do(None)


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
        _shown.append(Page(explorer, partial(Choice, n=n, by_hand=by_hand or {})))
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
    explorer.settings = explorer.settings.changed(**settings)
    by_hand = {SubBlock(*s): gone for some, gone in ((drop, True), (keep, False)) for s in some}
    show_explorer(explorer, n, by_hand)
    return explorer
