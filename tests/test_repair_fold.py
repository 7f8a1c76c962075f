"""Repairs that change weights or patch the stream: against hooks that do the same unfolded, the papers, planted truths."""

import copy
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from families import ids, tiny
from reference import close, output
from sklearn.linear_model import Ridge

from entrodrop_utils import dropping, evaluation, saving
from entrodrop_utils.families.decoder import UnsupportedModel, decoder_layers
from entrodrop_utils.families.modeling_entrodrop import RECORD
from entrodrop_utils.repairing import LOOPS, folds_by_set, rank_for_repair, repair, single_costs
from entrodrop_utils.repairing.folds import branches_of, carrier_of
from entrodrop_utils.repairing.magnitude import hadamard, runs
from entrodrop_utils.residual import SubBlock, endpoints, layout_of, states

ATTENTION, MLP, BLOCK = ((lambda layer, kind=kind: SubBlock(layer, kind)) for kind in ("attention", "mlp", "block"))
MIXED = [ATTENTION(1), MLP(1), ATTENTION(3), MLP(2)]  # the first three are folded into two branches
UNSEEN = ids(3, 20, seed=5)
CARRIERS = {  # family -> the last matrix of attention and MLP
    "Llama": ("self_attn.o_proj", "mlp.down_proj"),
    "Granite": ("self_attn.o_proj", "mlp.down_proj"),
    "GPT-2": ("attn.c_proj", "mlp.c_proj"),
    "GPT-NeoX (parallel)": ("attention.dense", "mlp.dense_4h_to_h"),
    "Bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
}


@pytest.fixture
def text():
    return ids(16, 24)


def changes(model, fitted) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module -> what was added to its matrix (dim, feature) and to its bias."""
    own, found = dict(decoder_layers(model).named_parameters()), {}
    for name, value in fitted.changed.items():
        module, _, weight = name.rpartition(".")
        transposed = type(decoder_layers(model).get_submodule(module)).__name__ == "Conv1D"
        change = value - own[name]
        found.setdefault(module, [None, 0])[weight == "bias"] = change.T if transposed and weight == "weight" else change
    return found


def unfolded(model, drop_set, fitted, tokens) -> torch.Tensor:
    """The logits with the bare drop, and hooks that add the map of an earlier branch's last input where the drop is."""
    changed, inputs = changes(model, fitted), {}
    with dropping.dropped(model, drop_set), ExitStack() as stack:
        layers = decoder_layers(model)
        for module in changed:

            def keep(_, args, module=module):
                inputs[module] = args[0]

            stack.callback(layers.get_submodule(module).register_forward_pre_hook(keep).remove)
        done = set()
        for sub_block in sorted(drop_set):
            carrier = carrier_of(model, sub_block, drop_set)
            kinds = CARRIERS[NAMES[type(model).__name__]]
            module = f"{carrier.layer}.{kinds[carrier.kind == 'mlp']}"
            if module in done:
                continue  # nothing runs between two sub-blocks of one carrier
            done.add(module)
            slope, bias = changed[module]

            def add(_, args, out, module=module, slope=slope, bias=bias):
                value = (inputs[module] @ slope.T + bias).reshape((out[0] if isinstance(out, tuple) else out).shape)
                return (out[0] + value, *out[1:]) if isinstance(out, tuple) else out + value

            parallel = layout_of(model).between is None  # where the other branch may carry it, which runs later
            place = "" if parallel else next(iter(layout_of(model).branch(sub_block.kind)))
            stack.callback(layers[sub_block.layer].get_submodule(place).register_forward_hook(add).remove)
        return output(model, tokens)


NAMES = {type(tiny(name)).__name__: name for name in CARRIERS}


@pytest.mark.parametrize("name", CARRIERS)
def test_a_folded_repair_is_the_unfolded_map(name, text):
    model = tiny(name)
    parallel = layout_of(model).between is None
    drop_set = [ATTENTION(1), MLP(2), ATTENTION(3), MLP(3)] if parallel else MIXED
    fitted = repair(model, drop_set, text, "fold")
    reference = unfolded(model, drop_set, fitted, UNSEEN)
    weights = copy.deepcopy(model.state_dict())
    with dropping.dropped(model, drop_set):
        bare = output(model, UNSEEN)
    with dropping.dropped(model, drop_set, fitted):
        folded = output(model, UNSEEN)
    torch.testing.assert_close(folded, reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))
    assert not close(folded, bare)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_the_carrier_is_the_last_branch_kept_before():
    llama, parallel = tiny("Llama"), tiny("GPT-NeoX (parallel)")
    expected = {ATTENTION(1): ATTENTION(0), MLP(0): ATTENTION(0), ATTENTION(3): MLP(2), BLOCK(2): MLP(1)}
    for sub_block, carrier in expected.items():
        assert carrier_of(llama, sub_block, [MLP(0), ATTENTION(1)]) == carrier
    assert carrier_of(parallel, ATTENTION(2), [ATTENTION(2)]) == MLP(2)
    assert carrier_of(parallel, ATTENTION(2), [ATTENTION(2), MLP(2)]) == MLP(1)
    with pytest.raises(ValueError, match="attention 0 cannot be folded: no branch is kept before it"):
        repair(llama, [ATTENTION(0)], ids(4, 8), "fold")


@pytest.mark.parametrize(("name", "constant"), [("Llama", False), ("GPT-2", True)])
def test_the_folded_map_is_scikit_learns(name, constant, text):
    """On values read with plain hooks; a constant only where the matrix has a bias."""
    model, kept = tiny(name), {}
    module = f"1.{CARRIERS[name][1]}"
    handle = decoder_layers(model).get_submodule(module).register_forward_pre_hook(lambda _, args: kept.update(x=args[0]))
    stream = states(model, text)
    handle.remove()
    start, end = endpoints(ATTENTION(2))
    x, y = kept["x"].reshape(-1, kept["x"].shape[-1]).double(), (stream[end] - stream[start]).flatten(0, 1).double()
    penalty = 0.01 * float(x.square().sum()) / x.shape[1]
    reference = Ridge(alpha=penalty, fit_intercept=constant).fit(x.numpy(), y.numpy())
    slope, bias = changes(model, repair(model, [ATTENTION(2)], text, "fold", penalties=[0.01]))[module]
    np.testing.assert_allclose(slope.detach(), reference.coef_, rtol=1e-3, atol=1e-3 * abs(reference.coef_).max())
    assert constant == isinstance(bias, torch.Tensor)
    if constant:
        np.testing.assert_allclose(bias.detach(), reference.intercept_, rtol=1e-3, atol=1e-3)


def planted(model, sub_block):
    """The model with an attention layer or block that adds a linear map of the last input of the MLP before it."""
    layers, kept = decoder_layers(model), {}
    module = layers[sub_block.layer - 1].mlp.down_proj
    module.register_forward_pre_hook(lambda _, args: kept.update(h=args[0]))
    torch.manual_seed(1)
    slope = torch.randn(32, module.in_features) / 5
    layer = layers[sub_block.layer]
    if sub_block.kind == "block":
        layer.forward = lambda hidden_states, **kwargs: hidden_states + kept["h"] @ slope.T
    else:
        original = layer.self_attn.forward
        layer.self_attn.forward = lambda **kwargs: (kept["h"] @ slope.T, original(**kwargs)[1])
    return model


@pytest.mark.parametrize("loop", LOOPS)
def test_a_sub_block_that_is_linear_in_the_earlier_branch_is_recovered(loop, text):
    model = planted(tiny("Llama"), ATTENTION(2))
    dense = output(model, UNSEEN)
    fitted = repair(model, [ATTENTION(2)], text, "fold", loop, penalties=[1e-12])
    with dropping.dropped(model, [ATTENTION(2)], fitted):
        assert close(output(model, UNSEEN), dense)
    assert fitted.fit.left.max() < 1e-6


def test_folds_in_closed_loop_are_no_worse_than_in_open_loop_on_their_text(text):
    model, drop_set = tiny("Llama"), [ATTENTION(1), ATTENTION(2), MLP(2)]
    dense, errors = states(model, text), {}
    for loop in LOOPS:
        fitted = repair(model, drop_set, text, "fold", loop, penalties=[1e-9])
        with dropping.dropped(model, drop_set, fitted):
            repaired = states(model, text)
        errors[loop] = [float((dense[end] - repaired[end]).double().square().sum()) for _, end in map(endpoints, drop_set)]
    assert errors["closed"][0] == pytest.approx(errors["open"][0], rel=1e-3)
    assert all(c <= o * (1 + 1e-3) for c, o in zip(errors["closed"], errors["open"], strict=True)), errors
    assert errors["closed"][-1] < errors["open"][-1]


@pytest.mark.parametrize("how", ["fold", "scale"])
def test_the_model_is_as_plain_as_without_the_repair(how, text, tmp_path):
    for drop_set in (MIXED, [BLOCK(1), BLOCK(3)]):
        bare, model = saving.remove(tiny("Llama"), drop_set), tiny("Llama")
        fitted = repair(model, drop_set, text, how)
        with dropping.dropped(model, drop_set, fitted):
            expected = output(model, UNSEEN)
        saving.remove(model, drop_set, fitted)
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in bare.state_dict().items()}
        assert getattr(model.config, RECORD)["repairs"] == {}
        assert getattr(model.config, RECORD)["bypasses"] == getattr(bare.config, RECORD)["bypasses"]
        folder = saving.save_pruned(model, tmp_path / f"{how}{len(drop_set)}")
        assert torch.equal(output(saving.load_pruned(folder), UNSEEN), expected)
        assert fitted.about in (folder / "README.md").read_text()
    assert type(model).__name__ == "LlamaForCausalLM"  # blocks: plain transformers


def test_it_repairs_exactly_its_set_and_only_in_whole_passes(text):
    model = tiny("Llama")
    fitted = repair(model, [ATTENTION(1), ATTENTION(2)], text, "fold")
    with pytest.raises(ValueError, match="changes weights for the drop of attention 1, attention 2"):
        dropping.dropped(model, [ATTENTION(1)], fitted).__enter__()
    with pytest.raises(ValueError, match="needs whole passes"):
        evaluation.losses_by_set(model, text, [[ATTENTION(1), ATTENTION(2)]], fitted)
    by_set = folds_by_set(model, [[ATTENTION(2), ATTENTION(1)], [ATTENTION(3)]], text)
    for name, value in by_set[ATTENTION(1), ATTENTION(2)].changed.items():
        torch.testing.assert_close(value, fitted.changed[name])
    assert by_set[(ATTENTION(3),)].changed.keys() == {"2.mlp.down_proj.weight"}


@pytest.mark.parametrize(("name", "how"), [("Gemma 3 (text)", "fold"), ("Gemma 3 (text)", "scale"), ("Mixtral", "fold")])
def test_a_branch_that_does_not_end_with_one_matrix_is_refused(name, how, text):
    model = tiny(name)
    before = str(model)
    with pytest.raises(UnsupportedModel, match="cannot carry a repair"):
        repair(model, [ATTENTION(2)], text, how)
    assert str(model) == before


def magnitudes(model, text, first, last) -> np.ndarray:
    """Mean absolute value of each channel before and behind a run of blocks, per sequence, from transformers' own states."""
    with torch.no_grad():
        hidden = model(text, output_hidden_states=True).hidden_states
    return np.stack([hidden[first].abs().mean(1).numpy(), hidden[last + 1].abs().mean(1).numpy()])


def test_the_factor_is_the_papers_and_is_applied_as_the_paper_does(text):
    """Prune&Comp multiplies the embedding and the branches before the cut; here those behind are divided."""
    model = tiny("Llama")
    before, behind = magnitudes(model, text, 1, 1)
    factor = float((behind / before).mean(0).mean())
    fitted = repair(model, [BLOCK(1)], text, "scale")
    assert fitted.fit.factor.item() == pytest.approx(factor, rel=1e-4)
    paper = tiny("Llama")
    paper.model.embed_tokens.weight.data *= factor
    for module in (paper.model.layers[0].self_attn.o_proj, paper.model.layers[0].mlp.down_proj):
        module.weight.data *= factor
    with dropping.dropped(paper, [BLOCK(1)]), dropping.dropped(model, [BLOCK(1)], fitted):
        torch.testing.assert_close(output(model, UNSEEN), output(paper, UNSEEN), rtol=1e-3, atol=1e-3)  # the norm has an epsilon


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "GPT-NeoX (parallel)"])
def test_factors_of_single_branches_multiply_the_stream(name, text):
    model, drop_set = tiny(name), [ATTENTION(1), MLP(2)]
    fitted = repair(model, drop_set, text, "scale")
    factors = dict(zip(drop_set, fitted.fit.factor, strict=True))
    with dropping.dropped(model, drop_set), ExitStack() as stack:
        for sub_block, factor in factors.items():
            layer = decoder_layers(model)[sub_block.layer]
            bypass = layer.get_submodule(next(iter(layout_of(model).branch(sub_block.kind))))
            kept = []
            stack.callback(layer.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0])).remove)
            middle = layout_of(model).between
            if sub_block.kind == "mlp" and middle:
                stack.callback(
                    layer.get_submodule(middle).register_forward_pre_hook(lambda _, a, kept=kept: kept.append(a[0])).remove
                )
            if sub_block.kind == "mlp" and not middle:  # the stream behind a parallel attention
                part = layer.get_submodule(next(iter(layout_of(model).attention)))
                stack.callback(part.register_forward_hook(lambda _, a, out, kept=kept: kept.append(kept[-1] + out[0])).remove)

            def scale(_, args, out, kept=kept, factor=factor):
                added = (factor - 1) * kept[-1]
                return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added

            stack.callback(bypass.register_forward_hook(scale).remove)
        reference = output(model, UNSEEN)
    with dropping.dropped(model, drop_set, fitted):
        torch.testing.assert_close(output(model, UNSEEN), reference, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 28, 36, 60, 384, 576, 640, 896, 1024])
def test_hadamard_matrices(n):
    matrix = hadamard(n)
    assert (matrix.abs() == 1).all()
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


def test_no_hadamard_matrix_is_one_clear_error():
    with pytest.raises(ValueError, match="order 3 is known"):
        hadamard(6)


def test_the_patch_is_the_papers_and_travels(text, tmp_path):
    model, drop_set = tiny("Llama"), [BLOCK(1), BLOCK(2)]
    rotation = hadamard(32).numpy() / 32**0.5
    with torch.no_grad():
        hidden = model(text, output_hidden_states=True).hidden_states
    before, behind = (np.abs(hidden[i].double().numpy() @ rotation).mean(1) for i in (1, 3))
    patch = rotation @ np.diag((behind / before).mean(0)) @ rotation.T
    fitted = repair(model, drop_set, text, "patch")
    np.testing.assert_allclose(fitted.maps[BLOCK(1)]["patch"] + np.eye(32), patch, rtol=1e-4, atol=1e-5)
    with dropping.dropped(model, drop_set):
        matrix = torch.from_numpy(patch).float()
        handle = model.model.layers[0].register_forward_hook(lambda _, args, out: out @ matrix)
        reference = output(model, UNSEEN)
        handle.remove()
    with dropping.dropped(model, drop_set, fitted):
        torch.testing.assert_close(output(model, UNSEEN), reference, rtol=1e-4, atol=1e-4)
    smaller = saving.remove(model, drop_set, fitted)
    back = saving.load_pruned(saving.save_pruned(smaller, tmp_path / "patched"))
    torch.testing.assert_close(output(back, UNSEEN), reference, rtol=1e-4, atol=1e-4)
    assert len(decoder_layers(back)) == 3
    assert runs([BLOCK(5), BLOCK(1), BLOCK(2)]) == [[BLOCK(1), BLOCK(2)], [BLOCK(5)]]
    assert branches_of([BLOCK(1), MLP(0)]) == [MLP(0), ATTENTION(1), MLP(1)]


def test_the_ranking_for_repair_is_that_of_a_plain_loop(text):
    model, held_out = tiny("Llama"), ids(6, 16, seed=3)
    candidates = [ATTENTION(i) for i in range(3)]
    fitted = repair(model, candidates, text)
    dense = tiny("Llama")
    costs = {}
    for candidate in candidates:
        with dropping.dropped(model, [candidate], fitted):
            costs[candidate] = evaluation.divergence(dense, model, held_out).mean
    assert rank_for_repair(model, candidates, held_out, fitted) == sorted(candidates, key=costs.get)
    table = single_costs(model, candidates, held_out, fitted).set_index("layer")
    assert table.kl.to_dict() == pytest.approx({s.layer: cost for s, cost in costs.items()}, rel=1e-3)


BAD = {
    "patch of a branch": (lambda m, t: repair(m, [MLP(1)], t, "patch"), "mlp 1 cannot be repaired by patch: .* of blocks"),
    "a closed scale": (lambda m, t: repair(m, [MLP(1)], t, "scale", "closed"), "scale has no closed loop"),
    "a rank of a fold": (lambda m, t: repair(m, [MLP(1)], t, "fold", rank=2), "rank of 2 is not possible"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case, text):
    act, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        act(tiny("Llama"), text)
