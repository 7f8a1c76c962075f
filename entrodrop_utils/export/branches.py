"""A model as the sequence of what it adds to its residual stream, and that sequence packed into layers of another format.

Formats for layers of different kinds (llama.cpp's ``deci``, ``nemotron-nas`` of vLLM and mlx-lm) still have layers: an attention
or none, then an MLP or none. The stream only knows additions in an order. So the attention of layer 5 and the MLP of layer 6 may
share one layer when nothing is left between them.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..families.decoder import UnsupportedModel, decoder, decoder_layers, layer_list
from ..families.modeling_entrodrop import is_bypass
from ..residual import SubBlock, layout_of


@dataclass(frozen=True)
class Branch:
    """One addition to the stream.

    Attributes:
        kind: ``attention`` and ``mlp`` are the model's own; ``linear`` (a normed map) and ``constant`` repair what was dropped.
        sub_block: where it stands in the model.
        weights: parameters by their name in a layer of the family; of a repair ``norm`` and ``weight`` (dim, dim), or ``bias``.
    """

    kind: Literal["attention", "mlp", "linear", "constant"]
    sub_block: SubBlock
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class PackedLayer:
    """A layer of the format: ``first`` (attention or linear), then ``mlp``, then a constant; each may be missing."""

    first: Branch | None = None
    mlp: Branch | None = None
    bias: Tensor | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the layer is as in the dense model."""
        return self.first is not None and self.first.kind == "attention" and self.mlp is not None and self.bias is None


def branches(model: PreTrainedModel) -> list[Branch]:
    """What the model adds to its stream, in order. Its weights are referred to, not copied.

    Raises:
        UnsupportedModel: branches that do not follow each other, or norms of the stream itself.

    >>> smaller = remove(copy.deepcopy(model), [SubBlock(1, "attention")])
    >>> [str(branch.sub_block) for branch in branches(smaller)][:4]
    ['attention 0', 'mlp 0', 'mlp 1', 'attention 2']
    """
    layout, sequence = layout_of(model), []
    if layout.between is None or layout.norms:
        raise UnsupportedModel(f"{type(model).__name__} adds its branches at once or norms its stream: no other format has it")
    for number, layer in enumerate(decoder_layers(model)):
        for kind in ("attention", "mlp"):
            sub_block, paths = SubBlock(number, kind), list(layout.branch(kind))
            modules = {path: layer.get_submodule(path) for path in paths}
            if is_bypass(modules[paths[0]]):
                norm = next((part for part in list(modules.values())[1:] if not is_bypass(part)), None)
                sequence += _repair(modules[paths[0]], norm, sub_block)
            else:
                weights = {f"{path}.{name}": p for path, part in modules.items() for name, p in part.named_parameters()}
                sequence.append(Branch(kind, sub_block, weights))
    return sequence


def _repair(bypass: nn.Module, norm: nn.Module | None, sub_block: SubBlock) -> list[Branch]:
    maps = {name: value.detach() for name, value in bypass.named_parameters()}
    bias = maps.pop("bias", None)
    repairs = []
    if maps:  # in the order in which the bypass applies them; the last is the leftmost factor
        matrices = [value.float() for value in maps.values()]
        product = functools.reduce(lambda product, matrix: matrix @ product, matrices)
        repairs.append(Branch("linear", sub_block, {"norm": norm.weight, "weight": product}))
    if bias is not None:
        repairs.append(Branch("constant", sub_block, {"bias": bias}))
    return repairs


def pack(sequence: Sequence[Branch]) -> list[PackedLayer]:
    """The branches in as few layers as hold them in order: an attention opens a layer, an MLP or a constant closes it.

    A constant is added after an MLP's output or, where no MLP stands before it, in a layer's empty place for one.

    >>> kinds = ["attention", "attention", "mlp", "mlp"]
    >>> layers = pack([Branch(kind, SubBlock(i, kind), {}) for i, kind in enumerate(kinds)])
    >>> [(layer.first is not None, layer.mlp is not None) for layer in layers]
    [(True, False), (True, True), (False, True)]
    """
    layers: list[PackedLayer] = []
    for branch in sequence:
        is_open = bool(layers) and layers[-1].mlp is None and layers[-1].bias is None
        if branch.kind in ("attention", "linear"):
            layers.append(PackedLayer(first=branch))
        elif branch.kind == "mlp" and is_open:
            layers[-1] = replace(layers[-1], mlp=branch)
        elif branch.kind == "mlp":
            layers.append(PackedLayer(mlp=branch))
        elif layers:
            bias = branch.weights["bias"].float()
            layers[-1] = replace(layers[-1], bias=bias if layers[-1].bias is None else layers[-1].bias + bias)
        else:
            layers.append(PackedLayer(bias=branch.weights["bias"].float()))
    return layers


def joined_constants(sequence: Sequence[Branch]) -> list[Branch]:
    """The branches with neighbouring constants as one, their sum, as ``pack`` holds them: what a check finds in order.

    >>> both = [Branch("constant", SubBlock(i, "attention"), {"bias": torch.full((1,), 2.0)}) for i in range(2)]
    >>> [branch.weights["bias"].item() for branch in joined_constants(both)]
    [4.0]
    """
    joint: list[Branch] = []
    for branch in sequence:
        if branch.kind == "constant":
            bias = branch.weights["bias"].float()
            if joint and joint[-1].kind == "constant":
                bias = joint.pop().weights["bias"] + bias
            branch = replace(branch, weights={"bias": bias})
        joint.append(branch)
    return joint


def outside(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights around the layers: ``embed_tokens``, ``norm``, and ``lm_head`` where it is not the embedding itself.

    Raises:
        UnsupportedModel: no language-modelling head, or weights that are none of these and in no layer.
    """
    name, head = type(model).__name__, model.get_output_embeddings()
    if head is None or not model.can_generate():
        raise UnsupportedModel(f"{name} has no language-modelling head: load it as a causal language model, as load_model does")
    embedding, norm = model.get_input_embeddings().weight, getattr(decoder(model), "norm", None)
    weights = {"embed_tokens": embedding, "norm": getattr(norm, "weight", None)}
    if head.weight is not embedding and head.weight.data_ptr() != embedding.data_ptr():
        weights["lm_head"] = head.weight
    inside = {id(p) for p in getattr(decoder(model), layer_list(model)).parameters()}
    known = inside | {id(weight) for weight in weights.values()}
    if others := [name for name, p in model.named_parameters() if id(p) not in known]:
        raise UnsupportedModel(f"{name} has weights for which the exported format has no place, first {others[0]}")
    return weights


def head_width(config: PreTrainedConfig) -> int:
    """The features of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_bytes(config: PreTrainedConfig, layers: int) -> int:
    """Of the keys and values of one token in so many layers, at 16 bits a number."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * 2 * layers * heads * head_width(config)


def check_exportable(model: PreTrainedModel) -> None:
    """Refuse what no target can hold.

    Raises:
        UnsupportedModel: an encoder, or another model without a language-modelling head.
        ValueError: weights on the meta device, or quantised ones.
    """
    name = type(model).__name__
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(f"{name} has weights on the meta device, which hold no numbers: load it on cpu, then export it")
    if getattr(model, "is_quantized", False):
        raise ValueError(f"{name} is quantised: load it dequantised (load_model does so for GGUF files), then export it")
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate() or model.get_output_embeddings() is None:
        raise UnsupportedModel(f"{name} is no causal language model: exports are of decoders with a language-modelling head")
