"""``run_mlx.py FOLDER IDS.npy LOGITS.npy``: mlx-lm's logits of a folder, computed at once and in pieces with its cache."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
folder, ids, out = sys.argv[1:]
model, ids = load_model(Path(folder))[0], mx.array(np.load(ids))
cache, n = make_prompt_cache(model), ids.shape[1]
pieces = [ids[:, : n - 24], ids[:, n - 24 : n - 4], *(ids[:, i : i + 1] for i in range(n - 4, n))]
ways = [model(ids), mx.concatenate([model(piece, cache=cache) for piece in pieces], axis=1)]
np.save(out, np.stack([np.array(way.astype(mx.float32))[0] for way in ways]))
