"""Builds a model without some of its attention layers or MLPs, from a folder whose config lists them.

This file is self-contained: a copy of it travels with the weights, so that ``AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)`` works where only transformers is installed. It contains no model code: the model is the family's own
class, in which a bypass replaces every dropped module.
"""

import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache, LlamaConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

RECORD = "entrodrop"  # the key of the config under which a pruned model records what was dropped
VERSION = 3  # version 2 had no repairs
# Version 1 used these names; transformers reads a nested `model_type` as a config of its own
OLDER_NAMES = {"stand_ins": "bypasses", "model_type": "family"}
AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForTextEncoding")


class Bypass(nn.Module):
    """Replaces a dropped module.

    ``returns`` lists what the caller receives, one word per value: ``zero`` (nothing is added to the residual stream), ``input``
    (the module's own input), ``residual`` (the stream, for modules that add to it themselves), ``position_bias``, ``none``.

    A repair adds an affine map of the module's input to ``zero`` or ``residual``: its ``bias``, and the matrices that are applied
    one after the other (``weight``, or ``down`` and ``up``).
    """

    def __init__(self, returns: str, repair: Mapping[str, Tensor] | None = None):
        super().__init__()
        self.returns = returns
        for name in sorted(repair or ()):  # bias, down, up, weight
            self.register_parameter(name, nn.Parameter(repair[name]))

    def added(self, hidden_states: Tensor) -> Tensor:
        """What the repair adds to the residual stream; zero without one."""
        matrices = [value for name, value in self.named_parameters() if name != "bias"]
        added = functools.reduce(nn.functional.linear, matrices, hidden_states) if matrices else torch.zeros_like(hidden_states)
        return added + self.bias if "bias" in self._parameters else added

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        def residual() -> Tensor:
            stream = kwargs["residual"] if "residual" in kwargs else args[0]
            return stream + self.added(hidden_states) if self._parameters else stream

        values = {
            "zero": lambda: self.added(hidden_states),
            "input": lambda: hidden_states,
            "residual": residual,
            "position_bias": lambda: kwargs.get("position_bias"),
            "none": lambda: None,
        }
        outputs = tuple(values[word]() for word in self.returns.split())
        return outputs[0] if len(outputs) == 1 else outputs

    def extra_repr(self) -> str:
        return ", ".join([self.returns, *(f"{name} {tuple(value.shape)}" for name, value in self.named_parameters())])


def classes_of(auto_class: str, config: PreTrainedConfig) -> list[str]:
    """The names of the classes that an Auto class builds from such a config."""
    classes = getattr(transformers, auto_class)._model_mapping.get(type(config), ())
    return [family.__name__ for family in (classes if isinstance(classes, tuple) else (classes,))]


def is_bypass(module: nn.Module) -> bool:
    """Whether the module was dropped. By name: a folder's copy of this file defines another class (``StandIn`` in version 1)."""
    return type(module).__name__ in (Bypass.__name__, "StandIn")


@functools.cache
def require_cache_without_gaps() -> None:
    """Refuse a transformers whose KV cache cannot skip layers without attention: generated text would be silently wrong.

    Raises:
        RuntimeError: transformers is older than 5.23, or no longer has the setting that is used.
    """
    config = LlamaConfig(num_hidden_layers=2)
    config.kv_sharing_modes = ["reuse", None]
    kept = DynamicCache(config=config).layers
    if len(kept) != 2 or type(kept[0]) is type(kept[1]):
        raise RuntimeError(
            f"transformers {transformers.__version__} reads the length of the text from layers without attention, so cached "
            "generation would be wrong: use transformers 5.23 or newer"
        )


class Pruned:
    """Mixed into a family's class: builds the model without the dropped modules, and saves it so that it loads again."""

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if any(getattr(config.get_text_config(decoder=True), "kv_sharing_modes", None) or ()):
            require_cache_without_gaps()
        record = getattr(config, RECORD)
        for path, returns in record["bypasses"].items():
            shapes = record["repairs"].get(path, {})
            self.set_submodule(path, Bypass(returns, {name: torch.zeros(shape) for name, shape in shapes.items()}))

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """Save under a model type that plain transformers refuses, as it would fill the gaps with random weights.

        Raises:
            ValueError: ``push_to_hub=True`` uploads before the config is written; ``model.push_to_hub`` has the right order.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("save a model with dropped sub-blocks first; model.push_to_hub(name) uploads it")
        super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        file, this = Path(save_directory) / "config.json", Path(__file__)
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings[RECORD]["family"], settings["model_type"] = settings["model_type"], f"{RECORD}-{settings['model_type']}"
        settings["auto_map"] = {"AutoConfig": f"{this.stem}.EntroDropConfig"}
        for name in AUTO_CLASSES:
            if type(self).__name__ in classes_of(name, self.config):
                settings["auto_map"][name] = f"{this.stem}.EntroDropModel"
        file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if this.resolve().parent != Path(save_directory).resolve():
            shutil.copyfile(this, Path(save_directory) / this.name)


@functools.cache
def pruned_class(family: type) -> type:
    """The family's class with ``Pruned`` mixed in; it keeps the family's name, which other code looks up."""
    if issubclass(family, Pruned):
        return family
    # A folder's own copy of this file, perhaps an older one, has mixed in its own class: the family's class is behind it
    plain = next(base for base in family.__mro__ if not any(c.__name__ == Pruned.__name__ for c in base.__mro__))
    return type(plain.__name__, (Pruned, plain), {"__module__": plain.__module__, "__qualname__": plain.__qualname__})


def build(path: str, config: PreTrainedConfig, **kwargs):
    """The model in a folder or hub repository, in evaluation mode.

    Raises:
        ValueError: the weights do not match the record.
    """
    family = getattr(transformers, config.architectures[0])
    if getattr(config, RECORD)["bypasses"]:
        family = pruned_class(family)
    kwargs = {"dtype": "auto", **kwargs, "use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, info = family.from_pretrained(path, config=config, **kwargs)
    wrong = sorted(str(key) for keys in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[keys])
    if wrong:
        difference = f"{len(wrong)} differ, first {wrong[0]}"
        raise ValueError(f"{path}: the record of dropped sub-blocks does not match the weights ({difference})")
    return model.eval()


def read_record(settings: dict, path: str) -> dict:
    """The record in a saved config, whose older versions are brought up to date.

    Raises:
        ValueError: a record of an unknown version.
    """
    record = settings.get(RECORD, {"version": VERSION, "kept": None, "dropped": [], "bypasses": {}, "repairs": {}, "fitted": []})
    if record.get("version") == 1:
        record = {OLDER_NAMES.get(name, name): value for name, value in record.items()} | {"version": 2}
    if record.get("version") == 2:
        record = record | {"version": VERSION, "repairs": {}, "fitted": []}
    if record.get("version") != VERSION:
        raise ValueError(f"{path} was written in format {record.get('version')}; this code reads formats 1 to {VERSION}")
    return record


class EntroDropConfig:
    """Reads the config of a pruned model and returns the family's own config."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do: ``Pruned.save_pretrained`` writes the entries that the Auto classes read."""

    @classmethod
    def from_pretrained(cls, path: str, **kwargs):
        """The config.

        Raises:
            ValueError: a record of an unknown version.
        """
        settings, unused = PreTrainedConfig.get_config_dict(path, **kwargs)
        record = settings[RECORD] = read_record(settings, path)
        settings["model_type"] = record.pop("family", settings["model_type"])
        return CONFIG_MAPPING[settings["model_type"]].from_dict(settings, **unused)


class EntroDropModel:
    """Called by the Auto classes to build a pruned model of any family."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to do: ``Pruned.save_pretrained`` writes the entries that the Auto classes read."""

    @classmethod
    def from_pretrained(cls, path: str, *args, config: PreTrainedConfig | None = None, **kwargs):
        """As ``build``."""
        kwargs.pop("trust_remote_code", None)
        return build(path, config or AutoConfig.from_pretrained(path, trust_remote_code=True), **kwargs)
