"""Where the model families keep their layers and, in a layer, the two branches: the one table to extend for a new family.

A family is known by the modules of its decoder layers, not by its name, so a new model of a known layout needs nothing here.
Layouts with the same modules are told apart by the self-check, which proves on the model at hand that the states found add up.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from .modeling_entrodrop import is_stand_in

# Module of the layer -> what its stand-in returns (modeling_entrodrop.StandIn); the module whose output is added comes first
Branch = dict[str, str]


@dataclass(frozen=True)
class Layout:
    """Where a decoder layer keeps its two branches; modules are named by their dotted path inside the layer.

    Each branch lists the modules that serve it alone, so its norms go when it goes. ``between`` is the module whose input is the
    stream after the attention and before the MLP; none where both branches read the layer's input (then the attention counts as the
    first). ``shared`` stay whatever is dropped. ``norms`` are those that the whole stream passes, after the attention and after the
    MLP (BERT). ``anchor`` is a part of one layer's attention that other layers depend on: that layer's attention cannot go.
    """

    attention: Branch
    mlp: Branch
    between: str | None
    shared: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    anchor: str | None = None

    def branch(self, kind: Literal["attention", "mlp"]) -> Branch:
        """The modules of a branch, the one whose output is added first."""
        return self.attention if kind == "attention" else self.mlp

    def explains(self, layer: nn.Module) -> bool:
        """Whether the layer has these modules, and none with weights besides."""
        present = dict(layer.named_modules())
        weighty = [name for name, part in present.items() if is_stand_in(part) or list(part.parameters(recurse=False))]
        # A module that is there may have no weights (OLMo's norms); one that has some must be known
        return self.modules <= present.keys() and all(f"{name}.".startswith(self._inside) for name in weighty)

    @property
    def modules(self) -> set[str]:
        """All that a layer of this layout must have."""
        return {*self.attention, *self.mlp, *self.shared, *self.norms}

    @property
    def _inside(self) -> tuple[str, ...]:
        return tuple(f"{path}." for path in self.modules)


ZERO, INPUT = "zero", "input"  # a module that adds to the stream; a norm or first projection, which hands on what it is given
ATTENTION = "zero none"  # attention modules return their weights as well

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
    ),
    "norms around each branch, GLM": Layout(
        attention={"self_attn": ATTENTION, "input_layernorm": INPUT, "post_self_attn_layernorm": INPUT},
        mlp={"mlp": ZERO, "post_attention_layernorm": INPUT, "post_mlp_layernorm": INPUT},
        between="post_attention_layernorm",
    ),
    "norm after each branch": Layout(  # OLMo 2 and 3
        attention={"self_attn": ATTENTION, "post_attention_layernorm": INPUT},
        mlp={"mlp": ZERO, "post_feedforward_layernorm": INPUT},
        between="mlp",
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
    "pre-norm, GPT-NeoX": Layout(  # first of the two: a sequential model passes for a parallel one, not the reverse
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
# Under which names the families keep the list of their layers, in the model or in one of these parts of it
LAYER_LISTS = ("layers", "h", "blocks", "block", "layer")
STACKS = ("decoder", "encoder", "language_model")
