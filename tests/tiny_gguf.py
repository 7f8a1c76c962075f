"""A tiny model as a GGUF file, written by the gguf package: for tests that need a real file but no real weights."""

from pathlib import Path

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 64, 4, 2, 96, 2
HEAD_DIM = {"llama": 16, "qwen2": 16, "qwen3": 128, "gemma3": 32}  # transformers takes 128 for granted in Qwen 3 files
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ Ġ", "Ġ t", "Ċ Ċ"]
END = "<|end|>"


def alphabet() -> list[str]:
    """GPT-2's letters for the 256 bytes: printable ones stand for themselves, the others for the letters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def weights(family: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under transformers' names and in its layout."""
    rng = np.random.default_rng(seed)
    wide = HEAD_DIM[family]
    vocabulary = 256 + len(MERGES) + 1
    norms = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
    if family in ("qwen3", "gemma3"):
        norms |= {"self_attn.q_norm": wide, "self_attn.k_norm": wide}
    if family == "gemma3":
        norms |= {"pre_feedforward_layernorm": HIDDEN, "post_feedforward_layernorm": HIDDEN}
    shapes = {
        "self_attn.q_proj": (HEADS * wide, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * wide, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * wide, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * wide),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }
    found = {"model.embed_tokens.weight": rng.normal(size=(vocabulary, HIDDEN)), "model.norm.weight": rng.normal(size=HIDDEN)}
    for layer in range(LAYERS):
        found |= {f"model.layers.{layer}.{name}.weight": rng.normal(size=shape) for name, shape in (norms | shapes).items()}
        if family == "qwen2":
            biased = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
            found |= {f"model.layers.{layer}.{name}.bias": rng.normal(size=shapes[name][0]) for name in biased}
    return {name: (0.1 * value).astype(np.float32) for name, value in found.items()}


def gguf_name(name: str, family: str) -> str:
    """llama.cpp's name of a tensor."""
    gemma = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm"}
    parts = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "input_layernorm": "attn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        **(gemma if family == "gemma3" else {"post_attention_layernorm": "ffn_norm"}),
        "self_attn.o_proj": "attn_output",
        **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
        **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"},
        **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    }
    for ours, theirs in parts.items():
        name = name.replace(ours, theirs)
    return name


def rope_divisors(factor: float, width: int) -> np.ndarray:
    """What Llama 3.1 divides its rotary frequencies by.

    1 for waves that fit four times into 8192 tokens, the factor for those longer than 8192 tokens, between them what mixes both.
    """
    waves = 8192 / (2 * np.pi * 10_000.0 ** (np.arange(0, width, 2) / width))
    share = np.clip((waves - 1) / (4 - 1), 0, 1)
    return (1 / ((1 - share) / factor + share)).astype(np.float32)


def write(
    path: Path, family: str = "llama", split: str = "smollm", seed: int = 0, rope_factor: float = 1.0
) -> dict[str, np.ndarray]:
    """Write the file; the weights that it holds, dequantised, under transformers' names and in its layout."""
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_key_length(HEAD_DIM[family])
    writer.add_value_length(HEAD_DIM[family])
    if family == "gemma3":
        writer.add_sliding_window(32)
    tokens = [*alphabet(), *(merge.replace(" ", "") for merge in MERGES), END]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(MERGES)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id, writer.add_unk_token_id):
        add(len(tokens) - 1)
    if rope_factor != 1:
        writer.add_tensor("rope_freqs.weight", rope_divisors(rope_factor, HEAD_DIM[family]))
    kinds = gguf.GGMLQuantizationType
    expected = {}
    for number, (name, value) in enumerate(weights(family, seed).items()):
        kind = kinds.F32 if value.ndim == 1 else (kinds.Q8_0, kinds.Q4_0, kinds.F16, kinds.Q4_1)[number % 4]
        stored = value
        if family == "llama" and (heads := {"q": HEADS, "k": KV_HEADS}.get(name.split(".")[-2][0])) and "self_attn" in name:
            # llama.cpp turns pairs of neighbours and not halves of a head, and its files hold the rows in that order
            stored = value.reshape(heads, 2, -1, HIDDEN).swapaxes(1, 2).reshape(value.shape)
        if family == "gemma3" and "norm" in name:
            stored = value + 1  # gemma's norms multiply by 1 + weight, which its files hold as one number
        packed = gguf.quantize(np.ascontiguousarray(stored), kind)
        writer.add_tensor(gguf_name(name, family), packed, raw_dtype=kind)
        # Quantisation works within a row, so it does not matter whether the rows were reordered before
        expected[name] = gguf.dequantize(gguf.quantize(value, kind), kind) if value.ndim > 1 else value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected
