"""The state of the explorer: settings, the ranking that they give, and the cost of each selection. It has no widgets."""

import copy
import functools
import inspect
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from .. import scoring, selection, text
from ..cached_scoring import cached_entropies, cached_score
from ..dropping import dropped
from ..evaluation import Estimate, IncrementalLosses
from ..models import check_model, load_model
from ..paths import ROOT
from ..profile import DEFAULT_MODEL, DEFAULT_TEXT, Profile, slug
from ..progress import report_step
from ..residual import Kind, SubBlock, find
from ..saving import remove, save_pruned

N_SEQUENCES, N_TOKENS = 8, 128  # 1,024 tokens to rank on and 1,024 to evaluate: an answer within two seconds on 2 cores
CONTEXT = 1024  # tokens of context that the size of the cache is stated for
NEW_TOKENS = 24  # of generated text
PROMPT = "The entropy of a random variable is"
CURVE = "bucket"  # the curve that is shown where the metric is not an entropy and has none of its own


@dataclass(frozen=True)
class Settings:
    """The settings of the page. ``pasted`` is calibration text that replaces the source ``text``."""

    model: str = DEFAULT_MODEL
    kind: Kind = "attention"
    metric: str = CURVE
    bins: int = 20
    k: int = 25
    alpha: float = 4.0
    first: bool = True  # whether the first token of a window counts
    text: str = DEFAULT_TEXT
    pasted: str = ""
    prompt: str = PROMPT
    seed: int = 0

    def options(self, name: str) -> list[str]:
        """Which of bins, k and alpha a metric has."""
        have = inspect.signature(scoring.resolve([name])[name]).parameters
        return [option for option in ("bins", "k", "alpha") if option in have]

    def metrics(self) -> dict[str, scoring.Metric]:
        """The chosen metric as it is set, and an entropy for the curve where the metric is none."""
        names = [self.metric] if scoring.is_entropy(scoring.METRICS[self.metric]) else [self.metric, CURVE]
        metrics = {}
        for name in names:
            metric = functools.partial(scoring.METRICS[name], **{option: getattr(self, option) for option in self.options(name)})
            metrics[name] = metric if self.first else scoring.without_first(metric)
        return metrics


class Ranking(NamedTuple):
    """The scores of one kind of sub-block on the calibration text."""

    curve: np.ndarray  # mean entropy at each of the 2 L + 1 endpoints of the residual stream, nats
    entropy: str  # the estimator of that curve
    importance: dict[SubBlock, float]  # of every sub-block of the kind, by depth
    order: list[SubBlock]  # what may be dropped, first dropped first


class Size(NamedTuple):
    """The size of a pruned model: parameters, and bytes of keys and values for ``CONTEXT`` tokens."""

    parameters: int
    cache: float


class Cost(NamedTuple):
    """The cost of a selection on held-out text."""

    loss: Estimate
    kl: Estimate


class _Stoppable(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores, **_):
        report_step("generating", 0, None)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Explorer:
    """One model at a time with all results for it: nothing is computed twice.

    Slow methods (``use``, ``size``, ``cost``, ``sample``, ``save``) wait for each other, as a model without some sub-blocks is the
    model itself for a while; ``known`` answers at once.
    """

    def __init__(self, profile: Profile | None = None, n_sequences: int = N_SEQUENCES, n_tokens: int = N_TOKENS):
        profile = profile or Profile()
        self.settings = Settings(profile.model, text=profile.text, seed=profile.seed)
        self.n_sequences, self.n_tokens = n_sequences, n_tokens
        self._model_lock, self._queue = threading.Lock(), threading.Lock()
        self.model = self.tokenizer = self.ranking = None
        self._opened = ""

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Alone with the model. Who waits holds the queue, so that a thread with much to do cannot come back before it."""
        with self._queue:
            self._model_lock.acquire()
        try:
            yield
        finally:
            self._model_lock.release()

    def use(self, settings: Settings | None = None) -> Ranking:
        """Load the model and score the calibration text where these settings ask for it; the ranking.

        Raises:
            ValueError: a model, text or setting that does not exist or does not fit; what was used before stays.
            ModelUnavailable: the model is not available.
        """
        settings = settings or self.settings
        with self._turn():
            metrics = settings.metrics()
            if settings.model != self._opened:
                self._open(settings)
            key = replace(settings, kind="attention", prompt="")
            if key not in self._scores:
                self._scores[key] = self._score(settings, metrics)
            scores, curve, entropy = self._scores[key]
            mean = scores[(scores.kind == settings.kind) & (scores.metric == settings.metric)].groupby("layer").value.mean()
            importance = {SubBlock(int(layer), settings.kind): float(value) for layer, value in mean.items()}
            order = selection.one_shot(scores, settings.metric, settings.kind)
            self.settings, self.ranking = settings, Ranking(curve, entropy, importance, order)
            return self.ranking

    def _open(self, settings: Settings) -> None:
        check_model(settings.model)
        report_step("loading the model", 0, None)
        model, tokenizer = load_model(settings.model)
        find(model, "attention")  # a model that is no decoder is refused here
        held_out = text.windows(DEFAULT_TEXT, "evaluation", tokenizer, self.n_sequences, self.n_tokens, settings.seed)
        losses = IncrementalLosses(model, held_out)
        self.model, self.tokenizer, self._cost = model, tokenizer, losses
        self._scores, self._sizes, self._samples, self._opened = {}, {}, {}, settings.model

    def _score(self, settings: Settings, metrics: dict[str, scoring.Metric]):
        if settings.pasted.strip():
            windows = pasted_windows(settings.pasted, self.tokenizer, self.n_sequences, self.n_tokens)
        else:
            windows = text.windows(settings.text, "calibration", self.tokenizer, self.n_sequences, self.n_tokens, settings.seed)
        entropy = next(name for name, metric in metrics.items() if scoring.is_entropy(metric))
        scores = cached_score(self.model, windows, metrics)
        curve = cached_entropies(self.model, windows, {entropy: metrics[entropy]})  # measured for the scores already
        return scores, curve.groupby("endpoint").value.mean().to_numpy(), entropy

    def known(self, drop: Iterable[SubBlock]) -> tuple[Size | None, Cost | None, str | None]:
        """The results that exist without these sub-blocks."""
        key = tuple(sorted(drop))
        cost = self._cost.results.get(key)
        return self._sizes.get(key), cost and Cost(*cost), self._samples.get((key, self.settings.prompt))

    @torch.inference_mode()
    def size(self, drop: Iterable[SubBlock]) -> Size:
        """Parameters and cache as counted on the model without these sub-blocks, not as computed from its config."""
        key = tuple(sorted(drop))
        with self._turn():
            if key not in self._sizes:
                with dropped(self.model, key) as model:
                    ids = torch.zeros(1, 8, dtype=torch.long, device=model.device)
                    layers = model(ids, use_cache=True).past_key_values.layers
                    kept = [part for layer in layers for part in (layer.keys, layer.values) if isinstance(part, Tensor)]
                    self._sizes[key] = Size(model.num_parameters(), sum(part.nbytes for part in kept) / ids.shape[1] * CONTEXT)
            return self._sizes[key]

    def cost(self, drop: Iterable[SubBlock]) -> Cost:
        """Loss and divergence from the dense model on held-out text."""
        with self._turn():
            return Cost(*self._cost(drop))

    @torch.inference_mode()
    def sample(self, drop: Iterable[SubBlock]) -> str:
        """The greedy continuation of the prompt."""
        key, prompt = tuple(sorted(drop)), self.settings.prompt
        with self._turn():
            if (key, prompt) not in self._samples:
                if not prompt.strip():
                    raise ValueError("the prompt is empty: there is nothing to go on from")
                ids = torch.tensor([self.tokenizer(prompt).input_ids], device=self.model.device)
                greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "max_new_tokens": NEW_TOKENS}
                pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
                with dropped(self.model, key) as model:
                    stop = StoppingCriteriaList([_Stoppable()])
                    mask = torch.ones_like(ids)
                    told = model.generate(ids, attention_mask=mask, pad_token_id=pad, stopping_criteria=stop, **greedy)
                self._samples[key, prompt] = self.tokenizer.decode(told[0, ids.shape[1] :], skip_special_tokens=True)
            return self._samples[key, prompt]

    def save(self, drop: Iterable[SubBlock], path: str) -> Path:
        """Write the model without these sub-blocks for ``load_pruned``; a relative folder is under the project's own."""
        if not path.strip():
            raise ValueError("name a folder to save the pruned model in")
        folder = ROOT / Path(path.strip()).expanduser()
        with self._turn():
            report_step("saving", 0, None)
            return save_pruned(remove(copy.deepcopy(self.model), drop), folder, self.tokenizer)

    def folder(self, drop: list[SubBlock]) -> str:
        """A name for what ``save`` writes."""
        return f"build/pruned/{slug(self.settings.model)}-without-{len(drop)}-{self.settings.kind}"

    def code(self, drop: Iterable[SubBlock]) -> str:
        """A notebook cell that has this model and selection."""
        chosen = "".join(f'    SubBlock({layer}, "{kind}"),\n' for layer, kind in drop)
        return (
            "from entrodrop_utils import SubBlock, dropped, load_model\n\n"
            f"model, tokenizer = load_model({self.settings.model!r})\n"
            f"drop_set = [  # first dropped first\n{chosen}]\nwith dropped(model, drop_set):\n"
            '    print(f"{model.num_parameters():,} parameters")\n'
        )


def pasted_windows(pasted: str, tokenizer, n_sequences: int, n_tokens: int) -> Int[Tensor, "sequence token"]:
    """Pasted text as windows of at most ``n_tokens`` tokens; the rest of the last one is left out.

    Raises:
        ValueError: too little text for one short window.
    """
    ids = tokenizer(pasted).input_ids
    tokens = min(n_tokens, len(ids))
    if tokens < (least := 32):
        raise ValueError(f"the pasted text has {len(ids)} tokens: at least {least} are needed to estimate an entropy")
    sequences = min(n_sequences, len(ids) // tokens)
    return torch.tensor(ids[: sequences * tokens]).view(sequences, tokens)
