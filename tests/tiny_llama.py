"""A small random model that several test files build."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(layers: int = 6, seed: int = 0, vocab_size: int = 101) -> LlamaForCausalLM:
    """A random Llama whose branches are large enough to matter."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(4)
    return model
