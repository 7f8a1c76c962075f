"""Runs one batch through single layers of a model, so that many sets of dropped sub-blocks share what they have in common."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from .dropping import dropped
from .progress import progress
from .sub_blocks import SubBlock, layers

BATCH = 512  # tokens whose logits are held at a time: 100 MB at a vocabulary of 49,152
Set = tuple[SubBlock, ...]  # sorted; the empty one is the dense model


def distinct(model: PreTrainedModel, sets: Iterable[Sequence[SubBlock]]) -> list[Set]:
    """The sets, sorted and each once. Raises ValueError for one that cannot be dropped, before anything is computed."""
    chosen = list(dict.fromkeys(tuple(sorted(one)) for one in sets))
    for one in chosen:
        with dropped(model, one):
            pass
    return chosen


class Replay:
    """The layers of a model on one batch, with the masks and positions of one whole forward pass.

    What a layer is given besides the state does not depend on what was dropped before it, so it is recorded once. A family in which
    that is not so, or whose layers pass on more than the state, is noticed: the dense model is replayed and compared first.
    """

    def __init__(self, model: PreTrainedModel, ids: Int[Tensor, "batch token"], check: bool = True, **inputs: Tensor):
        self.model, self.ids, self.calls, self.more = model, ids, [], None
        handles = [layer.register_forward_pre_hook(self._record, with_kwargs=True) for layer in layers(model)]
        try:
            whole = model.base_model(ids, use_cache=False, **inputs)[0]
        finally:
            for handle in handles:
                handle.remove()
        self.embedded = self.calls[0][0]
        if check:
            state = self.embedded
            for layer in range(len(self.calls)):
                state = self.layer(layer, state, ())
            replayed = self._past_the_layers(model.base_model, ids, state)[0]
            if not torch.allclose(replayed, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max())):
                raise RuntimeError(
                    f"{type(model).__name__} cannot be evaluated layer by layer: its layers share more than their states"
                )

    def _record(self, _, args: tuple, kwargs: dict) -> None:
        kwargs = dict(kwargs)  # the layer still needs its own
        state, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        self.calls.append((state, rest, kwargs))

    def layer(self, index: int, state: Tensor, without: Set) -> Tensor:
        """The state after a layer, without some of its sub-blocks."""
        if any(kind == "block" for _, kind in without):
            return state
        _, args, kwargs = self.calls[index]
        layer = layers(self.model)[index]
        with dropped(self.model, without) if without else nullcontext():
            output = layer(state, *args, **kwargs)
        self.more = output[1:] if isinstance(output, tuple) else None  # some families return more than the state
        return output if self.more is None else output[0]

    def logits(self, state: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token vocab"]:
        """Final norm and head of states: those of the batch, or any others of at most ``BATCH`` tokens."""
        ids = self.ids if state.shape[:2] == self.ids.shape else self.ids.new_zeros(state.shape[:2])
        return self._past_the_layers(self.model, ids, state).logits

    def _past_the_layers(self, model: torch.nn.Module, ids: Tensor, state: Tensor):
        """A forward pass in which every layer hands on that state."""
        blocks = layers(self.model)
        before = [layer.__dict__.get("forward") for layer in blocks]  # set where a model is spread over devices
        handed_on = state if self.more is None else (state, *self.more)
        try:
            for layer in blocks:
                layer.forward = lambda *args, **kwargs: handed_on
            return model(ids, use_cache=False)
        finally:
            for layer, forward in zip(blocks, before, strict=True):
                layer.__dict__.pop("forward") if forward is None else setattr(layer, "forward", forward)

    def ends(self, sets: list[Set]) -> Iterator[tuple[Set, Float[Tensor, "batch token dim"]]]:
        """Each set and the state after the last layer without it. Sets that agree on the first n layers share the way there."""
        yield from self._walk(0, self.embedded, sets)

    def _walk(self, layer: int, state: Tensor, group: list[Set]) -> Iterator[tuple[Set, Tensor]]:
        if layer == len(self.calls):
            yield group[0], state
            return
        ways: dict[Set, list[Set]] = {}
        for one in group:
            ways.setdefault(tuple(s for s in one if s.layer == layer), []).append(one)
        for way, members in ways.items():
            yield from self._walk(layer + 1, self.layer(layer, state, way), members)


class Bar:
    """A progress bar advanced by calls, for work that is not a loop."""

    def __init__(self, total: int, what: str):
        self.steps = iter(progress(range(total), what))
        next(self.steps, None)

    def __enter__(self):
        return lambda: next(self.steps, None)

    def __exit__(self, *_) -> None:
        self.steps.close()


def written(one: Set) -> str:
    """A set as a string: what the store keeps it under."""
    return ", ".join(map(str, one))
