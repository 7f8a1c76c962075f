"""The state of the explorer, without widgets: what is asked for, what is shown, and the settings that this was computed from.

``Explorer`` computes a ``Ranking`` from settings. ``Session`` is the one owner of what the page shows: a ranking, the selection in
it, and pinned selections. Every answer carries its settings; an answer after a cancel, an error or a newer question is dropped.
"""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float

from .. import selection
from ..profile import Profile
from ..residual import SubBlock
from .choice import Choice
from .loaded import LoadedModel
from .settings import Settings

N_SEQUENCES, N_TOKENS = 6, 128  # to rank on, and as many to evaluate: an answer within two seconds on two cores
FRACTION = 0.25  # of the sub-blocks that are dropped at first


@dataclass(frozen=True)
class Ranking:
    """The scores of all sub-blocks, with the settings and the model that they were computed from.

    Attributes:
        curve: mean entropy at each of the 2 L + 1 endpoints of the residual stream, nats, by ``settings.entropy``.
        importance: of every sub-block of every kind.
        order: the sub-blocks of ``settings.kind`` that may be dropped, first dropped first.
    """

    settings: Settings
    loaded: LoadedModel
    curve: Float[np.ndarray, "endpoint"]
    importance: dict[SubBlock, float]
    order: list[SubBlock]

    @property
    def candidates(self) -> list[SubBlock]:
        """The sub-blocks of the kind that is dropped, by depth."""
        return self.loaded.sub_blocks[self.settings.kind]


class Explorer:
    """From settings to a ranking; models stay in memory until ``keep_only``."""

    def __init__(self, profile: Profile | None = None, n_sequences: int = N_SEQUENCES, n_tokens: int = N_TOKENS):
        profile = profile or Profile()
        self.settings = Settings(profile.model, text=profile.text, seed=profile.seed)
        self.n_sequences, self.n_tokens = n_sequences, n_tokens
        self._loaded: dict[str, LoadedModel] = {}
        self._loading = threading.Lock()

    def use(self, settings: Settings | None = None) -> Ranking:
        """Load the model and score the calibration text where these settings ask for it; the ranking.

        Raises:
            ValueError: a model, text or setting that does not exist or does not fit.
            ModelUnavailable: the model is not available.
        """
        settings = settings or self.settings
        with self._loading:
            if settings.model not in self._loaded:
                self._loaded[settings.model] = LoadedModel(settings.model, self.n_sequences, self.n_tokens, settings.seed)
            loaded = self._loaded[settings.model]
        scores = loaded.scores(settings, tuple(dict.fromkeys([settings.metric, settings.entropy])))
        mean = scores[scores.metric == settings.metric].groupby(["kind", "layer"]).value.mean()
        importance = {SubBlock(int(layer), kind): float(value) for (kind, layer), value in mean.items()}
        order = selection.one_shot(scores, settings.metric, settings.kind)
        return Ranking(settings, loaded, loaded.curve((), settings), importance, order)

    def keep_only(self, loaded: LoadedModel) -> None:
        """Let all other models go."""
        with self._loading:
            self._loaded = {loaded.name: loaded}


@dataclass(frozen=True)
class Pin:
    """A selection that stays in the table, with the settings that it was made under."""

    name: str
    settings: Settings
    drop: tuple[SubBlock, ...]
    order: tuple[SubBlock, ...] = ()  # the ranking that it follows; empty for a choice by hand


@dataclass
class Session:
    """What the page shows and asks for. Methods return at once and may be called from any thread.

    Attributes:
        fields: what the controls say. They differ from ``shown.settings`` only while ``waiting``.
        shown: the ranking that everything drawn, exported and saved belongs to; None before the first answer.
        waiting: whether an answer is awaited: what is drawn is then dimmed.
        error: one sentence, until the next question.
    """

    fields: Settings
    shown: Ranking | None = None
    choice: Choice = field(default_factory=lambda: Choice([]))
    pins: list[Pin] = field(default_factory=list)
    waiting: bool = False
    error: str = ""
    _ticket: int = 0
    _wish: dict = field(default_factory=dict)

    def __post_init__(self):
        self.lock = threading.RLock()

    def ask(self, wish: dict | None = None, **wanted: object) -> int | None:
        """Change settings: the ticket of the answer that is now awaited; None where a value is refused, which ``error`` says.

        Args:
            wish: ``n``, ``by_hand`` and ``origin`` of the choice, once the answer is there.
        """
        with self.lock:
            self.error, before = "", self.fields
            try:
                self.fields = before.changed(**wanted)
            except (ValueError, TypeError) as error:
                self.error = str(error)
                return None
            self._ticket, self.waiting, self._wish = self._ticket + 1, True, wish or {}
            return self._ticket

    def answer(self, ticket: int, ranking: Ranking) -> bool:
        """Show a ranking, unless it answers an earlier question."""
        with self.lock:
            if ticket != self._ticket or not self.waiting:
                return False
            before, loaded = self.shown, ranking.loaded
            same = before is not None and before.loaded is loaded
            self.shown, self.fields, self.waiting = ranking, ranking.settings, False
            n = self.choice.n if same else selection.count_of(FRACTION, len(ranking.candidates))
            n = self._wish.get("n", n)
            follow = {"by_hand": self.choice.by_hand, "origin": self.choice.origin} if same and not self._wish else {}
            follow |= {name: self._wish[name] for name in ("by_hand", "origin") if name in self._wish}
            self.choice = Choice(ranking.order, n, attention=loaded.sub_blocks["attention"], **follow)
            self.pins = self.pins if same else []
            return True

    def cancel(self) -> None:
        """Await nothing: fields go back to what is shown."""
        with self.lock:
            self._ticket, self.waiting = self._ticket + 1, False
            if self.shown:
                self.fields = self.shown.settings

    def fail(self, ticket: int | None, sentence: str) -> bool:
        """An error in place of an answer: fields go back. An error of an earlier question is left."""
        with self.lock:
            if ticket is not None and (ticket != self._ticket or not self.waiting):
                return False
            if ticket is not None:
                self.cancel()
            self.error = sentence
            return True

    def slide(self, n: int) -> None:
        """So many are dropped."""
        with self.lock:
            low, high = self.choice.limits
            self.choice.n = min(max(int(n), low), high)

    def mark(self, sub_blocks: Iterable[Sequence], gone: bool | None = None) -> None:
        """Drop or keep sub-blocks by hand; None toggles a single one. A choice that is refused leaves a sentence in ``error``."""
        with self.lock:
            self.error, marked = "", [SubBlock(int(layer), kind) for layer, kind in sub_blocks]
            try:
                self.choice.toggle(*marked) if gone is None else self.choice.set(marked, gone)
            except ValueError as error:
                self.error = str(error)

    def follow(self) -> None:
        """Forget what was kept or dropped by hand."""
        with self.lock:
            self.choice = Choice(self.choice.order, self.choice.n, attention=self.choice.attention)

    def pin(self) -> None:
        """Keep the selection in the table."""
        with self.lock:
            if not self.shown:
                return
            drop, settings = tuple(self.choice.dropped), self.shown.settings
            kind = "" if settings.kind == "attention" else f" {settings.kind}"
            name = f"{settings.measure}{kind}, {len(drop)}"
            if self.choice.origin or self.choice.by_hand:
                name = f"{self.choice.origin or 'mine'}, {len(drop)}"
            pin = Pin(name, settings, drop, () if self.choice.by_hand else tuple(self.choice.order))
            self.pins = [old for old in self.pins if set(old.drop) != set(drop)] + [pin]

    def unpin(self, number: int) -> None:
        """Take a pinned selection out of the table."""
        with self.lock:
            self.pins = [pin for i, pin in enumerate(self.pins) if i != number]

    def preset(self, name: str, sink: SubBlock | None = None) -> dict:
        """What a preset asks for, as arguments of ``ask``.

        ``paper`` and ``cosine`` are 37.5% of the attention layers by bucket entropy or cosine, ``random`` is as many as now, and
        ``sink`` the branch that makes the attention sink.

        Raises:
            ValueError: an unknown preset.
        """
        with self.lock:
            paper = {"n": selection.count_of(0.375, self.shown.loaded.depth), "by_hand": {}, "origin": ""}
            if name in ("paper", "cosine"):
                return {"metric": "bucket" if name == "paper" else "cosine", "kind": "attention", "wish": paper}
            if name == "random":
                seed = self._ticket
                chosen = selection.random_order(self.choice.order, seed)[: self.choice.n]
                by_hand = dict.fromkeys(chosen, True)
                return {"wish": {"n": len(chosen), "by_hand": by_hand, "origin": f"at random (seed {seed})"}}
            if name == "sink" and sink:
                return {"wish": {"n": 1, "by_hand": {sink: True}, "origin": f"the largest fall of bucket entropy, {sink}"}}
            raise ValueError(f"unknown preset {name!r}: choose paper, cosine, sink or random")


def sink_of(loaded: LoadedModel, settings: Settings) -> SubBlock:
    """The branch at which bucket entropy falls most when the first token counts: there it becomes the attention sink."""
    curve = loaded.curve((), replace(settings, metric="bucket", first=True))
    endpoint = int(np.diff(curve).argmin())
    return SubBlock(endpoint // 2, ("attention", "mlp")[endpoint % 2])
