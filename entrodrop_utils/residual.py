"""The residual stream of a model: its sub-blocks, and its state before and after each of them.

A model of L layers has 2 L + 1 endpoints: 2 l is the input of layer l, 2 l + 1 the stream after its attention, 2 L the output of
the last layer, before the final norm. (``output_hidden_states[-1]`` of transformers is past that norm, so it is never used.) Where
a layer adds both branches to its input at once, the attention counts as the first.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .families.decoder import decoder, decoder_layers, find_layout, is_dropped
from .families.layouts import Layout
from .families.self_check import input_state, measuring, output_state

Kind = Literal["attention", "mlp", "block"]
KINDS: tuple[Kind, ...] = ("attention", "mlp", "block")
Callback = Callable[[int, Float[Tensor, "batch token dim"]], None]


class SubBlock(NamedTuple):
    """One attention layer, MLP or whole block; ``layer`` counts from 0 in the model at hand.

    >>> SubBlock(11, "attention")
    SubBlock(layer=11, kind='attention')
    >>> print(SubBlock(11, "attention"))
    attention 11
    """

    layer: int
    kind: Kind

    def __str__(self) -> str:
        return f"{self.kind} {self.layer}"


_verified: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()


def layout_of(model: nn.Module) -> Layout:
    """The layout of the model's decoder layers, verified by a self-check on first use.

    Raises:
        UnsupportedModel: no known layout has these modules, or its states are not the model's.
    """
    stack = decoder(model)
    if stack not in _verified:
        _verified[stack] = find_layout(model, capture_layers)
    return _verified[stack]


def find(model: nn.Module, kind: Kind | str) -> list[SubBlock]:
    """All sub-blocks of one kind that the model has, in order of depth.

    Raises:
        ValueError: an unknown kind.
        UnsupportedModel: as ``layout_of``.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(KINDS)}")
    layout = layout_of(model)
    return [
        SubBlock(i, kind) for i, layer in enumerate(decoder_layers(model)) if kind == "block" or not is_dropped(layer, layout, kind)
    ]


def endpoints(sub_block: SubBlock) -> tuple[int, int]:
    """The endpoints of a sub-block: its input and its output."""
    first = 2 * sub_block.layer
    return {"attention": (first, first + 1), "mlp": (first + 1, first + 2), "block": (first, first + 2)}[sub_block.kind]


@contextmanager
def capture_layers(layers: nn.ModuleList, layout: Layout, callback: Callback) -> Iterator[None]:
    """``capture`` for the layers of a model and their layout."""
    entered: dict[int, Tensor] = {}
    with ExitStack() as stack:

        def attach(handle) -> None:
            stack.callback(handle.remove)

        for i, layer in enumerate(layers):

            def before(_, args, kwargs, i=i):
                entered[i] = input_state(args, kwargs)
                callback(2 * i, entered[i])

            def between(_, args, kwargs, i=i):  # some families flatten the tokens of a batch
                callback(2 * i + 1, input_state(args, kwargs).view_as(entered.pop(i)))

            def parallel(_, args, output, i=i):
                callback(2 * i + 1, entered.pop(i) + output_state(output))

            attach(layer.register_forward_pre_hook(before, with_kwargs=True))
            if layout.between is None:
                attach(layer.get_submodule(next(iter(layout.attention))).register_forward_hook(parallel))
            else:
                attach(layer.get_submodule(layout.between).register_forward_pre_hook(between, with_kwargs=True))
        attach(layers[-1].register_forward_hook(lambda _, args, output: callback(2 * len(layers), output_state(output))))
        yield


@contextmanager
def capture(model: nn.Module, callback: Callback) -> Iterator[None]:
    """While open, every forward pass calls ``callback(endpoint, state)`` for each endpoint in order.

    The hooks only read. They are removed when the context closes, also after an error.

    Raises:
        UnsupportedModel: as ``layout_of``.
    """
    with capture_layers(decoder_layers(model), layout_of(model), callback):
        yield


def _n_positions(model: nn.Module) -> int | None:
    """How many tokens the model can read at once, by its config; None where that names no limit."""
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    tables = (part for name, part in model.named_modules() if isinstance(part, nn.Embedding) and "position" in name.split(".")[-1])
    first = next((part.padding_idx + 1 for part in tables if part.padding_idx is not None), 0)  # RoBERTa counts from there
    return limit - first if limit else None


def check_tokens(model: nn.Module, ids: Int[Tensor, "*batch token"]) -> None:
    """Refuse tokens that the model cannot read, before anything runs.

    Raises:
        ValueError: more tokens than the model has positions, a negative id, or one past its embedding.
    """
    positions = _n_positions(model)
    if positions is not None and ids.shape[-1] > positions:
        raise ValueError(
            f"windows of {ids.shape[-1]} tokens are longer than the {positions} positions of the model: use shorter ones"
        )
    rows = model.get_input_embeddings().num_embeddings
    if ids.numel() and int(ids.min()) < 0:
        raise ValueError(f"token {int(ids.min())} is negative: a window holds the ids of whole text, without padding or masks")
    if ids.numel() and int(ids.max()) >= rows:
        raise ValueError(
            f"token {int(ids.max())} is past the {rows} rows of the model's embedding: the tokenizer belongs to another model"
        )


@measuring
def states(model: nn.Module, input_ids: Int[Tensor, "batch token"]) -> Float[Tensor, "endpoint batch token dim"]:
    """The stream at all 2 L + 1 endpoints, in the model's dtype, from one forward pass.

    Raises:
        ValueError: as ``check_tokens``.
    """
    check_tokens(model, input_ids)
    stream: list[Tensor] = []
    with capture(model, lambda _, state: stream.append(state.clone())):  # some models change it in place later
        model.base_model(input_ids.to(model.device), use_cache=False)
    return torch.stack(stream)
