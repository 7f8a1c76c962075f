"""Exports of pruned models to the programs that serve models: llama.cpp, vLLM, mlx-lm.

``gguf`` writes a file for llama.cpp, ``vllm`` and ``mlx`` write folders. Each refuses what its target cannot compute, reads back
what it wrote and compares it with the model, and leaves nothing after an error. ``python -m entrodrop_utils.export`` does the same
from a saved folder. The README beside this file says which target holds which drops of which family.
"""

from .gguf_file import check_file, gguf
from .nas_folder import check_folder, mlx, vllm
from .report import Exported, ExportMismatch

__all__ = ["ExportMismatch", "Exported", "check_file", "check_folder", "gguf", "mlx", "vllm"]
