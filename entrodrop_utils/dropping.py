"""Dropping: the model without some sub-blocks while a context is open, and exactly as before afterwards."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .families.decoder import UnsupportedModel, decoder, decoder_layers, is_dropped, layer_list
from .families.edits import Edit, depth_configs, keep_layers
from .families.modeling_entrodrop import Bypass, require_cache_without_gaps
from .families.self_check import contributing_zero, equal, evaluation_mode, has_module, sample_ids
from .residual import SubBlock, find, layout_of


@dataclass(frozen=True)
class Repair:
    """What replaces dropped sub-blocks (``repairing.repair`` fits it).

    Attributes:
        maps: sub-block -> the affine map whose value is added to the stream in its place: ``bias`` (dim); ``weight`` (dim, dim), or
            ``down`` (rank, dim) and ``up`` (dim, rank), of the branch's input; or ``patch`` (dim, dim), of the stream. A drop uses
            those it needs.
        about: what it is and how it was fitted, for the model card.
        fit: one row per map, where it was fitted.
        changed: name of a weight in the list of decoder layers ("4.mlp.down_proj.weight") -> its new value. Nothing is added to
            the model.
        drop_set: the sub-blocks, sorted, for which the weights were changed; it repairs no other set.
    """

    maps: Mapping[SubBlock, Mapping[str, Tensor]]
    about: str = ""
    fit: pd.DataFrame | None = None
    changed: Mapping[str, Tensor] = field(default_factory=dict)
    drop_set: tuple[SubBlock, ...] = ()

    @property
    def by_layer(self) -> bool:
        """Whether every layer is repaired by what stands in that layer, so that layers can run by themselves."""
        return not self.changed and not any("patch" in maps for maps in self.maps.values())

    def check(self, drop_set: Iterable[SubBlock]) -> None:
        """Refuse a set that it does not repair. Raises ValueError with the sub-block."""
        if self.changed and tuple(sorted(drop_set)) != self.drop_set:
            fitted = ", ".join(map(str, self.drop_set))
            raise ValueError(f"the repair changes weights for the drop of {fitted}: fit it again for another set")
        if missing := [sub_block for sub_block in drop_set if sub_block not in self.maps]:
            raise ValueError(f"the repair has nothing in place of {missing[0]}: fit it on all sub-blocks to drop")


def as_branches(drop_set: list[SubBlock], repair: Repair | None) -> list[SubBlock]:
    """The set, with the attention and MLP of a block in place of a block that leaves a patch: the patch needs a layer to be in."""
    patched = [s for s in drop_set if repair and s.kind == "block" and repair.maps[s]]
    return [
        part for s in drop_set for part in ([SubBlock(s.layer, "attention"), SubBlock(s.layer, "mlp")] if s in patched else [s])
    ]


def check_drop_set(model: PreTrainedModel, sub_blocks: Iterable[SubBlock]) -> list[SubBlock]:
    """The sub-blocks as a list.

    Raises:
        ValueError: as ``dropped``; the message names the sub-block.
    """
    drop_set = [SubBlock(*sub_block) for sub_block in sub_blocks]
    if getattr(model, "is_quantized", False):
        raise ValueError("the model is quantised: load it dequantised (load_model does so for GGUF files) before dropping")
    present = {kind: find(model, kind) for kind in {kind for _, kind in drop_set}}
    layers, anchor = decoder_layers(model), layout_of(model).anchor
    for sub_block in drop_set:
        layer, kind = sub_block
        if sub_block not in present[kind]:
            gone = "was dropped before or " if 0 <= layer < len(layers) else ""
            raise ValueError(
                f"{sub_block} {gone}does not exist: the model has {len(layers)} layers, {len(present[kind])} with {kind}"
            )
        if drop_set.count(sub_block) > 1:
            raise ValueError(f"{sub_block} is named twice")
        if kind != "mlp" and has_module(layers[layer], anchor):
            raise ValueError(f"{sub_block} cannot be dropped: its {anchor.split('.')[-1]} serves the attention of all layers")
    blocks = {layer for layer, kind in drop_set if kind == "block"}
    if len(blocks) == len(layers):
        raise ValueError(f"cannot drop all {len(blocks)} blocks: nothing would be left of the model")
    if inside := [s for s in drop_set if s.kind != "block" and s.layer in blocks]:
        raise ValueError(f"{inside[0]} is part of block {inside[0].layer}, which is dropped as a whole")
    if drop_set and not set(find(model, "attention")) - {SubBlock(s.layer, "attention") for s in drop_set if s.kind != "mlp"}:
        raise ValueError("cannot drop every attention layer: without one no token sees another")
    return drop_set


def apply_drop(model: PreTrainedModel, drop_set: list[SubBlock], repair: Repair | None = None) -> Edit:
    """Drop a checked set in place; ``revert`` of the returned edit undoes it. An error leaves the model as it was.

    Raises:
        ValueError, RuntimeError, UnsupportedModel: as ``dropped``.
    """
    if repair is not None:
        repair.check(drop_set)
    for kind in dict.fromkeys(kind for _, kind in as_branches(drop_set, repair)):
        _verify_edit(model, kind)
    return _edit(model, drop_set, repair)


def _bypasses(model: PreTrainedModel, sub_block: SubBlock, repair: Repair | None) -> Iterator[tuple[str, Bypass]]:
    """(path in the layer, bypass) of every module of a branch that is dropped. A linear repair reads what the branch read, so the
    norm of its input stays. The patch of a block is in its attention.
    """
    layout, layer = layout_of(model), decoder_layers(model)[sub_block.layer]
    weight = next((weight for weight in layer.parameters() if not weight.is_meta), torch.empty(0, dtype=model.dtype))
    own = repair.maps.get(sub_block, {}) if repair else {}
    if repair and sub_block.kind == "attention":
        own = own or repair.maps.get(SubBlock(sub_block.layer, "block"), {})
    maps = {name: value.to(weight, copy=True) for name, value in own.items()}
    for number, (path, returns) in enumerate(layout.branch(sub_block.kind).items()):
        if number == 0:
            yield path, Bypass(returns, maps)
        elif path in layout.output_norms or not {"weight", "down"} & maps.keys():
            yield path, Bypass(returns)


def _edit(model: PreTrainedModel, drop_set: list[SubBlock], repair: Repair | None = None) -> Edit:
    edit, layout, layers = Edit(), layout_of(model), decoder_layers(model)
    drop_set = as_branches(drop_set, repair)
    try:
        for name, value in repair.changed.items() if repair else ():
            path, _, own = name.rpartition(".")
            module = layers.get_submodule(path)
            weight = getattr(module, own)
            edit.set(module, own, nn.Parameter(value.to(weight, copy=True), requires_grad=weight.requires_grad))
        for sub_block in drop_set:
            for path, bypass in _bypasses(model, sub_block, repair) if sub_block.kind != "block" else ():
                parent, _, name = path.rpartition(".")
                edit.set(layers[sub_block.layer].get_submodule(parent), name, bypass)
        blocks = {layer for layer, kind in drop_set if kind == "block"}
        kept = [i for i in range(len(layers)) if i not in blocks]
        if blocks:
            edit.set(decoder(model), layer_list(model), nn.ModuleList(layers[i] for i in kept))
            for new, old in enumerate(kept):
                for part in layers[old].modules():
                    if getattr(part, "layer_idx", None) is not None:
                        edit.set(part, "layer_idx", new)
            for config in depth_configs(model):
                keep_layers(edit, config, kept, len(layers))
        # A layer without attention keeps no keys and values. transformers has such layers as ones that reuse another layer's cache;
        # it then does not read the length of the text from them. The layer types still give each layer's mask.
        reuse = ["reuse" if is_dropped(layer, layout, "attention") else None for layer in decoder_layers(model)]
        if any(reuse):
            require_cache_without_gaps()
        for config in depth_configs(model):
            if any(reuse) and isinstance(getattr(type(config), "kv_sharing_modes", None), property):
                raise UnsupportedModel(
                    f"attention layers of {type(model).__name__} cannot be dropped: its config computes which layers share keys "
                    "and values, so the cache cannot skip a layer; drop MLPs"
                )
            if any(reuse) or "kv_sharing_modes" in vars(config):
                edit.set(config, "kv_sharing_modes", reuse)
    except BaseException as error:
        edit.revert()
        if isinstance(error, (AttributeError, TypeError, LookupError)):  # what is edited is not as in other models
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UnsupportedModel(f"the modules and config of {type(model).__name__} cannot be edited ({reason})") from error
        raise
    return edit


_verified_edits: WeakKeyDictionary[nn.Module, set[tuple[str, bool]]] = WeakKeyDictionary()


@torch.no_grad()
def _verify_edit(model: PreTrainedModel, kind: str) -> None:
    """Drop the first sub-block of a kind for a moment when the kind is first used, and compare.

    The self-check proves the states; this the edits of index and config, which matter most for the first layer. Without it, the
    model must compute what the whole model does with a zero contribution (a block that returns its input), and predict the same
    next token with a cache.

    Raises:
        UnsupportedModel: it does not run, or computes something else.
    """
    verified, proof = _verified_edits.setdefault(decoder(model), set()), (kind, model.can_generate())
    if proof in verified or (any(weight.is_meta for weight in model.parameters()) and not hasattr(model, "hf_device_map")):
        return
    first, name, ids = next(s for s in find(model, kind) if _can_be_dropped(model, s)), type(model).__name__, sample_ids(model)
    layer, branch = decoder_layers(model)[first.layer], None if kind == "block" else layout_of(model).branch(kind)
    with evaluation_mode(model):
        with contributing_zero(layer, branch):
            reference = _logits(model, ids)
        edit = _edit(model, [first])
        try:
            whole = _logits(model, ids)
            difference = _cache_error(model, ids, whole)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UnsupportedModel(f"{name} does not run without {first} ({reason}), so no {kind} can be dropped") from error
        finally:
            edit.revert()
    if not equal(whole, reference):
        raise UnsupportedModel(
            f"{name} without {first} computes something else than with a zero contribution of it, so no {kind} can be dropped"
        )
    if not difference <= max(1e-4, 16 * torch.finfo(whole.dtype).eps):
        with evaluation_mode(model):
            own = _cache_error(model, ids, _logits(model, ids))
        if not difference <= 4 * own:
            raise UnsupportedModel(
                f"{name} without {first} predicts another next token with a cache than without, so no {kind} can be dropped"
            )
    verified.add(proof)


def _can_be_dropped(model: PreTrainedModel, sub_block: SubBlock) -> bool:
    try:
        return bool(check_drop_set(model, [sub_block]))
    except ValueError:
        return False


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The model's output without a cache."""
    return model(ids, **({"use_cache": False} if model.can_generate() else {}))[0]


def _cache_error(model: PreTrainedModel, ids: Tensor, whole: Tensor) -> float:
    """How far the last logits with a cache are from those without one, relative to their spread; 0 where the model has no cache."""
    cached = model(ids[:, :-1], use_cache=True) if model.can_generate() else None
    if getattr(cached, "past_key_values", None) is None:
        return 0.0
    last = model(ids[:, -1:], past_key_values=cached.past_key_values, use_cache=True)[0]
    found, expected = (logits[:, -1].float() - logits[:, -1].float().mean(-1, keepdim=True) for logits in (last, whole))
    return float((found - expected).norm() / expected.norm())


@contextmanager
def dropped(model: PreTrainedModel, sub_blocks: Iterable[SubBlock], repair: Repair | None = None) -> Iterator[PreTrainedModel]:
    """The model without these sub-blocks while the context is open; exactly as before afterwards, also after an error.

    Without an attention layer or MLP, the residual stream passes that branch unchanged, or with what the repair adds, and no keys
    and values are kept for it; cached generation works as in the whole model.

    Raises:
        ValueError: a sub-block that does not exist, is named twice, is part of a dropped block or was dropped before; all attention
            layers or all blocks; a quantised model; a sub-block that the repair lacks. The model is left as it was.
        RuntimeError: an attention layer, with a transformers older than 5.23, whose cache cannot skip layers.
        UnsupportedModel: the pruned model does not run, or its cache gives other tokens; a short check on first use of a kind.

    >>> with dropped(model, [SubBlock(1, "attention")]) as smaller:
    ...     len(find(smaller, "attention")) == n_layers - 1
    True
    >>> len(find(model, "attention")) == n_layers
    True
    """
    edit = apply_drop(model, check_drop_set(model, sub_blocks), repair)
    try:
        yield model
    finally:
        edit.revert()
