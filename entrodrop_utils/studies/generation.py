"""Greedy continuations: how much a model repeats itself, which held-out loss does not show."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ..families.self_check import measuring

N_GRAM = 4  # tokens of the pieces whose repetition is counted


@measuring
def repeated_shares(
    model: PreTrainedModel, prompts: Int[Tensor, "prompt token"], n_new: int, gram: int = N_GRAM
) -> Float[np.ndarray, "prompt"]:
    """The share of the ``gram``-token pieces of each prompt's greedy continuation that stood earlier in it."""
    mask = torch.ones_like(prompts)
    settings = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False, "pad_token_id": 0}
    texts = model.generate(prompts.to(model.device), attention_mask=mask.to(model.device), **settings)[:, prompts.shape[1] :]
    pieces = [[tuple(text[i : i + gram]) for i in range(len(text) - gram + 1)] for text in texts.tolist()]
    return np.array([1 - len(set(runs)) / len(runs) for runs in pieces])
