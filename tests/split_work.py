"""What ``test_processes`` runs in several processes: scores, losses and answers of a small model, as one table per process."""

import os
import sys
from pathlib import Path

import pandas as pd
import torch
from tiny_llama import tiny_llama

from entrodrop_utils import cache
from entrodrop_utils.cached_scoring import cached_entropies, cached_score
from entrodrop_utils.evaluation import losses_by_set
from entrodrop_utils.residual import SubBlock
from entrodrop_utils.tasks.loglikelihoods import loglikelihoods_by_set


def work() -> dict[str, pd.DataFrame]:
    """Each table from more windows, batches or questions than processes, and from fewer."""
    model, generator = tiny_llama(), torch.Generator().manual_seed(1)
    windows = torch.randint(0, 101, (7, 120), generator=generator)
    sets = [(), (SubBlock(1, "attention"),), (SubBlock(1, "attention"), SubBlock(4, "mlp"))]
    long = torch.randint(0, 101, (12, 120), generator=generator)
    questions = [(tuple(row[: 90 + n].tolist()), tuple(row[100 : 104 + n % 3].tolist())) for n, row in enumerate(long)]
    answers = loglikelihoods_by_set(model, questions, sets)
    return {
        "scores": cached_score(model, windows, ["bucket", "knn", "cosine"]),
        "curve of one window": cached_entropies(model, windows[:1], ["bucket"]),
        "losses": losses_by_set(model, windows, sets),
        "losses of one window": losses_by_set(model, windows[:1], sets),
        "answers": pd.DataFrame([(*answers[s][q],) for s in sets for q in questions], columns=["logprob", "greedy"]),
    }


if __name__ == "__main__":
    cache.CACHE = Path(sys.argv[1]) / "cache"
    for name, table in work().items():
        table.drop(columns="set", errors="ignore").to_csv(
            Path(sys.argv[1]) / f"{name} {os.environ.get('RANK', 0)}.csv", index=False
        )
