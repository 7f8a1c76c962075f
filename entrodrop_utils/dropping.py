"""Take sub-blocks out of a model, reversibly or for good; save the smaller model and load it again."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from . import model_card, modeling_entrodrop
from .model_card import Card
from .modeling_entrodrop import RECORD, VERSION, StandIn, is_stand_in, pruned_class
from .self_check import has
from .sub_blocks import SubBlock, decoder, find, is_gone, layer_list, layers, layout


def _checked(model: PreTrainedModel, sub_blocks: Iterable[SubBlock]) -> list[SubBlock]:
    """The sub-blocks, or a ValueError that names the one that cannot be dropped."""
    chosen = [SubBlock(*sub_block) for sub_block in sub_blocks]
    if getattr(model, "is_quantized", False):
        raise ValueError("the model is quantised: load it dequantised (models.load does so for GGUF files) before dropping")
    have = {kind: find(model, kind) for kind in {kind for _, kind in chosen}}
    blocks, anchor = layers(model), layout(model).anchor
    for sub_block in chosen:
        layer, kind = sub_block
        if sub_block not in have[kind]:
            gone = "was dropped before or " if 0 <= layer < len(blocks) else ""
            raise ValueError(f"{sub_block} {gone}does not exist: the model has {len(blocks)} layers, {len(have[kind])} with {kind}")
        if chosen.count(sub_block) > 1:
            raise ValueError(f"{sub_block} is named twice")
        if kind != "mlp" and has(blocks[layer], anchor):
            raise ValueError(f"{sub_block} cannot be dropped: its {anchor.split('.')[-1]} serves the attention of all layers")
    whole = {layer for layer, kind in chosen if kind == "block"}
    if len(whole) == len(blocks):
        raise ValueError(f"cannot drop all {len(whole)} blocks: nothing would be left of the model")
    if both := [s for s in chosen if s.kind != "block" and s.layer in whole]:
        raise ValueError(f"{both[0]} is part of block {both[0].layer}, which is dropped as a whole")
    if chosen and not set(find(model, "attention")) - {SubBlock(s.layer, "attention") for s in chosen if s.kind != "mlp"}:
        raise ValueError("cannot drop every attention layer: without one no token sees another")
    return chosen


class _Edit:
    """The changes of one drop, each with what it replaced, so that they can be taken back in reverse."""

    def __init__(self) -> None:
        self.undo: list[tuple[object, str, object]] = []

    def set(self, owner: object, name: str, value: object) -> None:
        before = getattr(owner, name) if isinstance(owner, nn.Module) else vars(owner).get(name, self)
        self.undo.append((owner, name, before))
        setattr(owner, name, value)

    def revert(self) -> None:
        for owner, name, value in reversed(self.undo):
            delattr(owner, name) if value is self else setattr(owner, name, value)


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs that say how deep the model is: often one object, two where the decoder has its own."""
    found = [model.config.get_text_config(decoder=True), decoder(model).config]
    return found if found[0] is not found[1] else found[:1]


def _follow(edit: _Edit, config: PreTrainedConfig, kept: list[int], depth: int) -> None:
    """Let a config describe the layers that are kept: its depth, its lists of one value a layer, its lists of layers."""
    if getattr(config, "is_heterogeneous", False):
        raise ValueError("blocks cannot be dropped from a model whose config has settings for single layers (per_layer_config)")
    for key, value in list(vars(config).items()):
        one_each = isinstance(value, (list, tuple)) and len(value) == depth and key != "mlp_only_layers"
        if one_each and any(part in key for part in ("layer", "heads", "_size")):
            edit.set(config, key, [value[i] for i in kept])
    if "mlp_only_layers" in vars(config):  # layers counted, with a rule for the rest: all that are dense are listed instead
        step = vars(config).get("decoder_sparse_step", 1)
        dense = [i in (config.mlp_only_layers or ()) or (i + 1) % step != 0 for i in kept]
        edit.set(config, "mlp_only_layers", [new for new, is_dense in enumerate(dense) if is_dense])
        edit.set(config, "decoder_sparse_step", 1)
    if isinstance(vars(config).get("first_k_dense_replace"), int):
        edit.set(config, "first_k_dense_replace", sum(i < config.first_k_dense_replace for i in kept))
    edit.set(config, config.attribute_map.get("num_hidden_layers", "num_hidden_layers"), len(kept))


def _apply(model: PreTrainedModel, sub_blocks: list[SubBlock]) -> _Edit:
    edit, where, blocks = _Edit(), layout(model), layers(model)
    try:
        for layer, kind in sub_blocks:
            for path, returns in where.branch(kind).items() if kind != "block" else ():
                parent, _, name = path.rpartition(".")
                edit.set(blocks[layer].get_submodule(parent), name, StandIn(returns))
        gone = {layer for layer, kind in sub_blocks if kind == "block"}
        kept = [i for i in range(len(blocks)) if i not in gone]
        if gone:
            edit.set(decoder(model), layer_list(model), nn.ModuleList(blocks[i] for i in kept))
            for new, old in enumerate(kept):
                for part in blocks[old].modules():
                    if getattr(part, "layer_idx", None) is not None:
                        edit.set(part, "layer_idx", new)
            for config in _configs(model):
                _follow(edit, config, kept, len(blocks))
        # A layer without attention keeps no keys and values. transformers knows such layers as ones that reuse another's cache,
        # which also tells it not to read the length of the text from them; the layer types still say which mask is whose.
        reuse = ["reuse" if is_gone(layer, where, "attention") else None for layer in layers(model)]
        if any(reuse):
            modeling_entrodrop.require_cache_without_gaps()
        for config in _configs(model):
            if any(reuse) or "kv_sharing_modes" in vars(config):
                edit.set(config, "kv_sharing_modes", reuse)
    except Exception:
        edit.revert()
        raise
    return edit


@contextmanager
def dropped(model: PreTrainedModel, sub_blocks: Iterable[SubBlock]) -> Iterator[PreTrainedModel]:
    """The model without these sub-blocks while the context is open; exactly as it was afterwards, also when the body raises.

    Dropping an attention layer or an MLP leaves the residual stream as it enters that branch, and no keys and values are kept for
    it; cached generation works as in the whole model.

    Raises:
        ValueError: a sub-block that does not exist, is named twice, is part of a dropped block or was dropped before; all attention
            layers or all blocks; a quantised model. The model is left as it was.
        RuntimeError: an attention layer, with a transformers whose cache cannot do without it (older than 5.23).
    """
    edit = _apply(model, _checked(model, sub_blocks))
    try:
        yield model
    finally:
        edit.revert()


def _described(model: PreTrainedModel) -> dict[str, object]:
    """What a model's layers are, apart from their weights' values: modules, shapes and settings, by name."""
    found: dict[str, object] = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, part in layers(model).named_modules():
        for key, value in vars(part).items():
            passing = key[0] == "_" or "dropout" in key or key in ("p", "training", "gradient_checkpointing")
            if isinstance(value, (bool, int, float, str)) and not passing:
                found[f"{name}.{key}"] = value
    return found


def _reloads(model: PreTrainedModel) -> str | None:
    """Why transformers would build another model from this config than the one at hand; None where it is the same."""
    try:
        config = type(model.config).from_dict(model.config.to_dict())
        with torch.device("meta"):
            fresh = _described(type(model)._from_config(config))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    mine = _described(model)
    wrong = sorted(name for name in mine.keys() | fresh.keys() if mine.get(name) != fresh.get(name))
    return f"{wrong[0]} would be {fresh.get(wrong[0], 'missing')}, not {mine.get(wrong[0], 'missing')}" if wrong else None


def remove(model: PreTrainedModel, sub_blocks: Iterable[SubBlock]) -> PreTrainedModel:
    """Take these sub-blocks out of the model for good (in place): their weights are gone, and the config records what is missing.

    Drops compose: on a model that lost blocks before, layers count as they are now, and the record as they were at first.

    Raises:
        ValueError: as ``dropped``, or blocks without which no config describes the model (``dropped`` still takes them out for a
            while); the model is left as it was.
    """
    chosen = _checked(model, sub_blocks)
    if not chosen:
        return model
    depth = len(layers(model))
    record = getattr(model.config, RECORD, None) or {"version": VERSION, "layers": depth, "kept": list(range(depth)), "dropped": []}
    gone = {layer for layer, kind in chosen if kind == "block"}
    edit, family = _apply(model, chosen), type(model)
    record = {
        **record,
        "kept": [old for new, old in enumerate(record["kept"]) if new not in gone],
        "dropped": record["dropped"] + [[record["kept"][layer], kind] for layer, kind in chosen],
        "stand_ins": {name: part.returns for name, part in model.named_modules() if is_stand_in(part)},
    }
    edit.set(model.config, RECORD, record)
    if record["stand_ins"]:
        model.__class__ = pruned_class(family)
    if gone and (reason := _reloads(model)):
        edit.revert()
        model.__class__ = family
        blocks = ", ".join(str(sub_block) for sub_block in chosen if sub_block.kind == "block")
        raise ValueError(f"without {blocks} no config describes the model: {reason}")
    return model


def missing(record: dict) -> list[SubBlock]:
    """The branches that a recorded model lacks, counted in the layers it still has."""
    place = {old: new for new, old in enumerate(record["kept"])}
    return [SubBlock(place[layer], kind) for layer, kind in record["dropped"] if kind != "block" and layer in place]


def save(model: PreTrainedModel, path: str | Path, tokenizer=None, card: Card | Mapping[str, object] | None = None) -> Path:
    """Write a pruned model to a folder: safetensors, config with the record, a model card, the tokenizer if given.

    Whole blocks dropped give a plain transformers checkpoint. With an attention layer or MLP missing, a small modeling file travels
    with it, for ``from_pretrained(path, trust_remote_code=True)`` where this suite is not installed; plain transformers refuses the
    folder, as it would fill the gaps with random weights. ``load`` reads both.

    Raises:
        FileExistsError: the folder exists and is not empty.
    """
    path = Path(path)
    card = Card(**card) if isinstance(card, Mapping) else card or Card()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty: choose another folder, or delete it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        model.save_pretrained(making)
        if tokenizer is not None:
            tokenizer.save_pretrained(making)
        (making / "README.md").write_text(model_card.render(model, card, tokenizer is not None), encoding="utf-8")
        making.chmod(0o755)
        os.replace(making, path)  # an empty folder is replaced, a full one was refused above
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return path


def load(path: str | Path, **kwargs) -> PreTrainedModel:
    """The model that ``save`` wrote, in evaluation mode. ``kwargs`` go to ``from_pretrained`` (dtype, device_map, ...).

    Raises:
        ValueError: no such folder, a record of another version, or one that does not match the weights.
    """
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"{path} holds no config.json: dropping.load reads what dropping.save wrote")
    config = modeling_entrodrop.EntroDropConfig.from_pretrained(str(path))
    model = modeling_entrodrop.load(str(path), config, **kwargs)
    record, depth = getattr(config, RECORD), len(layers(model))
    if record["kept"] is None:
        delattr(model.config, RECORD)  # nothing was dropped before it was saved
        return model
    gone = [(kind, {s.layer for s in missing(record) if s.kind == kind}) for kind in ("attention", "mlp")]
    left = {kind: {s.layer for s in find(model, kind)} for kind, _ in gone}
    if depth != len(record["kept"]) or any(left[kind] != set(range(depth)) - lost for kind, lost in gone):
        raise ValueError(f"{path}: the record of dropped sub-blocks does not match the layers of the model")
    return model
