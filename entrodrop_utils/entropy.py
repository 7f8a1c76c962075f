"""Entropy estimators of hidden states, in nats: pure functions of ``Float[Tensor, "*batch token dim"]``.

The tokens of one sequence are the samples, the model's width is the dimension. Every estimator is batched over all
leading dimensions, computes in float64 (``knn`` of wide states in part in float32) and returns one number per sequence.
Bucket, KNN and Renyi are those of "Entropy-Based Block Pruning for Efficient Large Language Models" (arXiv 2504.03794);
``official=True`` gives the constants of its published code where they differ from the textbook's.
"""

import functools
import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Tensor


def _checked(x: Num[Tensor, "*batch token dim"], values: bool = True) -> Float[Tensor, "*batch token dim"]:
    """The states as a floating tensor of at least float32, or a ValueError that names their fault, in their values too if asked."""
    if not x.is_floating_point():
        raise ValueError(f"hidden states must be floating point, got {x.dtype}: token ids have no entropy of this kind")
    if x.ndim < 2 or x.shape[-2] < 2 or x.shape[-1] < 1:
        raise ValueError(f"need at least 2 tokens and one dimension (*batch, token, dim), got shape {tuple(x.shape)}")
    # A finite sum has only finite terms, and testing every term costs more
    if values and not torch.isfinite(x.sum()) and not torch.isfinite(x).all():
        raise ValueError(f"hidden states hold {int((~torch.isfinite(x)).sum())} NaN or infinite values of {x.numel()}")
    # Half-precision values often lie exactly on a bin's edge, where float32 rounding would decide
    return x if x.dtype in (torch.float32, torch.float64) else x.double()


_SHARED: ContextVar[dict | None] = ContextVar("shared", default=None)


@contextmanager
def shared() -> Iterator[None]:
    """While open, intermediate results that several estimators need of one state (distances, spectrum) are computed once.

    Many values of k or alpha then cost little more than one. States must not be changed in place meanwhile; they and the
    results are held until the context closes.
    """
    token = _SHARED.set({})
    try:
        yield
    finally:
        _SHARED.reset(token)


def once(function: Callable) -> Callable:
    """The function of tensors and settings, with its results kept while ``shared`` is open."""

    @functools.wraps(function)
    def cached(*arguments: Tensor | Hashable) -> Tensor | tuple[Tensor, ...]:
        if (results := _SHARED.get()) is None:
            return function(*arguments)
        key = function, *(_identity(argument) for argument in arguments)
        if key not in results:
            results[key] = arguments, function(*arguments)
        return results[key][1]

    return cached


def _identity(argument: Tensor | Hashable) -> Hashable:
    """What tells an argument apart: addresses identify tensors as long as all of them are held."""
    if not isinstance(argument, Tensor):
        return argument
    return argument.data_ptr(), argument.shape, argument.stride(), argument.dtype, argument.device


ROWS, COLUMNS = 64, 1024  # of a block of a product of states on a CPU
COUNTERS = 10_240  # histogram bins that are counted at a time on a CPU
# Above so many dimensions, KNN radii come from float32 products on a CPU (a GPU may give these fewer digits), unless a squared
# radius is below this share of its token's squared norm: radii then keep five digits, and the mean of their logarithms seven.
WIDE, CLOSE = 1024, 0.01


@once
def _products(x: Float[Tensor, "*batch token dim"], dtype: torch.dtype) -> Float[Tensor, "*batch token token"]:
    """Products of the centred tokens with each other, multiplied and summed in a dtype.

    In float32, which serves distances alone, the centre is the mean of every eighth token: distances need one near the tokens only.
    """
    *batch, tokens, dim = x.shape
    mean = (x[..., 1::8, :] if dtype == torch.float32 else x).mean(-2, keepdim=True, dtype=dtype)
    if x.device.type != "cpu":
        centred = x - mean
        return centred @ centred.mT
    # The product is symmetric: what is above the diagonal is copied. A part of the dimensions is centred at a time, so that it
    # stays in the processor's cache; its rows are no power of two apart, so that they do not displace each other there.
    grams = torch.zeros(math.prod(batch), tokens, tokens, dtype=dtype)
    width = math.ceil(dim / math.ceil(dim / COLUMNS))
    centred = torch.empty(tokens, width + 16, dtype=dtype)[:, :width]
    for gram, state, centre in zip(grams, x.detach().reshape(-1, tokens, dim), mean.view(-1, 1, dim), strict=True):
        blocks = [(gram[row:, row : row + ROWS], centred[row:], centred[row : row + ROWS].T) for row in range(0, tokens, ROWS)]
        for part, part_centre in zip(state.split(width, -1), centre.split(width, -1), strict=True):
            torch.sub(part, part_centre, out=centred[:, : part.shape[-1]])
            centred[:, part.shape[-1] :] = 0  # the last part may be narrower
            for block, rows, columns in blocks:
                block.addmm_(rows, columns)
        for row in range(ROWS, tokens, ROWS):
            gram[:row, row : row + ROWS] = gram[row : row + ROWS, :row].T
    return grams.view(*batch, tokens, tokens)


@once
def _distances(x: Float[Tensor, "*batch token dim"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Squared distances (token token) and the squared norms of the centred tokens, in a dtype."""
    gram = _products(x, dtype)
    norm = gram.diagonal(dim1=-2, dim2=-1)
    return torch.add(norm.unsqueeze(-1) + norm.unsqueeze(-2), gram, alpha=-2), norm


def squared_distances(x: Float[Tensor, "*batch token dim"]) -> Float[Tensor, "*batch token token"]:
    """Pairwise squared Euclidean distances in float64; exact zero between duplicates.

    The states are centred first: they share a large mean, and a matrix product of uncentred float32 states loses the whole
    distance. A distance below the rounding error of the product is that of a duplicate, and is set to 0.
    """
    d2, norm = _distances(x, torch.float64)
    return d2.masked_fill(d2 <= 1e-12 * (norm.unsqueeze(-1) + norm.unsqueeze(-2)), 0.0)


def bucket(x: Num[Tensor, "*batch token dim"], bins: int = 20) -> Float[Tensor, "*batch"]:
    """Histogram entropy, summed over dimensions: sum_d -sum_b p log p (arXiv 2504.03794).

    Each dimension has ``bins`` equal-width bins between its own minimum and maximum, so the estimate does not change
    when a dimension is shifted or scaled, and one outlier token can empty all bins but two. A constant dimension
    contributes 0. The largest possible value is dim * log(min(bins, token)).

    Args:
        x: hidden states, ``*batch token dim``.
        bins: bins per dimension; the paper's code uses 20.
    Returns:
        One entropy per leading index, nats (float64).
    Raises:
        ValueError: fewer than two tokens, NaN or inf, integer states, ``bins`` below 2.
    """
    if bins < 2 or bins % 1:
        raise ValueError(f"bins must be a whole number of at least 2, got {bins}")
    bins, x = int(bins), _checked(x, values=False).detach()
    *batch, tokens, dim = x.shape
    low, high = x.amin(-2, keepdim=True), x.amax(-2, keepdim=True)
    least, extent = torch.finfo(x.dtype).tiny * bins, high - low
    if not torch.isfinite(extent).all():  # past the range of the dtype; the estimate does not change with scale
        return bucket(_checked(x).double() / 4, bins)
    if x.dtype == torch.float32 and ((extent > 0) & (extent < least)).any():
        return bucket(x.double(), bins)
    scale, n = bins / extent.clamp(min=least), torch.arange(tokens + 1, dtype=torch.float64, device=x.device)
    n_log_n, total = torch.special.xlogy(n, n), n.new_zeros(batch)
    # One flat count over (sequence, dimension, bin): no one-hot tensor of token x dim x bins is ever made. On a CPU, a part of the
    # dimensions at a time, in the smallest integers that hold the count's places: states and counters stay in its cache.
    width = min(dim, max(1, COUNTERS // bins)) if x.device.type == "cpu" else dim
    size, places = math.prod(batch) * tokens * width, math.prod(batch) * width * bins
    integer = next(t for t in (torch.int16, torch.int32, torch.int64) if places <= torch.iinfo(t).max)
    memory, index = x.new_empty(size), x.new_empty(size, dtype=integer)
    first = torch.arange(0, places, bins, dtype=integer, device=x.device)  # place of each histogram
    for start in range(0, dim, width):
        part = slice(start, min(start + width, dim))
        own_width = part.stop - start
        n_parts = math.prod(batch) * own_width
        scaled, place = (own[: n_parts * tokens].view(*batch, tokens, own_width) for own in (memory, index))
        torch.sub(x[..., part], low[..., part], out=scaled).mul_(scale[..., part])
        place.copy_(scaled).clamp_(max=bins - 1).add_(first[:n_parts].view(*batch, 1, own_width))
        counts = torch.bincount(place.flatten(), minlength=n_parts * bins)
        total += n_log_n.index_select(0, counts).view(*batch, own_width * bins).sum(-1)
    return dim * math.log(tokens) - total / tokens


def knn(x: Num[Tensor, "*batch token dim"], k: int = 25, official: bool = False) -> Float[Tensor, "*batch"]:
    """Kozachenko-Leonenko differential entropy: D mean(log r_k) + log V_D + psi(N) - psi(k).

    r_k is the Euclidean distance to the k-th nearest neighbour and V_D the volume of the unit ball. Where a token has k or
    more exact duplicates, r_k is 0 and the textbook formula gives minus infinity; the nearest token that differs is used
    there, with its own rank as k. All other tokens are unaffected.

    Args:
        x: hidden states, ``*batch token dim``.
        k: neighbour, 1 <= k < token; the paper's code uses 25.
        official: use log N - log k, as the published code does, and not the digammas.
    Returns:
        One entropy per leading index, nats (float64). It follows scale: H(a X) = H(X) + dim log a.
    Raises:
        ValueError: k out of range, fewer than two tokens, NaN or inf, integer states, all tokens identical.
    """
    x = _checked(x, values=False)
    tokens, dim = x.shape[-2:]
    if not 1 <= k < tokens or k % 1:
        raise ValueError(f"k must be a whole number between 1 and token - 1 = {tokens - 1}, got {k}")
    k = int(k)
    rank = torch.tensor(k, device=x.device)
    fast = x.dtype == torch.float32 and x.device.type == "cpu" and dim > WIDE
    d2, norm = _distances(x, torch.float32 if fast else torch.float64)
    nearest = _ranked(d2, k)  # rank 0 is the token itself
    if not (nearest > CLOSE * norm).all():  # close or equal tokens, or NaN
        d2 = squared_distances(_checked(x))
        rank = (d2 == 0).sum(-1).clamp(min=k)  # the first neighbour that differs, or k
        if (rank == tokens).any():
            raise ValueError(f"all {tokens} tokens of a sequence are identical: their differential entropy is minus infinity")
        nearest = d2.sort(-1).values.gather(-1, rank.unsqueeze(-1)).squeeze(-1)
    log_radius = 0.5 * nearest.double().log()
    count = (lambda n: n.double().log()) if official else (lambda n: torch.special.digamma(n.double()))
    log_ball = 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim + 1)
    return (dim * log_radius - count(rank)).mean(-1) + log_ball + count(torch.tensor(tokens, device=x.device))


def _ranked(values: Float[Tensor, "*row column"], rank: int) -> Float[Tensor, "*row"]:
    """The element of each row with that rank, from 0."""
    if values.device.type == "cpu" and not values.requires_grad:  # numpy selects with vector instructions, in a fifth of the time
        return torch.from_numpy(np.partition(values.numpy(), rank, axis=-1)[..., rank])
    return values.topk(rank + 1, largest=False).values[..., rank]


def renyi(x: Num[Tensor, "*batch token dim"], alpha: float = 4.0) -> Float[Tensor, "*batch"]:
    """Kernel Renyi entropy: 1 / (1 - alpha) log mean_ij K_ij^(alpha - 1) (arXiv 2504.03794).

    Dimensions are standardised (a constant one becomes 0), K is a Gaussian kernel with sigma the median distance between
    two different tokens, and the mean is over all pairs, a token with itself included. Between 0 and log(token), since
    sigma adapts to the data it says how uneven the distances are, not how large.

    Args:
        x: hidden states, ``*batch token dim``.
        alpha: order, positive and not 1; the paper's code uses 4.
    Returns:
        One entropy per leading index, nats (float64).
    Raises:
        ValueError: alpha, fewer than two tokens, NaN or inf, integer states.
    """
    if not 0 < alpha < math.inf or alpha == 1:
        raise ValueError(f"alpha must be positive and not 1 (the limit is not defined for this estimator), got {alpha}")
    log_mean = torch.logsumexp((alpha - 1) * _log_kernel(_checked(x)), dim=(-2, -1)) - 2 * math.log(x.shape[-2])
    return log_mean / (1 - alpha)


@once
def _log_kernel(x: Float[Tensor, "*batch token dim"]) -> Float[Tensor, "*batch token token"]:
    """Log of the Gaussian kernel between standardised tokens, its sigma their median distance."""
    x = x.double()
    centred = x - x.mean(-2, keepdim=True)
    std = (centred.square().sum(-2, keepdim=True) / (x.shape[-2] - 1)).sqrt()
    varies = x.amax(-2, keepdim=True) > x.amin(-2, keepdim=True)
    d2 = squared_distances(centred.mul_(torch.where(varies, 1 / std, 0.0)))
    # The matrix holds each pair twice, and its diagonal of zeros: the lower median of the pairs is this element of it
    tokens = x.shape[-2]
    middle = tokens + 2 * ((tokens * (tokens - 1) // 2 - 1) // 2)
    sigma2 = _ranked(d2.flatten(-2), middle)
    # sigma = 0: more than half of the pairs coincide; only they keep K = 1, whatever the bandwidth
    return torch.where(d2 > 0, -d2 / (2 * sigma2[..., None, None]), 0.0)


def gaussian(x: Num[Tensor, "*batch token dim"]) -> Float[Tensor, "*batch"]:
    """Entropy of the Gaussian with the states' covariance: 1/2 log det(2 pi e Sigma).

    With fewer tokens than dimensions the sample covariance is singular, so it is shrunk towards a multiple of the
    identity by the oracle approximating shrinkage of Chen et al. (2010, eq. 23). An upper bound for any distribution
    with that covariance.

    Args:
        x: hidden states, ``*batch token dim``.
    Returns:
        One entropy per leading index, nats (float64).
    Raises:
        ValueError: fewer than two tokens, NaN or inf, integer states, all tokens identical.
    """
    x = _checked(x)
    tokens, dim = x.shape[-2:]
    # Tokens x tokens or dim x dim, whichever is smaller: both have the same non-zero eigenvalues
    gram = (_products(x, torch.float64) if tokens < dim else _covariance(x)) / tokens
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    if (trace == 0).any():
        raise ValueError(f"all {tokens} tokens of a sequence are identical: their Gaussian entropy is minus infinity")
    square = gram.square().sum((-2, -1))
    shrink = ((1 - 2 / dim) * square + trace**2) / ((tokens + 1 - 2 / dim) * (square - trace**2 / dim))
    shrink = torch.where(torch.isfinite(shrink) & (shrink > 0), shrink, 1.0).clamp(max=1.0)
    floor = shrink * trace / dim
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    inner = eye + ((1 - shrink) / floor)[..., None, None] * gram
    log_det = dim * floor.log() + 2 * torch.linalg.cholesky(inner).diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return 0.5 * (dim * math.log(2 * math.pi * math.e) + log_det)


@once
def _covariance(x: Float[Tensor, "*batch token dim"]) -> Float[Tensor, "*batch dim dim"]:
    """Products of the centred dimensions with each other, in float64."""
    centred = x.double() - x.mean(-2, keepdim=True, dtype=torch.float64)
    return centred.mT @ centred


def matrix_renyi(x: Num[Tensor, "*batch token dim"], alpha: float = 1.0) -> Float[Tensor, "*batch"]:
    """Matrix-based Renyi entropy of the trace-normalised token Gram matrix (Giraldo et al. 2015); alpha = 1: von Neumann.

    The states are not centred, as in "Attention Sinks and Compression Valleys in LLMs are Two Sides of the Same Coin"
    (arXiv 2510.06477). Between 0 and log(min(token, dim)); one dominating token brings it to 0.

    Args:
        x: hidden states, ``*batch token dim``.
        alpha: order, positive; 1 is the limit -sum lambda log lambda.
    Returns:
        One entropy per leading index, nats (float64).
    Raises:
        ValueError: alpha, fewer than two tokens, NaN or inf, integer states, all states zero.
    """
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive, got {alpha}")
    eigenvalue = _spectrum(_checked(x))
    if alpha == 1:
        return -torch.special.xlogy(eigenvalue, eigenvalue).sum(-1)
    return eigenvalue.pow(alpha).sum(-1).log() / (1 - alpha)


@once
def _spectrum(x: Float[Tensor, "*batch token dim"]) -> Float[Tensor, "*batch eigenvalue"]:
    """Eigenvalues of the token Gram matrix, which sum to 1; those of the covariance are the same but for zeros."""
    mean = x.mean(-2, keepdim=True, dtype=torch.float64)
    if x.shape[-2] < x.shape[-1]:
        parts = zip(x.split(COLUMNS, -1), mean.split(COLUMNS, -1), strict=True)
        along = sum(part.double() @ centre.mT for part, centre in parts)
        gram = _products(x, torch.float64) + (along + along.mT - mean @ mean.mT)
    else:
        gram = _covariance(x) + x.shape[-2] * mean.mT @ mean
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    if (trace == 0).any():
        raise ValueError("all states of a sequence are zero: their Gram matrix has no trace to normalise by")
    return torch.linalg.eigvalsh(gram / trace[..., None, None]).clamp(min=0)


ESTIMATORS = {"bucket": bucket, "knn": knn, "renyi": renyi, "gaussian": gaussian, "matrix_renyi": matrix_renyi}
