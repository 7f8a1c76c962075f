"""Take sub-blocks out of a model, reversibly or for good; save the smaller model and load it again."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .sub_blocks import LAYER_LISTS, Nothing, SubBlock, decoder, find, layers, layout, module

RECORD = "entrodrop"  # the key in the config under which a pruned model says what it lost
VERSION = 1


def _checked(model: PreTrainedModel, sub_blocks: Iterable[SubBlock]) -> list[SubBlock]:
    """The sub-blocks, or a ValueError that names the one that cannot be dropped."""
    chosen = [SubBlock(*sub_block) for sub_block in sub_blocks]
    if getattr(model, "is_quantized", False):
        raise ValueError("the model is quantised: load it dequantised (models.load does so for GGUF files) before dropping")
    for sub_block in chosen:
        have = find(model, sub_block.kind)
        if sub_block not in have:
            gone = "was dropped before or " if 0 <= sub_block.layer < len(layers(model)) else ""
            raise ValueError(f"{sub_block} {gone}does not exist: the model has {len(layers(model))} layers, {len(have)} with {sub_block.kind}")
        if chosen.count(sub_block) > 1:
            raise ValueError(f"{sub_block} is named twice")
    blocks = {layer for layer, kind in chosen if kind == "block"}
    if len(blocks) == len(layers(model)):
        raise ValueError(f"cannot drop all {len(blocks)} blocks: nothing would be left of the model")
    if both := [s for s in chosen if s.kind != "block" and s.layer in blocks]:
        raise ValueError(f"{both[0]} is part of block {both[0].layer}, which is dropped as a whole")
    if not set(find(model, "attention")) - {SubBlock(s.layer, "attention") for s in chosen if s.kind != "mlp"}:
        raise ValueError("cannot drop every attention layer: without one no token sees another")
    return chosen


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs that say how deep the model is: often one object, two where the decoder has its own."""
    found = [model.config.get_text_config(decoder=True), decoder(model).config]
    return found if found[0] is not found[1] else found[:1]


class _Edit:
    """The changes of one drop, each with what it replaced, so that they can be taken back in reverse."""

    def __init__(self) -> None:
        self.undo: list[tuple[object, str, object]] = []

    def set(self, owner: object, name: str, value: object) -> None:
        self.undo.append((owner, name, owner.__dict__.get(name, self) if not isinstance(owner, nn.Module) else getattr(owner, name)))
        setattr(owner, name, value)

    def revert(self) -> None:
        for owner, name, value in reversed(self.undo):
            delattr(owner, name) if value is self else setattr(owner, name, value)


def _apply(model: PreTrainedModel, sub_blocks: list[SubBlock]) -> _Edit:
    edit, where, blocks = _Edit(), layout(model), layers(model)
    for layer, kind in sub_blocks:
        if kind != "block":
            branch, *norms = where.parts(kind)
            edit.set(blocks[layer], branch, Nothing(returns_tuple=kind == "attention"))
            for norm in norms:
                edit.set(blocks[layer], norm, nn.Identity())
    gone = {layer for layer, kind in sub_blocks if kind == "block"}
    kept = [i for i in range(len(blocks)) if i not in gone]
    if gone:
        inner = decoder(model)
        name = next(name for name in LAYER_LISTS if getattr(inner, name, None) is blocks)
        edit.set(inner, name, nn.ModuleList(blocks[i] for i in kept))
        for new, old in enumerate(kept):
            for part in blocks[old].modules():
                if getattr(part, "layer_idx", None) is not None:
                    edit.set(part, "layer_idx", new)
    # A layer without attention keeps no keys and values. transformers knows such layers as ones that reuse another's cache, which
    # also tells it not to read the length of the text from them; the list of layer types still says which mask belongs to which layer.
    remaining = layers(model)
    reuse = ["reuse" if isinstance(module(layer, where.parts("attention")[0]), Nothing) else None for layer in remaining]
    for config in _configs(model):
        if gone:
            per_layer = [k for k, v in vars(config).items() if "layer" in k and isinstance(v, (list, tuple)) and len(v) == len(blocks)]
            for key in per_layer:
                edit.set(config, key, [vars(config)[key][i] for i in kept])
            edit.set(config, config.attribute_map.get("num_hidden_layers", "num_hidden_layers"), len(kept))
        if any(reuse) or "kv_sharing_modes" in vars(config):
            edit.set(config, "kv_sharing_modes", reuse)
    return edit


@contextmanager
def dropped(model: PreTrainedModel, sub_blocks: Iterable[SubBlock]) -> Iterator[PreTrainedModel]:
    """The model without these sub-blocks while the context is open; exactly as it was afterwards, also when the body raises.

    Dropping an attention layer or an MLP leaves the residual stream as it enters that branch, and no keys and values are kept for
    it; cached generation works as in the whole model.

    Raises:
        ValueError: a sub-block that does not exist, is named twice, is part of a dropped block or was dropped before; all attention
            layers or all blocks; a quantised model. The model is left as it was.
    """
    edit = _apply(model, _checked(model, sub_blocks))
    try:
        yield model
    finally:
        edit.revert()


def remove(model: PreTrainedModel, sub_blocks: Iterable[SubBlock]) -> PreTrainedModel:
    """Take these sub-blocks out of the model for good (in place): their weights are gone, and the config records what is missing.

    Drops compose: on a model that lost blocks before, layers count as they are now, and the record as they were at first.

    Raises:
        ValueError: as ``dropped``; the model is left as it was.
    """
    chosen = _checked(model, sub_blocks)
    depth = len(layers(model))
    record = getattr(model.config, RECORD, None) or {"version": VERSION, "layers": depth, "kept": list(range(depth)), "dropped": []}
    original = [[record["kept"][layer], kind] for layer, kind in chosen]
    gone = {layer for layer, kind in chosen if kind == "block"}
    _apply(model, chosen)
    kept = [old for new, old in enumerate(record["kept"]) if new not in gone]
    setattr(model.config, RECORD, {**record, "kept": kept, "dropped": record["dropped"] + original})
    return model


def missing(record: dict) -> list[SubBlock]:
    """The branches that a recorded model lacks, counted in the layers it still has."""
    place = {old: new for new, old in enumerate(record["kept"])}
    return [SubBlock(place[layer], kind) for layer, kind in record["dropped"] if kind != "block" and layer in place]


def save(model: PreTrainedModel, path: str | Path, tokenizer=None) -> Path:
    """Write a pruned model to a folder that ``load`` reads: safetensors, config with the record, the tokenizer if given.

    Whole blocks dropped give a plain transformers checkpoint. With an attention layer or MLP missing the config's model type is
    changed, so that plain transformers refuses it instead of filling the gap with random weights.

    Raises:
        FileExistsError: the folder exists and is not empty.
    """
    path = Path(path)
    if path.exists() and any(path.iterdir()):
        raise FileExistsError(f"{path} exists and is not empty: choose another folder, or delete it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        model.save_pretrained(making)
        if tokenizer is not None:
            tokenizer.save_pretrained(making)
        record = getattr(model.config, RECORD, None)
        if record and missing(record):
            config = json.loads((making / "config.json").read_text())
            config[RECORD]["model_type"], config["model_type"] = config["model_type"], f"{RECORD}-{config['model_type']}"
            (making / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        making.chmod(0o755)
        os.replace(making, path)  # an empty folder is replaced, a full one was refused above
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return path


def load(path: str | Path, **kwargs) -> PreTrainedModel:
    """The model that ``save`` wrote, in evaluation mode. ``kwargs`` go to ``from_pretrained`` (dtype, device_map, ...).

    Raises:
        ValueError: no such folder, a record of a newer version, or one that does not match the weights.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} holds no config.json: dropping.load reads what dropping.save wrote")
    settings = json.loads(file.read_text())
    record = settings.get(RECORD) or {"version": VERSION, "kept": [], "dropped": []}
    if record["version"] != VERSION:
        raise ValueError(f"{path} was written in format {record['version']}; this release reads format {VERSION}")
    settings["model_type"] = record.pop("model_type", settings["model_type"])
    config = AutoConfig.for_model(**settings)
    family = AutoModelForCausalLM._model_mapping[type(config)]

    class Pruned(family):  # from_pretrained builds it, so dtype, device_map and sharded weights work as ever
        def __init__(self, config, *args, **kwargs):
            super().__init__(config, *args, **kwargs)
            _apply(self, missing(record))

    Pruned.__name__ = Pruned.__qualname__ = family.__name__
    kwargs.setdefault("dtype", "auto")
    model, info = Pruned.from_pretrained(path, config=config, use_safetensors=True, output_loading_info=True, **kwargs)
    if wrong := sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]) + [str(m) for m in info["mismatched_keys"]]:
        raise ValueError(f"{path}: the record of dropped sub-blocks does not match the weights ({len(wrong)} differ, first {wrong[0]})")
    return model.eval()

