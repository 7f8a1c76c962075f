"""Edits that fail at any step, layouts that are wrong, and the proof of an edit on a kind's first use."""

import json
import types
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from families import BY_NAME, FAMILIES, VOCAB, ids, tiny
from reference import close, layout_name, output, without_contribution
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MiniMaxConfig, MiniMaxForCausalLM

from entrodrop_utils import dropping, residual, saving
from entrodrop_utils.families import decoder, edits
from entrodrop_utils.families.decoder import UnsupportedModel, decoder_layers, find_layout
from entrodrop_utils.families.layouts import Layout
from entrodrop_utils.residual import KINDS, SubBlock, capture_layers, find, layout_of

ATTENTION, MLP, BLOCK = ((lambda layer, kind=kind: SubBlock(layer, kind)) for kind in KINDS)
SETS = {
    "attention": [ATTENTION(1)],
    "mlp": [MLP(0), MLP(2)],
    "block": [BLOCK(0)],
    "a mix": [ATTENTION(0), MLP(3), BLOCK(1)],
}
NAMES = ("Gemma 3 (text)", "Bloom")
HOW: dict[str, Callable] = {"dropped": lambda *args: dropping.dropped(*args).__enter__(), "remove": saving.remove}


def picture(model) -> dict[str, object]:
    """Everything of a model that an edit could leave behind, weights and logits to the bit."""
    return {
        "class": type(model),
        "modules": [(name, id(part), list(vars(part))) for name, part in model.named_modules()],
        "config": json.dumps(model.config.to_dict(), default=str),
        "settings of the config": list(vars(model.config).items()),
        "places": [getattr(part, "layer_idx", None) for part in model.modules()],
        "weights": [(name, value.numpy().tobytes()) for name, value in model.state_dict().items()],
        "logits": output(model, ids()).numpy().tobytes(),
    }


def proven(name: str):
    """A model whose edits have passed their proof, so that all steps are those of the next edit."""
    model = tiny(name)
    for kind in KINDS:
        with dropping.dropped(model, [SubBlock(1, kind)]):
            pass
    return model


def failing_set(monkeypatch, error: BaseException, at: int, halfway: bool = False) -> list[int]:
    """From now on the n-th change of an edit raises, before it is made or after; returns where the number of changes is kept."""
    original, count = edits.Edit.set, [0]

    def changed(*args) -> None:
        count[0] += 1
        if count[0] != at:
            return original(*args)
        if halfway:
            original(*args)
        raise error

    monkeypatch.setattr(edits.Edit, "set", changed)
    return count


def failing_undo(monkeypatch, error: BaseException, at: int) -> list[Callable[[], None]]:
    """From now on the n-th change of an edit raises once when it is taken back; returns where the steps that work are kept."""
    original, steps = edits._restore, []

    def restore(*args) -> Callable[[], None]:
        step, planted = original(*args), [error] if len(steps) + 1 == at else []
        steps.append(step)

        def run() -> None:
            if planted:
                raise planted.pop()
            step()

        return run

    monkeypatch.setattr(edits, "_restore", restore)
    return steps


def n_changes(model, chosen: list[SubBlock], how: str = "dropped") -> int:
    with pytest.MonkeyPatch.context() as patch:
        count = failing_set(patch, OSError(), 0)
        HOW[how](model, chosen)
        return count[0]


def fails(error: type[BaseException], at: int, halfway: bool, run: Callable) -> None:
    with pytest.MonkeyPatch.context() as patch:
        failing_set(patch, error("planted"), at, halfway)
        with pytest.raises(error, match="planted"):
            run()


# Kind 1: an undo that can itself fail


@pytest.mark.parametrize("chosen", SETS)
@pytest.mark.parametrize("name", NAMES)
def test_a_failure_at_any_step_of_an_edit_leaves_the_model_as_it_was(name, chosen):
    model = proven(name)
    before = picture(model)
    for how, halfway, error in (("dropped", False, OSError), ("remove", True, KeyboardInterrupt)):
        n = n_changes(proven(name), SETS[chosen], how)
        assert n >= len(SETS[chosen])
        for at in range(1, n + 1):
            fails(error, at, halfway, lambda how=how: HOW[how](model, SETS[chosen]))
            assert picture(model) == before, (how, at)
    saving.remove(model, SETS[chosen])
    assert picture(model) != before


@pytest.mark.parametrize("name", NAMES)
def test_a_failure_at_any_step_of_the_proof_leaves_the_model_as_it_was(name):
    chosen = SETS["a mix"]
    model, n = tiny(name), n_changes(tiny(name), chosen)
    before = picture(model)
    for at in range(1, n + 1):
        dropping._verified_edits.clear()
        fails(RuntimeError, at, at % 2 == 0, lambda: saving.remove(model, chosen))
        assert picture(model) == before, at
    assert n > n_changes(proven(name), chosen)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_pass_of_the_proof_that_fails_leaves_the_model_as_it_was(error):
    model = tiny("Gemma 3 (text)")
    layout_of(model)
    before, calls = picture(model), []

    def count(*_) -> None:
        calls.append(1)
        if len(calls) == at:
            raise error("planted")

    at = 0
    handle = model.register_forward_pre_hook(count)
    dropping.apply_drop(model, SETS["a mix"]).revert()
    n = len(calls)
    assert n >= 9
    for at in range(1, n + 1):
        calls.clear()
        dropping._verified_edits.clear()
        with pytest.raises((error, UnsupportedModel), match="planted"), dropping.dropped(model, SETS["a mix"]):
            pass
        handle.remove()
        assert picture(model) == before, at
        handle = model.register_forward_pre_hook(count)


@pytest.mark.parametrize("chosen", SETS)
@pytest.mark.parametrize("name", NAMES)
def test_reverting_goes_on_past_a_step_that_fails_and_says_so(name, chosen):
    model = proven(name)
    before, n = picture(model), n_changes(proven(name), SETS[chosen])
    for at in range(1, n + 1):
        with pytest.MonkeyPatch.context() as patch:
            steps = failing_undo(patch, OSError("planted"), at)
            says = r"could not be restored, load it again \(1 of its changes stay: planted\)"
            with pytest.raises(RuntimeError, match=says) as found, dropping.dropped(model, SETS[chosen]):
                pass
        assert isinstance(found.value.__cause__, OSError)
        steps[at - 1]()  # the one that failed; all others were done
        assert picture(model) == before, at


@pytest.mark.parametrize("chosen", SETS)
def test_an_interrupt_while_reverting_waits_until_all_is_taken_back(chosen):
    model = proven("Gemma 3 (text)")
    before, n = picture(model), n_changes(proven("Gemma 3 (text)"), SETS[chosen])
    for at in range(1, n + 1):
        with pytest.MonkeyPatch.context() as patch:
            failing_undo(patch, KeyboardInterrupt("planted"), at)
            with pytest.raises(KeyboardInterrupt, match="planted"), dropping.dropped(model, SETS[chosen]):
                pass
        assert picture(model) == before, at


def test_an_edit_and_its_undo_that_both_fail_show_both():
    model = proven("Bloom")
    before = picture(model)
    with pytest.MonkeyPatch.context() as patch:
        steps = failing_undo(patch, OSError("the undo"), 2)
        with pytest.raises(RuntimeError, match="the undo") as found, dropping.dropped(model, SETS["a mix"]):
            raise ZeroDivisionError("the body")
    assert isinstance(found.value.__context__, (OSError, ZeroDivisionError))
    assert "the body" in str(found.getrepr(chain=True))
    steps[1]()
    assert picture(model) == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["_config_mismatch", "pruned_class", "is_bypass"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_remove_leaves_the_model_as_it_was_whatever_fails(name, where, error, monkeypatch):
    model = proven(name)
    before = picture(model)
    with monkeypatch.context() as patch:

        def fails(*_):
            raise error("planted")

        patch.setattr(saving, where, fails)
        with pytest.raises(error, match="planted"):
            saving.remove(model, SETS["a mix"])
    assert picture(model) == before
    saving.remove(model, [MLP(2)])
    first = picture(model)
    with monkeypatch.context() as patch:  # a model from which something was removed before
        patch.setattr(saving, where, fails)
        with pytest.raises(error, match="planted"):
            saving.remove(model, [ATTENTION(1), BLOCK(0)])
    assert picture(model) == first


def test_an_inner_context_that_fails_reverts_only_itself():
    model = proven("Gemma 3 (text)")
    before = picture(model)
    with dropping.dropped(model, [MLP(1)]):
        inside = picture(model)
        for at in (1, 3):
            fails(OSError, at, False, lambda: saving.remove(model, [BLOCK(0), MLP(2)]))
            assert picture(model) == inside
    assert picture(model) == before


GEMMA_4 = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


@pytest.fixture
def gemma_4():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **GEMMA_4)).eval()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ([ATTENTION(1)], r"attention layers of Gemma4.* cannot be dropped: its config computes .*; drop MLPs"),
        ([MLP(0), ATTENTION(2)], r"attention layers of Gemma4.* cannot be dropped"),
        ([BLOCK(1)], r"blocks cannot be dropped: the model's config has settings for single layers \(per_layer_config\)"),
        ([MLP(2), BLOCK(0)], "blocks cannot be dropped"),
    ],
)
def test_gemma_4_is_refused_untouched_where_its_config_cannot_follow(gemma_4, how, chosen, says):
    before = picture(gemma_4)
    for _ in range(2):  # neither proof nor edit leaves anything
        with pytest.raises(UnsupportedModel, match=says):
            HOW[how](gemma_4, chosen)
        assert picture(gemma_4) == before
    assert [len(find(gemma_4, kind)) for kind in KINDS] == [4, 4, 4]


def test_gemma_4_without_mlps_is_that_of_a_zero_contribution(gemma_4, tmp_path):
    before, chosen = picture(gemma_4), [MLP(0), MLP(3)]
    kept = {layer: gemma_4.model.layers[layer].mlp.down_proj.weight.detach().clone() for layer, _ in chosen}
    for layer in kept:
        gemma_4.model.layers[layer].mlp.down_proj.weight.data.zero_()
    expected = output(gemma_4, ids())
    with torch.no_grad():
        made = gemma_4.generate(ids(), max_new_tokens=12, do_sample=False, use_cache=False)
    for layer, weight in kept.items():
        gemma_4.model.layers[layer].mlp.down_proj.weight.data.copy_(weight)
    with dropping.dropped(gemma_4, chosen):
        assert close(output(gemma_4, ids()), expected)
        assert torch.equal(gemma_4.generate(ids(), max_new_tokens=12, do_sample=False), made)
    assert picture(gemma_4) == before
    back = saving.load_pruned(saving.save_pruned(saving.remove(gemma_4, chosen), tmp_path / "smaller"))
    assert torch.equal(output(back, ids()), output(gemma_4, ids()))


def test_gemma_4_whose_layers_scale_the_stream_is_refused(gemma_4):
    gemma_4.model.layers[2].layer_scalar.fill_(0.5)
    with pytest.raises(UnsupportedModel, match="layer 2 without"):
        find(gemma_4, "mlp")


# Kind 5: a proof that a wrong layout also passes


def changed(mine: Layout, **parts) -> Layout:
    return Layout(**{**vars(mine), **parts})


def mutations(mine: Layout) -> Iterator[tuple[str, Layout]]:
    """Wrong layouts that are one change away from the right one. "must": its numbers would be wrong for certain."""
    yield "must: the branches swapped", changed(mine, attention=mine.mlp, mlp=mine.attention)
    for place in (mine.modules | {None}) - {mine.between}:
        yield f"{'must: ' if mine.between and place else ''}between them is {place}", changed(mine, between=place)
    for kind in ("attention", "mlp"):
        branch, other = mine.branch(kind), "mlp" if kind == "attention" else "attention"
        (first, words), *rest = branch.items()
        for word in {"zero", "input", "residual"} - {words.split()[0]}:
            wrong = " ".join([word, *words.split()[1:]])
            yield f"must: {first} returns {wrong}", changed(mine, **{kind: {**branch, first: wrong}})
        for path, returns in rest:
            left = {p: r for p, r in branch.items() if p != path}
            yield f"{path} is left out", changed(mine, **{kind: left})
            yield f"{path} stays", changed(mine, **{kind: left}, shared=(*mine.shared, path))
            moved = {kind: left, other: {**mine.branch(other), path: returns}}
            yield f"{path} goes with the {other}", changed(mine, **moved)
            if not mine.norms:
                after = {"attention": mine.attention, "mlp": mine.mlp, kind: left}
                yield f"must: the stream passes {path}", changed(mine, **after, norms=(path, path))
        for path in mine.shared:
            yield f"{path} goes with the {kind}", changed(mine, shared=(), **{kind: {**branch, path: "input"}})
    if mine.norms:
        yield "must: the norms in the wrong order", changed(mine, norms=mine.norms[::-1])
        yield "must: the stream passes no norm", changed(mine, norms=(), shared=mine.norms)
        for number, path in enumerate(mine.norms):
            kind = ("attention", "mlp")[number]
            gone = {kind: {**mine.branch(kind), path: "input"}}
            yield f"must: {path} goes with the {kind}", changed(mine, norms=(), shared=mine.norms[1 - number :][:1], **gone)


def accepted(model, layout: Layout, monkeypatch) -> bool:
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "LAYOUTS", {"planted": layout})
        try:
            return find_layout(model, capture_layers) is layout
        except UnsupportedModel:
            return False


def states_of(model, layout: Layout) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    with capture_layers(decoder_layers(model), layout, lambda _, state: seen.append(state.clone())):
        output(model, ids())
    return seen


OWN_TURN = ("OPT (post-norm)", "BERT", "T5 (encoder)")


@pytest.mark.parametrize(
    "name", [pytest.param(f.name, marks=[pytest.mark.slow] * (f.slow and f.name not in OWN_TURN)) for f in FAMILIES]
)
def test_every_wrong_layout_is_refused_or_gives_the_right_numbers(name, monkeypatch):
    model, family = tiny(name), BY_NAME[name]
    mine = layout_of(model)
    assert accepted(model, mine, monkeypatch)
    right, tried, refused = states_of(model, mine), 0, 0
    for case, layout in mutations(mine):
        tried += 1
        if not accepted(model, layout, monkeypatch):
            refused += 1
            continue
        assert not case.startswith("must"), case
        assert all(map(close, states_of(model, layout), right)), case
        for chosen in ([MLP(2)], [ATTENTION(1), MLP(1)], [ATTENTION(3), MLP(0)]):
            expected = output(without_contribution(family, tiny(name), chosen), ids())
            residual._verified[decoder.decoder(model)] = layout
            try:
                with dropping.dropped(model, chosen):
                    assert close(output(model, ids()), expected), case
            except UnsupportedModel:
                refused += 1
            finally:
                residual._verified[decoder.decoder(model)] = mine
    assert refused >= 0.6 * tried > 4


def planted(forward, name: str = "Llama"):
    """A family with the modules of another one whose layers add up in another way."""
    model = tiny(name)
    for layer in decoder_layers(model):
        layer.forward = types.MethodType(forward, layer)
    return model


def attend(layer, x, kwargs):
    return layer.self_attn(hidden_states=x, **kwargs)[0]


def after_the_first_norm(layer, hidden_states, **kwargs):
    x = layer.input_layernorm(hidden_states)
    x = x + attend(layer, x, kwargs)
    return x + layer.mlp(layer.post_attention_layernorm(x))


def after_the_second_norm(layer, hidden_states, **kwargs):
    x = hidden_states + attend(layer, layer.input_layernorm(hidden_states), kwargs)
    x = layer.post_attention_layernorm(x)
    return x + layer.mlp(x)


def after_both_norms(layer, hidden_states, **kwargs):
    x = layer.input_layernorm(hidden_states)
    x = layer.post_attention_layernorm(x + attend(layer, x, kwargs))
    return x + layer.mlp(x)


def scaled_stream(layer, hidden_states, **kwargs):
    x = 0.9 * hidden_states + attend(layer, layer.input_layernorm(hidden_states), kwargs)
    return x + layer.mlp(layer.post_attention_layernorm(x))


def scaled_output(layer, hidden_states, **kwargs):
    x = hidden_states + attend(layer, layer.input_layernorm(hidden_states), kwargs)
    return 1.1 * (x + layer.mlp(layer.post_attention_layernorm(x)))


def in_parallel(layer, hidden_states, **kwargs):
    attention = attend(layer, layer.input_layernorm(hidden_states), kwargs)
    return hidden_states + attention + layer.mlp(layer.post_attention_layernorm(hidden_states))


def an_addend_of_its_own(layer, hidden_states, **kwargs):
    x = hidden_states + attend(layer, layer.input_layernorm(hidden_states), kwargs)
    return x + layer.mlp(layer.post_attention_layernorm(x)) + 0.1 * layer.post_attention_layernorm(x)


def norm_of_the_sum(layer, hidden_states, **kwargs):
    x = hidden_states + attend(layer, layer.input_layernorm(hidden_states), kwargs)
    return layer.post_attention_layernorm(x + layer.mlp(x))


WRONG = [
    after_the_first_norm,
    after_the_second_norm,
    after_both_norms,
    scaled_stream,
    scaled_output,
    in_parallel,
    an_addend_of_its_own,
    norm_of_the_sum,
]


@pytest.mark.parametrize("forward", WRONG)
def test_a_family_that_adds_up_in_another_way_is_refused(forward):
    with pytest.raises(UnsupportedModel, match="the states read from it are not the model's"):
        layout_of(planted(forward))


def scaled_branches(layer, hidden_states, **kwargs):
    x = hidden_states + 0.4 * attend(layer, layer.input_layernorm(hidden_states), kwargs)
    return x - 2 * layer.mlp(layer.post_attention_layernorm(x))


def gated_branches(layer, hidden_states, **kwargs):
    x = hidden_states + attend(layer, layer.input_layernorm(hidden_states), kwargs).tanh()
    return x + layer.mlp(layer.post_attention_layernorm(x)) * torch.sigmoid(x)


@pytest.mark.parametrize("forward", [scaled_branches, gated_branches])
def test_a_family_that_changes_only_its_branches_is_right(forward):
    model = planted(forward)
    assert layout_name(model) == "pre-norm"
    for chosen in ([ATTENTION(0)], [MLP(3)], [ATTENTION(2), MLP(1), MLP(2)]):
        zeroed = planted(forward)
        for layer, kind in chosen:
            part = decoder_layers(zeroed)[layer]
            (part.mlp.down_proj if kind == "mlp" else part.self_attn.o_proj).weight.data.zero_()
        with dropping.dropped(model, chosen):
            assert close(output(model, ids()), output(zeroed, ids()))


@pytest.mark.parametrize("factor", [1, 0.5, 3.5565588200778455])
def test_minimax_whose_residual_is_taken_after_the_norm_is_refused(factor):
    names = [f"{part}_{end}_factor" for part in ("full_attn", "linear_attn", "mlp") for end in ("alpha", "beta")]
    sizes = {name: size for name, size in GEMMA_4.items() if "global" not in name and "_per_" not in name and "shared" not in name}
    sizes |= {"layer_types": ["full_attention"] * 4, "num_local_experts": 2, "num_experts_per_tok": 2}
    model = MiniMaxForCausalLM(MiniMaxConfig(**sizes, **dict.fromkeys(names, factor))).eval()
    with pytest.raises(UnsupportedModel, match=r"layer 0 without (its MLP differs|both branches|its MLP does not)"):
        find(model, "attention")


# Kind 10: accepted families whose edits are unproven


class OwnPlace(nn.Module):
    """An attention that keeps its keys and values where it was at first, whatever its layer_idx says."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention, self.place = attention, attention.layer_idx

    def forward(self, **kwargs):
        self.attention.layer_idx = self.place
        return self.attention(**kwargs)


def cache_by_place():
    model = tiny("Llama")
    for layer in model.model.layers:
        layer.self_attn = OwnPlace(layer.self_attn)
    return model


def scale_by_place():
    """A family whose layers read a list of the config that is not one of layers by its name."""
    model = tiny("Llama")
    model.config.boosts = [1.0, 1.5, 0.5, 2.0]

    def forward(layer, hidden_states, **kwargs):
        x = hidden_states + attend(layer, layer.input_layernorm(hidden_states), kwargs)
        return x + model.config.boosts[layer.layer_idx] * layer.mlp(layer.post_attention_layernorm(x))

    for layer in model.model.layers:
        layer.layer_idx, layer.forward = layer.self_attn.layer_idx, types.MethodType(forward, layer)
    return model


def length_of_the_first_layer():
    """A family that reads the length of the text from what its first layer keeps."""
    model = tiny("Llama")
    forward = model.forward

    def run(input_ids, past_key_values=None, **kwargs):
        keys = past_key_values.layers[0].keys if past_key_values is not None else None
        start = 0 if keys is None else keys.shape[-2]
        place = torch.arange(start, start + input_ids.shape[1])[None]
        return forward(input_ids, past_key_values=past_key_values, position_ids=place, **kwargs)

    model.forward = run
    return model


def reads_the_config():
    """A family that has no cache to speak of and asks the config how deep it is."""
    model = tiny("Llama")
    forward = model.model.forward

    def run(*args, **kwargs):
        if model.config.num_hidden_layers != 4:
            raise TypeError("the depth is\nnot mine")
        return forward(*args, **kwargs)

    model.model.forward = run
    return model


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("make", "chosen", "says"),
    [
        (
            cache_by_place,
            [BLOCK(0)],
            "does not run without block 0 .* so no block can be dropped|without block 0 predicts another",
        ),
        (scale_by_place, [BLOCK(1)], "without block 0 computes something else than with a zero contribution of it, so no block"),
        (length_of_the_first_layer, [ATTENTION(2)], "without attention 0 predicts another next token with a cache than without"),
        (reads_the_config, [BLOCK(2)], r"does not run without block 0 \(TypeError: the depth is not mine\), so no block can be"),
    ],
)
def test_an_edit_that_a_family_does_not_follow_is_refused(make, chosen, says, how):
    model = make()
    layout_of(model)
    before = picture(model)
    for _ in range(2):
        with pytest.raises(UnsupportedModel, match=says):
            HOW[how](model, chosen)
        assert picture(model) == before
    with dropping.dropped(model, [MLP(1)]):  # a kind that it follows
        assert not close(output(model, ids()), torch.frombuffer(bytearray(before["logits"]), dtype=torch.float32).view(2, 10, -1))
    assert picture(model) == before


def test_a_kind_is_proven_by_its_first_layer_whichever_is_dropped():
    """Nothing moves without the last block, so it would prove nothing."""
    model = scale_by_place()
    with pytest.raises(UnsupportedModel, match="without block 0 computes something else"), dropping.dropped(model, [BLOCK(3)]):
        pass
    model = length_of_the_first_layer()
    with pytest.raises(UnsupportedModel, match="without attention 0 predicts"), dropping.dropped(model, [ATTENTION(3)]):
        pass
    model = tiny("T5 (encoder)")  # whose first attention serves the others
    with dropping.dropped(model, [ATTENTION(2), BLOCK(3)]):
        pass


def test_the_proof_runs_once_a_model_and_a_kind():
    model, calls = tiny("Llama"), []
    layout_of(model)
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    passes = []
    for chosen in ([MLP(1)], [MLP(2)], [ATTENTION(0), MLP(1)], [ATTENTION(3)], [BLOCK(2)], [BLOCK(0), ATTENTION(1), MLP(3)]):
        calls.clear()
        with dropping.dropped(model, chosen):
            pass
        passes.append(len(calls))
    assert passes[1] == passes[3] == passes[5] == 0
    assert 0 < passes[0] == passes[2] == passes[4] < 6
    calls.clear()
    saving.remove(model, [MLP(0)])
    assert not calls
    other = tiny("Llama")
    other.register_forward_pre_hook(lambda *_: calls.append(1))
    with dropping.dropped(other, [MLP(1)]):
        assert calls


def test_a_proof_without_a_head_does_not_stand_for_the_model_with_its_cache():
    model = length_of_the_first_layer()
    with dropping.dropped(model.model, [ATTENTION(1)]):
        assert len(find(model, "attention")) == 3
    with pytest.raises(UnsupportedModel, match="predicts another next token"), dropping.dropped(model, [ATTENTION(1)]):
        pass


def test_a_model_without_weights_is_not_run():
    model = tiny("Llama").to("meta")
    model.register_forward_pre_hook(lambda *_: pytest.fail("it was run"))
    with dropping.dropped(model, SETS["a mix"]):
        assert len(decoder_layers(model)) == 3
    saving.remove(model, SETS["a mix"])
    assert [len(find(model, kind)) for kind in KINDS] == [2, 2, 3]


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_lack_of_memory_is_not_blamed_on_the_family(error):
    def full(*_) -> None:
        raise error("full")

    model = tiny("Llama")
    handle = model.register_forward_pre_hook(full)
    with pytest.raises(error, match="full"):
        find(model, "mlp")
    handle.remove()
    layout_of(model)
    before, handle = picture(model), model.register_forward_pre_hook(full)
    with pytest.raises(error, match="full"), dropping.dropped(model, [MLP(1)]):
        pass
    handle.remove()
    assert picture(model) == before


@pytest.mark.parametrize("family", ["Deberta", "DebertaV2"])
def test_a_decoder_without_a_config_of_its_own_is_dropped_from(family, tmp_path):
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, relative_attention=True, pos_att_type=["c2p", "p2c"], pad_token_id=0)
    model = getattr(transformers, f"{family}ForMaskedLM")(config).eval()
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    before = picture(model)
    for chosen in ([ATTENTION(1)], [MLP(0)], [BLOCK(0)], SETS["a mix"]):
        layers = decoder_layers(model)
        kept = [(layers[layer], kind) for layer, kind in chosen]
        with dropping.dropped(model, chosen):
            found = output(model, ids())
        handles = [
            (
                part if kind == "block" else part.get_submodule("attention.output.dense" if kind == "attention" else "output.dense")
            ).register_forward_hook(lambda _, args, out, kind=kind: (args[0], *out[1:]) if kind == "block" else 0 * out)
            for part, kind in kept
        ]
        assert close(found, output(model, ids())), chosen
        for handle in handles:
            handle.remove()
        assert picture(model) == before
    smaller = saving.remove(model, SETS["a mix"])
    back = saving.load_pruned(saving.save_pruned(smaller, tmp_path / family))
    assert torch.equal(output(back, ids()), output(smaller, ids()))


def test_models_in_half_precision_pass_and_are_still_told_apart():
    model = tiny("Gemma 3 (text)").bfloat16()
    with dropping.dropped(model, SETS["a mix"]):
        pass
    wrong = length_of_the_first_layer().bfloat16()
    with pytest.raises(UnsupportedModel, match="predicts another next token"), dropping.dropped(wrong, [ATTENTION(1)]):
        pass


def test_a_model_that_pads_its_input_is_refused_as_its_states_are_not_those_of_the_tokens():
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LongformerForMaskedLM(transformers.LongformerConfig(**sizes, attention_window=16)).eval()
    with pytest.raises(UnsupportedModel, match=r"the state at endpoint 0 has shape \(1, 16, 32\), not \(1, 8, 32\)"):
        find(model, "mlp")
