"""A notebook that shows the explorer of a small random model: the page as a whole, without the minutes of a real one."""

from pathlib import Path

import nbformat
from tiny_llama import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LAYERS = 12


def write_model(folder: Path) -> Path:
    """A random Llama of 12 layers whose tokens are bytes, and "he"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: i for i, sign in enumerate(["<end>", *alphabet, "he"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("h", "e")]))  # one, as GGUF needs
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(folder)
    tiny_llama(LAYERS, vocab_size=len(vocabulary)).save_pretrained(folder)
    return folder


def write_notebook(path: Path, model: Path) -> None:
    """The explorer of the model in a first cell, and enough below it that it leaves the screen after Run All."""
    first = f"from entrodrop_utils.explorer.page import explore\n\nexplorer = explore({str(model)!r})"
    rest = [nbformat.v4.new_code_cell("print('below\\n' * 40)") for _ in range(2)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(first), *rest])
    notebook.metadata["kernelspec"] = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
