"""Reading the residual stream, and the proof that what was read adds up to what the model computes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .families import Layout
from .modeling_entrodrop import StandIn

TOKENS = 8  # of the self-check


def state_of(args: tuple, kwargs: dict) -> Tensor:
    """The stream among the arguments of a layer or module."""
    return args[0] if args else kwargs["hidden_states"]


def output_state(output: Tensor | tuple) -> Tensor:
    """The stream that a layer or branch returns; families that return more put it first."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def observe(blocks: nn.ModuleList, where: Layout, seen: Callable[[int, Float[Tensor, "batch token dim"]], None]) -> Iterator[None]:
    """While open, every forward pass calls ``seen(position, state)`` for the 2 L + 1 positions, in order.

    Hooks only read, and are gone when the context is left, also when its body raises.
    """
    entered: dict[int, Tensor] = {}
    with ExitStack() as stack:

        def attach(handle) -> None:
            stack.callback(handle.remove)

        for i, layer in enumerate(blocks):

            def before(_, args, kwargs, i=i):
                entered[i] = state_of(args, kwargs)
                seen(2 * i, entered[i])

            def between(_, args, kwargs, i=i):  # some families flatten the tokens of a batch
                seen(2 * i + 1, state_of(args, kwargs).view_as(entered.pop(i)))

            def parallel(_, args, output, i=i):
                seen(2 * i + 1, entered.pop(i) + output_state(output))

            attach(layer.register_forward_pre_hook(before, with_kwargs=True))
            if where.between is None:
                attach(layer.get_submodule(next(iter(where.attention))).register_forward_hook(parallel))
            else:
                attach(layer.get_submodule(where.between).register_forward_pre_hook(between, with_kwargs=True))
        attach(blocks[-1].register_forward_hook(lambda _, args, output: seen(2 * len(blocks), output_state(output))))
        yield


@contextmanager
def _replaced(layer: nn.Module, branch: dict[str, str]) -> Iterator[None]:
    """The layer without a branch while open."""
    before = {path: layer.get_submodule(path) for path in branch}
    try:
        for path, returns in branch.items():
            layer.set_submodule(path, StandIn(returns))
        yield
    finally:
        for path, module in before.items():
            layer.set_submodule(path, module)


@contextmanager
def _forced(blocks: nn.ModuleList, inputs: Sequence[Tensor], outputs: list[Tensor], last: Tensor) -> Iterator[None]:
    """While open, layers get these inputs whatever came before, what they return is noted, and the last one hands on ``last``."""
    with ExitStack() as stack:
        for i, layer in enumerate(blocks):

            def give(_, args, kwargs, i=i):
                return ((inputs[i], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": inputs[i]})

            def take(_, args, output, i=i):
                outputs.append(output_state(output))
                if i == len(blocks) - 1:
                    return (last, *output[1:]) if isinstance(output, tuple) else last

            stack.callback(layer.register_forward_pre_hook(give, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(take).remove)
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _same(x: Tensor, y: Tensor) -> bool:
    tolerance = 16 * torch.finfo(y.dtype).eps
    return x.shape == y.shape and torch.allclose(x, y, rtol=tolerance, atol=tolerance * float(y.abs().mean()))


@torch.no_grad()
def objection(model: nn.Module, blocks: nn.ModuleList, where: Layout) -> str | None:
    """What contradicts a layout on this model; None where its states add up and dropping does what it says.

    Three passes over eight tokens. A layer without its MLP must return the state that was found between the branches, and one
    without both branches what it was given (after the norms, where the stream itself is normed); what the last layer leaves must
    give the model's own output, whatever the layers before it returned.
    """
    embedding = model.get_input_embeddings()
    weight = embedding.weight
    device = "cpu" if weight.is_meta else weight.device  # weights that wait on disk are moved to where they are needed
    ids = (torch.arange(TOKENS, device=device) * 7 + 2)[None] % weight.shape[0]
    depth, found = len(blocks), []

    def normed(layer: nn.Module, branch: int, state: Tensor) -> Tensor:
        return layer.get_submodule(where.norms[branch])(state) if where.norms else state

    with _evaluating(model):
        with observe(blocks, where, lambda *at: found.append((at[0], at[1].clone()))):
            own = model(ids)[0]
        if [position for position, _ in found] != list(range(2 * depth + 1)):
            return f"a pass over {depth} layers shows the positions {[position for position, _ in found]}"
        states = [state for _, state in found]
        if wrong := [i for i, state in enumerate(states) if state.shape != states[0].shape]:
            return f"the state at position {wrong[0]} has shape {tuple(states[wrong[0]].shape)}, not {tuple(states[0].shape)}"
        inputs, middles = states[:-1:2], states[1::2]
        with ExitStack() as stack:
            for layer in blocks:
                stack.enter_context(_replaced(layer, where.mlp))
            for bare in (False, True):  # without the MLPs, then also without the attention
                for layer in blocks if bare else ():
                    if not has(layer, where.anchor):
                        stack.enter_context(_replaced(layer, where.attention))
                outputs: list[Tensor] = []
                with _forced(blocks, inputs, outputs, states[-1]):
                    again = model(ids)[0]
                for i, layer in enumerate(blocks):
                    attends = not bare or has(layer, where.anchor)
                    lacks = "its MLP" if attends else "both branches"
                    expected = middles[i] if attends else normed(layer, 0, inputs[i])
                    if not _same(outputs[i], normed(layer, 1, expected)):
                        return f"layer {i} without {lacks} does not return the stream that came before"
                if not _same(again, own):
                    return "what the last layer leaves does not give the model's own output"
    return None


def has(layer: nn.Module, path: str | None) -> bool:
    """Whether the layer has a module under this path."""
    return path is not None and path in dict(layer.named_modules())
