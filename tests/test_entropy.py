"""The estimators against numpy, closed forms, plain loops and the published formulas written out."""

import math

import numpy as np
import pytest
import torch
from scipy.special import digamma
from scipy.stats import multivariate_normal
from torch import Tensor

from entrodrop_utils import entropy


def normal(tokens: int, dim: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(tokens, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def histogram_entropy(x: np.ndarray, bins: int) -> float:
    total = 0.0
    for column in x.T:
        p = np.histogram(column, bins=bins)[0] / len(column)
        total -= sum(v * math.log(v) for v in p if v > 0)
    return total


@pytest.mark.parametrize(("tokens", "dim", "bins"), [(64, 8, 20), (256, 32, 5), (2, 3, 20), (1000, 4, 160)])
def test_bucket_is_numpys_histogram(tokens, dim, bins):
    x = normal(tokens, dim)
    assert float(entropy.bucket(x, bins)) == pytest.approx(histogram_entropy(x.numpy(), bins), rel=1e-9)


def test_bucket_at_the_size_of_a_large_model():
    x = normal(256, 4096).float()
    assert float(entropy.bucket(x)) == pytest.approx(histogram_entropy(x.double().numpy(), 20), rel=1e-5)


def test_bucket_ignores_shift_and_scale_and_is_bounded():
    x = normal(128, 16)
    assert float(entropy.bucket(7 * x - 3)) == pytest.approx(float(entropy.bucket(x)), rel=1e-6)
    assert 0 < float(entropy.bucket(x, 40)) <= 16 * math.log(40)


def test_one_outlier_token_empties_the_bins():
    x = normal(256, 16)
    before = float(entropy.bucket(x))
    x[0] = 1e4
    assert float(entropy.bucket(x)) < 0.05 * before


def knn_loop(x: np.ndarray, k: int, official: bool) -> float:
    """Kozachenko-Leonenko as it stands in the literature, one token at a time."""
    n, d = x.shape
    total = 0.0
    for i in range(n):
        radius = sorted(math.dist(x[i], x[j]) for j in range(n) if j != i)[k - 1]
        total += d * math.log(radius)
    log_ball = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    return total / n + log_ball + (math.log(n) - math.log(k) if official else digamma(n) - digamma(k))


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize(("tokens", "dim", "k"), [(60, 3, 1), (60, 24, 5), (40, 24, 39)])
def test_knn_is_the_plain_loop(tokens, dim, k, official):
    x = normal(tokens, dim)
    assert float(entropy.knn(x, k, official)) == pytest.approx(knn_loop(x.numpy(), k, official), rel=1e-9)


def test_official_knn_at_the_size_of_a_large_model():
    x = normal(256, 4096).float()
    distance = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").sort(-1).values[:, 25]
    ball = 2048 * math.log(math.pi) - math.lgamma(2049)
    plain = 4096 * float(distance.log().mean()) + ball + math.log(256) - math.log(25)
    assert float(entropy.knn(x, official=True)) == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize(("tokens", "dim", "k", "bias"), [(4000, 1, 3, 0.03), (4000, 3, 3, 0.08), (2000, 8, 3, 0.5)])
def test_knn_of_a_gaussian(tokens, dim, k, bias):
    """Unbiased as N grows; at these N within the stated bias, which grows with the dimension."""
    truth = 0.5 * dim * math.log(2 * math.pi * math.e)
    assert abs(float(entropy.knn(normal(tokens, dim), k)) - truth) < bias


def test_knn_and_gaussian_follow_scale():
    x = normal(100, 12)
    for estimator in (lambda x: entropy.knn(x, 5), entropy.gaussian):
        assert float(estimator(3 * x) - estimator(x)) == pytest.approx(12 * math.log(3), rel=1e-9)


def test_a_large_common_mean_costs_no_precision():
    x = normal(64, 128).float()
    shifted = (x.double() + 1e4).float()  # float32 itself keeps about three digits of these
    assert float(entropy.knn(shifted, 5)) == pytest.approx(float(entropy.knn(x, 5)), abs=0.02 * 128)
    assert torch.equal(entropy.squared_distances(shifted).diagonal(), torch.zeros(64, dtype=torch.float64))


def exact_distances(x: Tensor) -> Tensor:
    return torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")


def spoilt(how: str, tokens: int = 96, dim: int = 2048) -> Tensor:
    """Float32 states that are wide enough for float32 products, and hard for them."""
    x = normal(tokens, dim, seed=5).float()
    if how == "one far token":
        x[0, :3] = 3e5
    elif how == "every eighth token far":  # the centre of float32 products
        x[1::8] += 1e4
    elif how == "all but equal":
        x = x[:1] + 1e-4 * x
    elif how == "shifted":
        x += 1e4
    elif how == "equal tokens":
        x[: tokens // 2] = x[0]
    elif how == "past the squares of float32":
        x *= 1e22
    elif how == "a large shared dimension":
        x[:, 7] += 1e5
    elif how == "two clusters":
        x[tokens // 2 :] += 1e3
    return x


HARD = (
    "nothing", "one far token", "every eighth token far", "all but equal", "shifted", "equal tokens", "past the squares of float32",
    "a large shared dimension", "two clusters",
)  # fmt: skip


@pytest.mark.parametrize("how", HARD)
def test_knn_of_wide_states_is_that_of_exact_distances(how):
    x, k = spoilt(how), 25
    tokens, dim = x.shape
    sorted_distances = exact_distances(x).sort(-1).values
    rank = (sorted_distances == 0).sum(-1).clamp(min=k)
    radius = sorted_distances.gather(-1, rank[:, None])[:, 0]
    log_ball = dim / 2 * math.log(math.pi) - math.lgamma(dim / 2 + 1)
    plain = float((dim * radius.log() - torch.from_numpy(digamma(rank.numpy()))).mean()) + log_ball + digamma(tokens)
    assert float(entropy.knn(x)) == pytest.approx(plain, rel=1e-7)


@pytest.mark.parametrize("how", HARD)
def test_products_in_blocks_are_those_of_one_product(how):
    for x in (spoilt(how), spoilt(how, 70, 1100), spoilt(how, 65, 8)):
        centred = x.double() - x.double().mean(0)
        whole, scale = centred @ centred.T, (centred @ centred.T).diagonal().sqrt()
        assert (entropy._products(x, torch.float64) - whole).abs().le(1e-9 * scale.outer(scale) + 1e-12).all()


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_duplicate_tokens_use_the_nearest_that_differs(offset):
    x = torch.tensor([[0.0], [0.0], [0.0], [1.0], [3.0]]).double() + offset
    # k = 1: three tokens have two duplicates, so their first different neighbour is the third, at distance 1
    radius_and_rank = [(1, 3), (1, 3), (1, 3), (1, 1), (2, 1)]
    plain = np.mean([math.log(r) - digamma(k) for r, k in radius_and_rank]) + math.log(2) + digamma(5)
    assert float(entropy.knn(x, 1)) == pytest.approx(plain, rel=1e-9)


def renyi_plain(x: np.ndarray, alpha: float) -> float:
    z = (x - x.mean(0)) / x.std(0, ddof=1)
    n = len(z)
    d = np.array([np.sqrt(((z - z[i]) ** 2).sum(1)) for i in range(n)])
    sigma = np.sort(d[np.triu_indices(n, 1)])[(n * (n - 1) // 2 - 1) // 2]  # the lower median, as torch has it
    kernel = np.exp(-(d**2) / (2 * sigma**2))
    return math.log((kernel ** (alpha - 1)).mean()) / (1 - alpha)


@pytest.mark.parametrize("alpha", [0.5, 1.01, 2.0, 4.0, 8.0])
def test_renyi_is_the_published_formula(alpha):
    x = normal(50, 20)
    assert float(entropy.renyi(x, alpha)) == pytest.approx(renyi_plain(x.numpy(), alpha), rel=1e-4)


def test_renyi_at_the_size_of_a_large_model():
    x = normal(256, 4096).float()
    assert float(entropy.renyi(x)) == pytest.approx(renyi_plain(x.double().numpy(), 4.0), rel=1e-4)


@pytest.mark.parametrize(("tokens", "dim", "bias"), [(5000, 4, 0.05), (5000, 64, 1.0), (200, 64, 4.0)])
def test_gaussian_of_a_gaussian(tokens, dim, bias):
    """Against scipy's closed form for a covariance that is not a multiple of the identity; shrinkage biases it when N is near D."""
    covariance = np.diag(np.linspace(0.5, 2.0, dim))
    x = normal(tokens, dim) * torch.from_numpy(np.sqrt(np.diag(covariance)))
    assert abs(float(entropy.gaussian(x)) - multivariate_normal(cov=covariance).entropy()) < bias


@pytest.mark.parametrize(("tokens", "dim"), [(40, 100), (100, 40)])
def test_gaussian_is_the_shrunk_covariance_written_out(tokens, dim):
    """The dual form (fewer tokens than dimensions) and the primal one against numpy's determinant."""
    x = normal(tokens, dim).numpy()
    s = np.cov(x.T, bias=True)
    tr, tr2 = np.trace(s), np.trace(s @ s)
    rho = min(1.0, ((1 - 2 / dim) * tr2 + tr**2) / ((tokens + 1 - 2 / dim) * (tr2 - tr**2 / dim)))
    shrunk = (1 - rho) * s + rho * tr / dim * np.eye(dim)
    plain = 0.5 * np.linalg.slogdet(2 * math.pi * math.e * shrunk)[1]
    assert float(entropy.gaussian(torch.from_numpy(x))) == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("tokens", "dim"), [(12, 30), (30, 12)])
def test_matrix_from_singular_values(tokens, dim, alpha):
    x = normal(tokens, dim)
    p = np.linalg.svd(x.numpy(), compute_uv=False) ** 2
    p = p / p.sum()
    plain = -(p * np.log(p)).sum() if alpha == 1 else np.log((p**alpha).sum()) / (1 - alpha)
    assert float(entropy.matrix_renyi(x, alpha)) == pytest.approx(plain, rel=1e-9)


def test_matrix_of_known_spectra():
    assert float(entropy.matrix_renyi(torch.eye(7))) == pytest.approx(math.log(7))
    assert float(entropy.matrix_renyi(torch.ones(9, 5))) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", entropy.ESTIMATORS)
def test_batched_over_every_leading_dimension(name):
    estimator = entropy.ESTIMATORS[name]
    x = torch.randn(2, 3, 40, 6, generator=torch.Generator().manual_seed(3))
    together = estimator(x)
    assert together.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert float(together[i, j]) == pytest.approx(float(estimator(x[i, j])), rel=1e-9)


@pytest.mark.parametrize("name", entropy.ESTIMATORS)
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda x: x.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(math.nan)), "NaN"),
        (lambda x: x.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(math.inf)), "infinite"),
        (lambda x: x[:1], "at least 2 tokens"),
        (lambda x: x.long(), "floating point"),
    ],
)
def test_bad_states_are_refused(name, spoil, says):
    with pytest.raises(ValueError, match=says):
        entropy.ESTIMATORS[name](spoil(torch.randn(40, 6)))


@pytest.mark.parametrize("name", entropy.ESTIMATORS)
def test_a_constant_dimension_has_a_defined_result(name):
    x = normal(60, 6)
    x[:, 2] = 5.0
    value = float(entropy.ESTIMATORS[name](x))
    assert math.isfinite(value)
    if name == "bucket":
        assert value == pytest.approx(histogram_entropy(np.delete(x.numpy(), 2, 1), 20), rel=1e-9)


@pytest.mark.parametrize("name", entropy.ESTIMATORS)
def test_identical_tokens_are_defined_or_refused(name):
    x = torch.ones(40, 6)
    if name in ("knn", "gaussian"):
        with pytest.raises(ValueError, match="identical"):
            entropy.ESTIMATORS[name](x)
    else:
        assert float(entropy.ESTIMATORS[name](x)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: entropy.knn(x, 40), "k must be a whole number between 1 and token - 1 = 39, got 40"),
        (lambda x: entropy.knn(x, 0), "got 0"),
        (lambda x: entropy.bucket(x, 1), "bins must be a whole number of at least 2, got 1"),
        (lambda x: entropy.renyi(x, 1.0), "alpha"),
        (lambda x: entropy.renyi(x, -2.0), "alpha"),
        (lambda x: entropy.matrix_renyi(x, 0.0), "alpha"),
        (lambda x: entropy.matrix_renyi(0 * x), "zero"),
    ],
)
def test_bad_settings_say_which_and_why(call, says):
    with pytest.raises(ValueError, match=says):
        call(torch.randn(40, 6))


@pytest.mark.parametrize("name", entropy.ESTIMATORS)
def test_half_precision_is_measured_in_full(name):
    x = torch.randn(60, 16, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    assert float(entropy.ESTIMATORS[name](x)) == pytest.approx(float(entropy.ESTIMATORS[name](x.double())), rel=1e-5)


SEVERAL = [(entropy.knn, "k", (1, 5, 25)), (entropy.renyi, "alpha", (1.01, 2.0, 4.0)), (entropy.matrix_renyi, "alpha", (1.0, 2.0))]


def test_shared_work_changes_no_number_and_is_done_once(monkeypatch):
    states = [normal(40, 60, seed=seed) for seed in range(6)]
    parts = [part for x in states for part in (x, x[1:], x[:30])]  # views begin at the same address or share memory
    alone = [float(f(x, **{name: v})) for x in parts for f, name, values in SEVERAL for v in values]
    products = []
    addmm = Tensor.addmm_
    monkeypatch.setattr(Tensor, "addmm_", lambda a, b, c: products.append(1) or addmm(a, b, c))
    with entropy.shared():
        together = [float(f(x, **{name: v})) for x in parts for f, name, values in SEVERAL for v in values]
        for x in parts:
            entropy.gaussian(x)
    assert together == alone
    assert len(products) == 2 * len(parts), "one of the states, for all but Renyi, and one of the standardised states"


def test_nothing_is_remembered_outside():
    x = normal(40, 16)
    with entropy.shared():
        before = float(entropy.knn(x, 5))
    x *= 2
    assert float(entropy.knn(x, 5)) == pytest.approx(before + 16 * math.log(2), rel=1e-9)
