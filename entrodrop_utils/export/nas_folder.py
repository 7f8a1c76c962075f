"""Folders for vLLM and mlx-lm. Without whole blocks only, they are plain transformers checkpoints, which both read.

Without attention layers or MLPs they are of model type ``nemotron-nas`` (DeciLM): ``block_configs`` say of every layer whether it
has an attention, and how wide its MLP is. Read and tried there:

- the width of an MLP is a multiple of 256, computed from ``ffn_mult``: narrower ones are padded with zeros, which add nothing;
- vLLM crashes where the first layer has no attention; with ``zeros`` that attention stays, with weights of zeros;
- biases are of all attentions or MLPs, or of none: zeros fill what the model lacks;
- mlx-lm reads the base of rotary positions under the name that transformers had before version 5, also in plain checkpoints;
- mlx-lm has linear layers in place of an attention, which hold a linear repair; vLLM has none.
"""

import errno
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from ..families.decoder import UnsupportedModel, decoder_layers
from ..residual import SubBlock, find
from ..saving import repeat_rope_settings
from .branches import Branch, PackedLayer, branches, check_exportable, head_width, joined_constants, kv_bytes, outside, pack
from .report import Exported, ExportMismatch

FAMILIES = ("llama", "mistral", "qwen2")
PLAIN = (*FAMILIES, "qwen3")  # whose layers are alike in both targets; mlx-lm takes a Gemma layer's window from its number
MULTIPLE = 256
CONFIG_FILE = Path(__file__).with_name("configuration_nemotron_nas.py")


def vllm(model: PreTrainedModel, path: str | Path, tokenizer=None, zeros: bool = False) -> Exported:
    """Write a folder that vLLM serves (``vllm serve folder --trust-remote-code``): keys and values only where attention is left.

    The folder is read back and compared with the model before it takes its name; after an error nothing is left.

    Args:
        zeros: keep layer 0's attention with weights of zeros where it was dropped: vLLM crashes without one.
    Returns:
        What was written, and what vLLM keeps and loses of it.
    Raises:
        UnsupportedModel: a family, a repair or a setting that ``nemotron-nas`` cannot express, or layer 0's attention; the message
            says what to do.
        ValueError: no weights, or quantised ones.
        FileExistsError: the folder exists and is not empty.

    >>> smaller = remove(copy.deepcopy(model), [SubBlock(1, "attention"), SubBlock(3, "mlp")])
    >>> vllm(smaller, tmp_path / "for-vllm").kv_layers
    5
    """
    return _write(model, Path(path).expanduser(), tokenizer, "vLLM", zeros)


def mlx(model: PreTrainedModel, path: str | Path, tokenizer=None) -> Exported:
    """Write a folder that mlx-lm reads (``mlx_lm.generate --model folder``): keys and values only where attention is left.

    The folder is read back and compared with the model before it takes its name; after an error nothing is left.

    Returns:
        What was written, and what mlx-lm keeps and loses of it.
    Raises:
        UnsupportedModel: a family or a setting that ``nemotron-nas`` cannot express; the message says what to do.
        ValueError: no weights, or quantised ones.
        FileExistsError: the folder exists and is not empty.

    >>> smaller = remove(copy.deepcopy(model), [SubBlock(0, "attention")])
    >>> mlx(smaller, tmp_path / "for-mlx").architecture
    'nemotron-nas'
    """
    return _write(model, Path(path).expanduser(), tokenizer, "mlx-lm", zeros=False)


def _write(model: PreTrainedModel, path: Path, tokenizer, target: str, zeros: bool) -> Exported:
    check_exportable(model)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty: choose another folder, or delete it first")
    config = model.config.get_text_config(decoder=True)
    attention, depth = len(find(model, "attention")), len(decoder_layers(model))
    plain = attention == len(find(model, "mlp")) == depth
    if plain and config.model_type not in PLAIN:
        raise UnsupportedModel(
            f"folders for {target} are written of {', '.join(PLAIN)}, not of {config.model_type}, whose layers may depend on their "
            "number there. save_pruned writes a plain checkpoint without whole blocks; compare its answers before you use it"
        )
    layers = [] if plain else _layers(model, target, zeros)
    kept = attention if plain else sum(layer.first is not None and layer.first.kind == "attention" for layer in layers)

    def build(unfinished: Path) -> None:
        if plain:
            model.save_pretrained(unfinished)
        else:
            unfinished.mkdir()
            save_torch_state_dict(_state(model, layers), unfinished, max_shard_size="5GB")
            settings = _settings(model, layers, target)
            (unfinished / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            if target == "vLLM":
                shutil.copyfile(CONFIG_FILE, unfinished / CONFIG_FILE.name)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(unfinished)
        check_folder(unfinished, model)
        repeat_rope_settings(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)

    path.parent.mkdir(parents=True, exist_ok=True)
    nbytes = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    if (free := shutil.disk_usage(path.parent).free) < nbytes:
        raise OSError(errno.ENOSPC, f"no space for {path}: it needs {nbytes / 1e6:.0f} MB, {free / 1e6:.0f} MB are free")
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent)) / path.name
    try:
        build(unfinished)
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        reason = getattr(error, "strerror", None) or error
        message = f"{path} could not be written ({reason}); nothing of it is left"
        raise OSError(getattr(error, "errno", errno.EIO), message) from error
    finally:
        shutil.rmtree(unfinished.parent, ignore_errors=True)
    return Exported(
        target,
        path,
        config.model_type if plain else "nemotron-nas",
        sum(file.stat().st_size for file in path.iterdir()),
        layers=getattr(config, "entrodrop", {}).get("layers", depth),
        kv_layers=kept,
        kv_bytes_per_token=kv_bytes(config, kept),
        notes=tuple(_stand_ins(model, layers, target)),
    )


def _stand_ins(model: PreTrainedModel, layers: Sequence[PackedLayer], target: str) -> Iterator[str]:
    """What takes time or memory there, and did not in the model."""
    kept = sum(layer.first is not None and layer.first.kind == "attention" for layer in layers)
    if kept > len(find(model, "attention")):
        yield "Layer 0 keeps an attention of zeros, and its keys and values: vLLM crashes without it."
    own = model.config.get_text_config(decoder=True).intermediate_size
    if layers and _width(model) > own:
        yield f"MLPs are {_width(model)} wide instead of {own}: {target} has multiples of {MULTIPLE}, and zeros fill the rest."


def _layers(model: PreTrainedModel, target: str, zeros: bool) -> list[PackedLayer]:
    """The layers of the folder, if the target computes what this model's config says.

    Raises:
        UnsupportedModel: it does not.
    """
    config, name = model.config.get_text_config(decoder=True), type(model).__name__
    if config.model_type not in FAMILIES:
        raise UnsupportedModel(
            f"{target} has no model type for a {config.model_type} without single attention layers or MLPs (there is one for "
            f"{', '.join(FAMILIES)}): drop whole blocks, or serve save_pruned's folder with transformers"
        )
    rope, types = config.rope_parameters or {}, getattr(config, "layer_types", None) or []
    window = "sliding_attention" in types if types else bool(getattr(config, "sliding_window", None))
    odd = {
        "sliding windows": window,
        f"activation {config.hidden_act!r}": config.hidden_act not in ("silu", "swish"),
        f"rotary scaling {rope.get('rope_type')!r}": rope.get("rope_type", "default") not in ("default", "llama3", "linear"),
        "heads of another width than hidden size / heads": target == "mlx-lm"
        and (getattr(config, "head_dim", None) or 0) * config.num_attention_heads not in (0, config.hidden_size),
    }
    if wrong := [what for what, is_so in odd.items() if is_so]:
        raise UnsupportedModel(f"{name} has {wrong[0]}, which {target}'s nemotron-nas does not hold")
    layers = pack(branches(model))
    if target == "vLLM":
        if linear := [layer.first for layer in layers if layer.first is not None and layer.first.kind == "linear"]:
            raise UnsupportedModel(
                f"vLLM has nothing for the linear repair of {linear[0].sub_block}: use repair(how='constant'), or export to GGUF"
            )
        if layers[0].first is None:
            if not zeros:
                raise UnsupportedModel(
                    "vLLM crashes without the attention of the first layer: keep it (protect layer 0), or zeros=True (--zeros) "
                    "keeps an attention of zeros, and its keys and values, in its place"
                )
            like = next(layer.first for layer in layers if layer.first is not None)
            weights = {key: torch.zeros_like(value) for key, value in like.weights.items()}
            layers[0] = PackedLayer(Branch("attention", SubBlock(0, "attention"), weights), layers[0].mlp, layers[0].bias)
    return layers


def _width(model: PreTrainedModel) -> int:
    width = model.config.get_text_config(decoder=True).intermediate_size
    return -(-width // MULTIPLE) * MULTIPLE


def _has_biases(layers: Sequence[PackedLayer]) -> tuple[bool, bool]:
    """Whether attentions and MLPs have biases."""
    attention = any(name.endswith("proj.bias") for layer in layers if layer.first for name in layer.first.weights)
    mlp = any(name.endswith("proj.bias") for layer in layers if layer.mlp for name in layer.mlp.weights)
    return attention, mlp or any(layer.bias is not None for layer in layers)


def _state(model: PreTrainedModel, layers: Sequence[PackedLayer]) -> dict[str, Tensor]:
    """The weights of the folder, under the names that both targets read."""
    config, width = model.config.get_text_config(decoder=True), _width(model)
    around, (attention_biases, mlp_biases) = outside(model), _has_biases(layers)
    state = {"model.embed_tokens.weight": around["embed_tokens"], "model.norm.weight": around["norm"]}
    if "lm_head" in around:
        state["lm_head.weight"] = around["lm_head"]
    dim, dtype = config.hidden_size, model.dtype
    for number, layer in enumerate(layers):
        own: dict[str, Tensor] = {}
        if layer.first is not None and layer.first.kind == "linear":
            own |= {"input_layernorm.weight": layer.first.weights["norm"], "self_attn.linear.weight": layer.first.weights["weight"]}
            if attention_biases:
                own["self_attn.linear.bias"] = torch.zeros(dim)
        elif layer.first is not None:
            own |= layer.first.weights
            if attention_biases:
                rows = {f"self_attn.{name}_proj": own[f"self_attn.{name}_proj.weight"].shape[0] for name in "qkvo"}
                own |= {f"{name}.bias": torch.zeros(n) for name, n in rows.items() if f"{name}.bias" not in own}
        if layer.mlp is not None:
            own |= {name: _padded(name, weight, width) for name, weight in layer.mlp.weights.items()}
        elif layer.bias is not None:
            own |= {f"mlp.{name}_proj.weight": torch.zeros(MULTIPLE, dim) for name in ("gate", "up")}
            own |= {"mlp.down_proj.weight": torch.zeros(dim, MULTIPLE), "post_attention_layernorm.weight": torch.ones(dim)}
        if mlp_biases and "mlp.down_proj.weight" in own:
            for name in ("gate", "up", "down"):
                bias = own.setdefault(f"mlp.{name}_proj.bias", torch.zeros(own[f"mlp.{name}_proj.weight"].shape[0]))
                if name == "down" and layer.bias is not None:
                    own[f"mlp.{name}_proj.bias"] = bias.float() + layer.bias.to(bias.device)
        state |= {f"model.layers.{number}.{name}": value for name, value in own.items()}
    return {name: value.detach().to("cpu", dtype).contiguous() for name, value in state.items()}


def _padded(name: str, weight: Tensor, width: int) -> Tensor:
    """A weight of an MLP with zeros up to a width that the targets have."""
    axis = 1 if name == "mlp.down_proj.weight" else 0
    if not name.startswith("mlp.") or name == "mlp.down_proj.bias" or weight.shape[axis] == width:
        return weight
    shape = list(weight.shape)
    shape[axis] = width - shape[axis]
    return torch.cat([weight.detach(), weight.new_zeros(shape)], axis)


def _settings(model: PreTrainedModel, layers: Sequence[PackedLayer], target: str) -> dict[str, object]:
    """The config.json."""
    config = model.config.get_text_config(decoder=True)
    group = config.num_attention_heads // config.num_key_value_heads
    attention_bias, mlp_bias = _has_biases(layers)
    blocks = []
    for layer in layers:
        kind = layer.first.kind if layer.first else None
        width = _width(model) if layer.mlp is not None else MULTIPLE if layer.bias is not None else 0
        # both targets round 2/3 ffn_mult dim up to a multiple of 256; half of one below it, rounding of ffn_mult does no harm
        mult = 3 * (width - MULTIPLE / 2) / (2 * config.hidden_size) if width else None
        attention = {"no_op": kind is None, "n_heads_in_group": group if kind == "attention" else None}
        blocks.append(
            {
                "attention": attention | {"replace_with_linear": kind == "linear"},
                "ffn": {"no_op": not width, "ffn_mult": mult, "replace_with_linear": False},
            }
        )
    same = ("hidden_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "vocab_size", "hidden_act")
    same += ("max_position_embeddings", "intermediate_size", "bos_token_id", "eos_token_id", "pad_token_id")
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        **({"auto_map": {"AutoConfig": f"{CONFIG_FILE.stem}.PrunedNasConfig"}} if target == "vLLM" else {}),
        **{key: getattr(config, key, None) for key in same},
        "head_dim": head_width(config),
        "num_hidden_layers": len(layers),
        "tie_word_embeddings": "lm_head" not in outside(model),
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "rope_parameters": config.rope_parameters,
        "dtype": str(model.dtype).removeprefix("torch."),
        "block_configs": blocks,
    }


def check_folder(path: str | Path, model: PreTrainedModel) -> None:
    """Compare a folder with the model it was written from, reading only the folder and the model's own modules.

    Raises:
        ExportMismatch: a layer has other tensors than its block config says, or they are not the model's, in its order.
    """
    path = Path(path)
    settings, state = json.loads((path / "config.json").read_text()), {}
    for file in path.glob("*.safetensors"):
        state |= load_file(file)

    def take(name: str, own: Tensor | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor that must be ``own``, with zeros up to ``shape``."""
        shape = shape or tuple(own.shape)
        if name not in state or tuple(state[name].shape) != shape:
            raise ExportMismatch(f"{path.name}: tensor {name} of shape {shape} is missing or of another shape")
        written = state.pop(name)
        if own is not None:
            own = own.detach().to("cpu", written.dtype)
            inside = tuple(map(slice, own.shape))
            if not (torch.equal(written[inside], own) and written.count_nonzero() == own.count_nonzero()):
                raise ExportMismatch(f"{path.name}: the values of {name} are not the model's")
        return written

    if settings["model_type"] == "nemotron-nas":
        for name, own in outside(model).items():
            take(f"{name}.weight" if name == "lm_head" else f"model.{name}.weight", own)
        _check_blocks(path, model, settings, take)
    else:
        for name, own in model.named_parameters():  # tied ones once
            take(name, own)
        if settings["num_hidden_layers"] != len(decoder_layers(model)):
            raise ExportMismatch(f"{path.name}: config.json says {settings['num_hidden_layers']} layers")
    if state:
        raise ExportMismatch(f"{path.name}: {next(iter(state))} is left over")


def _check_blocks(path: Path, model: PreTrainedModel, settings: dict, take: Callable[..., Tensor]) -> None:
    """The layers of ``nemotron-nas``, one after the other, against what the model adds to its stream."""
    left = joined_constants(branches(model))[::-1]  # the next one last
    dim, heads, width = settings["hidden_size"], settings["num_attention_heads"], settings["head_dim"]

    def following(kind: str, number: int) -> Branch:
        if not left or left[-1].kind != kind:
            raise ExportMismatch(
                f"{path.name}: layer {number} has {kind}, where the model has {left[-1].sub_block if left else 'none'}"
            )
        return left.pop()

    for i, block in enumerate(settings["block_configs"]):
        layer, attention, ffn = f"model.layers.{i}", block["attention"], block["ffn"]
        own: dict[str, Tensor] = {}
        if attention["replace_with_linear"]:
            maps = following("linear", i).weights
            take(f"{layer}.input_layernorm.weight", maps["norm"])
            take(f"{layer}.self_attn.linear.weight", maps["weight"])
            if settings["attention_bias"]:
                take(f"{layer}.self_attn.linear.bias", torch.zeros(dim))
        elif not attention["no_op"]:
            rows = {"q": heads * width} | dict.fromkeys("kv", heads // attention["n_heads_in_group"] * width)
            shapes = {f"{name}_proj": (n, dim) for name, n in rows.items()} | {"o_proj": (dim, rows["q"])}
            if i > 0 or (left and left[-1].kind == "attention"):  # else the first layer keeps one of zeros
                own = following("attention", i).weights
            take(f"{layer}.input_layernorm.weight", own.get("input_layernorm.weight"), (dim,))
            for name, shape in shapes.items():
                take(f"{layer}.self_attn.{name}.weight", own.get(f"self_attn.{name}.weight", torch.zeros(shape)), shape)
                if settings["attention_bias"]:
                    take(f"{layer}.self_attn.{name}.bias", own.get(f"self_attn.{name}.bias", torch.zeros(shape[0])))
        if ffn["no_op"]:
            continue
        n = -(-int(2 * round(ffn["ffn_mult"], 6) * dim / 3) // MULTIPLE) * MULTIPLE
        own = following("mlp", i).weights if left and left[-1].kind == "mlp" else {}  # else an empty one with a constant
        bias = own.get("mlp.down_proj.bias", torch.zeros(dim))
        if left and left[-1].kind == "constant":
            bias = bias.float() + following("constant", i).weights["bias"].to(bias.device)
        elif not own:
            raise ExportMismatch(f"{path.name}: layer {i} has an MLP, where the model has {left[-1].sub_block if left else 'none'}")
        take(f"{layer}.post_attention_layernorm.weight", own.get("post_attention_layernorm.weight", torch.ones(dim)))
        for name in ("gate_proj", "up_proj", "down_proj"):
            shape = (dim, n) if name == "down_proj" else (n, dim)
            take(f"{layer}.mlp.{name}.weight", own.get(f"mlp.{name}.weight", torch.zeros(shape)), shape)
            if settings["mlp_bias"]:
                own_bias = bias if name == "down_proj" else own.get(f"mlp.{name}.bias", torch.zeros(n))
                take(f"{layer}.mlp.{name}.bias", own_bias, shape[:1])
    if left:
        raise ExportMismatch(f"{path.name}: {left[-1].sub_block} is missing")
