"""Layer-wise forward passes: many sets of dropped sub-blocks share the layers that they have in common."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from .dropping import Repair, dropped
from .families.decoder import decoder_layers
from .progress import progress
from .residual import SubBlock

MAX_TOKENS = 512  # whose logits are held at a time: 100 MB at a vocabulary of 49,152
DropSet = tuple[SubBlock, ...]  # sorted; the empty one is the dense model
_CHECKED: WeakSet[PreTrainedModel] = WeakSet()  # models that can be evaluated layer by layer


def distinct_sets(model: PreTrainedModel, sets: Iterable[Sequence[SubBlock]]) -> list[DropSet]:
    """The sets, sorted and each once. Raises ValueError for one that cannot be dropped, before anything is computed."""
    drop_sets = list(dict.fromkeys(tuple(sorted(sub_blocks)) for sub_blocks in sets))
    for drop_set in drop_sets:
        with dropped(model, drop_set):
            pass
    return drop_sets


def set_name(drop_set: DropSet) -> str:
    """A set as a string, as the cache has it."""
    return ", ".join(map(str, drop_set))


class LayerwiseForward:
    """The layers of a model on one batch, with the masks, positions and states of one whole forward pass of the dense model.

    The arguments of a layer other than the state do not depend on what was dropped before it, so they are recorded once. The first
    time for a model, a pass over all layers is compared with its own, which detects families where that is not so.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Int[Tensor, "batch token"],
        repair: Repair | None = None,
        **inputs: Tensor,
    ):
        if repair is not None and not repair.by_layer:
            raise ValueError("a repair that changes other layers needs whole passes: evaluate inside `dropped(model, set, repair)`")
        self.model, self.ids, self.calls, self.more, self.repair = model, ids, [], None, repair
        layers = decoder_layers(model)
        handles = [layer.register_forward_pre_hook(self._record, with_kwargs=True) for layer in layers]
        handles.append(layers[-1].register_forward_hook(self._record_last))
        try:
            whole = model.base_model(ids, use_cache=False, **inputs)[0]
        finally:
            for handle in handles:
                handle.remove()
        if model not in _CHECKED:
            state = self.dense(0)
            for layer in range(len(self.calls)):
                state = self.layer(layer, state, ())
            output = self._without_layers(model.base_model, ids, state)[0]
            if not torch.allclose(output, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max())):
                raise RuntimeError(
                    f"{type(model).__name__} cannot be evaluated layer by layer: its layers share more than their states"
                )
            _CHECKED.add(model)

    def _record(self, _, args: tuple, kwargs: dict) -> None:
        kwargs = dict(kwargs)  # the layer still needs its own
        state, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        self.calls.append((state, rest, kwargs))

    def _record_last(self, _, __, output: Tensor | tuple) -> None:
        self.last = self._state_of(output)

    def _state_of(self, output: Tensor | tuple) -> Tensor:
        """The state that a layer returns; some families return more, which ``_without_layers`` returns again."""
        self.more = output[1:] if isinstance(output, tuple) else None
        return output if self.more is None else output[0]

    def dense(self, layer: int) -> Float[Tensor, "batch token dim"]:
        """The dense model's state before a layer; after the last one for the number of layers."""
        return self.calls[layer][0] if layer < len(self.calls) else self.last

    def layer(self, index: int, state: Tensor, drop_set: DropSet) -> Tensor:
        """The state after a layer without some of its sub-blocks."""
        if any(kind == "block" for _, kind in drop_set):
            return state
        _, args, kwargs = self.calls[index]
        layer = decoder_layers(self.model)[index]
        with dropped(self.model, drop_set, self.repair) if drop_set else nullcontext():
            return self._state_of(layer(state, *args, **kwargs))

    def logits(self, state: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token vocab"]:
        """Final norm and head of states: those of the batch, or any others of at most ``MAX_TOKENS`` tokens."""
        ids = self.ids if state.shape[:2] == self.ids.shape else self.ids.new_zeros(state.shape[:2])
        return self._without_layers(self.model, ids, state).logits

    def _without_layers(self, model: torch.nn.Module, ids: Tensor, state: Tensor):
        """A forward pass in which every layer returns that state."""
        layers = decoder_layers(self.model)
        own = [layer.__dict__.get("forward") for layer in layers]  # set where a model is spread over devices
        returned = state if self.more is None else (state, *self.more)
        try:
            for layer in layers:
                layer.forward = lambda *args, **kwargs: returned
            return model(ids, use_cache=False)
        finally:
            for layer, forward in zip(layers, own, strict=True):
                layer.__dict__.pop("forward") if forward is None else setattr(layer, "forward", forward)

    def last_states(self, sets: list[DropSet]) -> Iterator[tuple[DropSet, Float[Tensor, "batch token dim"]]]:
        """Each set with the state after the last layer. Sets that agree on the first n layers share these layers."""
        yield from self._walk(0, self.dense(0), sets, untouched=True)

    def _walk(self, layer: int, state: Tensor, sets: list[DropSet], untouched: bool) -> Iterator[tuple[DropSet, Tensor]]:
        """The sets that have this state before a layer; ``untouched``: nothing was dropped up to there."""
        if layer == len(self.calls):
            yield sets[0], state
            return
        branches: dict[DropSet, list[DropSet]] = {}
        for drop_set in sets:
            branches.setdefault(tuple(s for s in drop_set if s.layer == layer), []).append(drop_set)
        for dropped_here, members in branches.items():
            same = untouched and not dropped_here
            after = self.dense(layer + 1) if same else self.layer(layer, state, dropped_here)
            yield from self._walk(layer + 1, after, members, same)


class Bar:
    """A progress bar advanced by calls, for work that is not a loop."""

    def __init__(self, total: int, label: str):
        self.steps = iter(progress(range(total), label))
        next(self.steps, None)

    def __enter__(self):
        return lambda: next(self.steps, None)

    def __exit__(self, *_) -> None:
        self.steps.close()
