"""``run_mlx.py FOLDER IDS.npy STEPS ANSWER.npz``: what mlx-lm computes of a folder; run by ``other_programs`` with its Python."""

import sys
from pathlib import Path

import numpy as np


def main(folder: str, ids: str, steps: str, answer: str) -> None:
    """Logits after each token, at once and in pieces with the cache, the greedy continuation, and the bytes of that cache."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, prompt = load_model(Path(folder))[0], mx.array(np.load(ids))
    cache, n = make_prompt_cache(model), prompt.shape[1]
    pieces = [prompt[:, : n - 24], prompt[:, n - 24 : n - 4], *(prompt[:, i : i + 1] for i in range(n - 4, n))]
    ways = [model(prompt), mx.concatenate([model(piece, cache=cache) for piece in pieces], axis=1)]
    logits, cached = (np.array(way.astype(mx.float32))[0] for way in ways)
    continuation = [int(cached[-1].argmax())]
    while len(continuation) < int(steps):
        last = model(mx.array([continuation[-1:]]), cache=cache).astype(mx.float32)
        continuation.append(int(np.array(last)[0, -1].argmax()))
    parts = [part for layer in cache if layer.keys is not None for part in (layer.keys, layer.values)]  # a linear layer keeps none
    kv_bytes = sum(part.nbytes / part.shape[2] for part in parts)
    np.savez(answer, logits=logits, cached=cached, continuation=continuation, kv_bytes_per_token=kv_bytes)


if __name__ == "__main__":
    main(*sys.argv[1:])
