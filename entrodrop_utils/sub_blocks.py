"""What a sub-block is, and where a model family keeps it."""

from dataclasses import dataclass
from operator import attrgetter
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Kind = Literal["attention", "mlp", "block"]
KINDS: tuple[Kind, ...] = ("attention", "mlp", "block")


class SubBlock(NamedTuple):
    """One attention layer, MLP or whole block; ``layer`` counts from 0 in the model it is used on."""

    layer: int
    kind: Kind

    def __str__(self) -> str:
        return f"{self.kind} {self.layer}"


class Nothing(nn.Module):
    """What stands where a branch was dropped: it adds zero to the residual stream and touches no cache."""

    def __init__(self, returns_tuple: bool):
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor | tuple[Tensor, None]:
        zero = torch.zeros_like(hidden_states)
        return (zero, None) if self.returns_tuple else zero  # attention returns its weights as well


@dataclass(frozen=True)
class Layout:
    """Where a decoder layer keeps its two branches: names of modules inside the layer.

    Every family adds ``attention`` and then ``mlp`` to the residual stream. ``after_attention`` is the module whose input is the
    stream between the two. ``*_norms`` are norms that serve that branch alone: they go when the branch goes.
    """

    attention: str
    mlp: str
    after_attention: str
    attention_norms: tuple[str, ...]
    mlp_norms: tuple[str, ...]

    def parts(self, kind: Kind) -> tuple[str, ...]:
        """The modules that make up a branch, the branch itself first."""
        return (self.attention, *self.attention_norms) if kind == "attention" else (self.mlp, *self.mlp_norms)


# A family is known by the modules of its decoder layer, not by its name: the first layout whose modules are all there, and
# which leaves no module of the layer unexplained, is the right one. Llama's layout also serves Mistral, Qwen2, Qwen3, ...
LAYOUTS = {
    "pre-norm": Layout("self_attn", "mlp", "post_attention_layernorm", ("input_layernorm",), ("post_attention_layernorm",)),
    "norms around each branch": Layout(  # Gemma 2 and 3
        "self_attn",
        "mlp",
        "pre_feedforward_layernorm",
        ("input_layernorm", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    "GPT-2": Layout("attn", "mlp", "ln_2", ("ln_1",), ("ln_2",)),
}
LAYER_LISTS = ("layers", "h")


class UnsupportedModel(ValueError):
    """The model's decoder layers are not laid out in a way this suite knows."""


def decoder(model: nn.Module) -> nn.Module:
    """The part of a causal language model that holds the decoder layers."""
    return getattr(model, "base_model", model)


def layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers, in order. Raises UnsupportedModel where there is no list of them."""
    inner = decoder(model)
    found = next((getattr(inner, name) for name in LAYER_LISTS if isinstance(getattr(inner, name, None), nn.ModuleList)), None)
    if found is None or len(found) == 0:
        raise UnsupportedModel(
            f"{type(model).__name__} keeps no list of decoder layers under any of {', '.join(LAYER_LISTS)}; "
            "add its name to LAYER_LISTS in entrodrop_utils/sub_blocks.py"
        )
    return found


def layout(model: nn.Module) -> Layout:
    """The layout of the model's decoder layers. Raises UnsupportedModel, naming what was looked for."""
    # A removed branch leaves an nn.Module in its place, so a pruned model still has its family's layout.
    names = {name for name, _ in layers(model)[0].named_children()} - {"attention_dropout", "resid_dropout", "dropout"}
    for candidate in LAYOUTS.values():
        if set(candidate.parts("attention") + candidate.parts("mlp")) == names:
            return candidate
    known = "; ".join(f"{k}: {', '.join(v.parts('attention') + v.parts('mlp'))}" for k, v in LAYOUTS.items())
    raise UnsupportedModel(
        f"a decoder layer of {type(model).__name__} has the modules {', '.join(sorted(names))}, and no known layout "
        f"({known}) has exactly these; add one to LAYOUTS in entrodrop_utils/sub_blocks.py"
    )


def module(layer: nn.Module, path: str) -> nn.Module:
    """The module of a decoder layer under a dotted name."""
    return attrgetter(path)(layer)


def find(model: nn.Module, kind: Kind) -> list[SubBlock]:
    """All sub-blocks of one kind that the model still has, in order of depth.

    Raises:
        ValueError: an unknown kind.
        UnsupportedModel: a family whose layers are laid out in an unknown way.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(KINDS)}")
    where = layout(model)
    branches = [layer if kind == "block" else module(layer, where.parts(kind)[0]) for layer in layers(model)]
    return [SubBlock(i, kind) for i, branch in enumerate(branches) if not isinstance(branch, Nothing)]
