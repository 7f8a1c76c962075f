"""Text in a model: the loss of each token, the likeliest next ones, greedy continuations and how fast they come."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from .attention import cache_bytes
from .families.self_check import measuring
from .progress import report_step


class Reading(NamedTuple):
    """What a model makes of a text: its tokens, the loss of each but the first, and after each the likeliest next tokens."""

    tokens: list[str]
    losses: Float[np.ndarray, " token"]  # nats; nan for the first token
    candidates: list[list[tuple[str, float]]]  # (token, probability), likeliest first


@measuring
def read_text(model: PreTrainedModel, tokenizer, text: str, n_tokens: int = 128, n_candidates: int = 5) -> Reading:
    """The loss of each of the first ``n_tokens`` tokens of a text, and the ``n_candidates`` likeliest tokens after each."""
    ids = torch.tensor([tokenizer(text).input_ids[:n_tokens]], device=model.device)
    log_p = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
    losses = -log_p[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    values, indices = log_p.topk(n_candidates)
    pairs = zip(indices.tolist(), values.exp().tolist(), strict=True)
    candidates = [[(tokenizer.decode([i]), p) for i, p in zip(*row, strict=True)] for row in pairs]
    return Reading([tokenizer.decode([i]) for i in ids[0].tolist()], np.array([math.nan, *losses.tolist()]), candidates)


class _Heard(StoppingCriteria):
    """Passes on what was generated so far; a step of progress, so a listener can end the work here."""

    def __init__(self, hear: Callable[[Tensor], None]):
        self.hear = hear

    def __call__(self, input_ids: Tensor, scores, **_):
        report_step("generating", 0, None)
        self.hear(input_ids[0])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _generate(model: PreTrainedModel, tokenizer, prompt: str, n_tokens: int, hear: Callable[[Tensor], None]) -> None:
    ids = torch.tensor([tokenizer(prompt).input_ids], device=model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "max_new_tokens": n_tokens}
    stop = StoppingCriteriaList([_Heard(lambda said: hear(said[ids.shape[1] :]))])
    model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=pad, stopping_criteria=stop, **greedy)


@measuring
def continue_text(
    model: PreTrainedModel, tokenizer, prompt: str, n_tokens: int, hear: Callable[[str], None] = lambda _: None
) -> str:
    """The greedy continuation of a prompt by at most ``n_tokens`` tokens.

    Args:
        hear: called with what there is of it after each token.
    Raises:
        ValueError: the prompt is empty.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty: there is nothing to go on from")
    texts = [""]

    def decoded(ids: Tensor) -> None:
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
        hear(texts[-1])

    _generate(model, tokenizer, prompt, n_tokens, decoded)
    return texts[-1]


@measuring
def decoding_rate(model: PreTrainedModel, tokenizer, prompt: str, n_tokens: int = 9, rounds: int = 3) -> float:
    """Tokens per second of greedy generation with a cache, one sequence: the best of some runs; nan where it stops at once."""
    rates = []
    for _ in range(rounds):
        times: list[float] = []
        _generate(model, tokenizer, prompt, n_tokens, lambda _, times=times: times.append(time.perf_counter()))
        rates.append((len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else math.nan)
    return max(rates)


class ModelSize(NamedTuple):
    """The size of a model: parameters, and bytes of keys and values per token of context."""

    parameters: int
    cache: float


@measuring
def model_size(model: PreTrainedModel, n_tokens: int = 8) -> ModelSize:
    """Parameters and cache as counted on the model after ``n_tokens`` tokens, not as computed from its config."""
    ids = torch.zeros(1, n_tokens, dtype=torch.long, device=model.device)
    return ModelSize(model.num_parameters(), cache_bytes(model(ids, use_cache=True).past_key_values) / n_tokens)
