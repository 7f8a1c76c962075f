"""``python -m entrodrop_utils.export gguf smaller/ smaller.gguf``, and the same for ``vllm`` and ``mlx``, which write folders."""

import argparse
import sys

from ..families.decoder import UnsupportedModel
from ..models import ModelUnavailable, load_model
from . import gguf, mlx, vllm
from .gguf_file import TYPES

HELP = {
    "gguf": "a file for llama.cpp, Ollama and LM Studio",
    "vllm": "a folder for vLLM",
    "mlx": "a folder for mlx-lm",
}


def main(arguments: list[str] | None = None) -> int:
    """Export a model, pruned or whole, for llama.cpp, vLLM or mlx-lm, and say what that keeps and loses."""
    parser = argparse.ArgumentParser(prog="python -m entrodrop_utils.export", description=main.__doc__)
    commands = parser.add_subparsers(dest="target", required=True)
    for target, text in HELP.items():
        command = commands.add_parser(target, help=text, description=text)
        command.add_argument("model", help="a folder that save_pruned wrote, or any model that load_model takes")
        command.add_argument("path", help="the file or folder to write; it must not exist")
        if target != "mlx":
            command.add_argument("--zeros", action="store_true", help="branches of zeros where the target cannot leave them out")
        if target == "gguf":
            command.add_argument("--dtype", choices=sorted(TYPES), default="f16", help="of the matrices (default f16)")
            command.add_argument("--vocabulary", metavar="FILE.gguf", help="copy the vocabulary of this file")
    chosen = parser.parse_args(arguments)
    try:
        model, tokenizer = load_model(chosen.model, device="cpu")
        if chosen.target == "gguf":
            exported = gguf(model, chosen.path, chosen.vocabulary or tokenizer, chosen.dtype, chosen.zeros)
        elif chosen.target == "vllm":
            exported = vllm(model, chosen.path, tokenizer, chosen.zeros)
        else:
            exported = mlx(model, chosen.path, tokenizer)
    except (ModelUnavailable, UnsupportedModel, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(exported)
    return 0


if __name__ == "__main__":
    sys.exit(main())
