"""Builds a model that lacks attention layers or MLPs, from a folder that says which.

Self-contained: a copy of this file travels with the weights, so that ``AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)`` works where nothing but transformers is installed. It holds no model code: the model is the family's own
class, in which stand-ins take the places of the modules that are gone.
"""

import functools
import json
import shutil
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache, LlamaConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

RECORD = "entrodrop"  # the key in the config under which a pruned model says what it lost
VERSION = 1
AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForTextEncoding")


class StandIn(nn.Module):
    """What stands where a module was dropped.

    ``returns`` says what the module's caller gets, one word a value: ``zero`` (nothing is added to the residual stream), ``input``
    (what it was given), ``residual`` (the stream itself, for modules that add to it themselves), ``position_bias``, ``none``.
    """

    def __init__(self, returns: str):
        super().__init__()
        self.returns = returns

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        values = {
            "zero": lambda: torch.zeros_like(hidden_states),
            "input": lambda: hidden_states,
            "residual": lambda: kwargs["residual"] if "residual" in kwargs else args[0],
            "position_bias": lambda: kwargs.get("position_bias"),
            "none": lambda: None,
        }
        found = tuple(values[word]() for word in self.returns.split())
        return found[0] if len(found) == 1 else found

    def extra_repr(self) -> str:
        return self.returns


def served(auto_class: str, config: PreTrainedConfig) -> list[str]:
    """The names of the classes that an Auto class may build from such a config."""
    found = getattr(transformers, auto_class)._model_mapping.get(type(config), ())
    return [family.__name__ for family in (found if isinstance(found, tuple) else (found,))]


def is_stand_in(module: nn.Module) -> bool:
    """Whether the module was dropped. By name: the class in a folder's copy of this file is another object than the suite's."""
    return type(module).__name__ == StandIn.__name__


@functools.cache
def require_cache_without_gaps() -> None:
    """Refuse a transformers whose cache cannot leave out layers without attention: what it generates would be silently wrong.

    Raises:
        RuntimeError: it is older than 5.23, or has given up the setting that is used for it.
    """
    config = LlamaConfig(num_hidden_layers=2)
    config.kv_sharing_modes = ["reuse", None]
    kept = DynamicCache(config=config).layers
    if len(kept) != 2 or type(kept[0]) is type(kept[1]):
        raise RuntimeError(
            f"transformers {transformers.__version__} reads the length of the text from layers without attention, so cached "
            "generation without them would be wrong: use transformers 5.23 or newer"
        )


class Pruned:
    """Mixed into a family's class: built without the modules that its config says are gone, and saved so that it loads again."""

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if any(getattr(config.get_text_config(decoder=True), "kv_sharing_modes", None) or ()):
            require_cache_without_gaps()
        for path, returns in getattr(config, RECORD)["stand_ins"].items():
            self.set_submodule(path, StandIn(returns))

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As ever, but under a model type that plain transformers refuses: it would fill the gaps with random weights.

        Raises:
            ValueError: ``push_to_hub=True``, which would upload before that is done; ``model.push_to_hub`` does it in order.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("save a model with dropped sub-blocks first; model.push_to_hub(name) uploads it")
        super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        file, this = Path(save_directory) / "config.json", Path(__file__)
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings[RECORD]["model_type"], settings["model_type"] = settings["model_type"], f"{RECORD}-{settings['model_type']}"
        settings["auto_map"] = {"AutoConfig": f"{this.stem}.EntroDropConfig"}
        for name in AUTO_CLASSES:
            if type(self).__name__ in served(name, self.config):
                settings["auto_map"][name] = f"{this.stem}.EntroDropModel"
        file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if this.resolve().parent != Path(save_directory).resolve():
            shutil.copyfile(this, Path(save_directory) / this.name)


@functools.cache
def pruned_class(family: type) -> type:
    """The family's class with ``Pruned`` mixed in, under the family's name: what asks a model for its class finds the family."""
    if any(base.__name__ == Pruned.__name__ for base in family.__mro__):
        return family
    return type(family.__name__, (Pruned, family), {"__module__": family.__module__, "__qualname__": family.__qualname__})


def load(path: str, config: PreTrainedConfig, **kwargs):
    """The model in a folder or hub repository, in evaluation mode.

    Raises:
        ValueError: the weights are not those that the record says are left.
    """
    family = getattr(transformers, config.architectures[0])
    if getattr(config, RECORD)["stand_ins"]:
        family = pruned_class(family)
    kwargs = {"dtype": "auto", **kwargs, "use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, info = family.from_pretrained(path, config=config, **kwargs)
    wrong = sorted(str(key) for keys in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[keys])
    if wrong:
        found = f"{len(wrong)} differ, first {wrong[0]}"
        raise ValueError(f"{path}: the record of dropped sub-blocks does not match the weights ({found})")
    return model.eval()


class EntroDropConfig:
    """Reads the config of a pruned model; what comes back is the family's own config."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do: ``Pruned.save_pretrained`` writes what the Auto classes look for."""

    @classmethod
    def from_pretrained(cls, path: str, **kwargs):
        """The config.

        Raises:
            ValueError: a record of another format.
        """
        settings, unused = PreTrainedConfig.get_config_dict(path, **kwargs)
        whole = {"version": VERSION, "kept": None, "dropped": [], "stand_ins": {}}
        record = settings.setdefault(RECORD, whole)
        if record.get("version") != VERSION:
            raise ValueError(f"{path} was written in format {record.get('version')}; this code reads format {VERSION}")
        settings["model_type"] = record.pop("model_type", settings["model_type"])
        return CONFIG_MAPPING[settings["model_type"]].from_dict(settings, **unused)


class EntroDropModel:
    """What the Auto classes call to build a pruned model of any family."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to do: ``Pruned.save_pretrained`` writes what the Auto classes look for."""

    @classmethod
    def from_pretrained(cls, path: str, *args, config: PreTrainedConfig | None = None, **kwargs):
        """As ``load``."""
        kwargs.pop("trust_remote_code", None)
        return load(path, config or AutoConfig.from_pretrained(path, trust_remote_code=True), **kwargs)
