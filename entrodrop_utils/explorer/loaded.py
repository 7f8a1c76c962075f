"""One model in memory with all that was measured on it: nothing is measured twice."""

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from .. import cache, scoring, text
from ..attention import cache_bytes
from ..cached_scoring import cached_entropies, cached_score
from ..dropping import dropped
from ..evaluation import Estimate, IncrementalLosses, losses_by_set
from ..models import check_model, load_model
from ..profile import DEFAULT_TEXT
from ..progress import report_step
from ..residual import KINDS, SubBlock, find
from ..selection import PUBLISHED_PROTECTED, protected_layers, random_order
from ..statistics import Interval, share_interval
from .settings import PROMPT, Settings

CONTEXT = 1024  # tokens of context that the size of the cache is stated for
NEW_TOKENS = 24  # of generated text
READ_TOKENS = 128  # of one's own text whose losses are shown
CANDIDATES = 5  # next tokens that are shown
DRAWS = 20  # random choices of one size that a choice is compared with
MAX_STATES = 256 << 20  # bytes of states inside pruned models that are kept for the next choice

DropSet = tuple[SubBlock, ...]


class Size(NamedTuple):
    """The size of a pruned model: parameters, and bytes of keys and values for ``CONTEXT`` tokens."""

    parameters: int
    cache: float


class Cost(NamedTuple):
    """The cost of a selection on evaluation text."""

    loss: Estimate
    kl: Estimate


class Reading(NamedTuple):
    """What a model makes of a text: its tokens, the loss of each but the first, and after each the likeliest next tokens."""

    tokens: list[str]
    losses: Float[np.ndarray, "token"]  # nats; nan for the first token
    candidates: list[list[tuple[str, float]]]  # (token, probability), likeliest first


class _Heard(StoppingCriteria):
    """Passes on what was generated so far; a step of progress, so a job that was replaced stops here."""

    def __init__(self, hear: Callable[[Tensor], None]):
        self.hear = hear

    def __call__(self, input_ids: Tensor, scores, **_):
        report_step("generating", 0, None)
        self.hear(input_ids[0])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class LoadedModel:
    """A model, its tokenizer, and its results; ``known`` answers at once, all other methods may take a while.

    These wait for each other, as a model without some sub-blocks is the model itself for a while.

    Raises:
        ValueError: a model that does not exist, or that predicts no next token.
        ModelUnavailable: the model is not available.
    """

    def __init__(self, name: str, n_sequences: int, n_tokens: int, seed: int = 0):
        check_model(name)
        report_step(f"loading {name}", 0, None)
        self.name, self.n_sequences, self.n_tokens, self.seed = name, n_sequences, n_tokens, seed
        self.model, self.tokenizer = load_model(name)
        if not self.model.can_generate():
            raise ValueError(
                f"{name} is an encoder ({type(self.model).__name__}): it predicts no next token, so there is no loss to show; "
                "notebook A2 measures encoders"
            )
        self.sub_blocks = {kind: find(self.model, kind) for kind in KINDS}
        self._model_lock, self._queue = threading.Lock(), threading.Lock()
        self._losses: dict[str, IncrementalLosses] = {}
        self._stored: dict[str, dict[DropSet, pd.DataFrame]] = {}  # costs on disk
        self._keys: dict[str, str | None] = {}
        self._results: dict[tuple, object] = {}
        protected = protected_layers(PUBLISHED_PROTECTED, self.depth)
        pools = [[s for s in self.sub_blocks[kind] if s.layer not in protected] for kind in KINDS]
        self._orders = [[random_order(pool, [seed, draw]) for pool in pools] for draw in range(DRAWS)]
        self._draws: dict[tuple, list[DropSet]] = {}

    @property
    def depth(self) -> int:
        """The number of layers."""
        return len(self.sub_blocks["block"])

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Alone with the model. Who waits holds the queue, so that a thread with much to do cannot come back before it."""
        with self._queue:
            self._model_lock.acquire()
        try:
            yield
        finally:
            self._model_lock.release()

    def _once(self, *key: object, compute: Callable[[], object]):
        with self.alone():
            if key not in self._results:
                with torch.inference_mode():
                    self._results[key] = compute()
            return self._results[key]

    def known(self, what: str, drop: Iterable[SubBlock], *more: object):
        """The result of the method ``what`` for these sub-blocks; None while there is none."""
        drop_set = tuple(sorted(drop))
        if what == "cost":
            losses = self._losses.get(_source(*more))
            values = losses and losses.results.get(drop_set)
            return Cost(*values) if values else None
        return self._results.get((what, drop_set, *more))

    # --- text

    def calibration(self, settings: Settings) -> Int[Tensor, "sequence token"]:
        """The windows that sub-blocks are ranked on."""
        if settings.role == "ranking":
            return pasted_windows(settings.pasted, self.tokenizer, self.n_sequences, self.n_tokens)
        return text.windows(settings.text, "calibration", self.tokenizer, self.n_sequences, self.n_tokens, self.seed)

    def evaluation(self, settings: Settings) -> Int[Tensor, "sequence token"]:
        """The windows that a cost is measured on."""
        if settings.role == "evaluation":
            return pasted_windows(settings.pasted, self.tokenizer, self.n_sequences, self.n_tokens)
        return text.windows(DEFAULT_TEXT, "evaluation", self.tokenizer, self.n_sequences, self.n_tokens, self.seed)

    # --- ranking

    def scores(self, settings: Settings, metrics: Iterable[str]) -> pd.DataFrame:
        """These metrics, as they are set, of every sub-block; those measured before come from the cache on disk."""
        chosen = {name: settings.configured(name) for name in metrics}
        key = (settings.calibration_key, *((name, *_options(settings, name)) for name in chosen))
        return self._once("scores", *key, compute=lambda: cached_score(self.model, self.calibration(settings), chosen))

    def ranks(self, settings: Settings, metric: str) -> dict[SubBlock, int]:
        """The place of every sub-block among those of its kind, 1 for the most redundant, by a metric as it is set."""
        scores = self.scores(settings, [metric])
        place = scores.groupby(["kind", "layer"]).value.mean().groupby("kind").rank(method="first").astype(int)
        ranks = {SubBlock(int(layer), kind): int(rank) for (kind, layer), rank in place.items()}
        return self._once("ranks", (), settings.calibration_key, metric, *_options(settings, metric), compute=lambda: ranks)

    def known_ranks(self, settings: Settings, metric: str) -> dict[SubBlock, int]:
        """``ranks`` as far as they were measured; empty before."""
        return self.known("ranks", (), settings.calibration_key, metric, *_options(settings, metric)) or {}

    def curve(self, drop: Iterable[SubBlock], settings: Settings) -> Float[np.ndarray, "endpoint"]:
        """Mean entropy at each of the 2 L + 1 endpoints, nats; a dropped sub-block passes the stream unchanged."""
        drop_set, name = tuple(sorted(drop)), settings.entropy
        key = (settings.calibration_key, name, *_options(settings, name))
        return self._once("curve", drop_set, *key, compute=lambda: self._curve(drop_set, settings))

    def known_curve(self, drop: Iterable[SubBlock], settings: Settings) -> Float[np.ndarray, "endpoint"] | None:
        """``curve`` as far as it was measured."""
        return self.known("curve", drop, settings.calibration_key, settings.entropy, *_options(settings, settings.entropy))

    def _curve(self, drop_set: DropSet, settings: Settings) -> Float[np.ndarray, "endpoint"]:
        metric, windows = {settings.entropy: settings.configured(settings.entropy)}, self.calibration(settings)
        if not drop_set:
            return cached_entropies(self.model, windows, metric).groupby("endpoint").value.mean().to_numpy()
        with dropped(self.model, drop_set) as model:
            mean = scoring.entropies(model, windows, metric).groupby("endpoint").value.mean().to_numpy()
        values, rest = [mean[0]], list(mean[1:])
        for layer in range(self.depth):  # the pruned model has no endpoints in a dropped block
            gone = SubBlock(layer, "block") in drop_set
            values += [values[-1]] * 2 if gone else [rest.pop(0), rest.pop(0)]
        return np.array(values)

    # --- cost

    def cost(self, drop: Iterable[SubBlock], settings: Settings) -> Cost:
        """Loss and divergence from the dense model on the evaluation text."""
        source = _source(settings)
        with self.alone():
            if source not in self._losses:
                windows = self.evaluation(settings)
                while len(self._losses) > 1:  # that of one's own text goes first, the default stays
                    gone = next(name for name in reversed(self._losses) if name)
                    del self._losses[gone]
                losses = IncrementalLosses(self.model, windows)
                key = cache.subkey(cache.model_key(self.model, "evaluation"), cache.tensor_digest(windows))
                table = cache.read("explorer", key)
                stored = {_parsed(name): rows for name, rows in table.groupby("set")} if table is not None else {}
                self._losses[source], self._stored[source], self._keys[source] = losses, stored, key
            losses, stored, drop_set = self._losses[source], self._stored[source], tuple(sorted(drop))
            if drop_set in stored and drop_set not in losses.results:  # only what is asked for is known: figures do not depend on
                rows = stored[drop_set]  # what earlier runs left
                losses.results[drop_set] = (Estimate.of(rows.nll.to_numpy()), Estimate.of(rows.kl.to_numpy()))
            result = Cost(*losses(drop_set))
            while sum(state.nbytes for state in losses.states.values()) > MAX_STATES:
                del losses.states[next(iter(losses.states))]
            return result

    def keep(self) -> None:
        """Write the costs that are new since the last call to the cache on disk."""
        for source, losses in list(self._losses.items()):
            stored = self._stored[source]
            new = {drop_set: result for drop_set, result in dict(losses.results).items() if drop_set not in stored}
            for drop_set, (loss, divergence) in new.items():
                name = " ".join(f"{layer}:{kind}" for layer, kind in drop_set)
                stored[drop_set] = pd.DataFrame({"set": name, "nll": loss.per_window, "kl": divergence.per_window})
            if new:
                cache.write("explorer", self._keys[source], pd.concat(stored.values(), ignore_index=True))

    def draws(self, drop: Iterable[SubBlock]) -> list[DropSet]:
        """Random choices of as many sub-blocks of the same kinds, from the layers that are not protected; none where a mixture of
        blocks and parts could overlap, or where the choice has more than there are.
        """
        kinds = [kind for _, kind in drop]
        counts = tuple(kinds.count(kind) for kind in KINDS)
        if counts not in self._draws:
            mixed, pools = counts[2] and counts[2] < len(kinds), [len(order) for order in self._orders[0]]
            impossible = not kinds or mixed or any(n > pool for n, pool in zip(counts, pools, strict=True))
            orders = [] if impossible else self._orders
            chosen = [[s for n, some in zip(counts, order, strict=True) for s in some[:n]] for order in orders]
            self._draws[counts] = [tuple(sorted(draw)) for draw in chosen]
        return self._draws[counts]

    def better_than(self, drop: Iterable[SubBlock], settings: Settings) -> tuple[Interval, int] | None:
        """The share of the random choices measured so far that cost more loss, and their number; None before the fifth."""
        cost = self.known("cost", drop, settings)
        known = [other for draw in self.draws(drop) if (other := self.known("cost", draw, settings))]
        if cost is None or len(known) < 5:
            return None
        return share_interval(np.array([other.loss.mean > cost.loss.mean for other in known])), len(known)

    def size(self, drop: Iterable[SubBlock]) -> Size:
        """Parameters and cache as counted on the model without these sub-blocks, not as computed from its config."""
        drop_set = tuple(sorted(drop))

        def count() -> Size:
            with dropped(self.model, drop_set) as model:
                ids = torch.zeros(1, 8, dtype=torch.long, device=model.device)
                nbytes = cache_bytes(model(ids, use_cache=True).past_key_values)
                return Size(model.num_parameters(), nbytes / ids.shape[1] * CONTEXT)

        return self._once("size", drop_set, compute=count)

    def repaired(self, drop: Iterable[SubBlock], made: Settings, settings: Settings) -> Estimate | None:
        """Loss on the evaluation text with a linear repair; None where there is none, as for whole blocks.

        Args:
            made: the settings that the selection was made under; the repair is fitted on their calibration text.
        """
        from ..repairing import repair

        drop_set = tuple(sorted(drop))

        def fitted() -> Estimate | None:
            if not drop_set or any(s.kind == "block" for s in drop_set):
                return None
            with suppress(ValueError):  # a text of too few windows
                maps = repair(self.model, drop_set, self.calibration(made))
                return Estimate.of(losses_by_set(self.model, self.evaluation(settings), [drop_set], maps).nll.to_numpy())
            return None

        return self._once("repaired", drop_set, made.calibration_key, _source(settings), compute=fitted)

    def known_repair(self, drop: Iterable[SubBlock], made: Settings, settings: Settings) -> tuple[bool, Estimate | None]:
        """Whether a repair of a selection made under some settings was measured on the evaluation text of others, and its loss."""
        key = ("repaired", tuple(sorted(drop)), made.calibration_key, _source(settings))
        return key in self._results, self._results.get(key)

    # --- text that is generated and read

    def continuation(self, drop: Iterable[SubBlock], prompt: str, hear: Callable[[str], None] = lambda _: None) -> str:
        """The greedy continuation of the prompt; ``hear`` is called with what there is of it after each token."""
        drop_set = tuple(sorted(drop))

        def generate() -> str:
            if not prompt.strip():
                raise ValueError("the prompt is empty: there is nothing to go on from")
            n = len(self.tokenizer(prompt).input_ids)
            said = self._generate(drop_set, prompt, NEW_TOKENS, lambda ids: hear(self._decoded(ids[n:])))
            return self._decoded(said[n:])

        return self._once("continuation", drop_set, prompt, compute=generate)

    def speed(self, drop: Iterable[SubBlock]) -> float:
        """Tokens per second of greedy generation with a cache, one sequence: the best of three short runs."""
        drop_set = tuple(sorted(drop))

        def measured() -> float:
            rates = []
            for _ in range(3):
                times: list[float] = []
                self._generate(drop_set, PROMPT, 9, lambda _, times=times: times.append(time.perf_counter()))
                rates.append((len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else math.nan)
            return max(rates)

        return self._once("speed", drop_set, compute=measured)

    def _generate(self, drop_set: DropSet, prompt: str, n: int, hear: Callable[[Tensor], None]) -> Tensor:
        ids = torch.tensor([self.tokenizer(prompt).input_ids], device=self.model.device)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "max_new_tokens": n}
        with dropped(self.model, drop_set) as model:
            stop = StoppingCriteriaList([_Heard(hear)])
            return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=pad, stopping_criteria=stop, **greedy)[0]

    def _decoded(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def reading(self, drop: Iterable[SubBlock], said: str) -> Reading:
        """The loss of every token of a text and the likeliest next ones, without these sub-blocks."""
        drop_set = tuple(sorted(drop))

        def read() -> Reading:
            ids = torch.tensor([self.tokenizer(said).input_ids[:READ_TOKENS]], device=self.model.device)
            with dropped(self.model, drop_set) as model:
                log_p = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
            losses = -log_p[:-1].gather(-1, ids[0, 1:, None])[:, 0]
            values, indices = log_p.topk(CANDIDATES)
            pairs = zip(indices.tolist(), values.exp().tolist(), strict=True)
            named = [[(self.tokenizer.decode([i]), p) for i, p in zip(*row, strict=True)] for row in pairs]
            tokens = [self.tokenizer.decode([i]) for i in ids[0].tolist()]
            return Reading(tokens, np.array([math.nan, *losses.tolist()]), named)

        return self._once("reading", drop_set, said, compute=read)


def _source(settings: Settings) -> str:
    """The evaluation text: one's own, or empty for the default."""
    return settings.pasted if settings.role == "evaluation" else ""


def _options(settings: Settings, name: str) -> tuple:
    return (settings.first, *(getattr(settings, option) for option in settings.options(name)))


def _parsed(name: str) -> DropSet:
    return tuple(SubBlock(int(layer), kind) for layer, _, kind in (part.partition(":") for part in name.split()))


def pasted_windows(pasted: str, tokenizer, n_sequences: int, n_tokens: int) -> Int[Tensor, "sequence token"]:
    """Pasted text as windows of at most ``n_tokens`` tokens; the rest of the last one is left out.

    Raises:
        ValueError: too little text for one short window.
    """
    ids = tokenizer(pasted).input_ids
    tokens = min(n_tokens, len(ids))
    if tokens < (least := 32):
        raise ValueError(f"the pasted text has {len(ids)} tokens: at least {least} are needed to rank or evaluate on it")
    sequences = min(n_sequences, len(ids) // tokens)
    return torch.tensor(ids[: sequences * tokens]).view(sequences, tokens)
