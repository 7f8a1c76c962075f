"""Dropping: what is refused, what is left as it was, how drops compose, and what follows a layer to its new place."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from families import ids, tiny
from reference import output
from transformers import AutoModelForCausalLM

from entrodrop_utils import dropping, saving
from entrodrop_utils.families import modeling_entrodrop
from entrodrop_utils.families.decoder import decoder_layers
from entrodrop_utils.families.modeling_entrodrop import RECORD
from entrodrop_utils.residual import KINDS, SubBlock, find, layout_of

ATTENTION, MLP, BLOCK = ((lambda layer, kind=kind: SubBlock(layer, kind)) for kind in KINDS)


def fingerprint(model) -> tuple:
    return (
        type(model),
        str(model),
        json.dumps(model.config.to_dict(), sort_keys=True, default=str),
        [(name, id(value), value.sum().item()) for name, value in model.state_dict(keep_vars=True).items()],
        [getattr(part, "layer_idx", None) for part in model.modules()],
    )


HOW = {"dropped": lambda *args: dropping.dropped(*args).__enter__(), "remove": saving.remove}
BAD = {
    "a layer that does not exist": ([BLOCK(4)], r"block 4 does not exist: the model has 4 layers, 4 with block"),
    "a layer counted from the end": ([MLP(-1)], r"mlp -1 does not exist"),
    "the same twice": ([MLP(1), MLP(1)], r"mlp 1 is named twice"),
    "all blocks": ([BLOCK(i) for i in range(4)], r"cannot drop all 4 blocks"),
    "all attention layers": ([ATTENTION(i) for i in range(4)], r"cannot drop every attention layer"),
    "all attention layers, one with its block": ([BLOCK(0), *(ATTENTION(i) for i in range(1, 4))], r"cannot drop every attention"),
    "a part of a dropped block": ([BLOCK(2), MLP(2)], r"mlp 2 is part of block 2"),
    "a kind that does not exist": ([SubBlock(1, "head")], r"unknown kind 'head': choose one of attention, mlp, block"),
    "good and bad ones": ([ATTENTION(0), MLP(1), BLOCK(9)], r"block 9 does not exist"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("how", HOW)
def test_bad_input_is_one_clear_error_and_changes_nothing(case, how):
    chosen, message = BAD[case]
    model = tiny("Gemma 3 (text)")
    layout_of(model)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        HOW[how](model, chosen)
    assert fingerprint(model) == before


def test_a_transformers_whose_cache_keeps_every_layer_is_refused(monkeypatch):
    modeling_entrodrop.require_cache_without_gaps.cache_clear()
    monkeypatch.setattr(modeling_entrodrop, "DynamicCache", lambda config: SimpleNamespace(layers=[object(), object()]))
    model = tiny("Llama")
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match=r"use transformers 5\.23 or newer"):
        saving.remove(model, [ATTENTION(0)])
    assert fingerprint(model) == before
    saving.remove(model, [MLP(0), BLOCK(1)])  # these need nothing of it
    monkeypatch.undo()
    modeling_entrodrop.require_cache_without_gaps.cache_clear()


def test_a_quantised_model_is_refused():
    model = tiny("Llama")
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantised: load it dequantised"):
        saving.remove(model, [MLP(0)])


def test_what_was_dropped_cannot_be_dropped_again():
    model = saving.remove(tiny("Llama"), [ATTENTION(1), BLOCK(3)])
    with pytest.raises(ValueError, match=r"attention 1 was dropped before or .*: the model has 3 layers, 2 with attention"):
        saving.remove(model, [ATTENTION(1)])
    with pytest.raises(ValueError, match=r"block 3 does not exist"):
        saving.remove(model, [BLOCK(3)])


def test_nothing_dropped_is_the_same_model():
    model = tiny("Llama")
    before = fingerprint(model)
    assert saving.remove(model, []) is model
    with dropping.dropped(model, []):
        pass
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", ["Gemma 3 (text)", "GPT-2", "Bloom"])
def test_the_model_is_as_it_was_after_the_context(name):
    model = tiny(name)
    before, dense = fingerprint(model), output(model, ids())
    with dropping.dropped(model, [ATTENTION(0), MLP(3), BLOCK(1)]):
        assert not torch.allclose(output(model, ids()), dense)
        assert len(decoder_layers(model)) == 3
        with dropping.dropped(model, [MLP(0)]):  # counted as the layers are now
            assert find(model, "mlp") == [MLP(1)]
    assert fingerprint(model) == before
    with pytest.raises(RuntimeError, match="stop"), dropping.dropped(model, [BLOCK(0)]):
        raise RuntimeError("stop")
    assert fingerprint(model) == before
    assert torch.equal(output(model, ids()), dense)


def test_drops_compose_and_the_record_counts_as_at_first():
    step_by_step = tiny("Gemma 3 (text)")
    saving.remove(step_by_step, [ATTENTION(2)])
    saving.remove(step_by_step, [BLOCK(0)])
    saving.remove(step_by_step, [MLP(2)])  # the last of the three that are left
    at_once = saving.remove(tiny("Gemma 3 (text)"), [ATTENTION(2), BLOCK(0), MLP(3)])
    assert torch.equal(output(step_by_step, ids()), output(at_once, ids()))
    record = getattr(step_by_step.config, RECORD)
    assert record == getattr(at_once.config, RECORD)
    assert record["kept"] == [1, 2, 3]
    assert record["dropped"] == [[2, "attention"], [0, "block"], [3, "mlp"]]
    assert saving.missing_branches(record) == [ATTENTION(1), MLP(2)]


def test_every_mlp_may_go():
    model = saving.remove(tiny("Llama"), [MLP(i) for i in range(4)])
    assert find(model, "mlp") == []
    made = model.generate(ids(), max_new_tokens=8, do_sample=False)
    assert made.shape == (2, 18)


@pytest.mark.parametrize("how", [{"cache_implementation": "static"}, {"num_beams": 3}], ids=["static cache", "beams"])
@pytest.mark.parametrize("name", ["Llama", "Gemma 3 (text)"])
def test_other_ways_to_generate(name, how):
    model = saving.remove(tiny(name), [ATTENTION(0), ATTENTION(2), MLP(1)])
    if "num_beams" in how:
        expected = model.generate(ids(), max_new_tokens=20, do_sample=False, use_cache=False, **how)
    else:
        expected = model.generate(ids(), max_new_tokens=20, do_sample=False)
    made = model.generate(ids(), max_new_tokens=20, do_sample=False, disable_compile=True, **how)
    assert torch.equal(made, expected)


def test_a_model_spread_over_devices(tmp_path):
    """Layers that wait on disk are a device of their own: what is dropped must not be read, and the rest must still arrive."""
    saving.save_pruned(tiny("Llama"), tmp_path / "whole")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk", "model.layers.3": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", device_map=places, offload_folder=tmp_path / "disk")
    plain, chosen = tiny("Llama"), [ATTENTION(1), MLP(0), BLOCK(2)]
    with dropping.dropped(model, chosen), dropping.dropped(plain, chosen):
        assert torch.equal(output(model, ids()), output(plain, ids()))
        assert torch.equal(model.generate(ids(), max_new_tokens=9), plain.generate(ids(), max_new_tokens=9))
    assert torch.equal(output(model, ids()), output(plain, ids()))


@pytest.mark.parametrize(
    ("name", "settings", "chosen"),
    [
        ("Qwen3-MoE", {"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [BLOCK(0)]),
        ("SmolLM3", {}, [BLOCK(0), ATTENTION(3)]),
        ("Qwen2", {}, [BLOCK(1), BLOCK(2)]),
    ],
)
def test_what_a_layer_is_follows_it_to_its_new_place(tmp_path, name, settings, chosen):
    config = tiny(name).config
    model = type(tiny(name))(type(config)(**config.to_dict() | settings)).eval()
    kinds = [type(layer.mlp).__name__ for layer in model.model.layers]
    with dropping.dropped(model, chosen):
        expected = output(model, ids())
    saving.remove(model, chosen)
    back = saving.load_pruned(saving.save_pruned(model, tmp_path / "saved"))
    assert torch.equal(output(back, ids()), expected)
    gone = {layer for layer, kind in chosen if kind == "block"}
    assert [type(layer.mlp).__name__ for layer in back.model.layers] == [kind for i, kind in enumerate(kinds) if i not in gone]


def test_a_list_of_one_value_a_layer_follows_whatever_it_is_called():
    model = tiny("Llama")
    model.config.num_heads_by_layer = [4, 3, 2, 1]
    model.config.eos_token_id = [5, 6, 7, 8]  # as long, and no list of layers
    saving.remove(model, [BLOCK(1)])
    assert model.config.num_heads_by_layer == [4, 2, 1]
    assert model.config.eos_token_id == [5, 6, 7, 8]


def test_blocks_without_which_no_config_describes_the_model_stay():
    config = tiny("GPT-2").config
    config.scale_attn_by_inverse_layer_idx = True  # a layer's scale is that of its place
    for model, layer in ((transformers.GPT2LMHeadModel(config).eval(), 1), (tiny("ModernBERT"), 0)):
        before = fingerprint(model)
        with pytest.raises(ValueError, match=rf"without block {layer} no config describes the model"):
            saving.remove(model, [BLOCK(layer)])
        assert fingerprint(model) == before
        with dropping.dropped(model, [BLOCK(layer)]):
            assert output(model, ids()).isfinite().all()


def test_the_part_of_one_layer_that_serves_all_stays():
    model = tiny("T5 (encoder)")
    for sub_block in (ATTENTION(0), BLOCK(0)):
        with pytest.raises(ValueError, match="cannot be dropped: its relative_attention_bias serves the attention of all layers"):
            saving.remove(model, [sub_block])
    saving.remove(model, [MLP(0), ATTENTION(1), BLOCK(2)])
