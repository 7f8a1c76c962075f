"""The residual stream before and after every sub-block of one forward pass.

A model of L layers has 2 L + 1 positions: 2 l is the input of layer l, 2 l + 1 the stream after its attention, 2 L what the last
layer leaves, before the final norm. (`output_hidden_states[-1]` of transformers is past that norm, so it is never used.) Where a
layer adds both branches to its input at once, the attention counts as the first.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from .progress import progress
from .self_check import observe
from .sub_blocks import SubBlock, layers, layout

Callback = Callable[[int, Float[Tensor, "batch token dim"]], None]


def positions(sub_block: SubBlock) -> tuple[int, int]:
    """The positions of a sub-block's input and output."""
    first = 2 * sub_block.layer
    return {"attention": (first, first + 1), "mlp": (first + 1, first + 2), "block": (first, first + 2)}[sub_block.kind]


@contextmanager
def watch(model: nn.Module, seen: Callback) -> Iterator[None]:
    """While open, every forward pass calls ``seen(position, state)`` for each position in order; states are not kept.

    Hooks only read, and are gone when the context is left, also when its body raises.

    Raises:
        UnsupportedModel: the family is not known, or its states would not add up to the model's output.
    """
    with observe(layers(model), layout(model), seen):
        yield


@torch.inference_mode()
def states(model: nn.Module, input_ids: Int[Tensor, "batch token"]) -> Float[Tensor, "position batch token dim"]:
    """The stream at all 2 L + 1 positions, in the model's dtype, from one forward pass."""
    found: list[Tensor] = []
    with watch(model, lambda _, state: found.append(state.clone())):
        model.base_model(input_ids.to(model.device), use_cache=False)
    return torch.stack(found)


@torch.inference_mode()
def attention_on_first(model: PreTrainedModel, windows: Int[Tensor, "window token"]) -> Float[np.ndarray, "layer"]:
    """The share of their attention that the later tokens of a window pay to its first one, layer by layer.

    Mean over heads, over all queries but the first (which in a decoder sees nothing else) and over windows. What shows here are the
    attention sinks of "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453).
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the fused kernels do not hand out their weights
    try:
        found = [
            [float(weights[..., 1:, 0].float().mean()) for weights in _attentions(model, window)]
            for window in progress(windows, "attention on the first token")
        ]
    finally:
        model.set_attn_implementation(before)
    return np.array(found).mean(0)


def _attentions(model: PreTrainedModel, window: Int[Tensor, "token"]) -> tuple[Float[Tensor, "1 head query key"], ...]:
    return model.base_model(window[None].to(model.device), output_attentions=True, use_cache=False).attentions
