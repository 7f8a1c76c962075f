"""Pruned models for good: remove sub-blocks, save the smaller model and load it again."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .dropping import Repair, apply_drop, as_branches, check_drop_set
from .families.decoder import decoder_layers
from .families.modeling_entrodrop import RECORD, VERSION, EntroDropConfig, build, is_bypass, pruned_class
from .model_card import Card, render_card
from .residual import SubBlock, find


def _described(model: PreTrainedModel) -> dict[str, object]:
    """The layers of a model apart from the values of their weights: modules, shapes and settings, by name."""
    description: dict[str, object] = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, part in decoder_layers(model).named_modules():
        for key, value in vars(part).items():
            passing = key[0] == "_" or "dropout" in key or key in ("p", "training", "gradient_checkpointing")
            if isinstance(value, (bool, int, float, str)) and not passing:
                description[f"{name}.{key}"] = value
    return description


def _config_mismatch(model: PreTrainedModel) -> str | None:
    """Why transformers would build another model from this config; None where it would build this one."""
    try:
        config = type(model.config).from_dict(model.config.to_dict())
        with torch.device("meta"):
            fresh = _described(type(model)._from_config(config))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    own = _described(model)
    wrong = sorted(name for name in own.keys() | fresh.keys() if own.get(name) != fresh.get(name))
    return f"{wrong[0]} would be {fresh.get(wrong[0], 'missing')}, not {own.get(wrong[0], 'missing')}" if wrong else None


def remove(model: PreTrainedModel, sub_blocks: Iterable[SubBlock], repair: Repair | None = None) -> PreTrainedModel:
    """Remove sub-blocks from the model in place: their weights are freed, and the config records what was removed.

    A repair takes their place; it is saved and loaded with the model. Removals compose: ``sub_blocks`` counts layers as they are
    now, the record counts them as they were at first.

    Raises:
        ValueError: as ``dropped``, or blocks without which no config describes the model; the model is left as it was.

    >>> smaller = remove(copy.deepcopy(model), [SubBlock(2, "mlp")])
    >>> smaller.config.entrodrop["dropped"]
    [[2, 'mlp']]
    """
    drop_set = check_drop_set(model, sub_blocks)
    if not drop_set:
        return model
    depth = len(decoder_layers(model))
    record = getattr(model.config, RECORD, None) or {"layers": depth, "kept": list(range(depth)), "dropped": []}
    names = ", ".join(str(SubBlock(record["kept"][layer], kind)) for layer, kind in drop_set)
    edit, family = apply_drop(model, drop_set, repair), type(model)
    drop_set = as_branches(drop_set, repair)
    blocks = {layer for layer, kind in drop_set if kind == "block"}
    try:
        bypasses = {name: part for name, part in model.named_modules() if is_bypass(part)}
        shapes = {name: {key: list(value.shape) for key, value in part.named_parameters()} for name, part in bypasses.items()}
        record = {
            **record,
            "version": VERSION,
            "kept": [old for new, old in enumerate(record["kept"]) if new not in blocks],
            "dropped": record["dropped"] + [[record["kept"][layer], kind] for layer, kind in drop_set],
            "bypasses": {name: part.returns for name, part in bypasses.items()},
            "repairs": {name: shape for name, shape in shapes.items() if shape},
            "fitted": record.get("fitted", []) + ([f"{names}: {repair.about or 'a map'}"] if repair else []),
        }
        edit.set(model.config, RECORD, record)
        if record["bypasses"]:
            model.__class__ = pruned_class(family)
        if blocks and (reason := _config_mismatch(model)):
            names = ", ".join(str(sub_block) for sub_block in drop_set if sub_block.kind == "block")
            raise ValueError(f"without {names} no config describes the model: {reason}")
    except BaseException:
        model.__class__ = family
        edit.revert()
        raise
    return model


def missing_branches(record: dict) -> list[SubBlock]:
    """The branches that a recorded model lacks, counted in the layers it still has."""
    place = {old: new for new, old in enumerate(record["kept"])}
    return [SubBlock(place[layer], kind) for layer, kind in record["dropped"] if kind != "block" and layer in place]


def repeat_rope_settings(folder: Path) -> None:
    """Write the base and scaling of rotary positions into a config.json under their names before transformers 5, too.

    mlx-lm knows no others: where they are missing it takes its default base. transformers 5 reads the same config from both.
    """
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    rope = dict(settings.get("rope_parameters") or {})
    if "rope_theta" in rope:  # one base for all layers
        settings["rope_theta"] = rope.pop("rope_theta")
        if rope.get("rope_type", "default") != "default":
            settings["rope_scaling"] = rope
        file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_pruned(model: PreTrainedModel, path: str | Path, tokenizer=None, card: Card | Mapping[str, object] | None = None) -> Path:
    """Write a pruned model to a folder: safetensors, config with the record, model card, and the tokenizer if given.

    Without whole blocks the folder is a plain transformers checkpoint. Without an attention layer or MLP, a small modeling file
    travels with it, for ``from_pretrained(path, trust_remote_code=True)``; plain transformers refuses the folder, as it would fill
    the gaps with random weights. ``load_pruned`` reads both.

    Raises:
        FileExistsError: the folder exists and is not empty.

    >>> smaller = remove(copy.deepcopy(model), [SubBlock(1, "attention")])
    >>> folder = save_pruned(smaller, tmp_path / "smaller")
    >>> sorted(file.name for file in folder.iterdir())[:3]
    ['README.md', 'config.json', 'generation_config.json']
    """
    path = Path(path).expanduser()
    card = Card(**card) if isinstance(card, Mapping) else card or Card()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty: choose another folder, or delete it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        model.save_pretrained(unfinished)
        if not any(map(is_bypass, model.modules())):  # a plain checkpoint, which other programs read
            repeat_rope_settings(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(render_card(model, card, tokenizer is not None), encoding="utf-8")
        unfinished.chmod(0o755)
        os.replace(unfinished, path)  # an empty folder is replaced, a full one was refused above
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path


def load_pruned(path: str | Path, **kwargs) -> PreTrainedModel:
    """The model that ``save_pruned`` wrote, in evaluation mode. ``kwargs`` go to ``from_pretrained`` (dtype, device_map, ...).

    Raises:
        ValueError: no such folder, a record of an unknown version, or a record that does not match the weights.

    >>> smaller = remove(copy.deepcopy(model), [SubBlock(1, "attention")])
    >>> [s.layer for s in find(load_pruned(save_pruned(smaller, tmp_path / "loaded")), "attention")]
    [0, 2, 3, 4, 5]
    """
    path = Path(path).expanduser()
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json: load_pruned reads what save_pruned wrote")
    config = EntroDropConfig.from_pretrained(str(path))
    model = build(str(path), config, **kwargs)
    record, depth = getattr(config, RECORD), len(decoder_layers(model))
    if record["kept"] is None:
        delattr(model.config, RECORD)  # nothing was dropped before it was saved
        return model
    dropped = [(kind, {s.layer for s in missing_branches(record) if s.kind == kind}) for kind in ("attention", "mlp")]
    present = {kind: {s.layer for s in find(model, kind)} for kind, _ in dropped}
    if depth != len(record["kept"]) or any(present[kind] != set(range(depth)) - lost for kind, lost in dropped):
        raise ValueError(f"{path}: the record of dropped sub-blocks does not match the layers of the model")
    return model
