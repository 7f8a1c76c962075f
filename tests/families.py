"""One tiny random model of every family, small enough that the whole matrix of tests runs on two cores."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
import transformers
from transformers import PreTrainedModel

VOCAB, LENGTH, DEPTH = 96, 10, 4
SPECIAL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
COMMON = SPECIAL | SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 128}
GPT = SPECIAL | {"n_embd": 32, "n_layer": DEPTH, "n_head": 4, "n_positions": 128}
BIG = {"attention": ("self_attention.dense",), "mlp": ("mlp.dense_4h_to_h",), "norm": "transformer.ln_f"}  # Falcon and Bloom
NEOX = {"attention": ("attention.dense",), "mlp": ("mlp.dense_4h_to_h",), "norm": "gpt_neox.final_layer_norm"}
OPT = {"attention": ("self_attn.out_proj",), "mlp": ("fc2",)}
EXPERTS = ("mlp.experts.down_proj",)
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
HYBRID = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]}


@dataclass(frozen=True)
class Family:
    """A family's model class, its config, and which parameters of a layer are the last step of each branch.

    With those at zero the branch adds nothing, which is what dropping is compared with; that knows nothing of the suite's hooks.
    """

    name: str
    model: str
    settings: Mapping[str, object]
    attention: tuple[str, ...] = ("self_attn.o_proj",)
    mlp: tuple[str, ...] = ("mlp.down_proj",)
    slow: bool = True
    norm: str | None = "model.norm"  # the final norm
    after: tuple[str, str] | None = None  # norms that the stream itself passes
    fixed: tuple[int, ...] = ()  # layers whose attention cannot be dropped
    kept_first: bool = False  # the first block cannot be dropped for good
    generates: bool = True
    common: Mapping[str, object] = field(default_factory=lambda: COMMON)


FAMILIES = [
    Family("Llama", "LlamaForCausalLM", {}, slow=False),
    Family("Mistral", "MistralForCausalLM", {"sliding_window": 5}),
    Family("Qwen2", "Qwen2ForCausalLM", HYBRID | {"use_sliding_window": True}),
    Family("Qwen3", "Qwen3ForCausalLM", {"head_dim": 8}),
    Family("Gemma", "GemmaForCausalLM", {"head_dim": 8}),
    Family("Gemma 2", "Gemma2ForCausalLM", HYBRID | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    Family("Gemma 3 (text)", "Gemma3ForCausalLM", HYBRID | {"head_dim": 8, "query_pre_attn_scalar": 8}, slow=False),
    Family(
        "Gemma 3 (image and text)",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": COMMON | HYBRID | {"head_dim": 8, "query_pre_attn_scalar": 8},
            "vision_config": {**SIZES, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
            "image_token_index": 2,
        },
        norm="model.language_model.norm",
        common={},
    ),
    Family("Phi", "PhiForCausalLM", {}, ("self_attn.dense",), ("mlp.fc2",), norm="model.final_layernorm"),
    Family("Phi-3", "Phi3ForCausalLM", {}),
    Family("OLMo", "OlmoForCausalLM", {}),
    Family("OLMo 2", "Olmo2ForCausalLM", {}),
    Family("OLMo 3", "Olmo3ForCausalLM", HYBRID),
    Family("Granite", "GraniteForCausalLM", {"residual_multiplier": 0.4}),
    Family("StarCoder2", "Starcoder2ForCausalLM", {"sliding_window": 5}, mlp=("mlp.c_proj",)),
    Family("StableLM", "StableLmForCausalLM", {}),
    Family("StableLM (parallel)", "StableLmForCausalLM", {"use_parallel_residual": True}),
    Family("SmolLM3", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 1, 0]}),
    Family("GPT-2", "GPT2LMHeadModel", {}, ("attn.c_proj",), ("mlp.c_proj",), False, "transformer.ln_f", common=GPT),
    Family(
        "GPT-J", "GPTJForCausalLM", {"rotary_dim": 4}, ("attn.out_proj",), ("mlp.fc_out",), True, "transformer.ln_f", common=GPT
    ),
    Family("GPT-NeoX (parallel)", "GPTNeoXForCausalLM", {"use_parallel_residual": True}, **NEOX, slow=False),
    Family("GPT-NeoX (sequential)", "GPTNeoXForCausalLM", {"use_parallel_residual": False}, **NEOX),
    Family("Falcon (parallel)", "FalconForCausalLM", {"parallel_attn": True}, **BIG),
    Family("Falcon (parallel, two norms)", "FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}, **BIG),
    Family(
        "Falcon (alibi, sequential)",
        "FalconForCausalLM",
        {"parallel_attn": False, "multi_query": False, "alibi": True, "bias": True},
        **BIG,
    ),
    Family("OPT", "OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}, **OPT, norm="model.decoder.final_layer_norm"),
    Family(
        "OPT (post-norm)",
        "OPTForCausalLM",
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
        **OPT,
        norm=None,
        after=("self_attn_layer_norm", "final_layer_norm"),
    ),
    Family("Bloom", "BloomForCausalLM", {"n_layer": DEPTH, "n_head": 4}, **BIG, slow=False),
    Family(
        "MPT",
        "MptForCausalLM",
        {"d_model": 32, "n_layers": DEPTH, "n_heads": 4, "max_seq_len": 128},
        ("attn.out_proj",),
        ("ffn.down_proj",),
        norm="transformer.norm_f",
    ),
    Family("Cohere (parallel)", "CohereForCausalLM", {}),
    Family("Cohere 2 (parallel)", "Cohere2ForCausalLM", HYBRID),
    Family("Mixtral", "MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}, mlp=EXPERTS, slow=False),
    Family(
        "Qwen2-MoE",
        "Qwen2MoeForCausalLM",
        MOE | {"shared_expert_intermediate_size": 24},
        mlp=(*EXPERTS, "mlp.shared_expert.down_proj"),
    ),
    Family(
        "Qwen3-MoE",
        "Qwen3MoeForCausalLM",
        MOE | {"head_dim": 8, "mlp_only_layers": [1], "decoder_sparse_step": 1},
        mlp=(*EXPERTS, "mlp.down_proj"),
    ),
    Family("OLMoE", "OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2}, mlp=EXPERTS),
    Family("GLM-4", "Glm4ForCausalLM", {"head_dim": 8}),
    Family(
        "BERT",
        "BertForMaskedLM",
        {},
        ("attention.output.dense",),
        ("output.dense",),
        norm=None,
        after=("attention.output.LayerNorm", "output.LayerNorm"),
        generates=False,
    ),
    Family(
        "ModernBERT",
        "ModernBertForMaskedLM",
        {"local_attention": 4, "global_attn_every_n_layers": 2},
        ("attn.Wo",),
        ("mlp.Wo",),
        norm="model.final_norm",
        kept_first=True,
        generates=False,
    ),
    Family(
        "T5 (encoder)",
        "T5EncoderModel",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": DEPTH, "num_heads": 4},
        ("layer.0.SelfAttention.o",),
        ("layer.1.DenseReluDense.wo",),
        norm="encoder.final_layer_norm",
        fixed=(0,),
        generates=False,
    ),
]
BY_NAME = {family.name: family for family in FAMILIES}


@cache
def _built(name: str) -> PreTrainedModel:
    family = BY_NAME[name]
    model_class = getattr(transformers, family.model)
    settings = {**family.common, **family.settings}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**settings)).eval()
        # As initialised, branches add next to nothing and norms are the identity: a wrong answer would look right
        for parameter in model.parameters():
            spread = 0.2 * torch.randn_like(parameter)
            parameter.data = spread if parameter.ndim > 1 else parameter.data + spread
    return model


def tiny(name: str) -> PreTrainedModel:
    """A fresh copy of a family's tiny model, in evaluation mode; the same weights every time."""
    return copy.deepcopy(_built(name))


def ids(batch: int = 2, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    """Random token ids without the special ones."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
