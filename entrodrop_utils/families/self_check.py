"""A check, on the model itself, that the states read with a layout are those that the model computes."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .layouts import Layout
from .modeling_entrodrop import Bypass

N_TOKENS = 8  # of each forward pass
DEVICES = ("cpu", "cuda", "mps", "xpu")
Capture = AbstractContextManager[None]


def input_state(args: tuple, kwargs: dict) -> Tensor:
    """The residual stream among the arguments of a layer or module."""
    return args[0] if args else kwargs["hidden_states"]


def output_state(output: Tensor | tuple) -> Tensor:
    """The residual stream that a layer or branch returns; families that return several values put it first."""
    return output[0] if isinstance(output, tuple) else output


def has_module(layer: nn.Module, path: str | None) -> bool:
    """Whether the layer has a module at this path."""
    return path is not None and path in dict(layer.named_modules())


@contextmanager
def _bypassed(layer: nn.Module, branch: dict[str, str]) -> Iterator[None]:
    """The layer without a branch while open."""
    with ExitStack() as stack:
        for path, returns in branch.items():
            stack.callback(layer.set_submodule, path, layer.get_submodule(path))
            layer.set_submodule(path, Bypass(returns))
        yield


@contextmanager
def contributing_zero(layer: nn.Module, branch: dict[str, str] | None) -> Iterator[None]:
    """The layer with a branch that runs and adds nothing while open; without a branch, the layer that returns its input.

    The last module of the branch returns zero; its norms stay in place.
    """
    path, returns = next(iter(branch.items())) if branch else ("", "zero")
    if returns.split()[0] != "zero":  # the module adds to the stream itself
        with _bypassed(layer, {path: returns}):
            yield
        return

    def replace(_, args, kwargs, output):
        state = torch.zeros_like(output_state(output)) if branch else input_state(args, kwargs)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    handle = layer.get_submodule(path).register_forward_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _given_inputs(blocks: nn.ModuleList, inputs: Sequence[Tensor], outputs: list[Tensor], last: Tensor) -> Iterator[None]:
    """While open, every layer receives its entry of ``inputs``, its output is recorded, and the last one returns ``last``."""
    with ExitStack() as stack:
        for i, layer in enumerate(blocks):

            def give(_, args, kwargs, i=i):
                return ((inputs[i], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": inputs[i]})

            def record(_, args, output, i=i):
                outputs.append(output_state(output))
                if i == len(blocks) - 1:
                    return (last, *output[1:]) if isinstance(output, tuple) else last

            stack.callback(layer.register_forward_pre_hook(give, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(record).remove)
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without autocast while open; each module returns to its own mode."""
    training = [module for module in model.modules() if module.training]
    try:
        with ExitStack() as stack:
            for device in filter(torch.is_autocast_enabled, DEVICES):
                stack.enter_context(torch.autocast(device, enabled=False))
            model.eval()
            yield
    finally:
        for module in training:
            module.training = True


def measuring(function: Callable) -> Callable:
    """A function whose first argument is a model, which runs in evaluation mode, without gradients and without autocast."""

    @functools.wraps(function)
    def measured(model: nn.Module, *args, **kwargs):
        with torch.inference_mode(), evaluation_mode(model):
            return function(model, *args, **kwargs)

    return measured


def equal(x: Tensor, y: Tensor) -> bool:
    """Whether two results differ by rounding only."""
    tolerance = 16 * torch.finfo(y.dtype).eps
    return x.shape == y.shape and torch.allclose(x, y, rtol=tolerance, atol=tolerance * float(y.abs().mean()))


def sample_ids(model: nn.Module) -> Tensor:
    """A few tokens for a check, one sequence."""
    embedding = model.get_input_embeddings().weight
    device = "cpu" if embedding.is_meta else embedding.device  # offloaded weights move to where they are needed
    return (torch.arange(N_TOKENS, device=device) * 7 + 2)[None] % embedding.shape[0]


@torch.no_grad()
def find_mismatch(model: nn.Module, blocks: nn.ModuleList, layout: Layout, capture: Callable[..., Capture]) -> str | None:
    """Where a layout contradicts the model; None where its states and its branches are right.

    Short forward passes over eight tokens, in which every layer receives its own input of the first pass. Removing the MLP of a
    layer must return the mid-layer state, removing both branches the layer's input (after the norms, where the stream itself is
    normed), and the last state must reproduce the model's output. Removing a branch must also equal a zero contribution: the layer
    whose branch's last module returns zero, with its norms in place. What is called the MLP must treat each token by itself.
    """
    ids, depth, captured = sample_ids(model), len(blocks), []
    for kind in ("attention", "mlp"):
        path, returns = next(iter(layout.branch(kind).items()))
        if returns.split()[0] not in ("zero", "residual"):
            return f"without the {kind}, its {path} must return zero, or the residual stream, and not {returns}"

    def normed(layer: nn.Module, branch: int, state: Tensor) -> Tensor:
        return layer.get_submodule(layout.norms[branch])(state) if layout.norms else state

    def outputs_without(
        *branches: dict[str, str], given: Sequence[Tensor], context: Callable[..., Capture] = _bypassed
    ) -> tuple[list[Tensor], Tensor]:
        """The output of every layer without these branches for its given input, and the model's output."""
        outputs: list[Tensor] = []
        with ExitStack() as stack:
            for layer in blocks:
                for branch in branches:
                    if branch is layout.mlp or not has_module(layer, layout.anchor):
                        stack.enter_context(context(layer, branch))
            with _given_inputs(blocks, given, outputs, states[-1]):
                return outputs, model(ids)[0]

    with evaluation_mode(model):
        with capture(blocks, layout, lambda endpoint, state: captured.append((endpoint, state.clone()))):
            reference = model(ids)[0]
        if [endpoint for endpoint, _ in captured] != list(range(2 * depth + 1)):
            return f"a pass over {depth} layers gives the endpoints {[endpoint for endpoint, _ in captured]}"
        states = [state for _, state in captured]
        shape = (*ids.shape, states[0].shape[-1])  # a model that pads its input has states of no token of the text
        if wrong := [i for i, state in enumerate(states) if state.shape != shape]:
            return f"the state at endpoint {wrong[0]} has shape {tuple(states[wrong[0]].shape)}, not {shape}"
        inputs, middles = states[:-1:2], states[1::2]
        without_mlp, logits = outputs_without(layout.mlp, given=inputs)
        without_both, _ = outputs_without(layout.mlp, layout.attention, given=inputs)
        for i, layer in enumerate(blocks):
            if not equal(without_mlp[i], normed(layer, 1, middles[i])):
                return f"layer {i} without its MLP does not return the stream that came before"
            expected = middles[i] if has_module(layer, layout.anchor) else normed(layer, 0, inputs[i])
            if not equal(without_both[i], normed(layer, 1, expected)):
                return f"layer {i} without both branches does not return the stream that came before"
        if not equal(logits, reference):
            return "the last state does not give the model's own output"
        without_attention, _ = outputs_without(layout.attention, given=inputs)
        for kind, without in (("MLP", without_mlp), ("attention", without_attention)):
            branch = layout.branch("mlp" if kind == "MLP" else "attention")
            zero, _ = outputs_without(branch, given=inputs, context=contributing_zero)
            if wrong := [i for i in range(depth) if not equal(without[i], zero[i])]:
                return f"layer {wrong[0]} without its {kind} differs from the layer whose {kind} contributes zero"
        # Two branches that read the same state could be taken for each other: only the attention looks at other tokens
        changed = [torch.cat([-state[:, :1], state[:, 1:]], 1) for state in inputs]
        others, _ = outputs_without(layout.attention, given=changed)
        for i, layer in enumerate(blocks):
            if not has_module(layer, layout.anchor) and not equal(others[i][:, 1:], without_attention[i][:, 1:]):
                return f"layer {i} without its attention still mixes tokens"
    return None
