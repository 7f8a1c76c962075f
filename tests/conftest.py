"""What several tests share: a small model, windows for it, and the real one where it is on this machine or can be had."""

import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def tiny_llama(layers: int = 6, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama whose branches are large enough to matter."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=101,
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


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    """What a test computes is computed, and not read from an earlier run."""
    from entrodrop_utils import store

    monkeypatch.setattr(store, "CACHE", tmp_path / "cache")


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(0, 101, (5, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def smollm2():
    """The default model and its tokenizer; a machine that cannot have it says why."""
    from entrodrop_utils import models

    try:
        return models.load()
    except models.ModelUnavailable as error:
        pytest.skip(str(error))
