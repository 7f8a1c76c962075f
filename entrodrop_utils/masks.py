"""Which tokens attend to which: the same trained model under another attention pattern."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from .self_check import state_of
from .sub_blocks import layers

# query position, key position -> whether that query may attend to that key, on top of what the model itself allows
Rule = Callable[[Int[Tensor, "query 1"], Int[Tensor, "1 key"]], Bool[Tensor, "query key"]]


@contextmanager
def attending(model: nn.Module, rule: Rule) -> Iterator[nn.Module]:
    """The decoder, in which tokens attend to others only where ``rule(query, key)`` allows; as it was when the context is left.

    Causality and a layer's own sliding window still hold: the rule can only take away. For whole sequences without padding or
    cache, with eager or scaled-dot-product attention, which are those that read a mask of (1, 1, query, key).

    Raises:
        ValueError: another attention implementation; in a forward pass, a token that would attend to nothing, or a family whose
            layers are not handed their mask.
    """
    kind = model.config._attn_implementation
    if kind not in ("eager", "sdpa"):
        raise ValueError(f"{type(model).__name__} runs {kind} attention, which takes no mask: load it with eager or sdpa attention")

    def limit(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = inspect.signature(layer.forward).bind(*args, **kwargs)  # some families hand it over by position
        if "attention_mask" not in given.arguments:
            raise ValueError(f"{type(layer).__name__} is not given its attention mask, so it cannot be changed")
        state, own = state_of(args, kwargs), given.arguments["attention_mask"]
        query = torch.arange(state.shape[1], device=state.device)[:, None]
        allowed = (query >= query.T) & rule(query, query.T)
        if not allowed.any(-1).all():
            raise ValueError(f"the rule lets token {int(allowed.any(-1).int().argmin())} attend to nothing, not even itself")
        least = torch.finfo(state.dtype).min
        mask = torch.zeros(allowed.shape, dtype=state.dtype, device=state.device).masked_fill(~allowed, least)
        if own is not None:  # none stands for causal
            mask = torch.minimum(mask, torch.zeros_like(mask).masked_fill(~own, least) if own.dtype == torch.bool else own)
        given.arguments["attention_mask"] = mask.expand(1, 1, *allowed.shape)
        return given.args, given.kwargs

    with ExitStack() as stack:
        for layer in layers(model):
            stack.callback(layer.register_forward_pre_hook(limit, with_kwargs=True).remove)
        yield model
