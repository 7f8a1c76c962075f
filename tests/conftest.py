"""What several tests share: a small model, windows for it, and the real one where it is on this machine or can be had."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each worker; set before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tiny_llama import tiny_llama
from transformers import LlamaForCausalLM

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What a test computes is computed, and not read from an earlier run."""
    from entrodrop_utils import cache

    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")


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
        return models.load_model()
    except models.ModelUnavailable as error:
        pytest.skip(str(error))
