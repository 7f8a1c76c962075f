"""``repair``: what to put in place of dropped sub-blocks, fitted on calibration text without training."""

from collections.abc import Iterable, Sequence

import pandas as pd
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from ..dropping import Repair, check_drop_set
from ..families.decoder import UnsupportedModel, decoder_layers
from ..residual import KINDS, SubBlock, layout_of
from ..text import text_digest
from .branches import BranchSettings, branch_gain, closed_loop, open_loop
from .folds import fold_repairs
from .magnitude import patch_maps, scaled_weights, stream_factors
from .sums import SPLIT, BranchFit, FitSettings

HOW = {  # what each repair is, for model cards
    "constant": "the mean of the branch's output",
    "linear": "a linear map of the branch's input",
    "fold": "a linear map of an earlier branch's last input, folded into that branch's weights",
    "scale": "a factor of the stream (Prune&Comp), folded into the weights of the later branches",
    "patch": "a linear map of the stream (LinearPatch)",
}
ONE_BRANCH = ("constant", "linear")
LOOPS = ("open", "closed")
PENALTIES = tuple(10.0**power for power in range(-5, 2))  # in units of the features' mean square


def repair(
    model: PreTrainedModel,
    sub_blocks: Iterable[SubBlock],
    windows: Int[Tensor, "sequence token"],
    how: str = "linear",
    loop: str = "open",
    rank: int | None = None,
    penalties: Sequence[float] = PENALTIES,
) -> Repair:
    """What to put in place of dropped sub-blocks, fitted on calibration text; ``dropped`` and ``remove`` take it.

    Sums of products are added up window by window in float64, so memory does not grow with the text. Three quarters of the windows
    fit the maps of every penalty, the last quarter chooses the penalty, and all of them fit the map that is returned.

    Args:
        how: of attention layers and MLPs: ``constant``, the mean of the branch's output over the tokens after the first, which is
            an attention sink; or ``linear``, ridge regression of its output on its normed input, at dim x dim multiplications per
            token. Of any sub-blocks, at no cost: ``fold``, ridge regression of what they add on the last input of the last branch
            before them, added to that branch's weights (with ``block``s, ReplaceMe, arXiv 2505.02819); or ``scale``, Prune&Comp's
            factor of the stream (arXiv 2507.18212). Of blocks: ``patch``, LinearPatch (arXiv 2505.24680), dim x dim per run.
        loop: ``open`` predicts what the sub-block adds in the dense model. ``closed`` goes from the first to the last and predicts
            the dense stream less the stream of the model repaired so far; it keeps states of all tokens on the disk.
        rank: of the linear map; the best approximation of its fitted values, at 2 rank x dim multiplications.
        penalties: of the squared weights, in units of the mean square of the inputs.
    Returns:
        The repair, whose table ``fit`` has layer, kind, penalty and left: the share of the output's variance that the map leaves
        unexplained on the last quarter of the windows, before it is fitted on all; of ``scale`` layer, kind and factor.
    Raises:
        ValueError: as ``dropped``; a kind that ``how`` does not repair; fewer than four windows; an unknown ``how`` or ``loop``, or
            one that does not apply; an impossible rank; ``fold`` where no branch is kept before a sub-block.
        UnsupportedModel: a family whose stream passes a norm after each branch, whose branch is not one module (linear) or does not
            end with one matrix (fold, scale).

    >>> text = windows.repeat(2, 1)
    >>> drop_set = [SubBlock(2, "attention"), SubBlock(4, "attention")]
    >>> with dropped(model, drop_set, repair(model, drop_set, text, "fold")) as smaller:
    ...     loss = perplexity(smaller, held_out)
    """
    drop_set = sorted(check_drop_set(model, sub_blocks))
    _check(model, drop_set, windows, how, loop, rank)
    text = f"{len(windows)} windows of {windows.shape[1]} tokens (hash of the tokens: `{text_digest(windows)}`)"
    about = HOW[how] + (f" of rank {rank}" if rank else "")
    about += f", fitted on {text}" if how in ("scale", "patch") else f", fitted in {loop} loop on {text}"
    if not drop_set:
        return Repair({}, about, _table({}))
    if how in ONE_BRANCH:
        settings = _branch_settings(model, drop_set, how, penalties, rank)
        closed = loop == "closed"
        fits = closed_loop(model, drop_set, windows, settings) if closed else open_loop(model, drop_set, windows, [settings])[0]
        return Repair({s: _plain(fit.maps) for s, fit in fits.items()}, about, _table(fits))
    if how == "patch":
        return Repair({s: _plain(maps) for s, maps in patch_maps(model, drop_set, windows).items()}, about)
    if how == "scale":
        factors = stream_factors(model, drop_set, windows)
        table = pd.DataFrame([(*s, factor) for s, factor in factors.items()], columns=["layer", "kind", "factor"])
        return _in_place(scaled_weights(model, drop_set, factors), drop_set, about, table)
    ((changed, fits),) = fold_repairs(model, [drop_set], windows, FitSettings(tuple(penalties)), loop)
    return _in_place(changed, drop_set, about, _table(fits))


def _branch_settings(
    model: PreTrainedModel, drop_set: list[SubBlock], how: str, penalties: Sequence[float] = PENALTIES, rank: int | None = None
) -> BranchSettings:
    gains = {kind: branch_gain(model, next(s for s in drop_set if s.kind == kind), how) for kind in {s.kind for s in drop_set}}
    return BranchSettings(how, gains, FitSettings(tuple(penalties) if how == "linear" else (0.0,), rank))


def maps_by_how(
    model: PreTrainedModel, sub_blocks: Iterable[SubBlock], windows: Int[Tensor, "sequence token"], hows: Sequence[str] = ONE_BRANCH
) -> dict[str, Repair]:
    """``repair`` by ``constant`` and ``linear`` of many attention layers and MLPs from one pass over the text.

    In open loop the map of a sub-block does not depend on what else is dropped, so that these repair every set of them, and they
    may be more than a model can be without.
    """
    candidates = sorted(set(sub_blocks))
    for how in hows:
        _check(model, candidates, windows, how, "open", None)
    fits = open_loop(model, candidates, windows, [_branch_settings(model, candidates, how) for how in hows])
    return {
        how: Repair({s: _plain(fit.maps) for s, fit in of.items()}, HOW[how], _table(of))
        for how, of in zip(hows, fits, strict=True)
    }


def folds_by_set(
    model: PreTrainedModel, sets: Iterable[Sequence[SubBlock]], windows: Int[Tensor, "sequence token"]
) -> dict[tuple[SubBlock, ...], Repair]:
    """``repair(..., "fold")`` of many sets from one pass over the text, by sorted set."""
    drop_sets = list(dict.fromkeys(tuple(sorted(check_drop_set(model, sub_blocks))) for sub_blocks in sets))
    for drop_set in drop_sets:
        _check(model, list(drop_set), windows, "fold", "open", None)
    results = fold_repairs(model, drop_sets, windows, FitSettings(PENALTIES))
    return {
        drop_set: _in_place(changed, list(drop_set), HOW["fold"], _table(fits))
        for drop_set, (changed, fits) in zip(drop_sets, results, strict=True)
    }


def _in_place(changed: dict[str, Tensor], drop_set: list[SubBlock], about: str, table: pd.DataFrame) -> Repair:
    """A repair that changes weights and puts nothing in the place of what is dropped."""
    weights = {name: value.float().clone() for name, value in changed.items()}
    return Repair({s: {} for s in drop_set}, about, table, weights, tuple(sorted(drop_set)))


def _plain(maps: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() for name, value in maps.items()}


def _table(fits: dict[SubBlock, BranchFit]) -> pd.DataFrame:
    return pd.DataFrame([(*s, fit.penalty, fit.left) for s, fit in fits.items()], columns=["layer", "kind", "penalty", "left"])


def _check(model: PreTrainedModel, drop_set: list[SubBlock], windows: Tensor, how: str, loop: str, rank: int | None) -> None:
    """Refuse what has no repair, before anything runs."""
    layout, name = layout_of(model), type(model).__name__
    for value, known in ((how, HOW), (loop, LOOPS)):
        if value not in known:
            raise ValueError(f"unknown repair {value!r}: choose one of {', '.join(known)}")
    if loop == "closed" and how in ("scale", "patch"):
        raise ValueError(f"the repair {how} has no closed loop: it compares the two ends of what is dropped in the dense model")
    kinds_repaired = {"patch": ("block",), **dict.fromkeys(ONE_BRANCH, ("attention", "mlp"))}.get(how, KINDS)
    if wrong := [s for s in drop_set if s.kind not in kinds_repaired]:
        kinds = "attention layers and MLPs" if how in ONE_BRANCH else "blocks"
        raise ValueError(
            f"{wrong[0]} cannot be repaired by {how}: that is a repair of {kinds}; fold and scale repair any sub-block"
        )
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
