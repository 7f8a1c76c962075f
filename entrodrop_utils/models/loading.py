"""Loading: from a registered name, a folder, a .gguf file or a hub name to a model and its tokenizer."""

import copy
import json
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

from ..processes import local_process, n_processes
from ..saving import load_pruned
from .dequantise import quiet_transformers, require_complete
from .downloads import ModelUnavailable
from .registry import KNOWN, check_model
from .sources import folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load_model(
    name: str = "smollm2-135m-instruct", dtype: str | None = None, device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in evaluation mode, and its tokenizer.

    A decoder comes with its language-modelling head, an encoder with its masked-token head if its weights have one.

    Args:
        name: a registered name (``models/registry.toml``), a transformers folder (also one that ``save_pruned`` wrote), a ``.gguf``
            file, or a hub name, with ``@revision`` if not the newest.
        dtype: of the weights; None for what the registry says of a large model, float32 for all others. Scores are float32 or
            better whatever it is.
        device: ``cpu``, ``cuda``, ``mps``; ``auto`` takes the accelerator if there is one, and spreads a model over all that there
            is where the registry says so.
    Raises:
        ValueError: an unknown name or dtype, or a device that is not there.
        ModelUnavailable: it is not available here, has its weights as pickles, needs code from its repository, or lacks some
            weights; the message says what to do.

    >>> folder = save_pruned(remove(copy.deepcopy(model), [SubBlock(4, "mlp")]), tmp_path / "mine", tokenizer)
    >>> loaded, its_tokenizer = load_model(str(folder), device="cpu")
    >>> [sub_block.layer for sub_block in find(loaded, "mlp")]
    [0, 1, 2, 3, 5]
    """
    check_model(name)
    known = KNOWN.get(name, {})
    dtype = dtype or known.get("dtype", "float32")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    where, spread = _device(device), known.get("device_map") if device == "auto" else None
    path = folder(name)
    if (path / "adapter_config.json").is_file():
        what = "an adapter beside its model" if (path / "config.json").is_file() else "an adapter and no model"
        raise ModelUnavailable(f"{name} holds {what}: merge them (merge_and_unload of peft) and save the result")
    if not any(path.glob("*.safetensors")):
        pickles = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern)]
        reason = f"has its weights as a pickle ({pickles[0]}), which can run code when read" if pickles else "holds no safetensors"
        raise ModelUnavailable(f"{name} {reason}: name a folder with safetensors (save_pretrained writes them) or a .gguf file")
    with quiet_transformers():
        try:
            model = _read(path, dtype=DTYPES[dtype], device_map=spread)
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # transformers raises a dozen kinds
            if "trust_remote_code" in str(error):
                reason = "it needs Python code from its own repository, which is never run here"
            elif "above report" in str(error):  # which is not shown
                reason = (
                    "weights that are joined, such as those of experts, are not as many or not of the shape that its config says"
                )
            else:
                reason = " ".join(str(error).split())[:600] or type(error).__name__
            raise ModelUnavailable(
                f"{name} could not be loaded ({reason}); a model here is a config.json, whole safetensors and a tokenizer, of an "
                "architecture that the installed transformers has"
            ) from error
    return (model if spread else model.to(where)).eval(), tokenizer


def at_precision(model: PreTrainedModel, name: str, dtype: str) -> PreTrainedModel:
    """A model with its weights in another dtype, as ``load_model(name, dtype)`` reads it; the same one if it has this dtype.

    A large model is then in memory once.
    """
    return model if model.dtype == DTYPES.get(dtype) else load_model(name, dtype)[0]


def random_init_copy(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """A model of the same shape with random weights: it shows what comes from the architecture and not from training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # The config is copied: dropping from one model edits its config, which must not change the other's
        fresh = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    return fresh.to(model.device).eval()


def _device(name: str) -> torch.device:
    there = ["cpu"] + ["mps"] * torch.backends.mps.is_available() + ["cuda"] * torch.cuda.is_available()
    if name != "auto" and name.partition(":")[0] not in there:
        raise ValueError(f"unknown device {name!r}: this machine has {', '.join(there)}")
    if name == "auto" and there[-1] == "cuda" and n_processes() > 1:  # started together: one accelerator each
        return torch.device("cuda", local_process())
    return torch.device(there[-1] if name == "auto" else name)


def _read(path: Path, **placed) -> PreTrainedModel:
    if json.loads((path / "config.json").read_text()).get("model_type", "").startswith("entrodrop-"):
        return load_pruned(path, **placed)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    model, info = _family(config).from_pretrained(
        path,
        config=config,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **placed,
    )
    require_complete(info, model)
    return model


def _family(config: PreTrainedConfig):
    """The auto class whose model for this config is the one that the weights were saved from."""
    autos = [AutoModelForMaskedLM, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModel]
    fitting = [auto for auto in autos if type(config) in auto._model_mapping]
    saved = (config.architectures or [None])[0]
    return next((auto for auto in fitting if auto._model_mapping[type(config)].__name__ == saved), (fitting or autos)[0])
