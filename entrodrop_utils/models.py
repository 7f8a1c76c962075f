"""A name -> model and tokenizer: a registered name, a folder, a .gguf file, or a name on the hub.

On the command line: ``python -m entrodrop_utils.models list`` and ``python -m entrodrop_utils.models fetch NAME``.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .dequantise import complete, quiet
from .downloads import ModelUnavailable
from .sources import KNOWN, check, folder, here

__all__ = ["DTYPES", "KNOWN", "ModelUnavailable", "check", "here", "load", "twin"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load(
    name: str = "smollm2-135m-instruct", dtype: str | None = None, device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in evaluation mode, and its tokenizer.

    A decoder comes with its language-modelling head, an encoder with its masked-token head if its weights have one.

    Args:
        name: a registered name (``data/profiles.toml``), a transformers folder (also one that ``dropping.save`` wrote), a ``.gguf``
            file, or a hub name, with ``@revision`` if not the newest.
        dtype: of the weights; None for what the registry says of a large model, float32 for all others. Scores are float32 or
            better whatever it is.
        device: ``cpu``, ``cuda``, ``mps``; ``auto`` takes the accelerator if there is one, and spreads a model over all that there
            is where the registry says so.
    Raises:
        ValueError: an unknown name or dtype, or a device that is not there.
        ModelUnavailable: it cannot be had here, has its weights as pickles, needs code of its own, or lacks some weights; the
            message says what to do.
    """
    check(name)
    known = KNOWN.get(name, {})
    dtype = dtype or known.get("dtype", "float32")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    where, spread = _device(device), known.get("device_map") if device == "auto" else None
    path = folder(name)
    if not any(path.glob("*.safetensors")):
        pickles = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern)]
        reason = f"has its weights as a pickle ({pickles[0]}), which can run code when read" if pickles else "holds no safetensors"
        raise ModelUnavailable(f"{name} {reason}: name a folder with safetensors (save_pretrained writes them) or a .gguf file")
    with quiet():
        try:
            model = _read(path, dtype=DTYPES[dtype], device_map=spread)
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # transformers raises a dozen kinds
            if "trust_remote_code" in str(error):
                reason = "it needs Python code from its own repository, which is never run here"
            else:
                reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ModelUnavailable(
                f"{name} could not be loaded ({reason}); a model here is a config.json, whole safetensors and a tokenizer, of an "
                "architecture that the installed transformers has"
            ) from error
    return (model if spread else model.to(where)).eval(), tokenizer


def twin(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """A freshly initialised model of the same shape: what is in the architecture and not in the training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # The config is copied: dropping from one model edits its config, which must not change the other's
        fresh = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    return fresh.to(model.device).eval()


def _device(name: str) -> torch.device:
    there = ["cpu"] + ["mps"] * torch.backends.mps.is_available() + ["cuda"] * torch.cuda.is_available()
    if name != "auto" and name.partition(":")[0] not in there:
        raise ValueError(f"unknown device {name!r}: this machine has {', '.join(there)}")
    return torch.device(there[-1] if name == "auto" else name)


def _read(path: Path, **placed) -> PreTrainedModel:
    if json.loads((path / "config.json").read_text()).get("model_type", "").startswith("entrodrop-"):
        # Imported here: dropping stands after models on the one line of modules, and only a pruned folder needs it
        from .dropping import load as load_pruned

        return load_pruned(path, **placed)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    model, info = _family(config).from_pretrained(
        path, config=config, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **placed
    )
    complete(info)
    return model


def _family(config: PreTrainedConfig):
    """The auto class whose model for this config is the one that the weights were saved from."""
    autos = [AutoModelForMaskedLM, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModel]
    fitting = [auto for auto in autos if type(config) in auto._model_mapping]
    saved = (config.architectures or [None])[0]
    return next((auto for auto in fitting if auto._model_mapping[type(config)].__name__ == saved), (fitting or autos)[0])


def _size(megabytes: int) -> str:
    return f"{megabytes / 1000:.1f} GB" if megabytes >= 1000 else f"{megabytes} MB"


def main(arguments: list[str] | None = None) -> int:
    """``list`` the registered models, or ``fetch`` one: download, convert and check it against its hashes."""
    parser = argparse.ArgumentParser(prog="python -m entrodrop_utils.models", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what is known, with licence, size of the download and whether it is on this machine")
    commands.add_parser("fetch", help="get a model and check it").add_argument("name", help="as for models.load")
    chosen = parser.parse_args(arguments)
    if chosen.command == "list":
        rows = [("name", "here", "download", "licence", "what it is")]
        rows += [(n, "yes" if here(n) else "-", _size(k["megabytes"]), k["licence"], k["about"]) for n, k in KNOWN.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return 0
    if terms := KNOWN.get(chosen.name, {}).get("terms"):
        print(f"{chosen.name} comes under the {KNOWN[chosen.name]['licence']}: {terms}")
    try:
        print(f"{chosen.name} is whole, in {folder(chosen.name, verify=True)}")
    except (ValueError, ModelUnavailable) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
