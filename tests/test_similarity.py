"""The similarity scores against numpy, one token at a time."""

import math

import numpy as np
import pytest
import torch

from entrodrop_utils import similarity


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 10, 8, generator=generator), torch.randn(2, 10, 8, generator=generator)


def token_by_token(x, y, of):
    return [np.mean([of(a, b) for a, b in zip(xs, ys, strict=True)]) for xs, ys in zip(x.numpy(), y.numpy(), strict=True)]


def cos(a, b):
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("cosine", lambda a, b: 1 - cos(a, b)),
        ("angular", lambda a, b: math.acos(cos(a, b)) / math.pi),
        ("norm_ratio", lambda a, b: np.linalg.norm(b - a) / np.linalg.norm(a)),
    ],
)
def test_against_numpy(pair, name, of):
    assert similarity.SIMILARITIES[name](*pair).numpy() == pytest.approx(token_by_token(*pair, of), rel=1e-5)


@pytest.mark.parametrize("name", similarity.SIMILARITIES)
def test_no_change_scores_zero(pair, name):
    assert similarity.SIMILARITIES[name](pair[0], pair[0]).numpy() == pytest.approx(0, abs=1e-7)


def test_differences_below_half_precision_are_kept():
    """In float16, 1 - cos is a multiple of about 1e-4; what decides a ranking is smaller."""
    x = torch.ones(1, 1, 64)
    y = x.clone()
    y[..., 0] += 1e-3
    a, b = x.double().flatten().numpy(), y.double().flatten().numpy()
    assert float(similarity.cosine(x, y)) == pytest.approx(1 - cos(a, b), rel=1e-6)


def test_bad_states_are_refused(pair):
    pair[1][0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="output states hold NaN"):
        similarity.cosine(*pair)
