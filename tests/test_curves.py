"""Entropy curves and the comparison with cosine: stages, scale and shape, and sentences that follow the numbers."""

from functools import partial

import numpy as np
import pytest
import torch

from entrodrop_utils import cache, entropy
from entrodrop_utils.scoring import without_first
from entrodrop_utils.studies import curves


def test_stages_of_a_valley():
    valley = np.array([5.0, 4, 3, 2, 1, 3, 4])  # inputs of three layers: 5, 3, 1; output 4
    noise = np.random.default_rng(0).normal(0, 0.1, (20, 7))
    found = curves.stages(valley + noise)
    assert found.boundary == (2, 2, 2)
    assert found.fall.low < 4 < found.fall.high
    assert found.rise.low < 3 < found.rise.high
    assert found.verdict == "holds"
    assert curves.shape_of(found.fall, found.rise) == "falls and then rises"
    rising = curves.stages(np.tile(np.arange(7.0), (5, 1)))
    assert rising.verdict == "does not hold"
    assert curves.shape_of(rising.fall, rising.rise) == "has no falling stage"


def test_a_scaled_copy_grows_in_scale_only():
    states = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0)).double()
    steps = [states, states, 3 * states]  # one layer: its attention changes nothing, its MLP scales
    entropies, scales = (np.array([float(f(x)[0]) for x in steps]) for f in (partial(entropy.knn, k=5), curves.log_scale))
    table = curves.scale_and_shape(entropies, scales)
    assert table.increase[0] == pytest.approx(8 * np.log(3))
    assert table["shape"][0] == pytest.approx(0, abs=1e-9)


def test_functions_of_a_study_are_not_cached():
    for measure in (curves.log_scale, without_first(curves.largest_activation)):
        assert cache.subkey("base", measure) is None
    assert cache.subkey("base", without_first(entropy.bucket)) is not None
