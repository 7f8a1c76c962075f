"""Exports as files and folders: what is in them, what is refused, and that nothing is left after an error.

Whether the programs compute the same is in test_export_runtimes.py.
"""

import contextlib
import copy
import errno
import json
import resource
import shutil

import gguf as library
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from tiny_gguf import write as write_tiny_gguf
from tiny_llama import tiny_llama
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from entrodrop_utils import SubBlock, dropped, load_model, remove, save_pruned
from entrodrop_utils.dropping import Repair
from entrodrop_utils.export import ExportMismatch, check_file, check_folder, gguf, mlx, vllm
from entrodrop_utils.export.__main__ import main
from entrodrop_utils.export.branches import Branch, branches, pack
from entrodrop_utils.families.decoder import UnsupportedModel


def attention(*layers: int) -> list[SubBlock]:
    return [SubBlock(layer, "attention") for layer in layers]


def mlps(*layers: int) -> list[SubBlock]:
    return [SubBlock(layer, "mlp") for layer in layers]


def blocks(*layers: int) -> list[SubBlock]:
    return [SubBlock(layer, "block") for layer in layers]


SHAPE = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def field(path, key: str):
    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    return reader.fields[key.replace("ARCH", architecture)].contents()


def read(path) -> dict[str, np.ndarray]:
    return {t.name: library.dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}


@pytest.mark.parametrize(
    ("drop_set", "heads", "kv", "ffn"),
    [
        (attention(2, 4), [4, 4, 0, 4, 0, 4], [2, 2, 0, 2, 0, 2], [48] * 6),
        (attention(0), [4] * 6, [0, 2, 2, 2, 2, 2], [48] * 6),  # a linear layer of zeros
        (attention(5), [4] * 5 + [0], [2] * 5 + [0], [48] * 6),
        (mlps(1, 5), [4] * 6, [2] * 6, [48, 32, 48, 48, 48, 32]),  # never 0
        (blocks(1) + attention(3), [4, 4, 0, 4, 4], [2, 2, 0, 2, 2], [48] * 5),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value[0], SubBlock) else "",
)
def test_a_deci_file_says_what_each_layer_has(model, tmp_path, drop_set, heads, kv, ffn):
    exported = gguf(remove(model, drop_set), tmp_path / "m.gguf")
    path = exported.path
    assert field(path, "general.architecture") == "deci"
    assert field(path, "ARCH.attention.head_count") == heads
    assert field(path, "ARCH.attention.head_count_kv") == kv
    assert field(path, "ARCH.feed_forward_length") == ffn
    tensors = read(path)
    for i, (n, n_kv) in enumerate(zip(heads, kv, strict=True)):
        assert (f"blk.{i}.attn_norm.weight" in tensors) == (n > 0)
        assert (f"blk.{i}.attn_k.weight" in tensors) == (n_kv > 0)
    if drop_set == attention(0):
        assert not tensors["blk.0.attn_output.weight"].any()
        assert "Layer 0 keeps a linear layer of zeros, without keys and values" in str(exported)
    if drop_set == mlps(1, 5):
        assert "Layers without an MLP (2) keep one of 32 zeros" in str(exported)
        assert not any(tensors[f"blk.{i}.ffn_{name}.weight"].any() for i in (1, 5) for name in ("gate", "up", "down"))


def test_branches_share_layers_where_nothing_is_left_between_them(model, tmp_path):
    exported = gguf(remove(model, mlps(1) + attention(2)), tmp_path / "m.gguf", dtype="f32")
    assert (exported.architecture, exported.kv_layers, exported.layers) == ("llama", 5, 6)
    assert field(exported.path, "ARCH.block_count") == 5


def test_packing_keeps_every_branch_in_order():
    generator = np.random.default_rng(0)
    for _ in range(200):
        kinds = generator.choice(["attention", "mlp", "linear", "constant"], generator.integers(1, 12))
        sequence = [Branch(k, SubBlock(i, "block"), {"bias": torch.full((1,), float(2**i))}) for i, k in enumerate(kinds)]
        found, expected = [], []
        for layer in pack(sequence):
            assert layer.first or layer.mlp or layer.bias is not None
            found += [branch.sub_block.layer for branch in (layer.first, layer.mlp) if branch]
            found += [] if layer.bias is None else [i for i in range(12) if int(layer.bias) >> i & 1]
        expected = list(range(len(kinds)))
        assert found == expected


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_transformers_reads_a_plain_file_back(tmp_path, family):
    """An independent reader: transformers' own, which undoes the permutation and the shift of norms."""
    configs = {
        "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
        "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=128)),
        "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**SHAPE, head_dim=32, query_pre_attn_scalar=32, sliding_window=16)),
    }
    torch.manual_seed(0)
    kind, config = configs[family]
    model = kind(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    source = tmp_path / "vocabulary.gguf"
    write_tiny_gguf(source)
    model.resize_token_embeddings(len(field(source, "tokenizer.ggml.tokens")))
    with dropped(model, [] if family == "gemma3" else blocks(2)) as smaller:
        gguf(smaller, tmp_path / "m.gguf", source, "f32")
        own = {name: weight.clone() for name, weight in smaller.state_dict().items()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    assert loaded.keys() == own.keys()
    for name, weight in own.items():
        torch.testing.assert_close(loaded[name], weight, rtol=0, atol=1e-6, msg=name)


def test_types_round_as_they_should(model, tmp_path):
    weight = model.model.layers[0].mlp.gate_proj.weight.detach().numpy()
    sizes = {}
    for dtype, step in {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 254}.items():
        exported = gguf(model, tmp_path / f"{dtype}.gguf", dtype=dtype)
        written, sizes[dtype] = read(exported.path)["blk.0.ffn_gate.weight"], exported.nbytes
        assert np.abs(written - weight).max() <= step * np.abs(weight).max() * 1.01
        assert (written != weight).any() == (dtype != "f32")
    assert sizes["q8_0"] < sizes["f16"] == sizes["bf16"] < sizes["f32"]


def test_repairs_are_in_the_file(model, tmp_path):
    bias, matrix = torch.randn(32), torch.randn(32, 32)
    drop_set = attention(2) + mlps(4)
    constant = Repair({s: {"bias": bias} for s in drop_set})
    with dropped(model, drop_set, constant) as repaired:
        tensors = read(gguf(repaired, tmp_path / "constant.gguf", dtype="f32").path)
    # the constant of attention 2 is added with MLP 1, that of MLP 4 with an empty MLP
    np.testing.assert_allclose(tensors["blk.1.ffn_down.bias"], bias, rtol=1e-6)
    np.testing.assert_allclose(tensors["blk.4.ffn_down.bias"], bias, rtol=1e-6)
    down, up = torch.randn(3, 32), torch.randn(32, 3)
    for maps, product in (({"weight": matrix}, matrix), ({"down": down, "up": up}, up @ down)):
        with dropped(model, attention(2), Repair({attention(2)[0]: maps | {"bias": bias}})) as repaired:
            tensors = read(gguf(repaired, tmp_path / "linear.gguf", dtype="f32", overwrite=True).path)
        np.testing.assert_allclose(tensors["blk.2.attn_output.weight"], product, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(
            tensors["blk.2.attn_norm.weight"], model.model.layers[2].input_layernorm.weight.detach().numpy()
        )
    with dropped(model, attention(2), Repair({attention(2)[0]: {"weight": matrix}})) as repaired:
        assert mlx(repaired, tmp_path / "mlx").kv_layers == 5
        assert torch.equal(load_file(tmp_path / "mlx" / "model.safetensors")["model.layers.2.self_attn.linear.weight"], matrix)
        with pytest.raises(UnsupportedModel, match="vLLM has nothing for the linear repair of attention 2"):
            vllm(repaired, tmp_path / "vllm")
    with dropped(model, drop_set, constant) as repaired:
        vllm(repaired, tmp_path / "vllm")
        assert torch.equal(load_file(tmp_path / "vllm" / "model.safetensors")["model.layers.1.mlp.down_proj.bias"], bias)


def test_nas_folders_say_what_each_layer_has(model, tmp_path):
    smaller = remove(model, attention(2) + mlps(4))
    for write in (vllm, mlx):
        exported = write(smaller, tmp_path / write.__name__)
        folder = exported.path
        assert f"MLPs are 256 wide instead of 48: {exported.target} has multiples of 256" in str(exported)
        config = json.loads((folder / "config.json").read_text())
        no_ops = [(b["attention"]["no_op"], b["ffn"]["no_op"]) for b in config["block_configs"]]
        assert no_ops == [(False, False)] * 2 + [(True, False), (False, False), (False, True), (False, False)]
        wide = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
        assert wide.shape == (32, 256)  # both targets round the width up
        assert torch.equal(wide[:, :48], model.model.layers[0].mlp.down_proj.weight)
        assert not wide[:, 48:].any()
        for block in config["block_configs"]:  # their own formula, with mlx-lm's rounding of the factor
            if block["ffn"]["ffn_mult"]:
                width = int(2 * round(block["ffn"]["ffn_mult"], 6) * 32 / 3)
                assert -(-width // 256) * 256 == 256
    config = AutoConfig.from_pretrained(tmp_path / "vllm", trust_remote_code=True)
    assert config.block_configs[2].attention.no_op
    assert not hasattr(config.block_configs[2].ffn, "intermediate_size")


def test_blocks_alone_are_a_plain_checkpoint_for_vllm_and_mlx(model, tmp_path):
    smaller = remove(model, blocks(1, 2))
    for write in (vllm, mlx):
        exported = write(smaller, tmp_path / write.__name__)
        assert (exported.architecture, exported.kv_layers, exported.layers) == ("llama", 4, 6)
        assert len(LlamaForCausalLM.from_pretrained(exported.path).model.layers) == 4


def test_layer_0_in_vllm(model, tmp_path):
    smaller = remove(model, attention(0))
    with pytest.raises(UnsupportedModel, match="vLLM crashes without the attention of the first layer"):
        vllm(smaller, tmp_path / "refused")
    exported = vllm(smaller, tmp_path / "kept", zeros=True)
    assert exported.kv_layers == 6
    assert "Layer 0 keeps an attention of zeros" in str(exported)
    assert not load_file(exported.path / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"].any()


def test_families_that_deci_does_not_fit(tmp_path):
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32)).eval()
    with dropped(model, attention(2)) as smaller:
        with pytest.raises(UnsupportedModel, match=r"no file for a qwen3 without single attention layers.*zeros=True"):
            gguf(smaller, tmp_path / "m.gguf")
        with pytest.warns(UserWarning, match="no faster"):
            exported = gguf(smaller, tmp_path / "m.gguf", zeros=True)
        for write in (vllm, mlx):
            with pytest.raises(UnsupportedModel, match="has no model type for a qwen3"):
                write(smaller, tmp_path / "folder")
    assert exported.kv_layers == 6
    assert "nothing is faster" in str(exported)
    assert not read(exported.path)["blk.2.attn_output.weight"].any()
    gemma = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, head_dim=32, query_pre_attn_scalar=32, sliding_window=16)).eval()
    with dropped(gemma, blocks(2)) as smaller, pytest.raises(UnsupportedModel, match="every sixth layer"):
        gguf(smaller, tmp_path / "gemma.gguf")


SETTINGS = {
    "sliding windows": {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2},
    "activation 'gelu'": {"hidden_act": "gelu"},
    "rotary scaling 'yarn'": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    },
}


@pytest.mark.parametrize("what", SETTINGS)
def test_settings_that_a_target_ignores_are_refused(tmp_path, what):
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, **SETTINGS[what])).eval()
    with dropped(model, attention(2)) as smaller:
        for write in (gguf, vllm, mlx):
            with pytest.raises(UnsupportedModel, match=what):
                write(smaller, tmp_path / "refused")
    assert not list(tmp_path.iterdir())


def test_bad_input_leaves_nothing(model, tmp_path, monkeypatch):
    with torch.device("meta"):
        hollow = LlamaForCausalLM(LlamaConfig(**SHAPE))
    encoder = BertForMaskedLM(BertConfig(**(SHAPE | {"num_attention_heads": 4})))
    other = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50))
    for write in (gguf, vllm, mlx):
        with pytest.raises(ValueError, match="meta device"):
            write(hollow, tmp_path / "x")
        with pytest.raises(UnsupportedModel, match="no causal language model"):
            write(encoder, tmp_path / "x")
        with dropped(other, attention(1)), pytest.raises(UnsupportedModel, match="gpt2"):
            write(other, tmp_path / "x")
        (tmp_path / "full").mkdir(exist_ok=True)
        (tmp_path / "full" / "file").write_text("mine")
        with pytest.raises(FileExistsError, match="exists"):
            write(model, tmp_path / "full")
    with pytest.raises(ValueError, match="unknown dtype 'q4_0'"):
        gguf(model, tmp_path / "x", dtype="q4_0")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"blk.1.ffn_up.weight has values past the range of f16"):
        gguf(model, tmp_path / "x", dtype="f16")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    smaller = remove(model, attention(1))
    for write in (gguf, vllm, mlx):
        with pytest.raises(OSError, match="no space for") as error:
            write(smaller, tmp_path / "x")
        assert error.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "file").read_text() == "mine"


@pytest.mark.parametrize("write", [gguf, vllm, mlx], ids=lambda f: f.__name__)
def test_a_disk_that_fills_while_writing(model, tmp_path, write):
    smaller = remove(model, attention(1))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="could not be written"):
            write(smaller, tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert not list(tmp_path.iterdir())


def altered_file(path, name: str):
    """A copy of a GGUF file with 0.1 more in a tensor."""
    broken = path.with_name("broken.gguf")
    shutil.copyfile(path, broken)
    tensor = next(t for t in GGUFReader(broken, "r+").tensors if t.name == name)
    tensor.data[...] += 0.1
    tensor.data.base.flush() if hasattr(tensor.data.base, "flush") else None
    return broken


@contextlib.contextmanager
def altered_folder(folder, name: str):
    """The folder has 0.1 more in a tensor until the context closes."""
    file = folder / "model.safetensors"
    state = load_file(file)
    try:
        save_file(state | {name: state[name] + 0.1}, file)
        yield
    finally:
        save_file(state, file)


def test_the_check_finds_what_is_wrong_in_a_file(model, tmp_path):
    smaller = remove(copy.deepcopy(model), attention(2) + mlps(4))
    path = gguf(smaller, tmp_path / "m.gguf", dtype="f32").path
    check_file(path, smaller)
    with pytest.raises(ExportMismatch):  # another set of as many
        check_file(path, remove(copy.deepcopy(model), attention(3) + mlps(4)))
    with pytest.raises(ExportMismatch):  # a branch more
        check_file(path, remove(copy.deepcopy(model), attention(2)))
    for name in ("blk.0.attn_q.weight", "blk.1.ffn_down.weight", "blk.4.ffn_up.weight", "token_embd.weight", "output_norm.weight"):
        with pytest.raises(ExportMismatch, match=name):
            check_file(altered_file(path, name), smaller)


def test_the_check_finds_what_is_wrong_in_a_folder(model, tmp_path):
    for write in (vllm, mlx):
        smaller = remove(copy.deepcopy(model), attention(2) + mlps(4))
        folder = write(smaller, tmp_path / write.__name__).path
        check_folder(folder, smaller)
        with pytest.raises(ExportMismatch):  # another set of as many
            check_folder(folder, remove(copy.deepcopy(model), attention(3) + mlps(4)))
        with pytest.raises(ExportMismatch):  # a branch more
            check_folder(folder, remove(copy.deepcopy(model), attention(2)))
        for name in ("model.layers.3.self_attn.q_proj", "model.layers.5.mlp.down_proj", "model.embed_tokens", "model.norm"):
            with pytest.raises(ExportMismatch, match=name), altered_folder(folder, f"{name}.weight"):
                check_folder(folder, smaller)
    smaller = remove(copy.deepcopy(model), blocks(1))
    folder = mlx(smaller, tmp_path / "plain").path
    check_folder(folder, smaller)
    with pytest.raises(ExportMismatch, match=r"layers.2.*up_proj"), altered_folder(folder, "model.layers.2.mlp.up_proj.weight"):
        check_folder(folder, smaller)
    with pytest.raises(ExportMismatch):
        check_folder(folder, remove(copy.deepcopy(model), blocks(2)))


def test_the_check_finds_what_is_wrong_in_a_repair(model, tmp_path):
    drop_set = attention(0, 2) + mlps(4)  # a constant closes its layer, so the layers are 0: attention 0, 3: attention 2, 6: MLP 4
    maps = {"weight": torch.randn(32, 32), "bias": torch.randn(32)}
    repair = Repair({s: maps if s == attention(2)[0] else {"bias": torch.randn(32)} for s in drop_set})
    with dropped(model, drop_set, repair) as repaired:
        path = gguf(repaired, tmp_path / "m.gguf", dtype="f32").path
        folder = mlx(repaired, tmp_path / "mlx").path
        for name in ("blk.0.attn_output.weight", "blk.0.ffn_down.bias", "blk.3.attn_output.weight", "blk.6.ffn_down.bias"):
            with pytest.raises(ExportMismatch, match=name):
                check_file(altered_file(path, name), repaired)
        for name in ("layers.3.self_attn.linear.weight", "layers.6.mlp.down_proj.bias"):
            with pytest.raises(ExportMismatch, match=name), altered_folder(folder, f"model.{name}"):
                check_folder(folder, repaired)
    with pytest.raises(ExportMismatch):  # the same without its repair
        check_file(path, remove(model, drop_set))


def test_the_command_line_exports_a_saved_folder(tmp_path, capsys):
    source = tmp_path / "tiny.gguf"
    write_tiny_gguf(source)
    whole, tokenizer = load_model(str(source), device="cpu")
    whole.resize_token_embeddings(len(tokenizer))
    folder = save_pruned(remove(whole, attention(1)), tmp_path / "smaller", tokenizer)
    assert main(["gguf", str(folder), str(tmp_path / "smaller.gguf"), "--dtype", "f32"]) == 0
    assert "architecture deci" in capsys.readouterr().out
    tokens = field(source, "tokenizer.ggml.tokens")
    assert field(tmp_path / "smaller.gguf", "tokenizer.ggml.tokens")[: len(tokens)] == tokens
    assert field(tmp_path / "smaller.gguf", "tokenizer.ggml.pre") == "smollm"
    assert main(["mlx", str(folder), str(tmp_path / "mlx")]) == 0
    assert main(["vllm", str(folder), str(tmp_path / "vllm")]) == 0
    capsys.readouterr()
    assert main(["gguf", str(folder), str(tmp_path / "smaller.gguf")]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["gguf", str(tmp_path / "nothing"), str(tmp_path / "x.gguf")]) == 1
    assert "unknown model" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_refused(model, tmp_path):
    source = tmp_path / "tiny.gguf"
    write_tiny_gguf(source)
    _, tokenizer = load_model(str(source), device="cpu")
    for vocabulary in (tokenizer, source):
        with pytest.raises(ValueError, match="belongs to another model"):
            gguf(model, tmp_path / "x.gguf", vocabulary)
    assert not (tmp_path / "x.gguf").exists()
    assert [b.kind for b in branches(tiny_llama(2))] == ["attention", "mlp"] * 2
