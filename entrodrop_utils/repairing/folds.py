"""A dropped sub-block predicted from what an earlier branch computes, folded into that branch's own weights."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..dropping import Repair, dropped
from ..families.decoder import UnsupportedModel, decoder_layers
from ..families.self_check import measuring, output_state, sample_ids
from ..progress import progress
from ..residual import SubBlock, capture, endpoints, find, layout_of, states
from .branches import Reached
from .sums import BranchFit, FitSettings, Sums, add_window, solved


def branches_of(drop_set: Iterable[SubBlock]) -> list[SubBlock]:
    """The set with the attention and MLP of every block in its place, sorted."""
    parts = {"block": ("attention", "mlp")}
    return sorted(SubBlock(layer, kind) for layer, kinds in drop_set for kind in parts.get(kinds, (kinds,)))


def carrier_of(model: PreTrainedModel, sub_block: SubBlock, drop_set: Iterable[SubBlock]) -> SubBlock:
    """The branch that can carry what a dropped sub-block added: nothing that is kept reads the stream between the two.

    That is the last one kept before it. Where both branches of a layer read the layer's input, it is the other one of its layer.

    Raises:
        ValueError: no branch is kept before it.
    """
    gone = {*branches_of(drop_set), *branches_of([sub_block])}
    kept = [s for kind in ("mlp", "attention") for s in find(model, kind) if s not in gone]
    same = [s for s in kept if s.layer == sub_block.layer]
    if same and layout_of(model).between is None:
        return same[0]
    first = endpoints(sub_block)[0]
    before = [s for s in kept if endpoints(s)[1] <= first]
    if not before:
        raise ValueError(f"{sub_block} cannot be folded: no branch is kept before it")
    return max(before, key=lambda s: endpoints(s)[1])


@measuring
def output_projections(model: PreTrainedModel, branches: Iterable[SubBlock]) -> dict[SubBlock, tuple[str, float]]:
    """Branch -> the name in the list of layers of the matrix that is its last step, and by what the model multiplies its output.

    It is found on a few tokens: the module with one matrix whose output is, up to a factor, what the branch adds to the stream.

    Raises:
        UnsupportedModel: a branch does not end with one matrix (a mixture of experts), or its output passes a norm.
    """
    layers, layout, outputs = decoder_layers(model), layout_of(model), {}
    branches = list(branches)
    with ExitStack() as stack:
        for sub_block in branches:
            root = f"{sub_block.layer}.{next(iter(layout.branch(sub_block.kind)))}"
            for path, module in layers.get_submodule(root).named_modules(prefix=root):
                if isinstance(module, (nn.Linear, Conv1D)):

                    def keep(_, args, output, key=(sub_block, path)):
                        outputs[key] = output_state(output)

                    stack.callback(module.register_forward_hook(keep).remove)
        stream = states(model, sample_ids(model)).float()
    projections = {}
    for sub_block in branches:
        start, end = endpoints(sub_block)
        added = (stream[end] - stream[start]).flatten(0, -2)
        rounding = 16 * torch.finfo(model.dtype).eps * float(stream[end].abs().max())
        for (branch, path), output in outputs.items():
            output = output.float().flatten(0, -2)
            if branch == sub_block and output.shape == added.shape:
                gain = float((added * output).sum() / output.square().sum())
                if gain and torch.allclose(added, gain * output, rtol=1e-3, atol=rounding):
                    projections[sub_block] = (path, gain)
        if sub_block not in projections:
            raise UnsupportedModel(
                f"{type(model).__name__} cannot carry a repair in its {sub_block}: what it adds is not the output of one matrix"
            )
    return projections


@contextmanager
def _kept_inputs(model: PreTrainedModel, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """While open, every forward pass leaves the inputs of these modules of the layers, token by token."""
    inputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in names:

            def keep(_, args, name=name):
                inputs[name] = args[0].reshape(-1, args[0].shape[-1]).clone()

            stack.callback(decoder_layers(model).get_submodule(name).register_forward_pre_hook(keep).remove)
        yield inputs


def _has_bias(model: PreTrainedModel, name: str) -> bool:
    return getattr(decoder_layers(model).get_submodule(name), "bias", None) is not None


def changed_weights(model: PreTrainedModel, name: str, slope: Tensor, bias: Tensor, factor: float = 1.0) -> dict[str, Tensor]:
    """The weights of a matrix, multiplied by a factor, with a slope (dim, feature) and a bias (dim) added."""
    module = decoder_layers(model).get_submodule(name)
    own = slope.T if isinstance(module, Conv1D) else slope
    weights = {f"{name}.weight": (module.weight.detach().double() * factor + own).float().contiguous()}
    if _has_bias(model, name):
        weights[f"{name}.bias"] = (module.bias.detach().double() * factor + bias).float()
    return weights


def fold_repairs(
    model: PreTrainedModel, sets: Sequence[Sequence[SubBlock]], windows: Tensor, settings: FitSettings, loop: str = "open"
) -> list[tuple[dict[str, Tensor], dict[SubBlock, BranchFit]]]:
    """For every set, the changed weights and the fits. In open loop one pass over the text serves all sets."""
    carriers = [{sub_block: carrier_of(model, sub_block, drop_set) for sub_block in sorted(drop_set)} for drop_set in sets]
    names = output_projections(model, {carrier for pairs in carriers for carrier in pairs.values()})
    if loop == "open":
        pairs = {(sub_block, names[carrier][0]) for of in carriers for sub_block, carrier in of.items()}
        fits = _open_folds(model, sorted(pairs), windows, settings)
        by_set = [{s: fits[s, names[carrier][0]] for s, carrier in of.items()} for of in carriers]
    else:
        by_set = [_closed_folds(model, of, names, windows, settings) for of in carriers]
    return [(_folded(model, of, names, fits), fits) for of, fits in zip(carriers, by_set, strict=True)]


def _folded(
    model: PreTrainedModel,
    carriers: Mapping[SubBlock, SubBlock],
    names: Mapping[SubBlock, tuple[str, float]],
    fits: Mapping[SubBlock, BranchFit],
) -> dict[str, Tensor]:
    """The weights with all of these fits added to them; those of one carrier add up."""
    changed: dict[str, Tensor] = {}
    for carrier in dict.fromkeys(carriers[s] for s in fits):
        name, gain = names[carrier]
        maps = [fits[s].maps for s in fits if carriers[s] == carrier]
        changed |= changed_weights(model, name, sum(m["weight"] for m in maps) / gain, sum(m["bias"] for m in maps) / gain)
    return changed


def _ridge(model: PreTrainedModel, name: str, settings: FitSettings) -> FitSettings:
    return FitSettings(settings.penalties, constant=_has_bias(model, name))


@measuring
def _open_folds(
    model: PreTrainedModel, pairs: Sequence[tuple[SubBlock, str]], windows: Tensor, settings: FitSettings
) -> dict[tuple[SubBlock, str], BranchFit]:
    """What every sub-block adds in the dense model, from the input of its carrier's last matrix."""
    sums = {pair: (Sums(), Sums()) for pair in pairs}
    with _kept_inputs(model, {name for _, name in pairs}) as inputs:
        for number, window in enumerate(progress(windows, "fitting the repair")):
            stream = states(model, window[None])
            for sub_block, name in pairs:
                start, end = endpoints(sub_block)
                add_window(sums[sub_block, name], number, inputs[name], (stream[end] - stream[start])[0])
    return {pair: solved(sums[pair], _ridge(model, pair[1], settings)) for pair in pairs}


@measuring
def _closed_folds(
    model: PreTrainedModel,
    carriers: Mapping[SubBlock, SubBlock],
    names: Mapping[SubBlock, tuple[str, float]],
    windows: Tensor,
    settings: FitSettings,
) -> dict[SubBlock, BranchFit]:
    """Every sub-block fitted, in order of depth, to the dense stream less that of the model repaired so far.

    The dense streams behind the sub-blocks are on the disk.
    """
    fits: dict[SubBlock, BranchFit] = {}
    order = sorted(carriers)
    behind = {s: max(endpoints(s)[1], endpoints(carriers[s])[1]) for s in order}  # where the stream has what was folded
    dim = model.get_input_embeddings().embedding_dim
    shape = (len(order), *windows.shape, dim)
    with TemporaryDirectory() as folder:
        dense = torch.from_file(str(Path(folder) / "dense"), True, math.prod(shape), dtype=model.dtype).view(shape)
        for number, window in enumerate(progress(windows, "the dense stream")):
            stream = states(model, window[None])
            for place, sub_block in enumerate(order):
                dense[place, number] = stream[behind[sub_block]][0]
        for place, sub_block in enumerate(progress(order, "fitting the repair one sub-block after another")):
            name, sums = names[carriers[sub_block]][0], (Sums(), Sums())
            gone = branches_of(order[: place + 1])
            so_far = Repair({s: {} for s in gone}, changed=_folded(model, carriers, names, fits), drop_set=tuple(gone))
            with dropped(model, gone, so_far), _kept_inputs(model, [name]) as inputs:
                for number, window in enumerate(windows):
                    reached = _stream_at(model, window[None], behind[sub_block])
                    add_window(sums, number, inputs[name], dense[place, number].to(reached.device) - reached)
            fits[sub_block] = solved(sums, _ridge(model, name, settings))
    return fits


def _stream_at(model: PreTrainedModel, ids: Tensor, endpoint: int) -> Tensor:
    """The stream of one window at an endpoint (token, dim); what comes after it does not run."""

    def stop(reached: int, state: Tensor) -> None:
        if reached == endpoint:
            raise Reached(state[0].clone())

    callback: Callable[[int, Tensor], None] = stop
    try:
        with capture(model, callback):
            model.base_model(ids.to(model.device), use_cache=False)
    except Reached as reached:
        return reached.args[0]
    raise RuntimeError(f"a forward pass does not reach endpoint {endpoint}")
