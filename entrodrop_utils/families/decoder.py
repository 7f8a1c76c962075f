"""The decoder layers of a model, and the layout that fits them."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from .layouts import LAYER_LISTS, LAYOUTS, STACKS, Layout
from .modeling_entrodrop import is_bypass
from .self_check import Capture, evaluation_mode, find_mismatch, sample_ids

HOW_TO_ADD = "see entrodrop_utils/families/README.md"


class UnsupportedModel(ValueError):
    """The model's decoder layers have no layout that this package knows."""


def _stacks(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that may hold the list of layers: the model without its head, and the stacks in it."""
    inner = getattr(model, "base_model", model)
    yield inner
    yield from (part for name, part in inner.named_children() if name in STACKS)


def _list_name(stack: nn.Module) -> str | None:
    lists = {name for name, part in stack.named_children() if isinstance(part, nn.ModuleList) and len(part)}
    return next((name for name in LAYER_LISTS if name in lists), None)


def decoder(model: nn.Module) -> nn.Module:
    """The part of a model that holds its layers. Raises UnsupportedModel where there is none, or more than one."""
    stacks = [stack for stack in _stacks(model) if _list_name(stack)]
    if len(stacks) == 1:
        return stacks[0]
    name = type(model).__name__
    if stacks:
        raise UnsupportedModel(
            f"{name} has layers in its decoder and in its encoder, so two residual streams: choose one, as in "
            "T5EncoderModel.from_pretrained or model.get_encoder()"
        )
    raise UnsupportedModel(
        f"{name} has no list of decoder layers: looked for {', '.join(LAYER_LISTS)} in the model and its {', '.join(STACKS)}; "
        f"add the name to LAYER_LISTS ({HOW_TO_ADD})"
    )


def layer_list(model: nn.Module) -> str:
    """The name under which ``decoder(model)`` keeps its layers."""
    return _list_name(decoder(model))


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers, in order. Raises UnsupportedModel where there is no list of them."""
    stack = decoder(model)
    return getattr(stack, _list_name(stack))


def is_dropped(layer: nn.Module, layout: Layout, kind: Literal["attention", "mlp"]) -> bool:
    """Whether a layer's branch was dropped."""
    return is_bypass(layer.get_submodule(next(iter(layout.branch(kind)))))


def _damaged(model: nn.Module) -> list[str]:
    """The weights that hold NaN or infinite values, and the buffers that hold NaN: a mask may be infinite."""
    weights = {name: weight.isfinite().all() for name, weight in model.named_parameters() if _may_be_nan(weight)}
    weights |= {name: ~buffer.isnan().any() for name, buffer in model.named_buffers() if _may_be_nan(buffer)}
    return [name for name, sound in weights.items() if not sound]


def _may_be_nan(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.element_size() > 1 and not weight.is_meta


@torch.no_grad()
def _computes_numbers(model: nn.Module) -> bool:
    """Whether the model's output holds no NaN, as it does where a state is past the range of a small dtype."""
    try:
        with evaluation_mode(model):
            return not model(sample_ids(model))[0].isnan().any()
    except Exception:  # it does not run at all, which the mismatch says
        return True


def find_layout(model: nn.Module, capture: Callable[..., Capture]) -> Layout:
    """The layout of the model's decoder layers, verified by the self-check on this model.

    Args:
        capture: reads the states that a layout describes (``residual.capture_layers``).
    Raises:
        UnsupportedModel: no layout has these modules, or the states of those that do are not the model's.
        ValueError: the weights hold NaN or infinite values, or the model computes NaN.
    """
    blocks, name = decoder_layers(model), type(model).__name__
    candidates = {key: layout for key, layout in LAYOUTS.items() if all(layout.fits(layer) for layer in blocks)}
    if not candidates:
        parts = [path for path, part in blocks[0].named_children() if list(part.parameters()) or is_bypass(part)]
        known = "; ".join(f"{key}: {', '.join(sorted(layout.modules))}" for key, layout in LAYOUTS.items())
        raise UnsupportedModel(
            f"the layers of {name} ({type(blocks[0]).__name__}: {', '.join(parts)}) have no known layout: looked for exactly the "
            f"modules of one of {known}. Add a layout to LAYOUTS ({HOW_TO_ADD})"
        )
    if any(parameter.is_meta for parameter in model.parameters()) and not hasattr(model, "hf_device_map"):
        return next(iter(candidates.values()))  # a model without weights computes nothing that could be wrong
    if damaged := _damaged(model):
        raise ValueError(
            f"{len(damaged)} weights of {name} hold NaN or infinite values, first {damaged[0]}: get a whole copy of it"
        )
    mismatches = {}
    for key, layout in candidates.items():
        try:
            mismatch = find_mismatch(model, blocks, layout, capture)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a wrong layout can break a forward pass in any way
            mismatch = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if mismatch is None:
            return layout
        mismatches[key] = mismatch
    if not _computes_numbers(model):
        raise ValueError(f"{name} computes NaN with sound weights in {model.dtype}: load it in float32")
    reasons = "; ".join(f"{key}: {mismatch}" for key, mismatch in mismatches.items())
    raise UnsupportedModel(
        f"{name} has the modules of a known layout, but the states read from it are not the model's ({reasons}). Scores and drops "
        f"would be silently wrong. Add its layout to LAYOUTS ({HOW_TO_ADD})"
    )
