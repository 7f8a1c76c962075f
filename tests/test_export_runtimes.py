"""Exports in the programs that read them: the same logits as transformers, and keys and values only where attention is left.

``make test-export`` gets the programs; a test is skipped, with the reason, where one is missing.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_llama import tiny_llama
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from entrodrop_utils import SubBlock, dropped
from entrodrop_utils.export import gguf, llama_cpp, mlx, other_programs, vllm
from entrodrop_utils.models.sources import folder, is_local
from entrodrop_utils.repairing import repair

SHAPE = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SETS = {
    "dense": "",
    "attention": "a1 a4",
    "attention of layer 0": "a0",
    "MLPs": "m0 m2 m3",
    "blocks": "b1 b4",
    "mixed": "b1 a0 m3 a4",
    "last attention": "a5",
    "last MLP": "m5",
    "branches that share a layer": "m1 a2",
}


def drop_set(text: str) -> list[SubBlock]:
    kinds = {"a": "attention", "m": "mlp", "b": "block"}
    return [SubBlock(int(word[1:]), kinds[word[0]]) for word in text.split()]


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 101, (1, 64), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def llama():
    """llama.cpp, or the reason why it is not here."""
    try:
        llama_cpp._library()
    except llama_cpp.RuntimeUnavailable as error:
        pytest.skip(str(error))
    return llama_cpp


def reference(model, ids) -> np.ndarray:
    with torch.no_grad():
        return model(ids).logits[0].numpy()


@pytest.mark.parametrize("name", SETS)
def test_llama_cpp_computes_the_same(llama, tmp_path, ids, name):
    with dropped(tiny_llama(), drop_set(SETS[name])) as model:
        expected = reference(model, ids)
        exported = gguf(model, tmp_path / "m.gguf", dtype="f32")
        with llama.load(exported.path) as runtime:
            np.testing.assert_allclose(runtime.decode(ids[0].tolist()), expected, rtol=1e-4, atol=1e-4)
            runtime.decode(ids[0, :60].tolist())
            steps = np.concatenate([runtime.decode([int(ids[0, i])], i) for i in range(60, 64)])  # with the cache
            np.testing.assert_allclose(steps, expected[60:], rtol=1e-4, atol=1e-4)
        q8_0 = gguf(model, tmp_path / "q.gguf", dtype="q8_0")
    with llama.load(q8_0.path, tokens=2048, kv_type="f16") as runtime:
        assert np.abs(runtime.decode(ids[0].tolist()) - expected).max() < 0.15 * expected.std()
        assert abs(runtime.kv_bytes - 2048 * exported.kv_bytes_per_token) <= 0.01 * 2**20  # it says so with two decimals


def families():
    torch.manual_seed(0)
    llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 32
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    deep, gemma = SHAPE | {"num_hidden_layers": 7}, {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
    return {
        "llama with biases": LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)),
        "llama 3, tied, wide heads": LlamaForCausalLM(
            LlamaConfig(**SHAPE, head_dim=32, tie_word_embeddings=True, rope_parameters=llama3)
        ),
        "mistral": MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None, rope_parameters=linear)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 300.0})),
        "gemma3": Gemma3ForCausalLM(Gemma3TextConfig(**deep, **gemma)),
    }


@pytest.mark.parametrize("family", ["llama with biases", "llama 3, tied, wide heads", "mistral", "qwen2", "qwen3", "gemma3"])
@pytest.mark.filterwarnings("ignore:branches of zeros")
def test_llama_cpp_computes_the_same_for_every_family(llama, tmp_path, ids, family):
    model = families()[family].eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3) if weight.ndim > 1 else weight.add_(0.2 * torch.randn_like(weight))
    by_zeros = family in ("qwen3", "gemma3")
    tolerance = 4e-3 if family == "gemma3" else 1e-4  # llama.cpp looks GELU up in a table of 16 bits
    for blocks, zeros in ((drop_set("b6" if family == "gemma3" else "b2"), False), (drop_set("a1 m3 a0 m5"), by_zeros)):
        with dropped(model, blocks) as smaller:
            path = gguf(smaller, tmp_path / "m.gguf", dtype="f32", zeros=zeros, overwrite=True).path
            with llama.load(path) as runtime:
                np.testing.assert_allclose(runtime.decode(ids[0].tolist()), reference(smaller, ids), rtol=tolerance, atol=tolerance)


REPAIRS = [("constant", None), ("linear", None), ("linear", 3)]


@pytest.mark.parametrize(("how", "rank"), REPAIRS)
def test_llama_cpp_computes_repairs(llama, tmp_path, ids, how, rank):
    model, gone = tiny_llama(), drop_set("a0 m0 a2 m4 a5")
    text = torch.randint(0, 101, (8, 48), generator=torch.Generator().manual_seed(2))
    with dropped(model, gone, repair(model, gone, text, how, rank=rank)) as repaired:
        path = gguf(repaired, tmp_path / "m.gguf", dtype="f32").path
        with llama.load(path) as runtime:
            np.testing.assert_allclose(runtime.decode(ids[0].tolist()), reference(repaired, ids), rtol=1e-4, atol=1e-4)


TEXTS = (
    "Hello, world! It's 2024: 3.14159 or  1,000 tokens.\n\n    def f(x):\n\treturn x ** 2  # why not?",
    "Grüße aus Zürich – naïve café, 你好世界, Привет, 🙂🙃 and \u00a0 no-break",
    "DON'T we've I'll 12345678 a\n\n\nb   c\r\nd",
)


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2.5-coder-0.5b-instruct", "gemma-3-270m")]


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", *LARGE])
def test_llama_cpp_reads_text_as_the_tokenizer_does(llama, tmp_path, name):
    if not is_local(name):
        pytest.skip(f"{name} is not on this machine: make fetch MODEL={name}")
    tokenizer = AutoTokenizer.from_pretrained(folder(name))
    path = gguf(tiny_llama(1, vocab_size=len(tokenizer)), tmp_path / "m.gguf", tokenizer).path
    special = tokenizer.all_special_tokens[0]
    with llama.load(path) as runtime:
        for text in (*TEXTS, f"{TEXTS[0]}{special}x"):
            assert runtime.tokenise(text) == tokenizer(text, add_special_tokens=False).input_ids


TEXT = "The residual stream of a transformer is what every layer reads from and adds to."
GONE = [SubBlock(layer, "attention") for layer in (7, 14, 20, 22, 24, 25, 26, 28)] + [SubBlock(12, "block"), SubBlock(29, "mlp")]


@pytest.mark.slow
def test_the_default_model_in_llama_cpp(llama, tmp_path, smollm2):
    model, tokenizer = smollm2
    ids = torch.tensor(tokenizer(TEXT).input_ids)
    with dropped(model, [*GONE, SubBlock(0, "attention")]) as smaller:
        path = gguf(smaller, tmp_path / "m.gguf", tokenizer, "f32").path
        with llama.load(path) as runtime:
            np.testing.assert_allclose(runtime.decode(ids.tolist()), reference(smaller, ids[None]), rtol=1e-2, atol=1e-2)
            options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            expected = smaller.generate(ids[None], max_new_tokens=12, **options)[0, len(ids) :].tolist()
            assert runtime.greedy(ids.tolist(), 12) == expected


def answer_of(program: str, folder: Path, ids: torch.Tensor, steps: int = 1) -> other_programs.Answer:
    try:
        return other_programs.ask(program, folder, ids[0].tolist(), steps)
    except llama_cpp.RuntimeUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_the_default_model_in_mlx(tmp_path, smollm2):
    model, tokenizer = smollm2
    ids = torch.tensor([2 * tokenizer(TEXT).input_ids])
    with dropped(model, [*GONE, SubBlock(0, "attention")]) as smaller:
        folder = mlx(smaller, tmp_path / "m", tokenizer).path
        answer = answer_of("mlx", folder, ids)
        for way in (answer.logits, answer.cached):
            np.testing.assert_allclose(way, reference(smaller, ids), rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("gone", [GONE, [*GONE, SubBlock(0, "attention")]], ids=["mixed", "mixed, attention 0"])
def test_the_default_model_in_vllm(tmp_path, smollm2, gone):
    model, tokenizer = smollm2
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    with dropped(model, gone) as smaller:
        exported = vllm(smaller, tmp_path / "m", tokenizer, zeros=True)
        answer = answer_of("vllm", exported.path, ids, 12)
        np.testing.assert_allclose(answer.logits, reference(smaller, ids), rtol=1e-2, atol=1e-2)
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert answer.continuation == smaller.generate(ids, max_new_tokens=12, **options)[0, ids.shape[1] :].tolist()
        # at 32 bits; blocks of the cache are whole
        assert answer.kv_bytes_per_token == pytest.approx(2 * exported.kv_bytes_per_token, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("how", [None, "constant", "linear"])
@pytest.mark.parametrize("name", SETS)
def test_mlx_computes_the_same(tmp_path, ids, name, how):
    gone = drop_set(SETS[name])
    if how and name not in ("attention of layer 0", "MLPs", "last attention"):
        pytest.skip("repairs are tried on three sets")
    model = tiny_llama()
    text = torch.randint(0, 101, (8, 48), generator=torch.Generator().manual_seed(2))
    with dropped(model, gone, repair(model, gone, text, how) if how else None) as smaller:
        folder = mlx(smaller, tmp_path / "m")
        answer = answer_of("mlx", folder.path, ids)
        for way in (answer.logits, answer.cached):
            np.testing.assert_allclose(way, reference(smaller, ids), rtol=1e-4, atol=1e-4)
        assert answer.kv_bytes_per_token == 2 * folder.kv_bytes_per_token


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama with biases", "mistral", "qwen2", "qwen3"])
def test_mlx_computes_the_same_for_every_family(tmp_path, ids, family):
    model = families()[family].eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3) if weight.ndim > 1 else weight.add_(0.2 * torch.randn_like(weight))
    with dropped(model, drop_set("b2" if family == "qwen3" else "a1 m3 a0 m5")) as smaller:
        folder = mlx(smaller, tmp_path / "m").path
        answer = answer_of("mlx", folder, ids)
        for way in (answer.logits, answer.cached):
            np.testing.assert_allclose(way, reference(smaller, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "attention of layer 0", "MLPs", "blocks", "mixed", "last attention", "last MLP"])
def test_vllm_computes_the_same(tmp_path, ids, name):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(SHAPE | {"head_dim": 64}))).eval()
    with dropped(model, drop_set(SETS[name])) as smaller:
        answer = answer_of("vllm", vllm(smaller, tmp_path / "m", zeros=True).path, ids)
        np.testing.assert_allclose(answer.logits, reference(smaller, ids), rtol=1e-3, atol=1e-3)


def test_a_runtime_that_is_missing_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(llama_cpp.RuntimeUnavailable, match="pip install xllamacpp"), llama_cpp.load(tmp_path / "m.gguf"):
        pass


def test_a_file_that_llama_cpp_does_not_load_says_why(llama, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"no GGUF")
    with pytest.raises(ValueError, match="llama.cpp does not load"), llama.load(tmp_path / "m.gguf"):
        pass
