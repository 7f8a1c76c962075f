"""The config of a pruned model for vLLM's ``nemotron-nas``: a copy of this file travels with the weights.

vLLM reads the kind of each layer as attributes of ``block_configs``; config.json holds dictionaries.
"""

from transformers import LlamaConfig


class BlockSettings(dict):
    """A dictionary whose keys are attributes, too."""

    def __getattr__(self, name: str) -> object:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class PrunedNasConfig(LlamaConfig):
    """A Llama config with one entry per layer: whether it has an attention and an MLP, and their sizes."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **kwargs):
        self.block_configs = [
            BlockSettings({part: BlockSettings(values) for part, values in block.items()}) for block in block_configs
        ]
        super().__init__(**kwargs)
