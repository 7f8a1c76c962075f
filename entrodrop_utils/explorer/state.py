"""The state of the explorer, without widgets: what is asked for, what is shown, and the settings that this was computed from.

``Explorer`` computes a ``Ranking`` from settings. ``Session`` is the one owner of what the page shows: a choice in a ranking, and
pinned choices. Every answer carries its settings; an answer after a cancel, an error or a newer question is dropped.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from .. import selection
from ..profile import Profile
from ..residual import SubBlock
from .choice import Choice, Ranking
from .loaded import LoadedModel
from .settings import Settings

N_SEQUENCES, N_TOKENS = 6, 80  # to rank on, and as many to evaluate: an answer within two seconds on two cores


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
        scores = loaded.scores(settings, settings.metric)
        order = selection.one_shot(scores.table, settings.metric, settings.kind)
        return Ranking(settings, loaded, loaded.curve((), settings), scores.mean, order)

    def keep_only(self, loaded: LoadedModel) -> None:
        """Let all other models go."""
        with self._loading:
            self._loaded = {loaded.name: loaded}


@dataclass
class Session:
    """What the page shows and asks for. Methods return at once and may be called from any thread.

    Attributes:
        fields: what the controls say. They differ from the settings of what is shown only while ``waiting``.
        choice: everything drawn, exported and saved belongs to it and to its ranking; None before the first answer.
        waiting: whether an answer is awaited: what is drawn is then dimmed.
        error: one sentence, until the next question.
    """

    fields: Settings
    choice: Choice | None = None
    pins: list[Choice] = field(default_factory=list)
    waiting: bool = False
    error: str = ""
    _ticket: int = 0

    def __post_init__(self):
        self.lock = threading.RLock()

    def ask(self, **wanted: object) -> int:
        """Change settings: the ticket of the answer that is now awaited. Raises ValueError as ``Settings.changed``."""
        with self.lock:
            self.fields = self.fields.changed(**wanted)
            self._ticket, self.waiting, self.error = self._ticket + 1, True, ""
            return self._ticket

    def answer(self, ticket: int, ranking: Ranking, choice: Choice | None = None) -> bool:
        """Show a ranking and a choice in it, without one what the choice before is there; not if it answers an earlier question."""
        with self.lock:
            if ticket != self._ticket or not self.waiting:
                return False
            same = self.choice is not None and self.choice.ranking.loaded is ranking.loaded
            self.choice = choice or (replace(self.choice, ranking=ranking) if same else Choice(ranking))
            self.fields, self.waiting, self.pins = ranking.settings, False, self.pins if same else []
            return True

    def cancel(self) -> None:
        """Await nothing: fields go back to what is shown."""
        with self.lock:
            self._ticket, self.waiting = self._ticket + 1, False
            if self.choice:
                self.fields = self.choice.settings

    def fail(self, ticket: int | None, sentence: str) -> bool:
        """An error in place of an answer: fields go back. An error of an earlier question is left; None is of no question."""
        with self.lock:
            if ticket is not None:
                if ticket != self._ticket or not self.waiting:
                    return False
                self.cancel()
            self.error = sentence
            return True

    def slide(self, n: int) -> None:
        """So many are dropped."""
        self._choose(lambda now: replace(now, n=int(n)))

    def mark(self, sub_blocks: Iterable[Sequence], gone: bool | None = None) -> None:
        """Drop or keep sub-blocks by hand; None toggles a single one. Raises ValueError as ``Choice.marked``."""
        self._choose(lambda now: now.marked([SubBlock(int(layer), kind) for layer, kind in sub_blocks], gone))

    def follow(self) -> None:
        """Forget what was kept or dropped by hand."""
        self._choose(lambda now: Choice(now.ranking, now.n))

    def pin(self) -> None:
        """Keep the choice in the table."""
        with self.lock:
            if self.choice:
                self.pins = [pin for pin in self.pins if set(pin.dropped) != set(self.choice.dropped)] + [self.choice]

    def unpin(self, number: int) -> None:
        """Take a pinned choice out of the table."""
        with self.lock:
            self.pins = [pin for i, pin in enumerate(self.pins) if i != number]

    def _choose(self, change: Callable[[Choice], Choice]) -> None:
        with self.lock:
            if self.choice:
                self.choice, self.error = change(self.choice), ""
