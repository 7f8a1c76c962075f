"""The size of the stream behind what was dropped: one factor (Prune&Comp), or one per rotated channel (LinearPatch).

Both papers compare mean absolute values of the stream at the two ends of what is dropped, averaged over calibration sequences.
Their published code is the reference for what the papers leave open.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from ..families.decoder import UnsupportedModel
from ..families.self_check import measuring
from ..progress import progress
from ..residual import SubBlock, endpoints, find, layout_of, states
from .branches import branch_gain
from .folds import branches_of, changed_weights, output_projections

Ends = tuple[int, int]  # endpoints


@measuring
def magnitude_ratios(
    model: PreTrainedModel, ends: list[Ends], windows: Tensor, rotation: Tensor | None = None
) -> dict[Ends, Float[Tensor, " dim"]]:
    """For every pair of endpoints, the mean absolute value of each channel at the second over that at the first.

    Args:
        rotation: (dim, dim), applied to the stream first.
    """
    ratios = {pair: torch.zeros(()) for pair in ends}
    for window in progress(windows, "the size of the stream"):
        stream = states(model, window[None])[:, 0].double()
        for start, end in ends:
            before, after = (stream[place] if rotation is None else stream[place] @ rotation for place in (start, end))
            ratios[start, end] = ratios[start, end] + after.abs().mean(0).cpu() / before.abs().mean(0).cpu() / len(windows)
    return ratios


def stream_factors(model: PreTrainedModel, drop_set: list[SubBlock], windows: Tensor) -> dict[SubBlock, float]:
    """Prune&Comp's factor of every dropped sub-block (arXiv 2507.18212): the mean over channels of ``magnitude_ratios``.

    The paper multiplies the stream at the cut by it.
    """
    ratios = magnitude_ratios(model, [endpoints(s) for s in drop_set], windows)
    return {s: float(ratios[endpoints(s)].mean()) for s in drop_set}


def scaled_weights(model: PreTrainedModel, drop_set: list[SubBlock], factors: dict[SubBlock, float]) -> dict[str, Tensor]:
    """The last matrix of every kept branch, divided by the factors of what was dropped before it.

    A stream that is c times larger gives the same branches and logits, as norms come before them; so in place of the embedding and
    the branches before a cut, the branches behind it are changed, and tied embeddings can stay.

    Raises:
        UnsupportedModel: a family without one last matrix in every branch (``output_projections``).
    """
    gone = branches_of(drop_set)
    first = min(endpoints(s)[0] for s in drop_set)
    kept = [s for kind in ("attention", "mlp") for s in find(model, kind) if s not in gone and endpoints(s)[0] >= first]
    changed: dict[str, Tensor] = {}
    for branch, (name, _) in output_projections(model, kept).items():
        before = [factors[s] for s in drop_set if endpoints(s)[1] <= endpoints(branch)[0]]
        changed |= changed_weights(model, name, torch.zeros(1, 1), torch.zeros(1), 1 / float(torch.tensor(before).double().prod()))
    return changed


def runs(drop_set: list[SubBlock]) -> list[list[SubBlock]]:
    """Sorted blocks as runs of neighbours."""
    groups: list[list[SubBlock]] = []
    for block in sorted(drop_set):
        if groups and groups[-1][-1].layer == block.layer - 1:
            groups[-1].append(block)
        else:
            groups.append([block])
    return groups


def patch_maps(model: PreTrainedModel, drop_set: list[SubBlock], windows: Tensor) -> dict[SubBlock, dict[str, Tensor]]:
    """LinearPatch (arXiv 2505.24680): in place of every run of blocks the stream x becomes x H D H', with a Hadamard matrix H and
    the ``magnitude_ratios`` of the rotated stream in D. The map of a run's first block is what that adds to the stream.

    Raises:
        ValueError: no Hadamard matrix of the model's width is known.
        UnsupportedModel: a family whose attention cannot be replaced by a map of the stream.
    """
    groups = runs(drop_set)
    firsts = [SubBlock(run[0].layer, "attention") for run in groups]
    if layout_of(model).between is None:
        raise UnsupportedModel(f"{type(model).__name__} has no patch: both branches of a layer read the layer's input")
    gain = branch_gain(model, firsts[0], "patch")
    dim = model.get_input_embeddings().embedding_dim
    rotation = hadamard(dim) / dim**0.5
    ends = [(2 * run[0].layer, 2 * run[-1].layer + 2) for run in groups]
    ratios = magnitude_ratios(model, ends, windows, rotation.to(model.device))
    maps: dict[SubBlock, dict[str, Tensor]] = {block: {} for run in groups for block in run}
    for run, pair in zip(groups, ends, strict=True):
        patch = rotation @ ratios[pair].diag() @ rotation.T - torch.eye(dim, dtype=torch.float64)
        maps[run[0]] = {"patch": patch / gain}
    return maps


def hadamard(n: int) -> Float[Tensor, "n n"]:
    """A matrix of 1 and -1 with orthogonal rows: doubled (Sylvester) from an order that Paley's constructions give.

    Raises:
        ValueError: none is known here.

    >>> (hadamard(12) @ hadamard(12).T == 12 * torch.eye(12)).all()
    tensor(True)
    """
    if (small := _paley(n)) is not None:
        return small
    if n % 2:
        raise ValueError(f"no Hadamard matrix of order {n} is known here")
    half = hadamard(n // 2)
    return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])


def _paley(n: int) -> Tensor | None:
    """Order 1, q + 1 for a prime q = 3 mod 4, or 2 q + 2 for a prime q = 1 mod 4 (Paley 1933); else None."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    q = n - 1 if n % 4 == 0 else 0
    if q > 2 and _is_prime(q):
        return torch.eye(n, dtype=torch.float64) + _conference(q)
    q = n // 2 - 1
    if n % 2 == 0 and q % 4 == 1 and q > 1 and _is_prime(q):
        core, one = _conference(q), torch.eye(q + 1, dtype=torch.float64)
        signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, signs) + torch.kron(one, other)
    return None


def _conference(q: int) -> Tensor:
    """Zero on the diagonal, 1 and -1 elsewhere, orthogonal rows: Jacobsthal's matrix of the residues modulo a prime, bordered."""
    squares = {i * i % q for i in range(1, q)}
    symbol = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    place = torch.arange(q)
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[0, 1:] = 1
    core[1:, 0] = 1 if q % 4 == 1 else -1
    core[1:, 1:] = symbol[(place[:, None] - place) % q]
    return core


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))
