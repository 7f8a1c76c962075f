"""Conversion of a GGUF file to a transformers folder with float32 weights and the tokenizer."""

import contextlib
import importlib
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging as transformers_logging

from ..progress import progress, report_step
from .downloads import ModelUnavailable

# GGUF names the pattern by which text is split before BPE. transformers knows some of these names and reads the others as GPT-2's;
# under the ones below each digit also stands alone, so that a run of spaces before a number is another token.
SPLIT_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


# Weights that a model may leave out without a change of its output: buffers that are computed, further prediction layers, towers
# for pictures and sound, and heads of other tasks
IDLE = re.compile(
    r"rotary\w*\.(original_)?(inv_freq|cos_cached|sin_cached)$|\.(attn|attention)\.(masked_)?bias$|\.causal_mask$|position_ids$|"
    r"(^|\.)mtp(\.|_)|\.nextn|"
    r"^(\w+\.)?(vision_\w+|visual|audio_\w+|(multi_modal|mm)_projector|connector|embed_(vision|audio)|image_newline)(\.|$)"
)
HEADS = re.compile(
    r"^(\w+\.)?((\w+_)?(classifier|lm_head|predictions)|pooler|cls|score|qa_outputs|v_head|vocab_(transform|projector|layer_norm))(\.|$)"
)


def require_complete(info: dict, model: PreTrainedModel) -> None:
    """Refuse weights that do not fit the model: transformers fills gaps with random numbers, ignores the rest, and only warns.

    Args:
        info: what ``from_pretrained`` returns with ``output_loading_info`` and ``ignore_mismatched_sizes``.

    Raises:
        ModelUnavailable: weights are missing or of another shape, or the file has weights for which the model has no place.
    """
    others = [name for name in info["unexpected_keys"] if not _is_idle(name, model)]
    if missing := sorted(info["missing_keys"]):
        instead = f", and it has others instead (the first is {sorted(others)[0]})" if others else ""
        raise ModelUnavailable(f"{len(missing)} of its weights are missing (the first is {missing[0]}){instead}: get a whole copy")
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        raise ModelUnavailable(
            f"{len(mismatched)} of its weights have another shape than its config says (the first is {name}: {tuple(found)}, not "
            f"{tuple(wanted)}): correct its config.json"
        )
    require_no_others(others)


def _is_idle(name: str, model: PreTrainedModel) -> bool:
    """Whether the model gives the same output without this weight of its file, for which it has no place."""
    config = model.config.get_text_config(decoder=True)
    layer, depth = re.search(r"(?:^|\.)layers\.(\d+)\.", name), getattr(config, "num_hidden_layers", 0)
    if layer and depth <= int(layer[1]) < depth + (getattr(config, "num_nextn_predict_layers", 0) or 0):
        return True  # of DeepSeek and GLM, whose prediction layers follow the others
    if IDLE.search(name) or not HEADS.search(name):
        return bool(IDLE.search(name))
    parents = [name.rsplit(".", end)[0] for end in range(1, name.count(".") + 1)]  # a head that the model has is not another's
    return not any(part._parameters for path, part in model.named_modules() if path in parents)


def require_no_others(names: Iterable[str]) -> None:
    """Refuse weights for which the model has no place."""
    if others := sorted(names):
        raise ModelUnavailable(
            f"it has {len(others)} weights for which the model has no place (the first is {others[0]}), so its output would be "
            "wrong: correct its config.json, or merge its adapter"
        )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own bars and notices, which would end up in notebooks. Errors are raised as usual."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def convert(name: str, path: Path, out: Path) -> None:
    """Dequantise the GGUF file ``path`` into the folder ``out``.

    A model read from GGUF counts as quantised for transformers and refuses to be cast or saved, so its weights move into a fresh
    model of the same config.

    Raises:
        ModelUnavailable: the file is cut or no GGUF, or the installed transformers does not know what is in it.
    """
    with quiet_transformers(), _dequantising(name), tempfile.TemporaryDirectory() as alone:
        link = Path(alone) / "model.gguf"
        report_step(f"converting {name}", 0, None)  # transformers reads the file before its bar begins
        link.symlink_to(path.resolve())  # beside other files, transformers would take the tokenizer from them
        try:
            reader = GGUFReader(path)
            quantised, info = AutoModelForCausalLM.from_pretrained(
                alone, gguf_file=link.name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
            require_complete(info, quantised)
            require_no_others(_unread(reader, quantised))
            config = _config(reader, quantised.config)
            tokenizer = _tokenizer(reader, link)
        except Exception as error:  # an unknown architecture, a cut file, no GGUF at all: a dozen kinds
            said = str(error).replace(str(link), path.name).replace(alone, str(path.parent))  # nobody knows the link
            reason = " ".join(said.split())[:600] or type(error).__name__
            raise ModelUnavailable(f"{name} cannot be read as GGUF ({reason}): get a whole copy, or another format") from error
        with torch.device("meta"):  # no second copy of the weights
            plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(quantised.state_dict(), assign=True)
        plain.tie_weights()
        plain.save_pretrained(out)
        tokenizer.save_pretrained(out)


def _unread(reader: GGUFReader, model: PreTrainedModel) -> Iterator[str]:
    """The tensors of the file that the model has no place for: transformers skips those that it does not know."""
    library = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    family = _field(reader, "general.architecture")
    processor = library.TENSOR_PROCESSORS.get(family, library.TensorProcessor)(config=model.config.to_dict())
    places = {"rope_freqs.weight", *library.get_gguf_hf_weights_map(model, processor)}  # `_config` reads the rotary frequencies
    for tensor in reader.tensors:
        if not {tensor.name, tensor.name.removesuffix(".weight")} & places:  # experts that are joined have no suffix in the map
            yield tensor.name


def _field(reader: GGUFReader, key: str, default: object = None):
    return reader.fields[key].contents() if key in reader.fields else default


def _config(reader: GGUFReader, read: PreTrainedConfig) -> PreTrainedConfig:
    """The config as read, no longer quantised, with the scaling of rotary frequencies, which transformers drops without a word.

    Llama 3.1 and later hold it as one divisor per frequency; the parameters that give these are found and checked against them.
    """
    settings = {k: v for k, v in read.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    family = _field(reader, "general.architecture")
    scaling = _field(reader, f"{family}.rope.scaling.type", "none")
    if scaling != "none" and _field(reader, f"{family}.rope.scaling.factor", 1.0) != 1.0 and family != "gpt-oss":
        raise ValueError(f"transformers does not read its {scaling} rope scaling")
    divisors = next((torch.tensor(tensor.data) for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    if divisors is None:
        return AutoConfig.for_model(**settings)
    theta = settings["rope_parameters"]["rope_theta"]
    llama3 = {"rope_type": "llama3", "rope_theta": theta, "factor": float(divisors.max()), "original_max_position_embeddings": 8192}
    settings["rope_parameters"] = llama3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = AutoConfig.for_model(**settings)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    unscaled = theta ** -(torch.arange(len(divisors)) / len(divisors))
    if not torch.allclose(unscaled / frequencies, divisors, rtol=1e-3):
        raise ValueError("its rope scaling is not that of Llama 3")
    return config


def _tokenizer(reader: GGUFReader, path: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and _field(reader, "tokenizer.ggml.pre") in SPLIT_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


@contextlib.contextmanager
def _dequantising(name: str) -> Iterator[None]:
    """Show transformers' bar over the tensors of a GGUF file as ours: its own cannot be turned off, and a cell would keep it."""
    reader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    own, reader.tqdm = reader.tqdm, lambda tensors, **_: progress(tensors, f"dequantising {name} (tensors)")
    try:
        yield
    finally:
        reader.tqdm = own
