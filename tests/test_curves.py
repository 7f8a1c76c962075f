"""Entropy curves: stages, scale and shape, and sentences that follow the numbers."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from entrodrop_utils import cache, entropy
from entrodrop_utils.paths import RESULTS
from entrodrop_utils.scoring import without_first
from entrodrop_utils.statistics import Interval
from entrodrop_utils.studies import architectures, curves


def curve(*inputs: float) -> np.ndarray:
    """20 noisy curves through these layer inputs and the output; each attention adds half of its layer's change."""
    plain = np.interp(np.arange(2 * len(inputs) - 1) / 2, np.arange(len(inputs)), inputs)
    return plain + np.random.default_rng(0).normal(0, 0.1, (20, len(plain)))


@pytest.mark.parametrize(
    ("inputs", "boundary", "fall", "rise", "share", "outcome", "words"),
    [
        ((10, 7, 4, 1, 5, 9), 3, 9, 8, 1 / 3, "holds", "falls over several layers and then rises"),
        ((10, 9, 8, 1, 5, 9), 3, 9, 8, 7 / 9, "single step", "falls in a single step and then rises"),
        ((10, 11, 1, 5, 9, 10), 2, 9, 9, 10 / 9, "single step", "falls in a single step and then rises"),
        ((10, 5.5, 1, 5, 9, 10), 2, 9, 9, 1 / 2, "inconclusive", "does not clearly fall over several layers and then rise"),
        ((1, 2, 3, 4, 5, 6), 1, -1, 4, np.nan, "does not hold", "has no falling stage"),
        ((6, 5, 4, 3, 2, 1), 4, 4, -1, 1 / 4, "does not hold", "has no rising stage"),
    ],
)
def test_stages_of_a_curve(inputs, boundary, fall, rise, share, outcome, words):
    got = curves.stages(curve(*inputs))
    assert got.boundary == boundary
    for measured, true in ((got.fall, fall), (got.rise, rise), (got.share, share)):
        assert measured.estimate == pytest.approx(true, abs=0.1, nan_ok=True)
        assert np.isnan(true) or measured.low < true < measured.high
    assert got.verdict == outcome
    assert curves.shape_of(got.fall, got.rise, got.verdict) == words


def test_noise_alone_makes_no_valley():
    """The minimum of a flat curve is below its start; located on other windows it is not."""
    noise = np.random.default_rng(1).normal(size=(300, 24, 21))
    falls = [curves.stages(values).fall for values in noise]
    assert np.mean([fall.low > 0 for fall in falls]) < 0.06
    assert np.mean([fall.estimate for fall in falls]) == pytest.approx(0, abs=0.05)


STAGES = sorted(file.parent for file in RESULTS.glob("*/*/01_stages.csv"))


@pytest.mark.parametrize("folder", STAGES, ids=lambda folder: folder.parent.name)
def test_the_committed_verdicts_follow_from_the_committed_stages(folder):
    stages = pd.read_csv(folder / "01_stages.csv").query("weights == 'trained'").set_index(["estimator", "first_token"])
    claims = pd.read_csv(folder / "01_claims.csv").set_index("claim")
    for key, name in architectures.ENTROPY_NAMES.items():
        row = stages.loc[key]
        parts = [Interval(*row[[what, f"{what}_low", f"{what}_high"]]) for what in ("fall", "rise", "share")]
        claim = claims.loc[f"{name} falls, then rises; measured: the fall in nats"]
        assert claim.verdict == curves.stage_verdict(*parts)
        assert (claim.measured, claim.low, claim.high) == parts[0]


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


def test_a_fall_that_the_first_layer_makes_is_a_single_step():
    fall = np.random.default_rng(0).normal(5, 0.1, 12)
    curves_ = np.stack([fall, fall, 0 * fall, 1 + 0 * fall, 2 + 0 * fall, 3 + 0 * fall, 4 + 0 * fall], axis=1)  # three layers
    stage = curves.stages(curves_)
    assert (stage.boundary, stage.share.estimate, stage.verdict) == (1, 1.0, "single step") and np.isnan(stage.share.low)
