"""Repair: what a dropped attention layer or MLP added to the stream, predicted without training.

A dropped branch is replaced by an affine map of its own input: a constant (the mean of its output), or the ridge regression of its
output on its normed input. Prune&Comp (arXiv 2507.18212), LinearPatch (arXiv 2505.24680) and ReplaceMe (arXiv 2505.02819) repair
whole blocks; these are the corresponding maps of single branches.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from .dropping import Repair, check_drop_set, dropped
from .families.decoder import UnsupportedModel, decoder_layers
from .families.self_check import input_state, measuring, sample_ids
from .layerwise import LayerwiseForward
from .progress import progress
from .residual import SubBlock, capture, endpoints, layout_of, states
from .text import text_digest

HOW = ("constant", "linear")
LOOPS = ("open", "closed")
PENALTIES = tuple(10.0**power for power in range(-5, 2))  # in units of the features' mean square
SPLIT = 4  # every fourth window chooses the penalty


def repair(
    model: PreTrainedModel,
    sub_blocks: Iterable[SubBlock],
    windows: Int[Tensor, "sequence token"],
    how: str = "linear",
    loop: str = "open",
    rank: int | None = None,
    penalties: Sequence[float] = PENALTIES,
) -> Repair:
    """What to put in place of dropped attention layers and MLPs, fitted on calibration text; ``dropped`` and ``remove`` take it.

    Sums of products are added up window by window in float64, so memory does not grow with the text. Three quarters of the windows
    fit the maps of every penalty, the last quarter chooses the penalty, and all of them fit the map that is returned.

    Args:
        how: ``constant``: the mean of the branch's output over the tokens after the first, which is an attention sink; or
            ``linear``: ridge regression of its output on its normed input, at dim x dim multiplications per token.
        loop: ``open`` predicts what the branch adds in the dense model. ``closed`` goes from the first branch to the last and
            predicts the dense stream less the stream of the model repaired so far; it keeps two states per token on the disk.
        rank: of the linear map; the best approximation of its fitted values, at 2 rank x dim multiplications.
        penalties: of the squared weights, in units of the mean square of the inputs.
    Returns:
        The repair, whose table ``fit`` has layer, kind, penalty and left: the share of the output's variance that the map leaves
        unexplained on the last quarter of the windows, before it is fitted on all.
    Raises:
        ValueError: as ``dropped``; a whole block; fewer than four windows; an unknown ``how`` or ``loop``, or an impossible rank.
        UnsupportedModel: a family whose stream passes a norm after each branch, or whose branch is not one module (linear).
    """
    drop_set = sorted(check_drop_set(model, sub_blocks))
    _check(model, drop_set, windows, how, loop, rank)
    gains = {kind: _gain(model, next(s for s in drop_set if s.kind == kind), how) for kind in {kind for _, kind in drop_set}}
    settings = _Settings(how, gains, rank, tuple(penalties) if how == "linear" else (0.0,))
    fits = (_open_loop if loop == "open" else _closed_loop)(model, drop_set, windows, settings) if drop_set else {}
    table = pd.DataFrame([(*s, fit.penalty, fit.left) for s, fit in fits.items()], columns=["layer", "kind", "penalty", "left"])
    what = "the mean of the branch's output" if how == "constant" else "a linear map of the branch's input"
    what += f" of rank {rank}" if rank else ""
    text = f"{len(windows)} windows of {windows.shape[1]} tokens (hash of the tokens: `{text_digest(windows)}`)"
    maps = {sub_block: {name: value.float() for name, value in fit.maps.items()} for sub_block, fit in fits.items()}
    return Repair(maps, f"{what}, fitted in {loop} loop on {text}", table)


@dataclass(frozen=True)
class _Settings:
    """How all branches are fitted. ``gains``: kind -> by what a model multiplies a branch's output before it adds it."""

    how: str
    gains: dict[str, float]
    rank: int | None
    penalties: tuple[float, ...]


@dataclass
class _Fit:
    """The map of one branch, its penalty, and the share of variance that it leaves."""

    maps: dict[str, Tensor]
    penalty: float
    left: float


def _check(model: PreTrainedModel, drop_set: list[SubBlock], windows: Tensor, how: str, loop: str, rank: int | None) -> None:
    """Refuse what has no repair, before anything runs."""
    layout, name = layout_of(model), type(model).__name__
    for value, known in ((how, HOW), (loop, LOOPS)):
        if value not in known:
            raise ValueError(f"unknown repair {value!r}: choose one of {', '.join(known)}")
    if blocks := [s for s in drop_set if s.kind == "block"]:
        raise ValueError(f"{blocks[0]} cannot be repaired: a repair is of attention layers and MLPs")
    if len(windows) < SPLIT:
        raise ValueError(f"a repair needs at least {SPLIT} windows, got {len(windows)}: every fourth one chooses the penalty")
    dim = model.get_input_embeddings().embedding_dim
    if rank is not None and (how != "linear" or not 1 <= rank <= dim):
        raise ValueError(f"a rank of {rank} is not possible: only a linear repair has one, from 1 to {dim}")
    if layout.norms:
        raise UnsupportedModel(f"{name} cannot be repaired: its stream passes a norm after each branch")
    for layer, kind in drop_set if how == "linear" else ():
        others = [path for path in list(layout.branch(kind))[1:] if path not in layout.output_norms]
        if any(weight.ndim > 1 for path in others for weight in decoder_layers(model)[layer].get_submodule(path).parameters()):
            raise UnsupportedModel(f"{name} has no linear repair of its {kind}: it is not one module; use how='constant'")


def _gain(model: PreTrainedModel, sub_block: SubBlock, how: str) -> float:
    """By what the model multiplies the output of a branch before it adds it to the stream (Granite; 1 in most families).

    It is measured with a known map in place of the branch, which also verifies that the map reads the input that was recorded and
    that the stream receives its value.
    """
    ids = sample_ids(model)
    with _inputs(model, [sub_block]) as inputs:
        dim = states(model, ids).shape[-1]
    x = inputs[sub_block].reshape(-1, inputs[sub_block].shape[-1]).float()
    known = {"bias": torch.ones(dim)} if how == "constant" else {"bias": torch.zeros(dim), "weight": torch.eye(dim)}
    with dropped(model, [sub_block], Repair({sub_block: known})):
        stream = states(model, ids)[:, 0].float()
    start, end = endpoints(sub_block)
    added = stream[end] - stream[start]
    expected = torch.ones_like(added) if how == "constant" else x
    gain = float((added * expected).sum() / expected.square().sum()) if added.shape == expected.shape else math.nan
    rounding = 16 * torch.finfo(model.dtype).eps * float(stream.abs().max())
    if not (gain and torch.allclose(added, gain * expected, rtol=1e-3, atol=rounding)):
        raise UnsupportedModel(f"{type(model).__name__} does not add to its stream what stands in place of its {sub_block.kind}")
    return gain


@contextmanager
def _inputs(model: PreTrainedModel, sub_blocks: Iterable[SubBlock]) -> Iterator[dict[SubBlock, Tensor]]:
    """While open, every forward pass leaves the input of each of these branches: that of the module that a map replaces."""
    inputs: dict[SubBlock, Tensor] = {}
    layout = layout_of(model)
    with ExitStack() as stack:
        for sub_block in sub_blocks:
            module = decoder_layers(model)[sub_block.layer].get_submodule(next(iter(layout.branch(sub_block.kind))))

            def keep(_, args, kwargs, sub_block=sub_block):
                inputs[sub_block] = input_state(args, kwargs).clone()

            stack.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield inputs


class Sums:
    """Sums over tokens of products of features (the last one is constant) and targets, in float64."""

    def __init__(self):
        self.gram, self.cross, self.squares = 0, 0, 0.0

    def add(self, features: Float[Tensor, "token feature"], targets: Float[Tensor, "token dim"]) -> None:
        """Add the tokens of a window."""
        self.gram += features.T @ features
        self.cross += features.T @ targets
        self.squares += float(targets.square().sum())

    def __add__(self, other: "Sums") -> "Sums":
        both = Sums()
        both.gram, both.cross, both.squares = self.gram + other.gram, self.cross + other.cross, self.squares + other.squares
        return both

    def solve(self, penalty: float) -> Float[Tensor, "feature dim"]:
        """The weights with the least squared error plus ``penalty`` times their squares; that of the constant is free."""
        penalties = torch.full((len(self.gram),), penalty, dtype=torch.float64, device=self.gram.device)
        penalties[-1] = 0
        return torch.linalg.solve(self.gram + penalties.diag(), self.cross)

    def error(self, weights: Float[Tensor, "feature dim"]) -> float:
        """The squared error of these weights."""
        return float(self.squares - 2 * (weights * self.cross).sum() + (weights * (self.gram @ weights)).sum())

    @property
    def unit(self) -> float:
        """The sum over tokens of the mean square of the features, apart from the constant."""
        return float(self.gram.diagonal()[:-1].sum()) / max(1, len(self.gram) - 1)


def _add_window(sums: Sequence[Sums], number: int, x: Tensor, y: Tensor, settings: _Settings, kind: str) -> None:
    """Add the input and output of a branch in one window to the sums that fit, or to those that choose the penalty."""
    x, y = (t.cpu() if t.device.type == "mps" else t for t in (x, y))  # which has no float64
    targets = y.reshape(-1, y.shape[-1]).double() / settings.gains[kind]
    if settings.how == "constant":
        targets = targets[1:]
        features = targets.new_ones(len(targets), 1)
    else:
        features = torch.cat([x.reshape(targets.shape[0], -1).double(), targets.new_ones(len(targets), 1)], 1)
    sums[number % SPLIT == SPLIT - 1].add(features, targets)


def _fit(sums: Sequence[Sums], settings: _Settings) -> _Fit:
    """The map from the sums that fit and those that choose the penalty."""
    fitting, choosing = sums
    errors = [choosing.error(fitting.solve(penalty * fitting.unit)) for penalty in settings.penalties]
    penalty = settings.penalties[min(range(len(errors)), key=errors.__getitem__)]
    spread = choosing.squares - float((choosing.cross[-1] ** 2).sum() / choosing.gram[-1, -1])
    whole = fitting + choosing
    weights = whole.solve(penalty * whole.unit)
    slope, bias = weights[:-1].T, weights[-1]
    maps = {"bias": bias} if settings.how == "constant" else {"bias": bias, "weight": slope}
    if settings.rank:
        n, total = whole.gram[-1, -1], whole.gram[:-1, -1]
        covariance = whole.gram[:-1, :-1] - total.outer(total) / n
        basis = torch.linalg.eigh(slope @ covariance @ slope.T).eigenvectors[:, -settings.rank :]
        mean = slope @ total / n
        maps = {"bias": bias + mean - basis @ (basis.T @ mean), "down": basis.T @ slope, "up": basis}
    return _Fit(maps, penalty, min(errors) / spread if spread > 0 else math.nan)


@measuring
def _open_loop(model: PreTrainedModel, drop_set: list[SubBlock], windows: Tensor, settings: _Settings) -> dict[SubBlock, _Fit]:
    """Every branch fitted to what it adds in the dense model, from one pass over the text."""
    sums = {sub_block: (Sums(), Sums()) for sub_block in drop_set}
    with _inputs(model, drop_set) as inputs:
        for number, window in enumerate(progress(windows, "fitting the repair")):
            stream = states(model, window[None])
            for sub_block in drop_set:
                start, end = endpoints(sub_block)
                target = stream[end] - stream[start]
                _add_window(sums[sub_block], number, inputs[sub_block], target, settings, sub_block.kind)
    return {sub_block: _fit(sums[sub_block], settings) for sub_block in drop_set}


@measuring
def _closed_loop(model: PreTrainedModel, drop_set: list[SubBlock], windows: Tensor, settings: _Settings) -> dict[SubBlock, _Fit]:
    """Every branch fitted to the dense stream less the stream of the model repaired before it, layer by layer.

    The arguments of a layer other than the state are those of the first window: all windows are equally long.
    """
    fits: dict[SubBlock, _Fit] = {}
    first, last, n = drop_set[0].layer, drop_set[-1].layer, len(windows)
    forward = LayerwiseForward(model, windows[:1].to(model.device))
    shape = (n, *forward.embedded.shape)
    with TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("dense", "repaired")]
        dense, repaired = (torch.from_file(file, True, math.prod(shape), dtype=model.dtype).view(shape) for file in files)
        for number, window in enumerate(progress(windows, "the stream before the first drop")):
            dense[number] = repaired[number] = _state_before(model, window[None], first)
        for layer in progress(range(first, last + 1), "fitting the repair layer by layer"):
            here = [sub_block for sub_block in drop_set if sub_block.layer == layer]
            for place, sub_block in enumerate(here):
                (start, end), sums = endpoints(sub_block), (Sums(), Sums())
                for number in range(n):
                    target = _through(forward, layer, dense[number])[0][end]
                    stream, x = _through(forward, layer, repaired[number], here[:place], fits, sub_block)
                    _add_window(sums, number, x, target - stream[start], settings, sub_block.kind)
                fits[sub_block] = _fit(sums, settings)
            for number in range(n if layer < last else 0):
                dense[number] = _through(forward, layer, dense[number])[0][2 * layer + 2]
                repaired[number] = _through(forward, layer, repaired[number], here, fits)[0][2 * layer + 2]
        reached = _state_before(model, windows[-1:], last).cpu()
        if not torch.allclose(dense[-1], reached, rtol=1e-3, atol=1e-3 * float(reached.abs().max())):
            raise UnsupportedModel(f"{type(model).__name__} has no closed loop: its layers share more than their states")
    return fits


def _through(
    forward: LayerwiseForward,
    layer: int,
    state: Tensor,
    gone: Sequence[SubBlock] = (),
    fits: dict[SubBlock, _Fit] | None = None,
    read: SubBlock | None = None,
) -> tuple[dict[int, Tensor], Tensor | None]:
    """The states at a layer's endpoints, with these of its branches repaired, and the input of its branch ``read``."""
    stream: dict[int, Tensor] = {}
    maps = Repair({sub_block: fits[sub_block].maps for sub_block in gone})
    with (
        dropped(forward.model, gone, maps),
        capture(forward.model, lambda endpoint, value: stream.update({endpoint: value.clone()})),
        _inputs(forward.model, [read] if read else []) as inputs,
    ):
        stream[2 * layer + 2] = forward.layer(layer, state.to(forward.calls[layer][0].device), ())
    return stream, inputs.get(read)


class _Reached(Exception):
    """Ends a forward pass at the layer whose input is wanted."""


def _state_before(model: PreTrainedModel, ids: Tensor, layer: int) -> Float[Tensor, "batch token dim"]:
    """The stream that enters a layer."""

    def stop(_, args, kwargs):
        raise _Reached(input_state(args, kwargs).clone())

    handle = decoder_layers(model)[layer].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model.base_model(ids.to(model.device), use_cache=False)
    except _Reached as reached:
        return reached.args[0]
    finally:
        handle.remove()
    raise RuntimeError(f"a forward pass does not reach layer {layer}")
