"""GGUF files for llama.cpp and the programs that vendor it (Ollama, LM Studio).

Without whole blocks, a pruned model is a plain file of its family with fewer layers. Without attention layers or MLPs it is a file
of llama.cpp's architecture ``deci``, whose head counts and feed-forward lengths are per layer. Read and tried there:

- a layer of 0 heads has no attention tensors, no attention norm, and no keys and values;
- the first layer needs heads, as the width of a head is taken from it: it gets a linear attention (0 key-value heads) of zeros;
- a feed-forward length of 0 loads, but skips the rest of the layer, its attention included: a missing MLP is one of 32 zeros;
- rotary positions turn neighbouring features, as in ``llama`` files, so queries and keys are permuted.

A linear attention holds a linear repair, and the bias of a feed-forward a constant one.
"""

import contextlib
import errno
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf as library
import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..families.decoder import UnsupportedModel, decoder_layers
from ..files import replacing
from ..progress import progress
from ..residual import SubBlock, find, layout_of
from .branches import Branch, PackedLayer, branches, check_exportable, head_width, joined_constants, kv_bytes, outside, pack
from .report import Exported, ExportMismatch
from .vocabulary import add_vocabulary, check_vocabulary

EMPTY = 32  # the width of an MLP that adds nothing: one block of q8_0
TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


@dataclass(frozen=True)
class _Family:
    """How llama.cpp holds a family. ``pairs``: queries and keys are permuted; ``shift``: what its norms' weights lack."""

    arch: MODEL_ARCH
    pairs: bool = False
    shift: float = 0.0
    deci: bool = False


FAMILIES = {
    "llama": _Family(MODEL_ARCH.LLAMA, pairs=True, deci=True),
    "mistral": _Family(MODEL_ARCH.LLAMA, pairs=True, deci=True),
    "qwen2": _Family(MODEL_ARCH.QWEN2, deci=True),
    "qwen3": _Family(MODEL_ARCH.QWEN3),
    "gemma3_text": _Family(MODEL_ARCH.GEMMA3, shift=1.0),
}


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: its values are made when they are written."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    values: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(library.quant_shape_to_byte_shape(self.shape, self.kind))


def gguf(
    model: PreTrainedModel, path: str | Path, tokenizer=None, dtype: str = "f16", zeros: bool = False, overwrite: bool = False
) -> Exported:
    """Write a model, pruned or whole, as a GGUF file that llama.cpp loads and computes as transformers does.

    The file is read back and compared with the model before it takes its name; after an error nothing is left.

    Args:
        tokenizer: a fast tokenizer, or a ``.gguf`` file whose vocabulary is copied; None leaves a file that reads ids only.
        dtype: of the matrices: ``f32``, ``f16``, ``bf16`` or ``q8_0`` (rows that are no multiple of 32 are then f16).
        zeros: let branches of zeros stand for dropped attention layers and MLPs in families that ``deci`` does not fit (Qwen 3,
            Gemma 3). Nothing gets smaller or faster.
        overwrite: replace an existing file.
    Returns:
        What was written, and what llama.cpp keeps and loses of it.
    Raises:
        UnsupportedModel: a family, a repair or a setting that llama.cpp's file cannot express; the message says what to do.
        ValueError: no weights, quantised weights, an unknown dtype, a tokenizer that cannot be written, or weights past the range
            of the dtype.
        FileExistsError: the file exists.
        OSError: no space for it.

    >>> smaller = remove(copy.deepcopy(model), [SubBlock(1, "attention")])
    >>> exported = gguf(smaller, tmp_path / "smaller.gguf", dtype="f32")
    >>> exported.architecture, exported.kv_layers
    ('deci', 5)
    """
    path = Path(path).expanduser()
    if dtype not in TYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(TYPES)}")
    check_exportable(model)
    family = _family(model)
    if path.is_dir() or (path.exists() and not overwrite):
        raise FileExistsError(f"{path} exists: choose another name, or delete it first")
    sequence = branches(model)
    layers, arch = _layout(model, family, sequence, zeros)
    rows = model.get_input_embeddings().num_embeddings
    check_vocabulary(tokenizer, rows)
    entries = _entries(model, family, arch, layers, TYPES[dtype][0])
    _require_space(path, sum(entry.nbytes for entry in entries))
    with _no_space(path), replacing(path) as unfinished:
        _write(unfinished, model, arch, layers, entries, dtype, tokenizer, rows)
        check_file(unfinished, model, zeros)
        nbytes = unfinished.stat().st_size
    config = model.config.get_text_config(decoder=True)
    attention = sum(layer.first is not None and layer.first.kind == "attention" for layer in layers)
    return Exported(
        "llama.cpp",
        path,
        library.MODEL_ARCH_NAMES[arch],
        nbytes,
        layers=getattr(config, "entrodrop", {}).get("layers", len(decoder_layers(model))),
        kv_layers=attention,
        kv_bytes_per_token=kv_bytes(config, attention),
        zeros=arch == family.arch and len(find(model, "attention")) + len(find(model, "mlp")) < 2 * len(layers),
        notes=tuple(_stand_ins(layers)),
    )


def _stand_ins(layers: Sequence[PackedLayer]) -> Iterator[str]:
    """What is still computed of what was dropped."""
    first = layers[0].first
    if first is not None and first.kind == "linear" and not first.weights["weight"].any():
        yield "Layer 0 keeps a linear layer of zeros, without keys and values: llama.cpp reads the width of a head there."
    if empty := sum(layer.mlp is None for layer in layers):
        yield f"Layers without an MLP ({empty}) keep one of {EMPTY} zeros, which takes next to no time."


def _family(model: PreTrainedModel) -> _Family:
    """The model's family, if llama.cpp computes what this model's config says.

    Raises:
        UnsupportedModel: it does not.
    """
    config, name = model.config.get_text_config(decoder=True), type(model).__name__
    if config.model_type not in FAMILIES:
        raise UnsupportedModel(
            f"GGUF files are written for {', '.join(FAMILIES)}, not for {config.model_type} ({name}). Without whole blocks only, "
            "save_pruned writes a plain checkpoint that llama.cpp's convert_hf_to_gguf.py reads"
        )
    family = FAMILIES[config.model_type]
    gemma = family.arch == MODEL_ARCH.GEMMA3
    rope = config.rope_parameters or {}
    full = rope.get("full_attention", rope)
    act = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    types = getattr(config, "layer_types", None) or []
    odd = {
        f"rotary scaling {full.get('rope_type')!r}": full.get("rope_type", "default") not in ("default", "llama3", "linear"),
        "partly rotary heads": full.get("partial_rotary_factor", 1.0) != 1.0,
        f"activation {act!r}": act not in (("gelu_pytorch_tanh",) if gemma else ("silu", "swish")),
        "sliding windows": not gemma
        and (bool(getattr(config, "sliding_window", None)) if not types else "sliding_attention" in types),
    }
    if gemma:
        local = rope.get("sliding_attention", {})
        odd |= {
            "a scale of attention that is not of its head width": config.query_pre_attn_scalar != head_width(config),
            "soft caps of logits": bool(config.attn_logit_softcapping or config.final_logit_softcapping),
            "local rotary positions that are not of base 10000": (local.get("rope_theta"), local.get("rope_type"))
            != (1e4, "default"),
            "attention in both directions": bool(getattr(config, "use_bidirectional_attention", False)),
            "full attention that is not every sixth layer (llama.cpp takes that for granted: drop blocks so that it stays)": [
                kind == "full_attention" for kind in types
            ]
            != [(i + 1) % 6 == 0 for i in range(len(types))],
        }
    if wrong := [what for what, is_so in odd.items() if is_so]:
        raise UnsupportedModel(
            f"{name} has {wrong[0]}, which llama.cpp's {library.MODEL_ARCH_NAMES[family.arch]} files do not hold"
        )
    return family


def _layout(
    model: PreTrainedModel, family: _Family, sequence: Sequence[Branch], zeros: bool
) -> tuple[list[PackedLayer], MODEL_ARCH]:
    """The layers of the file, and its architecture."""
    repairs = [branch for branch in sequence if branch.kind in ("linear", "constant")]
    if not repairs:
        plain = pack(sequence)
        gemma = family.arch == MODEL_ARCH.GEMMA3  # whose windows depend on a layer's number
        if all(layer.is_whole for layer in plain) and (not gemma or len(plain) == len(decoder_layers(model))):
            return plain, family.arch
    if family.deci:
        layers = pack(sequence)
        if layers[0].first is None:
            layers[0] = PackedLayer(_zero_linear(model), layers[0].mlp, layers[0].bias)
        return layers, MODEL_ARCH.DECI
    kind = model.config.get_text_config(decoder=True).model_type
    if repairs:
        raise UnsupportedModel(f"llama.cpp has no file for a repaired {kind}: save it with save_pruned, or drop whole blocks")
    if not zeros:
        raise UnsupportedModel(
            f"llama.cpp has no file for a {kind} without single attention layers or MLPs: drop whole blocks, or pass zeros=True "
            "(--zeros) for branches of zeros, with which nothing gets faster"
        )
    warnings.warn(
        f"branches of zeros stand for what was dropped of {type(model).__name__}: llama.cpp computes the same, no faster",
        stacklevel=3,
    )
    whole = {(branch.sub_block.layer, branch.kind): branch for branch in sequence}
    depth = range(len(decoder_layers(model)))
    some = {kind: next(branch for branch in sequence if branch.kind == kind) for kind in ("attention", "mlp")}
    filled = {kind: [whole.get((i, kind)) or _zero_branch(some[kind], i) for i in depth] for kind in some}
    return [PackedLayer(*pair) for pair in zip(*filled.values(), strict=True)], family.arch


def _zero_branch(like: Branch, layer: int) -> Branch:
    return Branch(like.kind, SubBlock(layer, like.kind), {name: torch.zeros_like(value) for name, value in like.weights.items()})


def _zero_linear(model: PreTrainedModel) -> Branch:
    dim = model.get_input_embeddings().embedding_dim
    return Branch("linear", SubBlock(0, "attention"), {"norm": torch.ones(dim), "weight": torch.zeros(dim, dim)})


def _numbers(weight: Tensor) -> np.ndarray:
    return weight.detach().to("cpu", torch.float32).numpy()


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in llama.cpp's order: a head's halves alternate, as it turns neighbours and not halves."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _entries(
    model: PreTrainedModel, family: _Family, arch: MODEL_ARCH, layers: Sequence[PackedLayer], matrices: GGMLQuantizationType
) -> list[_Entry]:
    """All tensors of the file."""
    config = model.config.get_text_config(decoder=True)
    names = library.get_tensor_name_map(arch, len(layers))
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    entries: list[_Entry] = []

    def add(name: str, weight: Tensor, change: Callable[[Tensor], Tensor] = lambda weight: weight) -> None:
        kind = GGMLQuantizationType.F32 if weight.ndim == 1 else matrices
        if kind == GGMLQuantizationType.Q8_0 and weight.shape[-1] % 32:
            kind = GGMLQuantizationType.F16
        entries.append(_Entry(name, tuple(weight.shape), kind, lambda: _numbers(change(weight.detach()))))

    def named(theirs: str) -> str:
        module, _, end = theirs.rpartition(".")
        name = names.get_name(module)
        if name is None:
            raise UnsupportedModel(f"llama.cpp's {library.MODEL_ARCH_NAMES[arch]} files have no place for the weight {theirs}")
        return f"{name}.{end}"

    def add_own(number: int, branch: Branch, bias: Tensor | None = None) -> None:
        for name, weight in branch.weights.items():
            part, change = name.split(".")[-2], lambda weight: weight
            if part in heads and (family.pairs or arch == MODEL_ARCH.DECI):
                change = lambda weight, n=heads[part]: _interleaved(weight, n)  # noqa: E731
            elif part.endswith("norm") and family.shift:
                change = lambda weight: weight.float() + family.shift  # noqa: E731
            elif name == "mlp.down_proj.bias" and bias is not None:
                change = lambda weight: weight.float() + bias.to(weight.device)  # noqa: E731
            add(named(f"model.layers.{number}.{name}"), weight, change)
        if bias is not None and "mlp.down_proj.bias" not in branch.weights:
            add(f"blk.{number}.ffn_down.bias", bias)

    around = outside(model)
    add("token_embd.weight", around["embed_tokens"])
    for number, layer in enumerate(layers):
        if layer.first is not None and layer.first.kind == "linear":
            add(f"blk.{number}.attn_norm.weight", layer.first.weights["norm"])
            add(f"blk.{number}.attn_output.weight", layer.first.weights["weight"])
        elif layer.first is not None:
            add_own(number, layer.first)
        if layer.mlp is not None:
            add_own(number, layer.mlp, layer.bias)
        else:
            dim = config.hidden_size
            add(f"blk.{number}.ffn_norm.weight", torch.ones(dim))
            for name, shape in {"gate": (EMPTY, dim), "up": (EMPTY, dim), "down": (dim, EMPTY)}.items():
                add(f"blk.{number}.ffn_{name}.weight", torch.zeros(shape))
            if layer.bias is not None:
                add(f"blk.{number}.ffn_down.bias", layer.bias)
    add("output_norm.weight", around["norm"], lambda weight: weight.float() + family.shift)
    if "lm_head" in around:
        add("output.weight", around["lm_head"])
    if (config.rope_parameters or {}).get("rope_type") == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = config.rope_parameters["rope_theta"] ** -(torch.arange(len(scaled)) / len(scaled))
        add("rope_freqs.weight", plain / scaled)
    return entries


def _per_layer(config, layers: Sequence[PackedLayer]) -> dict[str, list[int]]:
    """The arrays of a ``deci`` file."""
    attention = [layer.first.kind if layer.first else "none" for layer in layers]
    return {
        "head_count": [0 if kind == "none" else config.num_attention_heads for kind in attention],
        "head_count_kv": [config.num_key_value_heads if kind == "attention" else 0 for kind in attention],
        "feed_forward_length": [EMPTY if layer.mlp is None else config.intermediate_size for layer in layers],
    }


def _write(path: Path, model, arch: MODEL_ARCH, layers, entries: list[_Entry], dtype: str, tokenizer, rows: int) -> None:
    config = model.config.get_text_config(decoder=True)
    writer = GGUFWriter(path, library.MODEL_ARCH_NAMES[arch])
    try:
        rope = config.rope_parameters or {}
        full = rope.get("full_attention", rope)
        writer.add_name(Path(str(getattr(model.config, "_name_or_path", "") or type(model).__name__)).name)
        writer.add_file_type(TYPES[dtype][1])
        writer.add_quantization_version(library.GGML_QUANT_VERSION)
        writer.add_block_count(len(layers))
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_vocab_size(rows)
        lengths = _per_layer(config, layers)
        for key, values in lengths.items():
            getattr(writer, f"add_{key}")(values if arch == MODEL_ARCH.DECI else values[0])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(full["rope_theta"])
        for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
            add(head_width(config))
        if full.get("rope_type") == "linear":
            writer.add_rope_scaling_type(library.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(full["factor"])
        if arch == MODEL_ARCH.GEMMA3:
            writer.add_sliding_window(config.sliding_window)
        add_vocabulary(writer, tokenizer, rows)
        for entry in entries:
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.nbytes, raw_dtype=entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in progress(entries, "writing the GGUF file (tensors)"):
            with np.errstate(over="ignore"):
                packed = library.quantize(np.ascontiguousarray(entry.values()), entry.kind)
            writer.write_tensor_data(packed)
    finally:
        writer.close()


def _require_space(path: Path, nbytes: int) -> None:
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OSError(errno.ENOSPC, f"no space for {path}: it needs {nbytes / 1e6:.0f} MB, {folder} has {free / 1e6:.0f} MB free")


@contextlib.contextmanager
def _no_space(path: Path) -> Iterator[None]:
    """Say what failed where the disk is full or the file too large; the writer's own message names no file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written ({error.strerror or error}); nothing of it is left") from error


def check_file(path: str | Path, model: PreTrainedModel, zeros: bool = False) -> None:
    """Compare a file with the model it was written from, reading only the file and the model's own modules.

    Every layer must have exactly the tensors, in the shapes, that llama.cpp reads for its head counts and feed-forward length;
    branch after branch must hold the weights of the model's sub-blocks, in the order of its stream.

    Raises:
        ExportMismatch: it does not; the message names the tensor.
        ValueError: values past the range of the file's dtype.
    """
    reader = GGUFReader(path)
    config, arch = model.config.get_text_config(decoder=True), reader.fields["general.architecture"].contents()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    depth = reader.fields[f"{arch}.block_count"].contents()
    dim, width = config.hidden_size, head_width(config)

    def array(key: str) -> list[int]:
        value = reader.fields[f"{arch}.{key}"].contents()
        return value if isinstance(value, list) else [value] * depth

    heads, kv, ffn = array("attention.head_count"), array("attention.head_count_kv"), array("feed_forward_length")
    known = {0, config.num_attention_heads}, {0, config.num_key_value_heads}, {EMPTY, config.intermediate_size}
    if (
        any(len(values) != depth or not set(values) <= of_model for values, of_model in zip((heads, kv, ffn), known, strict=True))
        or not heads[0]
    ):
        raise ExportMismatch(f"{path}: its arrays per layer ({heads}, {kv}, {ffn}) are none that llama.cpp computes rightly")

    def expect(name: str, shape: tuple[int, ...], weight: Tensor | None = None, turned: int = 0) -> None:
        if name not in tensors or tuple(int(n) for n in tensors[name].shape[::-1]) != shape:
            raise ExportMismatch(f"{path}: tensor {name} of shape {shape} is missing or of another shape")
        tensor = tensors.pop(name)
        written = library.dequantize(tensor.data, tensor.tensor_type)
        if not np.isfinite(written).all():
            raise ValueError(f"{name} has values past the range of {tensor.tensor_type.name.lower()}: use dtype='bf16' or 'f32'")
        if weight is not None:
            values = _numbers(weight)
            if turned:  # neighbours in the file are halves of a head in the model
                written = np.concatenate([np.concatenate([head[0::2], head[1::2]]) for head in np.split(written, turned)])
            steps = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 2**-7}
            if np.abs(written - values).max(initial=0) > steps[tensor.tensor_type.name] * np.abs(values).max(initial=0) + 1e-7:
                raise ExportMismatch(f"{path}: the values of {name} are not the model's")

    shift, layout = FAMILIES[config.model_type].shift, layout_of(model)
    zeros = zeros and arch != "deci" and depth == len(decoder_layers(model))
    left = joined_constants(branches(model))[::-1]  # the next one last
    there = {branch.sub_block for branch in left}

    def take(kind: str, number: int) -> Branch:
        if not left or left[-1].kind != kind:
            raise ExportMismatch(f"{path}: layer {number} has {kind}, where the model has {left[-1].sub_block if left else 'none'}")
        return left.pop()

    def of_model(kind: str, number: int) -> tuple[object | None, SubBlock | None]:
        if zeros and SubBlock(number, kind) not in there:
            return None, None
        sub_block = take(kind, number).sub_block
        return decoder_layers(model)[sub_block.layer].get_submodule(next(iter(layout.branch(kind)))), sub_block

    def expect_norms(kind: str, number: int, sub_block: SubBlock | None) -> None:
        own = library.get_tensor_name_map(next(a for a, n in library.MODEL_ARCH_NAMES.items() if n == arch), depth)
        for path_ in list(layout.branch(kind))[1:]:
            part = decoder_layers(model)[sub_block.layer].get_submodule(path_) if sub_block else None
            name = own.get_name(f"model.layers.{number}.{path_}")
            expect(f"{name}.weight", (dim,), None if part is None else part.weight.detach().float() + shift)

    for i in range(depth):
        if kv[i]:
            part, sub_block = of_model("attention", i)
            expect_norms("attention", i, sub_block)
            for name, count in (("q", heads[i]), ("k", kv[i]), ("v", kv[i])):
                whole, turned = part and getattr(part, f"{name}_proj"), count * (name != "v" and arch in ("llama", "deci"))
                expect(f"blk.{i}.attn_{name}.weight", (count * width, dim), part and whole.weight, turned)
                if part is not None and whole.bias is not None:
                    expect(f"blk.{i}.attn_{name}.bias", (count * width,), whole.bias, turned)
            shape = (dim, heads[i] * width)
            expect(f"blk.{i}.attn_output.weight", shape, part.o_proj.weight if part is not None else torch.zeros(shape))
            for name in ("q_norm", "k_norm") if arch in ("qwen3", "gemma3") else ():
                expect(f"blk.{i}.attn_{name}.weight", (width,), part and getattr(part, name).weight.detach().float() + shift)
            if part is not None and part.o_proj.bias is not None:
                expect(f"blk.{i}.attn_output.bias", (dim,), part.o_proj.bias)
        elif heads[i]:
            is_repair = i > 0 or (bool(left) and left[-1].kind == "linear")  # the first layer may hold one of zeros
            maps = take("linear", i).weights if is_repair else _zero_linear(model).weights
            expect(f"blk.{i}.attn_norm.weight", (dim,), maps["norm"])
            expect(f"blk.{i}.attn_output.weight", (dim, dim), maps["weight"])
        bias = None
        if ffn[i] == config.intermediate_size:
            part, sub_block = of_model("mlp", i)
            expect_norms("mlp", i, sub_block)
            for name, shape in (("gate", (ffn[i], dim)), ("up", (ffn[i], dim)), ("down", (dim, ffn[i]))):
                whole = part and getattr(part, f"{name}_proj")
                expect(f"blk.{i}.ffn_{name}.weight", shape, whole.weight if part is not None else torch.zeros(shape))
                if part is not None and name != "down" and whole.bias is not None:
                    expect(f"blk.{i}.ffn_{name}.bias", (ffn[i],), whole.bias)
            bias = part and part.down_proj.bias
        else:
            expect(f"blk.{i}.ffn_norm.weight", (dim,))
            for name, shape in (("gate", (ffn[i], dim)), ("up", (ffn[i], dim)), ("down", (dim, ffn[i]))):
                expect(f"blk.{i}.ffn_{name}.weight", shape, torch.zeros(shape))
        if left and left[-1].kind == "constant":
            constant = take("constant", i).weights["bias"]
            bias = constant if bias is None else bias.detach().float() + constant.to(bias.device)
        if bias is not None:
            expect(f"blk.{i}.ffn_down.bias", (dim,), bias)
    around = outside(model)
    expect("token_embd.weight", tuple(around["embed_tokens"].shape), around["embed_tokens"])
    expect("output_norm.weight", (dim,), around["norm"].detach().float() + shift)
    if "lm_head" in around:
        expect("output.weight", tuple(around["lm_head"].shape), around["lm_head"])
    if (config.rope_parameters or {}).get("rope_type") == "llama3":
        expect("rope_freqs.weight", (width // 2,))
    if left or tensors:
        raise ExportMismatch(f"{path}: {left[-1].sub_block} is missing" if left else f"{path}: {next(iter(tensors))} is left over")
