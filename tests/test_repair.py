"""Repair: the maps against other implementations, planted truths, and what must stay as it is without a repair."""

import copy
import json
import math

import pytest
import torch
from families import FAMILIES, ids, tiny
from reference import cache_bytes, close, output, stranger
from sklearn.linear_model import Ridge

from entrodrop_utils import dropping, evaluation, saving
from entrodrop_utils.dropping import Repair
from entrodrop_utils.families.decoder import UnsupportedModel, decoder_layers
from entrodrop_utils.families.modeling_entrodrop import RECORD
from entrodrop_utils.repairing import LOOPS, repair
from entrodrop_utils.repairing.fit import ONE_BRANCH as HOW
from entrodrop_utils.repairing.sums import Sums
from entrodrop_utils.residual import SubBlock, endpoints, find, layout_of, states

ATTENTION, MLP, BLOCK = ((lambda layer, kind=kind: SubBlock(layer, kind)) for kind in ("attention", "mlp", "block"))
MIXED = [ATTENTION(1), MLP(1), ATTENTION(3), MLP(2)]


@pytest.fixture
def text():
    return ids(16, 24)


def sums_of(x: torch.Tensor, y: torch.Tensor) -> Sums:
    sums = Sums()
    for part in (slice(0, 30), slice(30, None)):  # in a stream
        sums.add(torch.cat([x[part], torch.ones(len(x[part]), 1, dtype=x.dtype)], 1), y[part])
    return sums


@pytest.mark.parametrize("penalty", [1e-6, 0.3, 40.0])
def test_the_solution_is_scikit_learns_ridge(penalty):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 6, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 5, 0.1, 1, 1, 1], dtype=torch.float64) + 3
    y = x @ torch.randn(6, 3, generator=generator, dtype=torch.float64) + torch.randn(80, 3, generator=generator).double() - 7
    sums, reference = sums_of(x, y), Ridge(alpha=penalty).fit(x.numpy(), y.numpy())
    weights = sums.solve(penalty)
    torch.testing.assert_close(weights[:-1].T, torch.from_numpy(reference.coef_), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(weights[-1], torch.from_numpy(reference.intercept_), rtol=1e-8, atol=1e-8)
    error = ((torch.from_numpy(reference.predict(x.numpy())) - y) ** 2).sum()
    assert sums.error(weights) == pytest.approx(float(error), rel=1e-6)


def branch_values(model, text, sub_block) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output of a branch's module, by plain hooks on a Llama."""
    layer, kept = decoder_layers(model)[sub_block.layer], {}
    module = layer.self_attn if sub_block.kind == "attention" else layer.mlp

    def keep(_, args, kwargs, out):
        kept["x"] = args[0] if args else kwargs["hidden_states"]
        kept["y"] = out[0] if isinstance(out, tuple) else out

    handle = module.register_forward_hook(keep, with_kwargs=True)
    output(model, text)
    handle.remove()
    return kept["x"], kept["y"]


@pytest.mark.parametrize("sub_block", [ATTENTION(2), MLP(1)])
def test_the_maps_are_those_of_scikit_learn_on_the_branchs_own_values(sub_block, text):
    model = tiny("Llama")
    x, y = branch_values(model, text, sub_block)
    constant = repair(model, [sub_block], text, "constant").maps[sub_block]
    assert constant.keys() == {"bias"}
    torch.testing.assert_close(constant["bias"], y[:, 1:].flatten(0, 1).mean(0), rtol=1e-3, atol=1e-4)
    fitted = repair(model, [sub_block], text, "linear", penalties=[0.01])
    flat_x, flat_y = x.flatten(0, 1).double(), y.flatten(0, 1).double()
    reference = Ridge(alpha=0.01 * float(flat_x.square().sum()) / flat_x.shape[1]).fit(flat_x.numpy(), flat_y.numpy())
    torch.testing.assert_close(fitted.maps[sub_block]["weight"].numpy(), reference.coef_.astype("float32"), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(fitted.maps[sub_block]["bias"].numpy(), reference.intercept_.astype("float32"), rtol=1e-3, atol=1e-4)
    chosen = (torch.arange(len(text)) % 4 == 3)[:, None].expand(text.shape).flatten()
    reference.set_params(alpha=0.01 * float(flat_x[~chosen].square().sum()) / flat_x.shape[1])
    reference.fit(flat_x[~chosen].numpy(), flat_y[~chosen].numpy())
    left = 1 - float(torch.tensor(r2(reference.predict(flat_x[chosen].numpy()), flat_y[chosen].numpy())))
    assert fitted.fit.left.item() == pytest.approx(left, rel=1e-3)


def r2(predicted, true) -> float:
    return 1 - ((predicted - true) ** 2).sum() / ((true - true.mean(0)) ** 2).sum()


def test_the_penalty_is_the_best_of_the_last_quarter_of_the_windows(text):
    model, sub_block = tiny("Llama"), ATTENTION(2)
    left = {p: repair(model, [sub_block], text, penalties=[p]).fit.left.item() for p in (1e-6, 0.1, 10.0)}
    row = repair(model, [sub_block], text, penalties=list(left)).fit.iloc[0]
    assert row.penalty == min(left, key=left.get)
    assert row.left == min(left.values())


def linearised(model, sub_blocks):
    """The model with branches that really are affine maps of their normed input."""
    for number, (layer, kind) in enumerate(sub_blocks):
        name = "self_attn" if kind == "attention" else "mlp"
        torch.manual_seed(number)
        planted = torch.nn.Linear(32, 32)
        module = getattr(decoder_layers(model)[layer], name)
        if kind == "attention":  # it still writes its keys and values

            def attend(hidden_states, planted=planted, original=module.forward, **arguments):
                return planted(hidden_states), original(hidden_states=hidden_states, **arguments)[1]

            module.forward = attend
        else:
            module.forward = planted.forward
    return model


@pytest.mark.parametrize("loop", LOOPS)
def test_a_branch_that_is_linear_is_recovered(loop, text):
    model = linearised(tiny("Llama"), MIXED)
    dense = output(model, ids(3, 20, seed=5))
    fitted = repair(model, MIXED, text, loop=loop, penalties=[1e-12])
    with dropping.dropped(model, MIXED, fitted):
        assert close(output(model, ids(3, 20, seed=5)), dense)
    with dropping.dropped(model, MIXED):
        assert not close(output(model, ids(3, 20, seed=5)), dense)
    assert fitted.fit.left.max() < 1e-6


def test_a_map_of_low_rank_is_recovered_and_a_smaller_rank_is_not(text):
    model, sub_block = tiny("Llama"), MLP(2)
    torch.manual_seed(3)
    up, down = torch.randn(32, 4), torch.randn(4, 32)
    decoder_layers(model)[2].mlp.forward = lambda x: x @ down.T @ up.T + 0.5
    dense, unseen = output(model, ids(3, 20, seed=5)), ids(3, 20, seed=5)
    for rank, recovered in ((4, True), (3, False)):
        fitted = repair(model, [sub_block], text, rank=rank, penalties=[1e-12])
        assert {name: tuple(value.shape) for name, value in fitted.maps[sub_block].items()} == {
            "bias": (32,),
            "down": (rank, 32),
            "up": (32, rank),
        }
        with dropping.dropped(model, [sub_block], fitted):
            assert close(output(model, unseen), dense) == recovered


def test_of_all_maps_of_a_rank_the_fitted_values_are_nearest(text):
    """Against the singular values of the fitted values, which bound every map of that rank (Eckart and Young)."""
    model, sub_block = tiny("Llama"), ATTENTION(1)
    x, _ = branch_values(model, text, sub_block)
    x = x.flatten(0, 1)
    whole, low = (repair(model, [sub_block], text, rank=rank, penalties=[0.01]).maps[sub_block] for rank in (None, 5))
    full = x @ whole["weight"].T + whole["bias"]
    near = x @ low["down"].T @ low["up"].T + low["bias"]
    singular = torch.linalg.svdvals(full - full.mean(0))
    assert float((full - near).square().sum()) == pytest.approx(float(singular[5:].square().sum()), rel=1e-3)


def stream_error(model, text, drop_set, fitted) -> list[float]:
    """Squared distance of the repaired stream from the dense one behind each dropped branch."""
    dense = states(model, text)
    with dropping.dropped(model, drop_set, fitted):
        repaired = states(model, text)
    return [float((dense[end] - repaired[end]).double().square().sum()) for end in (endpoints(s)[1] for s in sorted(drop_set))]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["Llama", "Gemma 3 (text)", "GPT-NeoX (parallel)", "Bloom"])
def test_closed_loop_is_no_worse_than_open_loop_on_its_text(name, how, text):
    model, drop_set = tiny(name), [ATTENTION(0), ATTENTION(1), MLP(1), ATTENTION(2)]
    text = text[:, 1:] if how == "constant" else text  # any tokens will do
    opened, closed = (
        stream_error(model, text, drop_set, repair(model, drop_set, text, how, loop, penalties=[1e-9])) for loop in LOOPS
    )
    assert closed[0] == pytest.approx(opened[0], rel=1e-3)  # the first branch has nothing before it
    assert all(c <= o * (1 + 1e-3) for c, o in zip(closed, opened, strict=True)), (opened, closed)
    if how == "linear":
        assert closed[-1] < opened[-1]


def test_closed_loop_of_one_branch_is_open_loop(text):
    model = tiny("GPT-2")
    for how in HOW:
        opened, closed = (repair(model, [MLP(2)], text, how, loop).maps[MLP(2)] for loop in LOOPS)
        for name in opened:
            torch.testing.assert_close(closed[name], opened[name], rtol=1e-3, atol=1e-4)


WORDS = {  # how the family refuses
    "BERT": dict.fromkeys(HOW, "norm after each branch"),
    "OPT (post-norm)": dict.fromkeys(HOW, "norm after each branch"),
    "OPT": {"linear": "not one module"},
}


@pytest.mark.parametrize("name", [pytest.param(f.name, marks=[pytest.mark.slow] * f.slow) for f in FAMILIES])
@pytest.mark.parametrize("how", HOW)
def test_every_family_is_repaired_or_refused_untouched(name, how):
    family, model, text = next(f for f in FAMILIES if f.name == name), tiny(name), ids(8, 12)
    drop_set = [ATTENTION(1), MLP(1), ATTENTION(2), MLP(3)]
    layout_of(model)
    before, dense, weights = str(model), output(model, text), copy.deepcopy(model.state_dict())
    if words := WORDS.get(name, {}).get(how):
        with pytest.raises(UnsupportedModel, match=words):
            repair(model, drop_set, text, how)
    else:
        fitted = repair(model, drop_set, text, how)
        check_repaired(family, model, text, drop_set, fitted, how)
    assert str(model) == before
    assert torch.equal(output(model, text), dense)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def check_repaired(family, model, text, drop_set, fitted, how) -> None:
    reference = states(model, text)
    inputs = cache_bytes(model, text) if family.generates else {}
    with dropping.dropped(model, drop_set):
        plain, smaller = states(model, text), cache_bytes(model, text) if family.generates else {}
    with dropping.dropped(model, drop_set, fitted):
        repaired = states(model, text)
        if family.generates:
            assert cache_bytes(model, text) == smaller
            assert sum(smaller.values()) < sum(inputs.values())
            tokens, with_cache, without = (
                text[:2],
                *(
                    model.generate(
                        text[:2],
                        max_new_tokens=12,
                        do_sample=False,
                        use_cache=cached,
                        output_logits=True,
                        return_dict_in_generate=True,
                    ).logits
                    for cached in (True, False)
                ),
            )
            assert len(tokens) == 2 and close(torch.stack(with_cache), torch.stack(without))
    end = endpoints(drop_set[0])[1]
    tokens = slice(1, None) if how == "constant" else slice(None)
    errors = [float((reference[end] - stream[end])[:, tokens].square().sum()) for stream in (plain, repaired)]
    assert errors[1] < errors[0]  # the first repaired branch is nearer to what it was
    if how == "constant":  # what arrives in the stream is the mean of what the branch added
        start = endpoints(drop_set[0])[0]
        added = (reference[end] - reference[start])[:, 1:].flatten(0, 1).mean(0)
        arrived = (repaired[end] - repaired[start]).flatten(0, 1)
        assert close(arrived, added.expand_as(arrived))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["Llama", "Gemma 3 (text)", "Bloom"])
def test_it_travels_with_a_saved_model(name, how, text, tmp_path):
    model = tiny(name)
    fitted = repair(model, MIXED, text, how)
    with dropping.dropped(model, MIXED, fitted):
        expected = output(model, ids())
    smaller = saving.remove(model, MIXED, fitted)
    assert torch.equal(output(smaller, ids()), expected)
    folder = saving.save_pruned(smaller, tmp_path / "saved")
    back = saving.load_pruned(folder)
    assert torch.equal(output(back, ids()), expected)
    assert [find(back, kind) for kind in ("attention", "mlp")] == [find(smaller, kind) for kind in ("attention", "mlp")]
    record = getattr(back.config, RECORD)
    assert len(record["repairs"]) == len(MIXED)
    card = (folder / "README.md").read_text()
    assert f"Repaired: in place of {', '.join(map(str, MIXED))}: {fitted.about}." in card
    again = saving.load_pruned(saving.save_pruned(saving.remove(back, [MLP(0)]), tmp_path / "more"))  # without a repair of its own
    assert len(getattr(again.config, RECORD)["repairs"]) == len(MIXED)
    assert torch.equal(output(again, ids()), output(back, ids()))


def test_a_process_without_the_suite_loads_it(text, tmp_path):
    with stranger(tmp_path) as ask:
        for name, rank in (("Llama", None), ("GPT-2", 5)):
            model = tiny(name)
            saving.remove(model, MIXED, repair(model, MIXED, text, rank=rank))
            folder = saving.save_pruned(model, tmp_path / name)
            assert torch.equal(ask(folder, "AutoModelForCausalLM"), output(model, ids()))


@pytest.mark.filterwarnings("ignore")
def test_weights_that_do_not_match_the_recorded_repair_are_refused(text, tmp_path):
    model = tiny("Llama")
    saving.remove(model, MIXED, repair(model, MIXED, text))
    folder = saving.save_pruned(model, tmp_path / "saved")
    settings = json.loads((folder / "config.json").read_text())
    settings[RECORD]["repairs"].popitem()
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="does not match"):
        saving.load_pruned(folder)


def test_half_precision_and_composed_drops(text, tmp_path):
    saving.save_pruned(tiny("Llama"), tmp_path / "whole")
    model = saving.load_pruned(tmp_path / "whole", dtype=torch.bfloat16)
    saving.remove(model, [ATTENTION(2)], repair(model, [ATTENTION(2)], text))
    saving.remove(model, [BLOCK(0)])
    saving.remove(model, [MLP(2)], repair(model, [MLP(2)], text, "constant"))  # counted as the layers are now
    back = saving.load_pruned(saving.save_pruned(model, tmp_path / "saved"))
    assert back.dtype == torch.bfloat16
    assert torch.equal(output(back, ids()), output(model, ids()))
    record = getattr(back.config, RECORD)
    assert [line.split(":")[0] for line in record["fitted"]] == ["attention 2", "mlp 3"]
    assert record["repairs"] == {
        "model.layers.1.self_attn": {"bias": [32], "weight": [32, 32]},
        "model.layers.2.mlp": {"bias": [32]},
    }


def test_a_repaired_model_learns(text):
    model = tiny("Llama")
    saving.remove(model, MIXED, repair(model, MIXED, text))
    output_with_gradients = model(ids())[0].square().mean()
    output_with_gradients.backward()
    new = [value for name, value in model.named_parameters() if "self_attn.weight" in name or "mlp.weight" in name]
    assert len(new) == len(MIXED)
    assert all(value.grad.abs().sum() > 0 for value in new)


def test_losses_of_repaired_sets_are_those_of_whole_passes_and_have_a_cache_of_their_own(text):
    model, sets = tiny("Llama"), [[], [ATTENTION(1)], MIXED]
    bare = evaluation.losses_by_set(model, text[:6], sets).groupby("set", sort=False).nll.mean()
    for how in HOW:
        fitted = repair(model, MIXED, text, how)
        swept = evaluation.losses_by_set(model, text[:6], sets, fitted).groupby("set", sort=False).nll.mean()
        for drop_set in sets:
            with dropping.dropped(model, drop_set, fitted):
                whole = evaluation.perplexity(model, text[:6]).mean
            assert swept[tuple(sorted(drop_set))] == pytest.approx(whole, rel=1e-4)
            assert not drop_set or not math.isclose(whole, bare[tuple(sorted(drop_set))], rel_tol=1e-4)


BAD = {
    "a block": (lambda m, t: repair(m, [BLOCK(1)], t), "block 1 cannot be repaired"),
    "too little text": (lambda m, t: repair(m, [MLP(1)], t[:3]), "at least 4 windows, got 3"),
    "an unknown repair": (lambda m, t: repair(m, [MLP(1)], t, "cubic"), "unknown repair 'cubic': choose one of constant, linear"),
    "an unknown loop": (lambda m, t: repair(m, [MLP(1)], t, loop="half"), "unknown repair 'half': choose one of open, closed"),
    "too high a rank": (lambda m, t: repair(m, [MLP(1)], t, rank=33), "rank of 33 is not possible: .* from 1 to 32"),
    "a rank of a constant": (lambda m, t: repair(m, [MLP(1)], t, "constant", rank=2), "rank of 2 is not possible"),
    "what does not exist": (lambda m, t: repair(m, [MLP(9)], t), "mlp 9 does not exist"),
    "a repair that lacks one": (
        lambda m, t: dropping.dropped(m, [MLP(1)], Repair({ATTENTION(1): {"bias": torch.ones(32)}})).__enter__(),
        "nothing in place of mlp 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error_and_changes_nothing(case, text):
    act, message = BAD[case]
    model = tiny("Llama")
    before, dense = str(model), output(model, ids())
    with pytest.raises(ValueError, match=message):
        act(model, text)
    assert str(model) == before
    assert torch.equal(output(model, ids()), dense)


def test_nothing_dropped_needs_no_map(text):
    fitted = repair(tiny("Llama"), [], text)
    assert fitted.maps == {}
    assert fitted.fit.empty
