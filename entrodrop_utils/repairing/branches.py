"""A constant or a linear map of its own input in place of a dropped attention layer or MLP."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from ..dropping import Repair, dropped
from ..families.decoder import UnsupportedModel, decoder_layers
from ..families.self_check import input_state, measuring, sample_ids
from ..layerwise import LayerwiseForward
from ..progress import progress
from ..residual import SubBlock, capture, endpoints, layout_of, states
from .sums import BranchFit, FitSettings, Sums, add_window, solved


@dataclass(frozen=True)
class BranchSettings:
    """How all branches are fitted. ``gains``: kind -> by what a model multiplies a branch's output before it adds it."""

    how: str
    gains: dict[str, float]
    ridge: FitSettings


def branch_gain(model: PreTrainedModel, sub_block: SubBlock, how: str) -> float:
    """By what the model multiplies the output of a branch before it adds it to the stream (Granite; 1 in most families).

    It is measured with a known map in place of the branch, which also verifies that the map reads the input that was recorded and
    that the stream receives its value.
    """
    ids = sample_ids(model)
    with branch_inputs(model, [sub_block]) as inputs:
        dim = states(model, ids).shape[-1]
    x = inputs[sub_block].reshape(-1, inputs[sub_block].shape[-1]).float()
    known = {"bias": torch.ones(dim)} if how == "constant" else {"patch" if how == "patch" else "weight": torch.eye(dim)}
    with dropped(model, [sub_block], Repair({sub_block: known})):
        stream = states(model, ids)[:, 0].float()
    start, end = endpoints(sub_block)
    added = stream[end] - stream[start]
    expected = {"constant": torch.ones_like(added), "patch": stream[start]}.get(how, x)
    gain = float((added * expected).sum() / expected.square().sum()) if added.shape == expected.shape else math.nan
    rounding = 16 * torch.finfo(model.dtype).eps * float(stream.abs().max())
    if not (gain and torch.allclose(added, gain * expected, rtol=1e-3, atol=rounding)):
        raise UnsupportedModel(f"{type(model).__name__} does not add to its stream what stands in place of its {sub_block.kind}")
    return gain


@contextmanager
def branch_inputs(model: PreTrainedModel, sub_blocks: Iterable[SubBlock]) -> Iterator[dict[SubBlock, Tensor]]:
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


def _add(sums: Sequence[Sums], number: int, x: Tensor, y: Tensor, settings: BranchSettings, kind: str) -> None:
    """Add the input and output of a branch in one window to its sums."""
    targets = y.reshape(-1, y.shape[-1]) / settings.gains[kind]
    if settings.how == "constant":
        targets = targets[1:]
        add_window(sums, number, targets[:, :0], targets)
    else:
        add_window(sums, number, x.reshape(len(targets), -1), targets)


@measuring
def open_loop(
    model: PreTrainedModel, drop_set: list[SubBlock], windows: Tensor, several: Sequence[BranchSettings]
) -> list[dict[SubBlock, BranchFit]]:
    """Every branch fitted to what it adds in the dense model, with each of these settings, from one pass over the text."""
    sums = {(i, sub_block): (Sums(), Sums()) for i in range(len(several)) for sub_block in drop_set}
    with branch_inputs(model, drop_set) as inputs:
        for number, window in enumerate(progress(windows, "fitting the repair")):
            stream = states(model, window[None])
            for (i, sub_block), parts in sums.items():
                start, end = endpoints(sub_block)
                _add(parts, number, inputs[sub_block], stream[end] - stream[start], several[i], sub_block.kind)
    return [{s: solved(sums[i, s], settings.ridge) for s in drop_set} for i, settings in enumerate(several)]


@measuring
def closed_loop(
    model: PreTrainedModel, drop_set: list[SubBlock], windows: Tensor, settings: BranchSettings
) -> dict[SubBlock, BranchFit]:
    """Every branch fitted to the dense stream less the stream of the model repaired before it, layer by layer.

    The arguments of a layer other than the state are those of the first window: all windows are equally long.
    """
    fits: dict[SubBlock, BranchFit] = {}
    first, last, n = drop_set[0].layer, drop_set[-1].layer, len(windows)
    forward = LayerwiseForward(model, windows[:1].to(model.device))
    shape = (n, *forward.dense(0).shape)
    with TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("dense", "repaired")]
        dense, repaired = (torch.from_file(file, True, math.prod(shape), dtype=model.dtype).view(shape) for file in files)
        for number, window in enumerate(progress(windows, "the stream before the first drop")):
            dense[number] = repaired[number] = state_before(model, window[None], first)
        for layer in progress(range(first, last + 1), "fitting the repair layer by layer"):
            here = [sub_block for sub_block in drop_set if sub_block.layer == layer]
            for place, sub_block in enumerate(here):
                (start, end), sums = endpoints(sub_block), (Sums(), Sums())
                for number in range(n):
                    target = _through(forward, layer, dense[number])[0][end]
                    stream, x = _through(forward, layer, repaired[number], here[:place], fits, sub_block)
                    _add(sums, number, x, target - stream[start], settings, sub_block.kind)
                fits[sub_block] = solved(sums, settings.ridge)
            for number in range(n if layer < last else 0):
                dense[number] = _through(forward, layer, dense[number])[0][2 * layer + 2]
                repaired[number] = _through(forward, layer, repaired[number], here, fits)[0][2 * layer + 2]
        reached = state_before(model, windows[-1:], last).cpu()
        if not torch.allclose(dense[-1], reached, rtol=1e-3, atol=1e-3 * float(reached.abs().max())):
            raise UnsupportedModel(f"{type(model).__name__} has no closed loop: its layers share more than their states")
    return fits


def _through(
    forward: LayerwiseForward,
    layer: int,
    state: Tensor,
    gone: Sequence[SubBlock] = (),
    fits: dict[SubBlock, BranchFit] | None = None,
    read: SubBlock | None = None,
) -> tuple[dict[int, Tensor], Tensor | None]:
    """The states at a layer's endpoints, with these of its branches repaired, and the input of its branch ``read``."""
    stream: dict[int, Tensor] = {}
    maps = Repair({sub_block: fits[sub_block].maps for sub_block in gone})
    with (
        dropped(forward.model, gone, maps),
        capture(forward.model, lambda endpoint, value: stream.update({endpoint: value.clone()})),
        branch_inputs(forward.model, [read] if read else []) as inputs,
    ):
        stream[2 * layer + 2] = forward.layer(layer, state.to(forward.dense(layer).device), ())
    return stream, inputs.get(read)


class Reached(Exception):
    """Ends a forward pass at the layer whose input is wanted."""


def state_before(model: PreTrainedModel, ids: Tensor, layer: int) -> Float[Tensor, "batch token dim"]:
    """The stream that enters a layer."""

    def stop(_, args, kwargs):
        raise Reached(input_state(args, kwargs).clone())

    handle = decoder_layers(model)[layer].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model.base_model(ids.to(model.device), use_cache=False)
    except Reached as reached:
        return reached.args[0]
    finally:
        handle.remove()
    raise RuntimeError(f"a forward pass does not reach layer {layer}")
