"""Edits of a model that can be taken back: attributes of modules and of configs."""

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .decoder import UnsupportedModel, decoder


class Edit:
    """Changes of attributes, each with the step that takes it back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def set(self, owner: object, name: str, value: object) -> None:
        """Set an attribute. Its previous value is recorded first, so ``revert`` also takes back a step that failed halfway."""
        self._undo.append(_restore(owner, name))
        setattr(owner, name, value)

    def revert(self) -> None:
        """Take every step back, the last one first. An interrupt waits until all of them are.

        Raises:
            RuntimeError: a step could not be taken back; all others were.
        """
        errors: list[Exception] = []
        interrupt = None
        while self._undo:
            try:
                self._take_back(errors)
            except KeyboardInterrupt as error:
                interrupt = error
        if errors:
            raise RuntimeError(
                f"the model could not be restored, load it again ({len(errors)} of its changes stay: {errors[0]})"
            ) from errors[0]
        if interrupt:
            raise interrupt

    def _take_back(self, errors: list[Exception]) -> None:
        """Every step that is left. One that is interrupted stays: it can be done twice."""
        while self._undo:
            try:
                self._undo[-1]()
            except Exception as error:
                errors.append(error)
            self._undo.pop()


def _restore(owner: object, name: str) -> Callable[[], None]:
    """A function that gives an attribute the value that it has now, or removes it if it has none.

    It writes where the value is kept (a module's tables of children and weights, or the instance's own attributes), as a property
    of the class may have no deleter.
    """
    if isinstance(computed := getattr(type(owner), name, None), property):
        value = getattr(owner, name)
        return lambda: setattr(owner, name, value) if computed.fset else None
    tables = (owner._modules, owner._parameters) if isinstance(owner, nn.Module) else ()
    table = next((table for table in tables if name in table), vars(owner))
    if name not in table:
        return lambda: table.pop(name, None)
    value = table[name]
    return lambda: table.update({name: value})


def depth_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs that state the depth of the model: usually one, two where the decoder has its own."""
    config = model.config.get_text_config(decoder=True)
    own = getattr(decoder(model), "config", config)
    return [config] if own is config else [config, own]


def keep_layers(edit: Edit, config: PreTrainedConfig, kept: list[int], depth: int) -> None:
    """Let a config describe the kept layers: its depth, its lists of one value per layer, its lists of layers."""
    if getattr(config, "is_heterogeneous", False):
        raise UnsupportedModel("blocks cannot be dropped: the model's config has settings for single layers (per_layer_config)")
    for key, value in list(vars(config).items()):
        per_layer = isinstance(value, (list, tuple)) and len(value) == depth and key != "mlp_only_layers"
        if per_layer and any(part in key for part in ("layer", "heads", "_size")):
            edit.set(config, key, [value[i] for i in kept])
    if "mlp_only_layers" in vars(config):  # a list of layers and a rule for the rest: all dense layers are listed instead
        step = vars(config).get("decoder_sparse_step", 1)
        dense = [i in (config.mlp_only_layers or ()) or (i + 1) % step != 0 for i in kept]
        edit.set(config, "mlp_only_layers", [new for new, is_dense in enumerate(dense) if is_dense])
        edit.set(config, "decoder_sparse_step", 1)
    if isinstance(vars(config).get("first_k_dense_replace"), int):
        edit.set(config, "first_k_dense_replace", sum(i < config.first_k_dense_replace for i in kept))
    edit.set(config, config.attribute_map.get("num_hidden_layers", "num_hidden_layers"), len(kept))
