"""The layouts of decoder layers: which modules belong to the attention, which to the MLP. Add a new family here.

A family is recognised by the modules of its decoder layers, not by its name, so a new model with a known layout needs no entry.
Layouts with the same modules are told apart by the self-check, which verifies the states on the model at hand.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from .modeling_entrodrop import is_bypass

# Dotted path of a module in the layer -> what its bypass returns (modeling_entrodrop.Bypass). The module whose output is added to
# the residual stream comes first.
Branch = dict[str, str]


@dataclass(frozen=True)
class Layout:
    """Where a decoder layer keeps its two branches; modules are named by their dotted path inside the layer.

    Attributes:
        attention: the modules that serve only the attention, its norms included: they are dropped with it.
        mlp: the modules that serve only the MLP.
        between: the module whose input is the stream after the attention and before the MLP; None where both branches read the
            layer's input (the attention then counts as the first).
        shared: modules that stay whatever is dropped.
        norms: the norms that the whole stream passes after the attention and after the MLP (post-norm families such as BERT).
        output_norms: the norms of a branch's output (Gemma 2, OLMo 2); a branch's other norms are of its input.
        anchor: a part of one layer's attention that other layers depend on; that layer's attention cannot be dropped.
    """

    attention: Branch
    mlp: Branch
    between: str | None
    shared: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    output_norms: tuple[str, ...] = ()
    anchor: str | None = None

    def branch(self, kind: Literal["attention", "mlp"]) -> Branch:
        """The modules of a branch, the one whose output is added first."""
        return self.attention if kind == "attention" else self.mlp

    def fits(self, layer: nn.Module) -> bool:
        """Whether the layer has all modules of this layout, and no other module with weights."""
        present = dict(layer.named_modules())
        weighted = [name for name, part in present.items() if is_bypass(part) or list(part.parameters(recurse=False))]
        # A required module may have no weights (OLMo's norms); a module with weights must be part of the layout
        return self.modules <= present.keys() and all(f"{name}.".startswith(self._prefixes) for name in weighted)

    @property
    def modules(self) -> set[str]:
        """The modules that every layer of this layout has."""
        return {*self.attention, *self.mlp, *self.shared, *self.norms}

    @property
    def _prefixes(self) -> tuple[str, ...]:
        return tuple(f"{path}." for path in self.modules)


# A module that adds to the stream returns zero; a norm or a first projection returns its input; attention modules return their
# weights as well
ZERO, INPUT = "zero", "input"
ATTENTION = "zero none"

LAYOUTS: dict[str, Layout] = {
    "pre-norm": Layout(  # Llama, Mistral, Qwen, Gemma, Phi-3, Granite, StarCoder2, SmolLM3, Mixtral, OLMoE, ...
        attention={"self_attn": ATTENTION, "input_layernorm": INPUT},
        mlp={"mlp": ZERO, "post_attention_layernorm": INPUT},
        between="post_attention_layernorm",
    ),
    "norms around each branch": Layout(  # Gemma 2 and 3
        attention={"self_attn": ATTENTION, "input_layernorm": INPUT, "post_attention_layernorm": INPUT},
        mlp={"mlp": ZERO, "pre_feedforward_layernorm": INPUT, "post_feedforward_layernorm": INPUT},
        between="pre_feedforward_layernorm",
        output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "norms around each branch, GLM": Layout(
        attention={"self_attn": ATTENTION, "input_layernorm": INPUT, "post_self_attn_layernorm": INPUT},
        mlp={"mlp": ZERO, "post_attention_layernorm": INPUT, "post_mlp_layernorm": INPUT},
        between="post_attention_layernorm",
        output_norms=("post_self_attn_layernorm", "post_mlp_layernorm"),
    ),
    "norm after each branch": Layout(  # OLMo 2 and 3
        attention={"self_attn": ATTENTION, "post_attention_layernorm": INPUT},
        mlp={"mlp": ZERO, "post_feedforward_layernorm": INPUT},
        between="mlp",
        output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "parallel, one norm": Layout(  # Phi, Cohere, StableLM 2
        attention={"self_attn": ATTENTION},
        mlp={"mlp": ZERO},
        between=None,
        shared=("input_layernorm",),
    ),
    "GPT-2": Layout(
        attention={"attn": ATTENTION, "ln_1": INPUT},
        mlp={"mlp": ZERO, "ln_2": INPUT},
        between="ln_2",
    ),
    "parallel, one norm, GPT-J": Layout(
        attention={"attn": ATTENTION},
        mlp={"mlp": ZERO},
        between=None,
        shared=("ln_1",),
    ),
    "pre-norm, GPT-NeoX": Layout(  # tried first: a sequential model also passes as a parallel one
        attention={"attention": ATTENTION, "input_layernorm": INPUT},
        mlp={"mlp": ZERO, "post_attention_layernorm": INPUT},
        between="post_attention_layernorm",
    ),
    "parallel, GPT-NeoX": Layout(
        attention={"attention": ATTENTION, "input_layernorm": INPUT},
        mlp={"mlp": ZERO, "post_attention_layernorm": INPUT},
        between=None,
    ),
    "parallel, one norm, Falcon": Layout(
        attention={"self_attention": ATTENTION},
        mlp={"mlp": ZERO},
        between=None,
        shared=("input_layernorm",),
    ),
    "parallel, two norms, Falcon": Layout(
        attention={"self_attention": ATTENTION, "ln_attn": INPUT},
        mlp={"mlp": ZERO, "ln_mlp": INPUT},
        between=None,
    ),
    "pre-norm, Falcon": Layout(
        attention={"self_attention": ATTENTION, "input_layernorm": INPUT},
        mlp={"mlp": ZERO, "post_attention_layernorm": INPUT},
        between="post_attention_layernorm",
    ),
    "branches add themselves, Bloom": Layout(
        attention={"self_attention": "residual none", "input_layernorm": INPUT},
        mlp={"mlp": "residual", "post_attention_layernorm": INPUT},
        between="post_attention_layernorm",
    ),
    "MLP adds itself, MPT": Layout(
        attention={"attn": ATTENTION, "norm_1": INPUT},
        mlp={"ffn": "residual", "norm_2": INPUT},
        between="norm_2",
    ),
    "pre-norm, OPT": Layout(
        attention={"self_attn": ATTENTION, "self_attn_layer_norm": INPUT},
        mlp={"fc2": ZERO, "fc1": INPUT, "final_layer_norm": INPUT},
        between="final_layer_norm",
    ),
    "post-norm, OPT": Layout(  # the 350M model
        attention={"self_attn": ATTENTION},
        mlp={"fc2": ZERO, "fc1": INPUT},
        between="fc1",
        norms=("self_attn_layer_norm", "final_layer_norm"),
    ),
    "post-norm, BERT": Layout(
        attention={"attention.output.dense": ZERO, "attention.self": "input none"},
        mlp={"output.dense": ZERO, "intermediate": INPUT},
        between="intermediate",
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
    ),
    "pre-norm, ModernBERT": Layout(
        attention={"attn": ATTENTION, "attn_norm": INPUT},
        mlp={"mlp": ZERO, "mlp_norm": INPUT},
        between="mlp_norm",
    ),
    "pre-norm, T5 encoder": Layout(
        attention={"layer.0.SelfAttention": "zero position_bias none", "layer.0.layer_norm": INPUT},
        mlp={"layer.1.DenseReluDense": ZERO, "layer.1.layer_norm": INPUT},
        between="layer.1.layer_norm",
        anchor="layer.0.SelfAttention.relative_attention_bias",
    ),
}
# The names under which families keep the list of their layers, in the model or in one of these parts of it
LAYER_LISTS = ("layers", "h", "blocks", "block", "layer")
STACKS = ("decoder", "encoder", "language_model")
