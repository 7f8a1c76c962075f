"""Scores from gradients: of a gate on every branch (Fisher information, CBO) and of the weights (Taylor)."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ..families.decoder import decoder_layers
from ..families.self_check import evaluation_mode
from ..layerwise import MAX_TOKENS
from ..progress import progress
from ..residual import SubBlock, check_tokens, layout_of
from .costs import Kinds, SearchResult, SetCosts, candidates, fits, take

BACKWARD = 2  # forward passes that a backward pass counts as
TAYLOR_PROTECTED = (0, 1, 2, 3, -2, -1)


@contextmanager
def _gated(model: PreTrainedModel, gates: Float[Tensor, "gate window"], gated: Sequence[SubBlock]) -> Iterator[None]:
    """While open, what each branch adds to the stream is multiplied by its gate; a block's gate acts on both branches."""
    layers, layout = decoder_layers(model), layout_of(model)
    norms = set(layout.output_norms)
    with ExitStack() as stack:
        for sub_block, gate in zip(gated, gates, strict=True):
            for kind in ("attention", "mlp") if sub_block.kind == "block" else (sub_block.kind,):
                branch = layout.branch(kind)
                path = next((path for path in branch if path in norms), next(iter(branch)))  # the last module of the branch

                def multiply(_, args, output, gate=gate):
                    first = output[0] if isinstance(output, tuple) else output
                    first = first * gate.view(-1, *[1] * (first.ndim - 1)).to(first.dtype)
                    return (first, *output[1:]) if isinstance(output, tuple) else first

                handle = layers[sub_block.layer].get_submodule(path).register_forward_hook(multiply)
                stack.callback(handle.remove)
        yield


def gate_gradients(
    model: PreTrainedModel,
    windows: Int[Tensor, "window token"],
    gated: Sequence[SubBlock],
    sampled: bool = False,
    seed: int = 0,
) -> Float[np.ndarray, "window gate"]:
    """The gradient of each window's mean loss with respect to a gate on every sub-block, at the dense model (all gates 1).

    Args:
        sampled: labels drawn from the model's own predictions in place of the data's next tokens; the gradient then has mean zero,
            and the mean of its outer product is the Fisher information of the gates.
        seed: of the labels.
    Raises:
        ValueError: as ``check_tokens``.

    >>> gate_gradients(model, windows, [SubBlock(1, "mlp"), SubBlock(2, "mlp")]).shape == (len(windows), 2)
    True
    """
    check_tokens(model, windows)
    generator, rows = torch.Generator().manual_seed(seed), []
    with evaluation_mode(model), torch.enable_grad():
        for ids in progress(windows.to(model.device).split(max(1, MAX_TOKENS // windows.shape[1])), "gradients of the gates"):
            gates = torch.ones(len(gated), len(ids), device=model.device, requires_grad=True)
            with _gated(model, gates, gated):
                logits = model(ids, use_cache=False).logits[:, :-1].float()
            labels = ids[:, 1:]
            if sampled:
                p = logits.detach().softmax(-1).flatten(0, 1).cpu()
                labels = torch.multinomial(p, 1, generator=generator).view(labels.shape).to(ids.device)
            # The sum over windows of each one's mean: a window's gates act on that window only
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / labels.shape[1]
            rows.append(torch.autograd.grad(loss, gates)[0].T.double().cpu().numpy())
    return np.concatenate(rows)


def fisher(
    model: PreTrainedModel, windows: Int[Tensor, "window token"], n: int | None = None, kinds: Kinds = "attention"
) -> SearchResult:
    """The sub-blocks with the smallest diagonal of the empirical Fisher information of their gates (Kwon et al., arXiv 2204.09656).

    Their rearrangement exchanges masks inside a layer; with one mask per sub-block it changes nothing.

    >>> len(fisher(model, windows, 3).order)
    3
    """
    possible = candidates(model, kinds)
    score = (gate_gradients(model, windows, possible) ** 2).mean(0)
    passes = float(len(windows) * (1 + BACKWARD))
    return SearchResult(take(model, [possible[i] for i in np.argsort(score, kind="stable")], n), passes, passes * windows.shape[1])


def cbo(
    model: PreTrainedModel,
    windows: Int[Tensor, "window token"],
    n: int,
    kinds: Kinds = "attention",
    states: int = 10,
    starts: int = 200,
    seed: int = 0,
) -> SearchResult:
    """The best of several sets of low energy x' H x (CBO, arXiv 2602.00161): H is the mean outer product of the gates' gradients.

    Low-energy sets are local minima under exchanges of one sub-block, from random starts. The ``states`` lowest are measured, by
    their KL to the dense model, and the best is returned.

    Args:
        states: how many sets are measured.
        starts: random sets from which the descent starts.
        seed: of the starts.

    >>> len(cbo(model, windows, 2).order)
    2
    """
    possible, rng = candidates(model, kinds), np.random.default_rng(seed)
    take(model, possible, n)
    gradients = gate_gradients(model, windows, possible)
    hessian = gradients.T @ gradients / len(gradients)
    energies = {}
    for _ in range(starts):
        chosen = _descended(hessian, rng.permutation(len(possible))[:n])
        energies[tuple(possible[i] for i in sorted(chosen))] = hessian[np.ix_(chosen, chosen)].sum()
    lowest = [drop_set for drop_set in sorted(energies, key=energies.get) if fits(model, drop_set)][:states]
    costs = SetCosts(model, windows)
    best = lowest[int(costs.mean(lowest).argmin())]
    passes = costs.passes + BACKWARD * len(windows)  # the forward pass of the gradients is that of the dense model
    return SearchResult(list(best), passes, passes * windows.shape[1])


def _descended(hessian: Float[np.ndarray, "gate gate"], chosen: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The set after the best exchange of one member, again and again, until none lowers the energy."""
    x = np.zeros(len(hessian))
    x[chosen] = 1
    while 0 < x.sum() < len(x):
        field, inside, outside = hessian @ x, np.flatnonzero(x), np.flatnonzero(x == 0)
        # Energy of x - e_i + e_j minus that of x
        gain = (np.diag(hessian) - 2 * field)[inside][:, None] + (np.diag(hessian) + 2 * field)[outside][None]
        gain = gain - 2 * hessian[np.ix_(inside, outside)]
        i, j = np.unravel_index(gain.argmin(), gain.shape)
        if gain[i, j] >= -1e-12 * abs(hessian).max():
            break
        x[inside[i]], x[outside[j]] = 0, 1
    return np.flatnonzero(x)


def taylor(
    model: PreTrainedModel,
    windows: Int[Tensor, "window token"],
    n: int | None = None,
    kinds: Kinds = "block",
    protected: Sequence[int] = TAYLOR_PROTECTED,
) -> SearchResult:
    """The sub-blocks with the smallest sum of |weight times its gradient of the loss| (Taylor+ of Shortened LLaMA, 2402.02834).

    Args:
        protected: layers that go last; the published code never drops the first four and the last two blocks.

    >>> taylor(model, windows, 1, protected=range(5)).order
    [SubBlock(layer=5, kind='block')]
    """
    check_tokens(model, windows)
    possible, layers, layout = candidates(model, kinds), decoder_layers(model), layout_of(model)
    modules = {s: [layers[s.layer]] if s.kind == "block" else [layers[s.layer].get_submodule(p) for p in layout.branch(s.kind)]
               for s in possible}  # fmt: skip
    weights = {s: [w for module in parts for w in module.parameters()] for s, parts in modules.items()}
    every = list({id(w): w for parts in weights.values() for w in parts}.values())
    frozen = [w.requires_grad for w in every]
    sums = [torch.zeros_like(w) for w in every]
    try:
        for w in every:
            w.requires_grad_(True)
        with evaluation_mode(model), torch.enable_grad():
            for ids in progress(windows.to(model.device).split(1), "gradients of the weights"):
                logits = model(ids, use_cache=False).logits[:, :-1].float()
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
                for total, gradient in zip(sums, torch.autograd.grad(loss, every), strict=True):
                    total += gradient
    finally:
        for w, flag in zip(every, frozen, strict=True):
            w.requires_grad_(flag)
    salience = {id(w): float((w.detach() * total).abs().double().sum()) for w, total in zip(every, sums, strict=True)}
    kept = {layer % len(layers) for layer in protected}
    order = sorted(possible, key=lambda s: (s.layer in kept, sum(salience[id(w)] for w in weights[s])))
    passes = float(len(windows) * (1 + BACKWARD))
    return SearchResult(take(model, order, n), passes, passes * windows.shape[1])
