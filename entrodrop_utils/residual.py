"""The residual stream before and after every sub-block of one forward pass.

A model of L layers has 2 L + 1 positions: 2 l is the input of layer l, 2 l + 1 the stream after its attention, 2 L what the last
layer leaves, before the final norm. (`output_hidden_states[-1]` of transformers is past that norm, so it is never used.)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .sub_blocks import SubBlock, layers, layout, module

Callback = Callable[[int, Float[Tensor, "batch token dim"]], None]


def positions(sub_block: SubBlock) -> tuple[int, int]:
    """The positions of a sub-block's input and output."""
    first = 2 * sub_block.layer
    return {"attention": (first, first + 1), "mlp": (first + 1, first + 2), "block": (first, first + 2)}[sub_block.kind]


@contextmanager
def watch(model: nn.Module, seen: Callback) -> Iterator[None]:
    """While open, every forward pass calls ``seen(position, state)`` for each position in order; states are not kept.

    Hooks only read, and are gone when the context is left, also when its body raises.
    """
    where, blocks, handles = layout(model), layers(model), []

    def first_argument(args: tuple, kwargs: dict) -> Tensor:
        return args[0] if args else kwargs["hidden_states"]

    try:
        for i, layer in enumerate(blocks):

            def before(_, args, kwargs, i=i):
                seen(2 * i, first_argument(args, kwargs))

            def between(_, args, kwargs, i=i):
                seen(2 * i + 1, first_argument(args, kwargs))

            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            middle = module(layer, where.after_attention)
            handles.append(middle.register_forward_pre_hook(between, with_kwargs=True))

        def after(_, args, output):
            seen(2 * len(blocks), output[0] if isinstance(output, tuple) else output)

        handles.append(blocks[-1].register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def states(model: nn.Module, input_ids: Int[Tensor, "batch token"]) -> Float[Tensor, "position batch token dim"]:
    """The stream at all 2 L + 1 positions, in the model's dtype, from one forward pass."""
    found: list[Tensor] = []
    with watch(model, lambda _, state: found.append(state.clone())):
        model.base_model(input_ids.to(model.device), use_cache=False)
    return torch.stack(found)
