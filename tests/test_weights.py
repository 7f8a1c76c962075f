"""What a file holds and the model has no place for: refused with the first weight named, or known to be idle."""

import contextlib
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gguf
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.utils import logging

from entrodrop_utils import models
from entrodrop_utils.models import ModelUnavailable, sources
from entrodrop_utils.residual import SubBlock
from entrodrop_utils.saving import remove, save_pruned

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 300}
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a tiny Llama and a tokenizer, and its logits."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_gguf.write(folder / "tiny.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "MODELS", folder / "models")
        _, tokenizer = models.load_model(str(folder / "tiny.gguf"), device="cpu")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model.save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    return folder / "llama", model(IDS).logits, tokenizer


@pytest.fixture
def own_models(tmp_path, monkeypatch):
    """A folder of one's own for converted models."""
    monkeypatch.setattr(sources, "MODELS", tmp_path / "models")


def changed(source: Path, target: Path, more: dict[str, torch.Tensor] | None = None, without: tuple = (), **config) -> str:
    """A copy of a model's folder with further weights, without some, and with other settings."""
    shutil.copytree(source, target)
    weights = {name: weight for name, weight in load_file(source / "model.safetensors").items() if name not in without}
    save_file(weights | (more or {}), target / "model.safetensors", {"format": "pt"})
    settings = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(settings))
    return str(target)


ones = torch.ones


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.q_proj.bias", 16),
        ("model.layers.1.mlp.down_proj.bias", 16),
        ("model.layers.0.input_layernorm.bias", 16),
        ("model.norm.bias", 16),
        ("lm_head.bias", 300),
        ("model.layers.0.self_attn.q_proj.weight_scale", 1),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", 1),
        ("model.layers.1.self_attn.k_proj.input_scale", 1),
        ("lm_head.weight_scale", 1),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", (4, 16)),
        ("model.layers.0.mlp.gate_proj.lora_B.default.weight", (32, 4)),
        ("lm_head.lora_A.weight", (4, 16)),
        ("model.layers.0.self_attn.q_norm.weight", 8),
        ("model.layers.2.mlp.up_proj.weight", (32, 16)),
        ("model.layers.11.input_layernorm.weight", 16),
        ("model.embed_positions.weight", (64, 16)),
    ],
)
def test_a_weight_without_a_place_is_refused_and_named(name, shape, llama, tmp_path):
    folder = changed(llama[0], tmp_path / "more", {name: ones(shape), "model.layers.1.zzz": ones(1)})
    with pytest.raises(ModelUnavailable, match="2 weights for which the model has no place .*the first is ") as caught:
        models.load_model(folder, device="cpu")
    assert f"(the first is {min(name, 'model.layers.1.zzz')})" in str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.cos_cached"],
        ["mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight", "model.mtp_layers.0.input_layernorm.weight"],
        ["score.weight", "classifier.dense.weight", "model.pooler.dense.weight", "qa_outputs.bias", "v_head.summary.weight"],
        ["vision_tower.encoder.layers.0.mlp.fc1.weight", "multi_modal_projector.linear_1.bias", "model.visual.merger.weight"],
        ["audio_tower.conv1.weight", "model.vision_model.post_layernorm.weight", "model.connector.proj.weight"],
    ],
    ids=["rotary frequencies", "further predictions", "heads of other tasks", "vision", "sound"],
)
def test_what_is_known_to_be_idle_is_left_out(names, llama, tmp_path):
    folder = changed(llama[0], tmp_path / "more", {name: ones(3) for name in names})
    model, _ = models.load_model(folder, device="cpu")
    assert torch.equal(model(IDS).logits, llama[1])


def test_prediction_layers_after_the_last_are_idle_as_far_as_the_config_counts_them(llama, tmp_path):
    """DeepSeek and GLM store them as layers."""
    further = {"model.layers.2.eh_proj.weight": ones(16, 32), "model.layers.2.mlp.up_proj.weight": ones(32, 16)}
    folder = changed(llama[0], tmp_path / "one", further, num_nextn_predict_layers=1)
    model, _ = models.load_model(folder, device="cpu")
    assert torch.equal(model(IDS).logits, llama[1])
    folder = changed(llama[0], tmp_path / "two", {**further, "model.layers.3.norm.weight": ones(16)}, num_nextn_predict_layers=1)
    with pytest.raises(ModelUnavailable, match=r"1 weights .*the first is model.layers.3.norm.weight"):
        models.load_model(folder, device="cpu")


def test_experts_that_do_not_fit_the_config_are_refused_and_what_is_beside_them_is_named(llama, tmp_path):
    """transformers joins the weights of experts while it loads, and refers to a report when it cannot."""
    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "whole")
    llama[2].save_pretrained(tmp_path / "whole")
    first = "model.layers.0.block_sparse_moe.experts.1.w1"
    with pytest.raises(ModelUnavailable, match="experts, are not as many or not of the shape that its config says") as caught:
        models.load_model(changed(tmp_path / "whole", tmp_path / "less", without=(f"{first}.weight",)), device="cpu")
    assert "report" not in str(caught.value)
    with pytest.raises(ModelUnavailable, match=r"1 weights for which .*first is model.layers.0.mlp.experts.1.w1.weight_scale"):
        models.load_model(changed(tmp_path / "whole", tmp_path / "more", {f"{first}.weight_scale": ones(1)}), device="cpu")


def test_masks_of_older_gpt2_files_and_the_pair_head_of_bert_are_idle(llama, tmp_path):
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=300, n_positions=32)).eval()
    bert = BertForPreTraining(BertConfig(**SIZES)).eval()
    for name, model in (("gpt2", gpt2), ("bert", bert)):
        model.save_pretrained(tmp_path / name)
        llama[2].save_pretrained(tmp_path / name)
    masks = {f"h.{i}.attn.{part}": ones(1, 1, 32, 32) for i in range(2) for part in ("bias", "masked_bias")}
    found, _ = models.load_model(changed(tmp_path / "gpt2", tmp_path / "gpt2 with masks", masks), device="cpu")
    assert torch.equal(found(IDS).logits, gpt2(IDS).logits)
    found, _ = models.load_model(str(tmp_path / "bert"), device="cpu")
    assert torch.equal(found(IDS).logits, bert(IDS).prediction_logits)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"vocab_size": 320}, r"2 of its weights have another shape .*lm_head.weight: \(300, 16\), not \(320, 16\)"),
        ({"intermediate_size": 48}, r"another shape .*model.layers.0.mlp.down_proj.weight: \(16, 32\), not \(16, 48\)"),
        ({"num_hidden_layers": 3}, r"9 of its weights are missing \(the first is model.layers.2"),
        ({"num_hidden_layers": 1}, r"9 weights for which the model has no place \(the first is model.layers.1"),
        ({"attention_bias": True}, r"8 of its weights are missing \(the first is model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused_with_the_difference(config, says, llama, tmp_path):
    with pytest.raises(ModelUnavailable, match=says) as caught:
        models.load_model(changed(llama[0], tmp_path / "other", **config), device="cpu")
    assert "report" not in str(caught.value), "transformers' own table is not shown"


def test_an_adapter_that_is_not_merged_is_seen_in_both_names(llama, tmp_path):
    name = "model.layers.0.mlp.up_proj"
    more = {f"{name}.base_layer.weight": ones(32, 16), f"{name}.lora_A.weight": ones(2, 16)}
    folder = changed(llama[0], tmp_path / "peft", more, without=(f"{name}.weight",))
    says = rf"first is {name}.weight\), and it has others instead \(the first is {name}.base_layer.weight\)"
    with pytest.raises(ModelUnavailable, match=says):
        models.load_model(folder, device="cpu")


@pytest.mark.parametrize(("beside", "says"), [(True, "an adapter beside its model"), (False, "an adapter and no model")])
def test_an_adapter_in_the_folder_is_refused(beside, says, llama, tmp_path):
    """transformers ignores it without a word, or reads it where peft is installed."""
    folder = Path(changed(llama[0], tmp_path / "adapter"))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/name"}))
    if not beside:
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
        (folder / "config.json").unlink()
    with pytest.raises(ModelUnavailable, match=f"holds {says}: merge them"):
        models.load_model(str(folder), device="cpu")


def test_two_different_heads_are_both_kept_whatever_the_config_says(llama, tmp_path):
    model, _ = models.load_model(changed(llama[0], tmp_path / "tied", tie_word_embeddings=True), device="cpu")
    assert torch.equal(model(IDS).logits, llama[1])


def test_a_pruned_folder_with_a_weight_too_many_is_refused(llama, tmp_path):
    model, tokenizer = models.load_model(str(llama[0]), device="cpu")
    folder = save_pruned(remove(model, [SubBlock(0, "mlp")]), tmp_path / "pruned", tokenizer)
    more = {"model.layers.0.mlp.up_proj.weight": ones(32, 16)}
    with pytest.raises(ModelUnavailable, match=r"does not match the weights \(1 differ, first model.layers.0.mlp.up_proj.weight"):
        models.load_model(changed(folder, tmp_path / "more", more), device="cpu")


def test_loading_leaves_the_library_as_loud_as_it_was(llama, tmp_path):
    before = logging.get_verbosity()
    for folder in (str(llama[0]), changed(llama[0], tmp_path / "more", {"model.x": ones(1)})):
        with contextlib.suppress(ModelUnavailable):
            models.load_model(folder, device="cpu")
        assert logging.get_verbosity() == before and logging.is_progress_bar_enabled()


# GGUF files


def with_tensors(monkeypatch, *names: str) -> None:
    """``tiny_gguf.write`` adds tensors under these names of GGUF."""
    whole, of = tiny_gguf.weights, tiny_gguf.gguf_name
    more = {name: np.ones(32, dtype=np.float32) for name in names}
    monkeypatch.setattr(tiny_gguf, "weights", lambda *arguments: whole(*arguments) | more)
    monkeypatch.setattr(tiny_gguf, "gguf_name", lambda name, family: name if name in more else of(name, family))


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_q.bias",
        "blk.1.ffn_down.bias",
        "blk.0.attn_norm.bias",
        "output_norm.bias",
        "blk.2.ffn_up.weight",
        "blk.0.attn_q_norm.weight",
        "blk.0.post_attention_norm.weight",
        "blk.0.attn_q.scale",
        "blk.0.attn_q.weight.lora_a",
        "rope_factors_long.weight",
    ],
)
@pytest.mark.usefixtures("own_models")
def test_a_tensor_of_a_gguf_file_without_a_place_is_refused_and_named(name, tmp_path, monkeypatch):
    with_tensors(monkeypatch, name)
    tiny_gguf.write(tmp_path / "tiny.gguf")
    assert name in {tensor.name for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    with pytest.raises(ModelUnavailable, match=rf"1 weights for which the model has no place \(the first is {name}\)"):
        models.load_model(str(tmp_path / "tiny.gguf"), device="cpu")


@pytest.mark.usefixtures("own_models")
def test_the_biases_of_a_family_that_has_them_are_read_and_others_refused(tmp_path, monkeypatch):
    expected = tiny_gguf.write(tmp_path / "tiny.gguf", "qwen2")
    model, _ = models.load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    biases = {name for name in expected if name.endswith("bias")}
    assert len(biases) == 3 * tiny_gguf.LAYERS
    for name in biases:
        np.testing.assert_array_equal(model.state_dict()[name].numpy(), expected[name])
    with_tensors(monkeypatch, "blk.1.attn_output.bias")
    tiny_gguf.write(tmp_path / "more.gguf", "qwen2")
    with pytest.raises(ModelUnavailable, match="the first is blk.1.attn_output.bias"):
        models.load_model(str(tmp_path / "more.gguf"), device="cpu")


@pytest.mark.usefixtures("own_models")
def test_the_head_of_a_gguf_file_is_read_where_it_has_one(tmp_path, monkeypatch):
    head = np.random.default_rng(1).normal(size=(256 + len(tiny_gguf.MERGES) + 1, tiny_gguf.HIDDEN)).astype(np.float32)
    whole, of = tiny_gguf.weights, tiny_gguf.gguf_name
    monkeypatch.setattr(tiny_gguf, "weights", lambda *arguments: whole(*arguments) | {"lm_head.weight": head})
    names = {"lm_head.weight": "output.weight"}
    monkeypatch.setattr(tiny_gguf, "gguf_name", lambda name, family: names.get(name) or of(name, family))
    expected = tiny_gguf.write(tmp_path / "tiny.gguf")
    model, _ = models.load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    np.testing.assert_array_equal(model.lm_head.weight.detach().numpy(), expected["lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


@pytest.mark.usefixtures("own_models")
def test_a_gguf_file_with_another_number_of_layers_than_it_says_is_refused(tmp_path, monkeypatch):
    add = gguf.GGUFWriter.add_block_count
    for says, match in ((1, r"9 weights for which .*first is blk.1.attn_k.weight"), (3, "9 of its weights are missing .*layers.2")):
        monkeypatch.setattr(gguf.GGUFWriter, "add_block_count", lambda writer, _, says=says: add(writer, says))
        tiny_gguf.write(tmp_path / f"{says}.gguf")
        with pytest.raises(ModelUnavailable, match=match):
            models.load_model(str(tmp_path / f"{says}.gguf"), device="cpu")


# Paths are names and no patterns


@pytest.mark.parametrize("name", ["[2024]", "a*b", "x?y"])
@pytest.mark.usefixtures("own_models")
def test_a_folder_or_gguf_file_with_an_odd_name_is_read_and_no_other(name, llama, tmp_path):
    for other in ("2", "aXb", "xzy"):
        changed(llama[0], tmp_path / other, {"model.norm.weight": ones(16) * 7})
        tiny_gguf.write(tmp_path / f"{other}.gguf", seed=1)
    folder = changed(llama[0], tmp_path / name)
    model, _ = models.load_model(folder, device="cpu")
    assert torch.equal(model(IDS).logits, llama[1])
    for place in (tmp_path / f"{name}.gguf", tmp_path / name / "inside.gguf"):
        expected = tiny_gguf.write(place, seed=2)
        model, _ = models.load_model(str(place), device="cpu")
        np.testing.assert_array_equal(model.model.norm.weight.detach().numpy(), expected["model.norm.weight"])


@pytest.mark.usefixtures("own_models")
def test_nothing_beside_a_gguf_file_is_read(llama, tmp_path):
    """Repositories of GGUF files often hold the files of another revision, from which transformers takes the tokenizer."""
    words = json.loads((llama[0] / "tokenizer.json").read_text())
    words["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "a"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.1, "do_sample": True}))
    (tmp_path / "chat_template.jinja").write_text("another")
    tiny_gguf.write(tmp_path / "tiny.gguf")
    model, tokenizer = models.load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    assert tokenizer.tokenize("hello") == ["hello"] and tokenizer.eos_token == tiny_gguf.END and tokenizer.chat_template is None
    assert type(model) is LlamaForCausalLM and not model.generation_config.do_sample


@pytest.mark.usefixtures("own_models")
def test_a_gguf_file_behind_a_link_without_its_ending_is_read(tmp_path):
    """The hub's cache keeps files under their hash."""
    expected = tiny_gguf.write(tmp_path / "0123abcd")
    (tmp_path / "tiny.gguf").symlink_to(tmp_path / "0123abcd")
    model, _ = models.load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    np.testing.assert_array_equal(model.model.norm.weight.detach().numpy(), expected["model.norm.weight"])
