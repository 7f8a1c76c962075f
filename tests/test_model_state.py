"""State that could change a result: the mode of a model, autocast, default dtype; and inputs that a model cannot read."""

import json
import math
from contextlib import ExitStack
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from families import ids, tiny
from reference import word_tokenizer
from safetensors.torch import save_file
from tiny_llama import tiny_llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from entrodrop_utils import cache, dropping, entropy, evaluation, iterative, models, saving, scoring, selection, similarity, text
from entrodrop_utils.attention import attention_on_first, restricted
from entrodrop_utils.cached_scoring import cached_score
from entrodrop_utils.families import decoder
from entrodrop_utils.families.decoder import UnsupportedModel, decoder_layers
from entrodrop_utils.models import loading, sources
from entrodrop_utils.residual import SubBlock, find, layout_of, states
from entrodrop_utils.tasks.encoders import agreement_by_set, embed
from entrodrop_utils.tasks.loglikelihoods import loglikelihoods_by_set
from entrodrop_utils.text import pasted_windows

SETS = [(), (SubBlock(1, "attention"),), (SubBlock(2, "mlp"),)]
QUESTIONS = [((3, 4, 5), (6, 7)), ((8, 9), (10,))]


def likelihoods(model: LlamaForCausalLM) -> pd.DataFrame:
    answers = loglikelihoods_by_set(model, QUESTIONS, SETS)
    return pd.DataFrame([(str(s), *answer) for s, given in answers.items() for answer in given.values()])


MEASURES = {
    "score": lambda model, windows: scoring.score(model, windows, ["bucket", "cosine"]),
    "entropies": lambda model, windows: scoring.entropies(model, windows, ["bucket"]),
    "states": lambda model, windows: pd.DataFrame(states(model, windows).flatten(1).double().numpy()),
    "perplexity": lambda model, windows: pd.DataFrame(evaluation.perplexity(model, windows).per_window),
    "divergence": lambda model, windows: pd.DataFrame(evaluation.divergence(tiny_llama(seed=1), model, windows).per_window),
    "losses_by_set": lambda model, windows: evaluation.losses_by_set(model, windows, SETS),
    "attention_on_first": lambda model, windows: pd.DataFrame(attention_on_first(model, windows)),
    "loglikelihoods": lambda model, windows: likelihoods(model),
    "prune_until": lambda model, windows: iterative.prune_until(model, windows[:2], windows[2:], "cosine", retention=0.5)[1],
}


@pytest.fixture
def noisy() -> LlamaForCausalLM:
    """A model whose forward pass in training mode is random."""
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    return model


@pytest.fixture
def measured(own_cache, noisy, windows, monkeypatch, tmp_path):
    """The value of a measure on the model in evaluation mode, and a function that measures anew."""

    def measure(name: str, model: LlamaForCausalLM = noisy) -> pd.DataFrame:
        monkeypatch.setattr(cache, "CACHE", tmp_path / f"cache {np.random.default_rng().integers(2**60)}")
        return MEASURES[name](model, windows)

    return measure


@pytest.mark.parametrize("name", MEASURES)
def test_training_mode_changes_no_number_and_is_put_back(name, measured, noisy):
    expected = measured(name)
    noisy.train()
    noisy.model.layers[2].mlp.eval()
    modes = [module.training for module in noisy.modules()]
    pd.testing.assert_frame_equal(measured(name), expected, check_exact=True)
    assert [module.training for module in noisy.modules()] == modes


@pytest.mark.parametrize("name", ["score", "perplexity", "losses_by_set", "loglikelihoods"])
def test_autocast_changes_no_number(name, measured):
    expected = measured(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pd.testing.assert_frame_equal(measured(name), expected, check_exact=True)


@pytest.mark.parametrize("name", ["score", "perplexity", "losses_by_set"])
def test_the_default_dtype_changes_no_number(name, measured):
    expected = measured(name)
    torch.set_default_dtype(torch.float64)
    try:
        pd.testing.assert_frame_equal(measured(name), expected, rtol=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)


def with_dropout() -> PreTrainedModel:
    """GPT-2 with its modules of dropout, of which each is random in training mode."""
    model = tiny("GPT-2")
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.5
    return model


def explored(model, windows) -> pd.DataFrame:
    losses = evaluation.IncrementalLosses(model, windows)
    return pd.DataFrame([estimate.per_window for one in SETS for estimate in losses(one)])


MORE = {
    **MEASURES,
    "the explorer's losses": explored,
    "embeddings": lambda model, windows: pd.DataFrame(embed(model, windows).numpy()),
    "agreement": lambda model, windows: agreement_by_set(model, windows, SETS).drop(columns="set"),
    "cached scores": lambda model, windows: cached_score(model, windows, ["bucket", "cosine"]),
    "divergence": lambda model, windows: pd.DataFrame(evaluation.divergence(model, tiny("GPT-2"), windows).per_window),
    "divergence from another": lambda model, windows: pd.DataFrame(evaluation.divergence(tiny("GPT-2"), model, windows).per_window),
    "sub-blocks": lambda model, windows: pd.DataFrame([(s.layer, s.kind) for s in find(model, "attention")]),
    "what is dropped": lambda model, windows: pd.DataFrame([dropping.apply_drop(model, list(SETS[1])).revert() is None]),
}


@pytest.mark.parametrize("name", MORE)
def test_whatever_the_state_of_a_model_on_its_first_use_the_numbers_are_the_same(name, monkeypatch, tmp_path):
    """Its layout and its edits are checked in that state as well."""
    windows = ids(4, 16)
    expected = MORE[name](with_dropout(), windows)
    for number, (mode, autocast, dtype) in enumerate(
        [("training", False, "32"), ("evaluation", True, "32"), ("training", True, "64")]
    ):
        monkeypatch.setattr(cache, "CACHE", tmp_path / str(number))
        model = with_dropout().train(mode == "training")
        modes = [part.training for part in model.modules()]
        with ExitStack() as stack:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(getattr(torch, f"float{dtype}"))
            stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=autocast))
            stack.enter_context(torch.enable_grad())
            found = MORE[name](model, windows)
            assert torch.is_autocast_enabled("cpu") == autocast
        pd.testing.assert_frame_equal(found, expected, rtol=1e-6 if dtype == "64" else 0, atol=1e-9 if dtype == "64" else 0)
        assert [part.training for part in model.modules()] == modes
        assert not any(parameter.grad_fn for parameter in model.parameters())


def test_a_model_in_training_mode_has_the_key_of_its_values():
    model, windows = with_dropout().train(), ids(3, 16)
    kept = cached_score(model, windows, ["bucket"])
    key = cache.model_key(model, "scoring")
    assert key == cache.model_key(model.eval(), "scoring")
    with torch.autocast("cpu", torch.bfloat16):
        assert key == cache.model_key(model, "scoring")
    pd.testing.assert_frame_equal(kept, scoring.score(with_dropout(), windows, ["bucket"]), check_exact=True)


class Adapter(nn.Linear):
    """A weight with a low-rank addition, whose scale and switch are no weights."""

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight, self.added = base.weight, nn.Parameter(torch.randn_like(base.weight))
        self.scaling, self._disable_adapters, self.names = {"default": 0.5}, False, ["default"]

    def forward(self, x):
        return super().forward(x) + (not self._disable_adapters) * self.scaling["default"] * x @ self.added.T


CHANGES = {
    "eager attention": lambda model: model.set_attn_implementation("eager"),
    "how experts are computed": lambda model: setattr(model.config, "_experts_implementation", "batched_mm"),
    "the scale of an attention": lambda model: setattr(decoder_layers(model)[1].self_attn, "scaling", 0.9),
    "the eps of a norm": lambda model: setattr(decoder_layers(model)[0].input_layernorm, "variance_epsilon", 0.1),
    "the scale of an adapter": lambda model: decoder_layers(model)[2].self_attn.q_proj.scaling.update(default=0.75),
    "the switch of an adapter": lambda model: setattr(decoder_layers(model)[2].self_attn.q_proj, "_disable_adapters", True),
    "the dtype": lambda model: model.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_result_and_is_no_weight_is_in_the_key(change, windows):
    model = tiny_llama()
    model.model.layers[2].self_attn.q_proj = Adapter(model.model.layers[2].self_attn.q_proj)
    key = cache.fingerprint(model)
    before = cached_score(model, windows, ["cosine"])
    assert cache.fingerprint(model) == key
    CHANGES[change](model)
    assert cache.fingerprint(model) != key
    after = cached_score(model, windows, ["cosine"])
    pd.testing.assert_frame_equal(after, scoring.score(model, windows, ["cosine"]), check_exact=True)
    if change.startswith("the ") and change != "the dtype":
        assert not np.allclose(before.value, after.value, rtol=1e-4)


def test_the_attention_of_a_part_is_in_the_key_and_is_left_as_it_was():
    """A model of images and text whose two parts attend in different ways."""
    model = tiny("Gemma 3 (image and text)")
    key = cache.fingerprint(model)
    model.set_attn_implementation({"text_config": "eager"})
    changed = cache.fingerprint(model)
    assert changed != key
    kinds = [model.config._attn_implementation, model.config.text_config._attn_implementation]
    assert kinds == ["sdpa", "eager"]
    attention_on_first(model, ids())
    parts = (model.config, model.config.vision_config, model.config.text_config)
    assert [config._attn_implementation for config in parts] == ["sdpa", "sdpa", "eager"]
    assert cache.fingerprint(model) == changed
    model.config.text_config._attn_implementation = "flash_attention_2"
    with (
        pytest.raises(ValueError, match="flash_attention_2 attention, which takes no mask"),
        restricted(model, lambda q, k: k <= q),
    ):
        pass


def test_the_attention_is_put_back_where_measuring_it_fails(model, windows, monkeypatch):
    monkeypatch.setattr(type(model.model), "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attention_on_first(model, windows)
    assert model.config._attn_implementation == "sdpa"


def trained_to_cut(tokenizer):
    tokenizer(["w3 w4 w5", "w6"], truncation=True, max_length=2, padding="max_length")
    return tokenizer


def cut_by_its_backend(tokenizer):
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=64, pad_id=0, pad_token="w0")
    return tokenizer


def of_the_other_side(tokenizer):
    tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length = "left", "left", 4
    return tokenizer


def saved_so(tokenizer, folder):
    cut_by_its_backend(tokenizer).save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_truncation_and_padding_of_a_tokenizer_change_no_window(tmp_path):
    documents = [" ".join(f"w{(i * 7 + j * j) % 93 + 3}" for j in range(30)) for i in range(60)]
    (tmp_path / "notes.txt").write_text("\n\n".join(documents))
    source = str(tmp_path / "notes.txt")
    expected = text.windows(source, "calibration", word_tokenizer(), 4, 50)
    pasted = pasted_windows(" ".join(documents), word_tokenizer(), 4, 50)
    assert expected.shape == pasted.shape == (4, 50)
    assert not (expected == 0).any()
    for change in (trained_to_cut, cut_by_its_backend, of_the_other_side, partial(saved_so, folder=tmp_path / "tokenizer")):
        assert torch.equal(text.windows(source, "calibration", change(word_tokenizer()), 4, 50), expected)
        assert torch.equal(pasted_windows(" ".join(documents), change(word_tokenizer()), 4, 50), pasted)


def test_the_mode_is_put_back_after_an_error(noisy, windows):
    layout_of(noisy)
    noisy.train()
    noisy.model.embed_tokens.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        scoring.score(noisy, windows, ["bucket"])
    assert all(module.training for module in noisy.modules())


def learned_positions(layers: int = 4) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=101, n_embd=32, n_layer=layers, n_head=4, n_positions=16)).eval()


READERS = {
    "score": lambda model, windows: scoring.score(model, windows, ["cosine"]),
    "perplexity": evaluation.perplexity,
    "losses_by_set": lambda model, windows: evaluation.losses_by_set(model, windows, [()]),
    "states": states,
}


@pytest.mark.parametrize("reader", READERS)
def test_windows_longer_than_the_positions_are_refused(reader):
    with pytest.raises(ValueError, match="windows of 24 tokens are longer than the 16 positions of the model: use shorter"):
        READERS[reader](learned_positions(), torch.ones(2, 24, dtype=torch.long))
    READERS[reader](learned_positions(), torch.arange(32).view(2, 16))


@pytest.mark.parametrize("reader", READERS)
def test_ids_past_the_embedding_are_refused(reader):
    with pytest.raises(ValueError, match="token 101 is past the 101 rows of the model's embedding: the tokenizer belongs to"):
        READERS[reader](tiny_llama(), torch.full((2, 8), 101))


@pytest.mark.parametrize("reader", READERS)
def test_ids_below_zero_are_refused(reader):
    with pytest.raises(ValueError, match="token -100 is negative: a window holds the ids of whole text"):
        READERS[reader](tiny_llama(), torch.tensor([[3, 4, 5], [6, -100, -1]]))


def encoder(family: str) -> PreTrainedModel:
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{family}Config")(**sizes, max_position_embeddings=20, pad_token_id=1, ffn_dim=48)
    return getattr(transformers, f"{family}ForMaskedLM")(config).eval()


MPT = {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 20, "vocab_size": 101}
LIMITED = {
    "BERT": (lambda: encoder("Bert"), 20),
    "RoBERTa, whose positions start after the padding": (lambda: encoder("Roberta"), 18),
    "XLM-RoBERTa": (lambda: encoder("XLMRoberta"), 18),
    "MPT": (lambda: transformers.MptForCausalLM(transformers.MptConfig(**MPT)).eval(), 20),
    "OPT": (lambda: tiny("OPT"), 128),
    "GPT-2": (lambda: tiny("GPT-2"), 128),
}


@pytest.mark.parametrize("name", LIMITED)
def test_the_limit_is_the_number_of_tokens_that_a_model_can_read(name):
    make, limit = LIMITED[name]
    model, longest = make(), torch.arange(limit)[None] % 90 + 3
    assert len(scoring.score(model, longest, ["cosine"], ["block"])) == len(decoder_layers(model))
    longer = torch.cat([longest, longest[:, :1]], 1)
    with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
        model(longer)
    with pytest.raises(ValueError, match=f"windows of {limit + 1} tokens are longer than the {limit} positions of the model"):
        scoring.score(model, longer, ["cosine"])


@pytest.mark.parametrize("name", ["Bloom", "T5 (encoder)"])
def test_a_model_without_a_limit_reads_any_length(name):
    model = tiny(name)
    vars(model.config).pop("max_position_embeddings", None)  # the tests give it to every family; these two do not have it
    assert states(model, torch.arange(140)[None] % 90 + 3).isfinite().all()


TOO_LONG, UNKNOWN = torch.ones(2, 17, dtype=torch.long), torch.full((2, 8), 101)
PRUNING = {
    "prune_until": lambda model, windows: iterative.prune_until(model, windows, windows + 0 * windows[:1], "cosine"),
    "divergence": lambda model, windows: evaluation.divergence(model, model, windows),
    "the explorer's losses": evaluation.IncrementalLosses,
    "entropies": lambda model, windows: scoring.entropies(model, windows, ["bucket"]),
    "cached scores": lambda model, windows: cached_score(model, windows, ["bucket"]),
    "attention_on_first": attention_on_first,
    "embeddings": embed,
}


@pytest.mark.parametrize("reader", [name for name in {**READERS, **PRUNING} if name != "prune_until"])
@pytest.mark.parametrize("windows", [TOO_LONG, UNKNOWN], ids=["too long", "unknown"])
def test_what_cannot_be_read_is_refused_before_anything_runs(reader, windows):
    model = learned_positions()
    model.transformer.register_forward_pre_hook(lambda *_: pytest.fail("it was run"))
    with pytest.raises(ValueError, match="longer than the 16 positions|past the 101 rows"):
        {**READERS, **PRUNING}[reader](model, windows)


def test_a_process_of_pruning_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match="windows of 24 tokens are longer than the 16 positions"):
        iterative.prune_until(learned_positions(6), torch.randint(0, 9, (3, 12)), torch.randint(50, 99, (3, 24)), "cosine")
    with pytest.raises(ValueError, match="token 101 is past the 101 rows"):
        iterative.prune_until(learned_positions(6), torch.full((3, 12), 101), torch.randint(50, 99, (3, 12)), "cosine")


METRICS = {
    "a partial": {"mine": partial(entropy.knn, k=24)},
    "without the first token": {"rest": scoring.without_first(partial(entropy.knn, k=23))},
    "of the first tokens": {"short": scoring.first_tokens(entropy.knn, 20)},
    "more first tokens than there are": {"long": scoring.first_tokens(entropy.bucket, 25)},
    "a name": ["cosine", "knn"],
}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("measure", [scoring.score, cached_score, scoring.entropies])
def test_a_metric_that_the_windows_are_too_short_for_is_refused_before_anything_runs(name, measure, windows):
    model = tiny_llama()
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("it was run"))
    metrics = METRICS[name] if measure is not scoring.entropies or name != "a name" else ["knn"]
    with pytest.raises(ValueError, match="k must be a whole number between 1 and token - 1 = |25 tokens were asked for, the seq"):
        measure(model, windows, metrics)


def test_a_metric_of_ones_own_is_called_with_states_alone(windows):
    shapes = []
    scoring.score(tiny_llama(2), windows, {"mine": lambda x: shapes.append(x.shape) or torch.zeros(())}, ["block"])
    assert set(shapes) == {(24, 32)}


@pytest.mark.parametrize(("metric", "tokens"), [("knn", 24), ("knn", 25)])
def test_a_neighbour_past_the_tokens_is_refused(metric, tokens):
    windows = torch.randint(0, 101, (2, tokens), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=rf"k must be a whole number between 1 and token - 1 = {tokens - 1}, got 25"):
        scoring.score(tiny_llama(), windows, [metric])


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_in_a_model_of_few_layers_all_are_protected_and_that_is_said(layers, windows):
    scores = scoring.score(tiny_llama(layers), windows, ["cosine"], ["mlp"])
    protected = [layer for layer in (0, 1, -1) if layer < layers]
    with pytest.raises(ValueError, match=rf"all {layers} sub-blocks of kind mlp are protected, in layers .*: protect fewer"):
        selection.one_shot(scores, "cosine", "mlp", 1, protected)
    assert len(selection.one_shot(scores, "cosine", "mlp", 1, protected=())) == 1
    assert selection.one_shot(scores, "cosine", "mlp", 0, protected) == []
    says = "there is 1 layer" if layers == 1 else "all . sub-blocks of kind mlp are protected, in layers 0, 1"
    with pytest.raises(ValueError, match=says):
        selection.one_shot(scores, "cosine", "mlp")


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_in_a_model_of_few_layers_every_way_to_drop_says_what_is_left(layers, windows):
    model = tiny_llama(layers)
    scores = scoring.score(model, windows, ["bucket"])
    order = selection.one_shot(scores, "bucket", "mlp", protected=())
    assert len(order) == layers
    with pytest.raises(ValueError, match=f"cannot drop {layers + 1} of {layers} sub-blocks of kind mlp: {len(order)} are not"):
        selection.one_shot(scores, "bucket", "mlp", layers + 1, protected=())
    for kind, says in (("attention", "cannot drop every attention layer"), ("block", f"cannot drop all {layers} blocks")):
        with pytest.raises(ValueError, match=says), dropping.dropped(model, [SubBlock(i, kind) for i in range(layers)]):
            pass
    found, log = iterative.prune_until(model, windows[:2], windows[2:], "cosine", "mlp", 0.0, protected=range(layers))
    assert found == [] and log.empty
    if layers == 1:
        with pytest.raises(ValueError, match=r"cannot protect layers \[1\]: there is 1 layer"):
            iterative.prune_until(model, windows[:2], windows[2:], "cosine")
        with pytest.raises(ValueError, match="cannot drop every attention layer"):
            iterative.prune_until(model, windows[:2], windows[2:], "cosine", retention=0.0, protected=())


@pytest.mark.parametrize(
    "weight", ["model.embed_tokens", "model.layers.1.mlp.up_proj", "model.layers.5.self_attn.o_proj", "model.norm"]
)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_damaged_weight_is_named_and_the_layout_is_not_blamed(weight, value):
    model = tiny_llama()
    model.get_submodule(weight).weight.data[3] = float(value)
    with pytest.raises(
        ValueError, match=rf"1 weights of LlamaForCausalLM hold NaN or infinite values, first {weight}.weight"
    ) as raised:
        layout_of(model)
    assert not isinstance(raised.value, UnsupportedModel)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Mixtral", "BERT", "T5 (encoder)"])
def test_every_kind_of_weight_is_named(name):
    kinds = {key.split(".", 3)[-1] if key.split(".")[2:3] == ["1"] else key: key for key, _ in tiny(name).named_parameters()}
    assert len(kinds) > 8
    for number, key in enumerate(kinds.values()):
        model = tiny(name)
        model.get_parameter(key).data.view(-1)[-1] = (float("nan"), float("inf"), -float("inf"))[number % 3]
        with pytest.raises(ValueError, match=rf"1 weights of .* hold NaN or infinite values, first {key}: get a whole") as raised:
            find(model, "mlp")
        assert "layout" not in str(raised.value).lower()
        assert not isinstance(raised.value, UnsupportedModel)


def test_a_buffer_of_nan_is_named_and_one_of_infinite_values_may_be_a_mask():
    model = tiny_llama()
    model.model.rotary_emb.inv_freq[1] = float("nan")
    with pytest.raises(ValueError, match="first model.rotary_emb.inv_freq: get a whole copy of it"):
        find(model, "mlp")
    model = tiny_llama()
    model.model.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    assert len(find(model, "mlp")) == 6


def test_a_damaged_weight_of_a_family_without_a_layout_is_still_such_a_family():
    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2, num_heads=2)
    model = transformers.MambaForCausalLM(config)
    model.backbone.layers[0].norm.weight.data[0] = torch.nan
    with pytest.raises(UnsupportedModel, match="have no known layout"):
        find(model, "mlp")


def test_states_past_the_range_of_a_small_dtype_are_not_blamed_on_the_layout():
    model = tiny_llama().half()
    model.model.layers[1].mlp.down_proj.weight.data.fill_(6e4)
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM computes NaN with sound weights in torch.float16: load it in"
    ) as raised:
        find(model, "mlp")
    assert not isinstance(raised.value, UnsupportedModel)
    assert len(find(model.float(), "mlp")) == 6


def test_every_reason_is_one_whole_line(tmp_path, monkeypatch):
    def breaks(*_, **__):
        raise NotImplementedError("first line\n  and the second,\nwhich says why")

    whole = "NotImplementedError: first line and the second, which says why"
    model = tiny_llama()
    layout_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(
            model,
            "forward",
            lambda *_, **kwargs: breaks() if len(decoder_layers(model)) < 6 else type(model).forward(model, *_, **kwargs),
        )
        with pytest.raises(UnsupportedModel, match=rf"does not run without block 0 \({whole}\), so no block can be dropped"):
            dropping.apply_drop(model, [SubBlock(2, "block")])
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "_from_config", breaks)
        with pytest.raises(ValueError, match=f"without block 2 no config describes the model: {whole}"):
            saving.remove(model, [SubBlock(2, "block")])
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(loading, "_read", breaks)
    with pytest.raises(models.ModelUnavailable, match=r"could not be loaded \(first line and the second, which says why\)"):
        models.load_model(str(tmp_path), device="cpu")


def test_the_reasons_of_a_refusal_are_whole(monkeypatch):
    def broken(*_):
        raise RuntimeError("first line\nand the second, which says why")

    monkeypatch.setattr(decoder, "find_mismatch", broken)
    with pytest.raises(UnsupportedModel, match="RuntimeError: first line and the second, which says why"):
        find(tiny("Llama"), "mlp")


def test_a_folder_with_only_an_adapter_says_what_to_do(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    says = "holds an adapter and no model: merge .* and save the result"
    with pytest.raises(models.ModelUnavailable, match=says):
        models.load_model(str(tmp_path), device="cpu")
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")  # as older ones were saved
    with pytest.raises(models.ModelUnavailable, match=says):
        models.load_model(str(tmp_path), device="cpu")
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(models.ModelUnavailable, match="has its weights as a pickle"):
        models.load_model(str(tmp_path), device="cpu")


def test_every_path_may_begin_in_the_home_folder(tmp_path, monkeypatch, windows):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "notes.txt").write_text("\n\n".join(" ".join(f"w{(i + j) % 90}" for j in range(12)) for i in range(60)))
    assert text.windows("~/notes.txt", "calibration", word_tokenizer(), 3, 8).shape == (3, 8)
    saving.save_pruned(tiny_llama(2), "~/models/small", word_tokenizer())
    model, _ = models.load_model("~/models/small", device="cpu")
    assert torch.equal(model.lm_head.weight, tiny_llama(2).lm_head.weight)
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        saving.save_pruned(tiny_llama(2), "~/models/small")
    with pytest.raises(ValueError, match=f"{tmp_path}/elsewhere has no config.json"):
        saving.load_pruned("~/elsewhere")
    iterative.prune_until(tiny_llama(), windows[:2], windows[2:], "cosine", retention=0.9, log="~/log.json")
    assert "steps" in json.loads((tmp_path / "log.json").read_text())


def test_a_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saving.save_pruned(saving.remove(tiny_llama(), [SubBlock(1, "mlp")]), "~/smaller")
    assert (tmp_path / "smaller" / "config.json").is_file()
    assert find(saving.load_pruned("~/smaller"), "mlp") == [SubBlock(layer, "mlp") for layer in (0, 2, 3, 4, 5)]


PLAIN = {"bucket": entropy.bucket, "knn": entropy.knn, "renyi": entropy.renyi, "matrix_renyi": entropy.matrix_renyi}


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        *(("knn", k) for k in (2.5, 0, -1, 30, math.inf, math.nan, 24.999999)),
        *(("bucket", bins) for bins in (math.inf, math.nan, -math.inf, 20.5)),
        *(("renyi", alpha) for alpha in (math.nan, math.inf, 0, -1, 1)),
        *(("matrix_renyi", alpha) for alpha in (math.nan, math.inf, 0, -0.5)),
    ],
)
def test_a_setting_that_is_no_number_of_its_kind_is_refused(name, setting):
    with pytest.raises(ValueError, match=r"(bins|k|alpha) must be .*got "):
        getattr(PLAIN[name], "__wrapped__", PLAIN[name])(torch.randn(30, 4), setting)


@pytest.mark.parametrize(("name", "setting"), [("bucket", 20.0), ("knn", 5.0), ("knn", np.int64(5)), ("bucket", np.float64(20))])
def test_a_whole_number_of_another_type_is_one(name, setting):
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    assert float(getattr(PLAIN[name], "__wrapped__", PLAIN[name])(x, setting)) == float(PLAIN[name](x, int(setting)))


@pytest.mark.parametrize("name", entropy.ESTIMATORS)
@pytest.mark.parametrize("scale", [3e38, 1e-38])
def test_every_estimate_of_states_at_the_end_of_float32_is_that_of_their_doubles(name, scale):
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    x = x / x.abs().max() * scale
    found, metric = entropy.ESTIMATORS[name](x), entropy.ESTIMATORS[name]
    shift = 5 * math.log(scale) if name in ("knn", "gaussian") else 0.0  # these follow scale
    expected = float(metric(x.double() / scale)) + shift
    assert float(found) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_a_range_past_float64_too():
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x / x.abs().max()
    assert float(entropy.bucket(x * 1.7e308)) == pytest.approx(float(entropy.bucket(x)), rel=1e-6)


@pytest.mark.parametrize("name", ["cosine", "angular", "norm_ratio"])
def test_a_similarity_at_the_end_of_float32_is_that_of_the_doubles(name):
    x, y = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    metric = similarity.SIMILARITIES[name]
    assert float(metric(x * 1e38, y * 1e38)) == pytest.approx(float(metric(x.double(), y.double())), rel=1e-6)


@pytest.mark.parametrize("bins", [2.5, 1, 0, -3])
def test_bins_are_whole_numbers(bins):
    with pytest.raises(ValueError, match="bins must be a whole number of at least 2"):
        entropy.bucket.__wrapped__(torch.randn(30, 4), bins)  # without the check of types that the tests run with


def test_a_range_past_float32_gives_the_entropy_of_the_same_states_made_smaller():
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    x = x / x.abs().max()
    assert float(entropy.bucket(x * 3e38)) == pytest.approx(float(entropy.bucket(x.double())), rel=1e-3)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_refused(name):
    for use in (models.check_model, models.load_model, sources.folder):
        with pytest.raises(ValueError, match="no model is named: choose one of .*smollm2.*, a folder, a .gguf file or a hub name"):
            use(name)
    with pytest.raises(ValueError, match="no text is named: choose docs"):
        text.check_text(name)


def test_the_same_numbers_from_ids_of_any_integer_type():
    model, tokens = tiny_llama(), ids()
    for dtype in (torch.int32, torch.int64):
        torch.testing.assert_close(states(model, tokens.to(dtype)), states(model, tokens))
