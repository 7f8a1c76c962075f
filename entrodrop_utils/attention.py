"""Attention of a trained model: under restricted attention patterns, and the share that goes to the first token."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from .families.decoder import decoder_layers
from .families.self_check import input_state, measuring
from .progress import progress
from .residual import check_tokens

# query position, key position -> whether that query may attend to that key, on top of what the model itself allows
Rule = Callable[[Int[Tensor, "query 1"], Int[Tensor, "1 key"]], Bool[Tensor, "query key"]]


@contextmanager
def restricted(model: nn.Module, rule: Rule) -> Iterator[nn.Module]:
    """The decoder with attention only where ``rule(query, key)`` allows it; as before when the context closes.

    Causality and a layer's own sliding window still hold: the rule can only remove. For whole sequences without padding or cache,
    with eager or scaled-dot-product attention, which read a mask of (1, 1, query, key).

    Raises:
        ValueError: another attention implementation; in a forward pass, a token that would attend to nothing, or a family whose
            layers do not receive their mask.
    """
    kind = model.config.get_text_config(decoder=True)._attn_implementation
    if kind not in ("eager", "sdpa"):
        raise ValueError(f"{type(model).__name__} runs {kind} attention, which takes no mask: load it with eager or sdpa attention")

    def limit(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = inspect.signature(layer.forward).bind(*args, **kwargs)  # some families pass the mask by position
        if "attention_mask" not in given.arguments:
            raise ValueError(f"{type(layer).__name__} does not receive its attention mask, so it cannot be restricted")
        state, own = input_state(args, kwargs), given.arguments["attention_mask"]
        query = torch.arange(state.shape[1], device=state.device)[:, None]
        allowed = (query >= query.T) & rule(query, query.T)
        if not allowed.any(-1).all():
            raise ValueError(f"the rule lets token {int(allowed.any(-1).int().argmin())} attend to nothing, not even itself")
        least = torch.finfo(state.dtype).min
        mask = torch.zeros(allowed.shape, dtype=state.dtype, device=state.device).masked_fill(~allowed, least)
        if own is not None:  # None means causal
            mask = torch.minimum(mask, torch.zeros_like(mask).masked_fill(~own, least) if own.dtype == torch.bool else own)
        given.arguments["attention_mask"] = mask.expand(1, 1, *allowed.shape)
        return given.args, given.kwargs

    with ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.callback(layer.register_forward_pre_hook(limit, with_kwargs=True).remove)
        yield model


@measuring
def attention_on(model: PreTrainedModel, windows: Int[Tensor, "window token"], position: int) -> Float[np.ndarray, " layer"]:
    """The share of attention that the token at a position of a window receives from the later ones, for each layer.

    Mean over heads, windows and all later queries; in a decoder the earlier ones do not see the token.
    """
    check_tokens(model, windows)
    with _eager_attention(model):
        shares = [
            [float(weights[..., position + 1 :, position].float().mean()) for weights in _attentions(model, window)]
            for window in progress(windows, f"attention on token {position}")
        ]
    return np.array(shares).mean(0)


def attention_on_first(model: PreTrainedModel, windows: Int[Tensor, "window token"]) -> Float[np.ndarray, " layer"]:
    """``attention_on`` the first token.

    A large share is the attention sink of "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453).
    """
    return attention_on(model, windows, 0)


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model with eager attention while open, as fused kernels do not return their weights."""
    before = [(config, config._attn_implementation) for config in _nested(model.config)]
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        for config, implementation in before:  # setting one also sets those in it, which come later
            config._attn_implementation = implementation


def _nested(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and those in it, whose attention may differ."""
    yield config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from _nested(part)


def _attentions(model: PreTrainedModel, window: Int[Tensor, " token"]) -> tuple[Float[Tensor, "1 head query key"], ...]:
    return model.base_model(window[None].to(model.device), output_attentions=True, use_cache=False).attentions


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that a cache holds; layers without attention hold none."""
    parts = (part for layer in cache.layers for part in (layer.keys, layer.values))
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))
