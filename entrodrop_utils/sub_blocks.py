"""What a sub-block is, and which of them a model has."""

from collections.abc import Iterator
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

from .families import LAYER_LISTS, LAYOUTS, STACKS, Layout
from .modeling_entrodrop import is_stand_in
from .self_check import objection

Kind = Literal["attention", "mlp", "block"]
KINDS: tuple[Kind, ...] = ("attention", "mlp", "block")
ADD = "see entrodrop_utils/families.py, and the README on how to add a family"


class SubBlock(NamedTuple):
    """One attention layer, MLP or whole block; ``layer`` counts from 0 in the model it is used on."""

    layer: int
    kind: Kind

    def __str__(self) -> str:
        return f"{self.kind} {self.layer}"


class UnsupportedModel(ValueError):
    """The model's decoder layers are not laid out in a way this suite knows."""


def _homes(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that may hold the list of layers: the model without its head, and the stacks in it."""
    inner = getattr(model, "base_model", model)
    yield inner
    yield from (part for name, part in inner.named_children() if name in STACKS)


def _list_name(home: nn.Module) -> str | None:
    lists = {name for name, part in home.named_children() if isinstance(part, nn.ModuleList) and len(part)}
    return next((name for name in LAYER_LISTS if name in lists), None)


def decoder(model: nn.Module) -> nn.Module:
    """The part of a model that holds its layers. Raises UnsupportedModel where there is none, or more than one."""
    found = [home for home in _homes(model) if _list_name(home)]
    if len(found) == 1:
        return found[0]
    name = type(model).__name__
    if found:
        raise UnsupportedModel(
            f"{name} has a stack of layers in its decoder and one in its encoder, so two residual streams: name one, as in "
            "T5EncoderModel.from_pretrained or model.get_encoder()"
        )
    raise UnsupportedModel(
        f"{name} keeps no list of decoder layers: looked for {', '.join(LAYER_LISTS)} in the model and its {', '.join(STACKS)}; "
        f"add the name to LAYER_LISTS ({ADD})"
    )


def layer_list(model: nn.Module) -> str:
    """The name under which ``decoder(model)`` keeps its layers."""
    return _list_name(decoder(model))


def layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers, in order. Raises UnsupportedModel where there is no list of them."""
    home = decoder(model)
    return getattr(home, _list_name(home))


_proven: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()


def layout(model: nn.Module) -> Layout:
    """The layout of the model's decoder layers, proven on first use of a model by one short self-check.

    Raises:
        UnsupportedModel: no known layout has these modules, or those that do give states that do not add up; the message says what
            was looked for.
    """
    home = decoder(model)
    if home not in _proven:
        _proven[home] = _resolve(model)
    return _proven[home]


def layout_name(model: nn.Module) -> str:
    """The name of the model's layout in the table of families."""
    where = layout(model)
    return next(name for name, candidate in LAYOUTS.items() if candidate is where)


def _resolve(model: nn.Module) -> Layout:
    blocks, name = layers(model), type(model).__name__
    candidates = {key: where for key, where in LAYOUTS.items() if all(where.explains(layer) for layer in blocks)}
    if not candidates:
        parts = [path for path, part in blocks[0].named_children() if list(part.parameters()) or is_stand_in(part)]
        known = "; ".join(f"{key}: {', '.join(sorted(where.modules))}" for key, where in LAYOUTS.items())
        raise UnsupportedModel(
            f"the layers of {name} ({type(blocks[0]).__name__}: {', '.join(parts)}) have no known layout: looked for exactly the "
            f"modules of one of {known}. Add a layout to LAYOUTS ({ADD})"
        )
    if any(parameter.is_meta for parameter in model.parameters()) and not hasattr(model, "hf_device_map"):
        return next(iter(candidates.values()))  # a model without weights computes nothing that could be wrong
    objections = {}
    for key, where in candidates.items():
        try:
            against = objection(model, blocks, where)
        except Exception as error:  # a wrong layout can break a forward pass in any way
            against = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if against is None:
            return where
        objections[key] = against
    reasons = "; ".join(f"{key}: {against}" for key, against in objections.items())
    raise UnsupportedModel(
        f"{name} has the modules of a known layout, but its states do not add up to its own output ({reasons}). Scores and drops "
        f"would be silently wrong. Add the layout that it has to LAYOUTS ({ADD})"
    )


def find(model: nn.Module, kind: Kind | str) -> list[SubBlock]:
    """All sub-blocks of one kind that the model still has, in order of depth.

    Raises:
        ValueError: an unknown kind.
        UnsupportedModel: a family whose layers are laid out in an unknown way.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(KINDS)}")
    where = layout(model)
    return [SubBlock(i, kind) for i, layer in enumerate(layers(model)) if kind == "block" or not is_gone(layer, where, kind)]


def is_gone(layer: nn.Module, where: Layout, kind: Literal["attention", "mlp"]) -> bool:
    """Whether a layer's branch was dropped."""
    return is_stand_in(layer.get_submodule(next(iter(where.branch(kind)))))
