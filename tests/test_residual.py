"""The residual stream: endpoints, hooks that leave no trace, the self-check, and models that are refused."""

import pytest
import torch
import transformers
from families import FAMILIES, ids, tiny
from reference import layout_name
from torch import nn

from entrodrop_utils import residual, scoring
from entrodrop_utils.families import decoder, layouts, self_check
from entrodrop_utils.families.decoder import UnsupportedModel, decoder_layers
from entrodrop_utils.residual import SubBlock, capture_layers, find, layout_of


def hooks(model) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def test_endpoints_meet_end_to_end():
    for layer in range(3):
        (start, middle), (middle_too, end) = (residual.endpoints(SubBlock(layer, kind)) for kind in ("attention", "mlp"))
        assert middle == middle_too
        assert residual.endpoints(SubBlock(layer, "block")) == (start, end)
        assert residual.endpoints(SubBlock(layer + 1, "block"))[0] == end


def test_states_of_llama_follow_from_its_weights():
    model, tokens = tiny("Llama"), ids()
    states = residual.states(model, tokens)
    layer = model.model.layers[1]

    def rms(x, norm):
        return x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight

    x = rms(states[3], layer.post_attention_layernorm)
    mlp = (nn.functional.silu(x @ layer.mlp.gate_proj.weight.T) * (x @ layer.mlp.up_proj.weight.T)) @ layer.mlp.down_proj.weight.T
    torch.testing.assert_close(states[4], states[3] + mlp, rtol=1e-4, atol=1e-4)
    x = rms(states[2], layer.input_layernorm)
    attention = layer.self_attn
    q, k, v = (
        (x @ part.weight.T).view(2, 10, -1, 8).transpose(1, 2) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    cos, sin = model.model.rotary_emb(x, torch.arange(10)[None])
    cos, sin = cos[:, None], sin[:, None]

    def turned(y):
        return y * cos + torch.cat([-y[..., 4:], y[..., :4]], -1) * sin

    k, v = (y.repeat_interleave(2, 1) for y in (turned(k), v))
    logits = turned(q) @ k.mT / 8**0.5 + torch.full((10, 10), -torch.inf).triu(1)
    mixed = (logits.softmax(-1) @ v).transpose(1, 2).reshape(2, 10, 32) @ attention.o_proj.weight.T
    torch.testing.assert_close(states[3], states[2] + mixed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "GPT-NeoX (parallel)", "BERT"])
def test_hooks_only_read_and_are_gone_afterwards(name):
    model, tokens = tiny(name), ids()
    before = model(tokens)[0]
    seen = []
    with residual.capture(model, lambda endpoint, state: seen.append(endpoint)):
        assert torch.equal(model(tokens)[0], before)
    assert seen == list(range(9))
    with pytest.raises(ZeroDivisionError), residual.capture(model, lambda endpoint, state: 1 / 0):
        model(tokens)
    assert hooks(model) == 0
    assert torch.equal(model(tokens)[0], before)


def test_the_self_check_leaves_the_model_as_it_was():
    model = tiny("Gemma 3 (text)").train()
    model.model.layers[0].eval()
    modes = [part.training for part in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    layout_of(model)
    assert [part.training for part in model.modules()] == modes
    assert hooks(model) == 0
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_self_check_runs_once_a_model(monkeypatch):
    calls = []
    monkeypatch.setattr(decoder, "find_mismatch", lambda *args: calls.append(args) or self_check.find_mismatch(*args))
    model = tiny("Llama")
    for _ in range(3):
        find(model, "mlp")
        residual.states(model, ids())
        find(model.model, "attention")
    assert len(calls) == 1
    layout_of(tiny("Llama"))
    assert len(calls) == 2


@pytest.mark.parametrize("name", [pytest.param(f.name, marks=[pytest.mark.slow] * f.slow) for f in FAMILIES])
def test_no_other_layout_passes_the_self_check_of_a_family(name):
    """But for parallel ones, which give sequential models the same states."""
    model = tiny(name)
    mine, blocks = layout_of(model), decoder_layers(model)
    for layout in layouts.LAYOUTS.values():
        if layout is mine or not all(layout.fits(layer) for layer in blocks):
            continue
        try:
            against = self_check.find_mismatch(model, blocks, layout, capture_layers)
        except Exception as error:
            against = str(error)
        if against is None:
            for kind in ("attention", "mlp"):
                assert next(iter(layout.branch(kind).items())) == next(iter(mine.branch(kind).items()))
            assert mine.between is not None
            assert layout.between is None
        assert hooks(model) == 0


@pytest.mark.parametrize("name", [pytest.param(f.name, marks=[pytest.mark.slow] * f.slow) for f in FAMILIES])
def test_wrong_layouts_are_found(name):
    model = tiny(name)
    mine, blocks = layout_of(model), decoder_layers(model)
    swap = {"zero": "input", "residual": "zero"}
    if mine.norms:  # a norm does not see that a branch doubled its input
        swapped = layouts.Layout(**{**vars(mine), "norms": mine.norms[::-1]})
        assert self_check.find_mismatch(model, blocks, swapped, capture_layers), "norms in the wrong order"
    for kind in ("attention", "mlp") if not mine.norms else ():
        branch = dict(mine.branch(kind))
        first = next(iter(branch))
        branch[first] = " ".join(swap.get(word, word) for word in branch[first].split())
        wrong = layouts.Layout(**{**vars(mine), kind: branch})
        assert self_check.find_mismatch(model, blocks, wrong, capture_layers), f"{kind} that does not go away"
    if mine.between is not None:
        early = layouts.Layout(**{**vars(mine), "between": next(iter(mine.attention))})
        assert self_check.find_mismatch(model, blocks, early, capture_layers), "a middle state from before both branches"
    assert self_check.find_mismatch(model, blocks, mine, capture_layers) is None


class Doubling(nn.Module):
    """An attention whose layer it serves scales what it is given: same modules as Llama, another sum."""

    def __init__(self, layer):
        super().__init__()
        for name, part in layer.named_children():
            setattr(self, name, part)
        self.original = [layer]

    def forward(self, hidden_states, *args, **kwargs):
        return self.original[0](2 * hidden_states, *args, **kwargs)


def test_a_model_whose_states_do_not_add_up_is_refused():
    model = tiny("Llama")
    model.model.layers[2] = Doubling(model.model.layers[2])
    with pytest.raises(UnsupportedModel, match=r"the states read from it are not the model's .*pre-norm: .*layer 2.*LAYOUTS"):
        scoring.score(model, ids(1), ["cosine"], ["block"])


def test_a_model_that_reads_earlier_layers_is_refused():
    model = tiny("Llama")
    early: list[torch.Tensor] = []
    model.model.layers[0].register_forward_hook(lambda _, args, out: early.append(out))
    model.model.norm.register_forward_pre_hook(lambda _, args: (args[0] + early[-1],))
    with pytest.raises(UnsupportedModel, match="the last state does not give the model's own output"):
        find(model, "attention")


def test_a_family_with_unknown_modules_is_refused_with_what_was_looked_for():
    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2, num_heads=2)
    with pytest.raises(UnsupportedModel, match=r"MambaBlock: norm, mixer.*looked for exactly.*self_attn.*LAYOUTS.*README"):
        find(transformers.MambaForCausalLM(config), "mlp")
    with pytest.raises(UnsupportedModel, match="has no list of decoder layers: looked for layers, h, blocks"):
        decoder_layers(nn.Linear(2, 2))


def test_an_encoder_decoder_asks_for_one_of_its_two_streams():
    config = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.raises(UnsupportedModel, match="two residual streams"):
        find(model, "attention")
    states = residual.states(model.get_encoder(), ids())
    with torch.no_grad():
        own = model.encoder(ids(), output_hidden_states=True)
    assert torch.equal(states[2], own.hidden_states[1])
    assert torch.equal(model.encoder.final_layer_norm(states[-1].clone()), own.last_hidden_state)


@pytest.mark.parametrize("name", ["BERT", "ModernBERT", "T5 (encoder)"])
def test_encoders_are_scored(name):
    scores = scoring.score(tiny(name), ids(3), ["cosine", "bucket"])
    assert len(scores) == 2 * 3 * 4 * 3
    assert scores.value.notna().all()
    assert (scores[scores.metric == "cosine"].value > 0).all()


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown kind 'head': choose one of attention, mlp, block"):
        find(tiny("Llama"), "head")


def test_a_new_family_takes_three_lines(monkeypatch):
    """The README's example: Mixtral's modules under other names."""
    model = tiny("Llama")
    for layer in model.model.layers:
        layer.attn_norm = layer._modules.pop("input_layernorm")
        layer.forward = _forward.__get__(layer)
    with pytest.raises(UnsupportedModel, match="attn_norm"):
        layout_of(model)
    monkeypatch.setitem(
        layouts.LAYOUTS,
        "mine",
        layouts.Layout(
            attention={"self_attn": "zero none", "attn_norm": "input"},
            mlp={"mlp": "zero", "post_attention_layernorm": "input"},
            between="post_attention_layernorm",
        ),
    )
    assert layout_name(model) == "mine"
    assert torch.equal(residual.states(model, ids()), residual.states(tiny("Llama"), ids()))


def _forward(self, hidden_states, **kwargs):
    hidden_states = hidden_states + self.self_attn(hidden_states=self.attn_norm(hidden_states), **kwargs)[0]
    return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
