"""Exports of pruned models to the programs that serve models: llama.cpp, vLLM, mlx-lm.

``gguf`` writes a file for llama.cpp, ``vllm`` and ``mlx`` write folders. Each refuses what its target cannot compute, reads back
what it wrote and compares it with the model, and leaves nothing after an error. ``python -m entrodrop_utils.export`` does the same
from a saved folder. The README beside this file says which target holds which drops of which family.
"""

from .gguf_file import ExportMismatch, check_file, gguf
from .report import Exported

__all__ = ["ExportMismatch", "Exported", "check_file", "gguf"]
