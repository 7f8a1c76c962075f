"""Dropping, and pruned models as files: what is refused, what is left as it was, what a folder says and who can load it."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from families import VOCAB, ids, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from entrodrop_utils import dropping, models as suite_models, sub_blocks
from entrodrop_utils.dropping import RECORD
from entrodrop_utils.sub_blocks import KINDS, SubBlock

ATTENTION, MLP, BLOCK = ((lambda layer, kind=kind: SubBlock(layer, kind)) for kind in KINDS)


def logits(model, tokens=None) -> torch.Tensor:
    with torch.no_grad():
        return model(ids() if tokens is None else tokens)[0]


def fingerprint(model) -> tuple:
    return (
        type(model),
        str(model),
        json.dumps(model.config.to_dict(), sort_keys=True, default=str),
        [(name, id(value), value.sum().item()) for name, value in model.state_dict(keep_vars=True).items()],
        [getattr(part, "layer_idx", None) for part in model.modules()],
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w2", pad_token="w0", bos_token="w1")


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
@pytest.mark.parametrize("how", ["dropped", "remove"])
def test_bad_input_is_one_clear_error_and_changes_nothing(case, how):
    chosen, message = BAD[case]
    model = tiny("Gemma 3 (text)")
    sub_blocks.layout(model)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        if how == "remove":
            dropping.remove(model, chosen)
        else:
            with dropping.dropped(model, chosen):
                pass
    assert fingerprint(model) == before


def test_a_quantised_model_is_refused():
    model = tiny("Llama")
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantised: load it dequantised"):
        dropping.remove(model, [MLP(0)])


def test_what_was_dropped_cannot_be_dropped_again():
    model = dropping.remove(tiny("Llama"), [ATTENTION(1), BLOCK(3)])
    with pytest.raises(ValueError, match=r"attention 1 was dropped before or does not exist: the model has 3 layers, 2 with attention"):
        dropping.remove(model, [ATTENTION(1)])
    with pytest.raises(ValueError, match=r"block 3 does not exist"):
        dropping.remove(model, [BLOCK(3)])


def test_nothing_dropped_is_the_same_model():
    model = tiny("Llama")
    before = fingerprint(model)
    assert dropping.remove(model, []) is model
    with dropping.dropped(model, []):
        pass
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", ["Gemma 3 (text)", "GPT-2", "Bloom"])
def test_the_model_is_as_it_was_after_the_context(name):
    model = tiny(name)
    before, dense = fingerprint(model), logits(model)
    with dropping.dropped(model, [ATTENTION(0), MLP(3), BLOCK(1)]):
        assert not torch.allclose(logits(model), dense)
        assert len(sub_blocks.layers(model)) == 3
        with dropping.dropped(model, [MLP(0)]):  # counted as the layers are now
            assert sub_blocks.find(model, "mlp") == [MLP(1)]
    assert fingerprint(model) == before
    with pytest.raises(RuntimeError, match="stop"), dropping.dropped(model, [BLOCK(0)]):
        raise RuntimeError("stop")
    assert fingerprint(model) == before
    assert torch.equal(logits(model), dense)


def test_drops_compose_and_the_record_counts_as_at_first():
    step_by_step = tiny("Gemma 3 (text)")
    dropping.remove(step_by_step, [ATTENTION(2)])
    dropping.remove(step_by_step, [BLOCK(0)])
    dropping.remove(step_by_step, [MLP(2)])  # the last of the three that are left
    at_once = dropping.remove(tiny("Gemma 3 (text)"), [ATTENTION(2), BLOCK(0), MLP(3)])
    assert torch.equal(logits(step_by_step), logits(at_once))
    record = getattr(step_by_step.config, RECORD)
    assert record == getattr(at_once.config, RECORD)
    assert record["kept"] == [1, 2, 3]
    assert record["dropped"] == [[2, "attention"], [0, "block"], [3, "mlp"]]
    assert dropping.missing(record) == [ATTENTION(1), MLP(2)]


def test_every_mlp_may_go():
    model = dropping.remove(tiny("Llama"), [MLP(i) for i in range(4)])
    assert sub_blocks.find(model, "mlp") == []
    made = model.generate(ids(), max_new_tokens=8, do_sample=False)
    assert made.shape == (2, 18)


@pytest.mark.parametrize("how", [{"cache_implementation": "static"}, {"num_beams": 3}], ids=["static cache", "beams"])
@pytest.mark.parametrize("name", ["Llama", "Gemma 3 (text)"])
def test_other_ways_to_generate(name, how):
    model = dropping.remove(tiny(name), [ATTENTION(0), ATTENTION(2), MLP(1)])
    if "num_beams" in how:
        expected = model.generate(ids(), max_new_tokens=20, do_sample=False, use_cache=False, **how)
    else:
        expected = model.generate(ids(), max_new_tokens=20, do_sample=False)
    made = model.generate(ids(), max_new_tokens=20, do_sample=False, disable_compile=True, **how)
    assert torch.equal(made, expected)


def test_a_model_spread_over_devices(tmp_path):
    """Layers that wait on disk are a device of their own: what is dropped must not be read, and the rest must still arrive."""
    dropping.save(tiny("Llama"), tmp_path / "whole")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk", "model.layers.3": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", device_map=places, offload_folder=tmp_path / "disk")
    plain, chosen = tiny("Llama"), [ATTENTION(1), MLP(0), BLOCK(2)]
    with dropping.dropped(model, chosen), dropping.dropped(plain, chosen):
        assert torch.equal(logits(model), logits(plain))
        assert torch.equal(model.generate(ids(), max_new_tokens=9), plain.generate(ids(), max_new_tokens=9))
    assert torch.equal(logits(model), logits(plain))


def test_a_model_in_half_precision_keeps_it(tmp_path):
    dropping.save(tiny("Llama"), tmp_path / "whole")
    model = dropping.remove(dropping.load(tmp_path / "whole", dtype=torch.bfloat16), [ATTENTION(1)])
    back = dropping.load(dropping.save(model, tmp_path / "half"))
    assert back.dtype == torch.bfloat16
    assert torch.equal(logits(back), logits(model))
    assert dropping.load(tmp_path / "half", dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "settings", "chosen"),
    [
        ("Qwen3-MoE", {"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [BLOCK(0)]),
        ("SmolLM3", {}, [BLOCK(0), ATTENTION(3)]),
        ("Qwen2", {}, [BLOCK(1), BLOCK(2)]),
    ],
)
def test_what_a_layer_is_follows_it_to_its_new_place(tmp_path, name, settings, chosen):
    model = type(tiny(name))(copy.deepcopy(tiny(name).config).__class__(**{**tiny(name).config.to_dict(), **settings})).eval()
    kinds = [type(layer.mlp).__name__ for layer in model.model.layers]
    with dropping.dropped(model, chosen):
        expected = logits(model)
    dropping.remove(model, chosen)
    back = dropping.load(dropping.save(model, tmp_path / "saved"))
    assert torch.equal(logits(back), expected)
    gone = {layer for layer, kind in chosen if kind == "block"}
    assert [type(layer.mlp).__name__ for layer in back.model.layers] == [kind for i, kind in enumerate(kinds) if i not in gone]


def test_a_list_of_one_value_a_layer_follows_whatever_it_is_called():
    model = tiny("Llama")
    model.config.num_heads_by_layer = [4, 3, 2, 1]
    model.config.eos_token_id = [5, 6, 7, 8]  # as long, and no list of layers
    dropping.remove(model, [BLOCK(1)])
    assert model.config.num_heads_by_layer == [4, 2, 1]
    assert model.config.eos_token_id == [5, 6, 7, 8]


def test_blocks_without_which_no_config_describes_the_model_stay():
    config = tiny("GPT-2").config
    config.scale_attn_by_inverse_layer_idx = True  # a layer's scale is that of its place
    for model, layer in ((transformers.GPT2LMHeadModel(config).eval(), 1), (tiny("ModernBERT"), 0)):
        before = fingerprint(model)
        with pytest.raises(ValueError, match=rf"without block {layer} no config describes the model"):
            dropping.remove(model, [BLOCK(layer)])
        assert fingerprint(model) == before
        with dropping.dropped(model, [BLOCK(layer)]):
            assert logits(model).isfinite().all()


def test_the_part_of_one_layer_that_serves_all_stays():
    model = tiny("T5 (encoder)")
    for sub_block in (ATTENTION(0), BLOCK(0)):
        with pytest.raises(ValueError, match="cannot be dropped: its relative_attention_bias serves the attention of all layers"):
            dropping.remove(model, [sub_block])
    dropping.remove(model, [MLP(0), ATTENTION(1), BLOCK(2)])


# Saved models


@pytest.fixture
def pruned(tmp_path):
    """A folder with a model that lacks an attention layer, an MLP and a block."""
    model = dropping.remove(tiny("Llama"), [ATTENTION(1), MLP(2), BLOCK(0)])
    return model, dropping.save(model, tmp_path / "pruned", word_tokenizer())


def edited(folder: Path, change) -> Path:
    settings = json.loads((folder / "config.json").read_text())
    change(settings)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_plain_transformers_refuses_a_model_with_gaps(pruned):
    _, folder = pruned
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder)
    edited(folder, lambda settings: settings.pop("auto_map"))
    with pytest.raises(ValueError, match="entrodrop-llama"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_save_pretrained_is_as_safe_as_save(pruned, tmp_path):
    model, _ = pruned
    model.save_pretrained(tmp_path / "by hand")
    assert json.loads((tmp_path / "by hand" / "config.json").read_text())["model_type"] == "entrodrop-llama"
    assert torch.equal(logits(dropping.load(tmp_path / "by hand")), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


BROKEN = {
    "a dropped branch that is there": lambda s: s[RECORD]["dropped"].pop(0),
    "a branch that is said to be dropped": lambda s: s[RECORD]["dropped"].append([3, "mlp"]),
    "no stand-in where weights are gone": lambda s: s[RECORD]["stand_ins"].pop("model.layers.0.self_attn"),
    "a stand-in where weights are": lambda s: s[RECORD]["stand_ins"].update({"model.layers.2.mlp": "zero"}),
    "another number of layers": lambda s: s[RECORD].update(kept=[1, 2]),
    "a deeper model": lambda s: s.update(num_hidden_layers=4),
    "a wider model": lambda s: s.update(intermediate_size=64),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.filterwarnings("ignore")
def test_a_record_that_does_not_match_the_weights_is_refused(pruned, case):
    _, folder = pruned
    edited(folder, BROKEN[case])
    with pytest.raises(ValueError, match="does not match"):
        dropping.load(folder)


def test_a_block_record_that_does_not_match_is_refused(tmp_path):
    folder = dropping.save(dropping.remove(tiny("Llama"), [BLOCK(0)]), tmp_path / "blocks")
    edited(folder, lambda s: s[RECORD].update(kept=[0, 1, 2, 3]))
    with pytest.raises(ValueError, match="does not match the layers"):
        dropping.load(folder)


def test_another_version_of_the_record_is_refused(pruned):
    _, folder = pruned
    edited(folder, lambda s: s[RECORD].update(version=99))
    with pytest.raises(ValueError, match="written in format 99; this code reads format 1"):
        dropping.load(folder)
    with pytest.raises(ValueError, match="written in format 99"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_folders_that_cannot_be_written_or_read(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        dropping.save(tiny("Llama"), tmp_path / "full")
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "notes.txt"]
    with pytest.raises(ValueError, match="holds no config.json"):
        dropping.load(tmp_path / "nowhere")
    model = tiny("Llama")
    model.save_pretrained = lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        dropping.save(model, tmp_path / "half")
    assert not (tmp_path / "half").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_a_whole_model_is_saved_and_loaded_too(tmp_path):
    model = tiny("Llama")
    back = dropping.load(dropping.save(model, tmp_path / "whole"))
    assert torch.equal(logits(back), logits(model))
    assert not hasattr(back.config, RECORD)
    assert "Nothing was dropped" in (tmp_path / "whole" / "README.md").read_text()


def test_the_suite_drops_more_from_a_model_that_transformers_loaded(pruned):
    model, folder = pruned
    other = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert [sub_blocks.find(other, kind) for kind in KINDS] == [sub_blocks.find(model, kind) for kind in KINDS]
    assert torch.equal(logits(dropping.remove(other, [MLP(2)])), logits(dropping.remove(model, [MLP(2)])))
    again = dropping.load(dropping.save(other, folder.parent / "more"))
    assert torch.equal(logits(again), logits(model))


def test_models_load_takes_a_folder_of_whole_blocks_dropped(tmp_path):
    model = dropping.remove(tiny("Llama"), [BLOCK(1)])
    folder = dropping.save(model, tmp_path / "blocks", word_tokenizer())
    back, tokenizer = suite_models.load(str(folder), device="cpu")
    assert torch.equal(logits(back), logits(model))
    assert tokenizer("w5 w6").input_ids == [5, 6]


def test_the_model_card(tmp_path):
    model = dropping.remove(tiny("Llama"), [ATTENTION(2), ATTENTION(1), MLP(0)])
    model.config._name_or_path = str(tmp_path)  # loaded from a folder: its path stays at home
    card = {"metric": "cosine", "calibration": "24 windows of docs", "digest": "0123456789ab"}
    card |= {"perplexity_before": 12.344, "perplexity_after": 23.456, "evaluation": "WikiText-2"}
    text = (dropping.save(model, tmp_path / "saved", word_tokenizer(), card=card) / "README.md").read_text()
    for wanted in (
        "| attention layers | 2 | 1, 2 |",
        "| MLPs | 1 | 0 |",
        "Chosen by cosine, measured on 24 windows of docs (hash of the tokens: `0123456789ab`).",
        "Perplexity on WikiText-2: 12.34 before, 23.46 after.",
        'tokenizer = AutoTokenizer.from_pretrained("this folder", trust_remote_code=True)',
        tmp_path.name,
    ):
        assert wanted in text, wanted
    assert str(tmp_path) not in text
    assert "whole blocks" not in text
    model.config._name_or_path = "organisation/model"
    assert "base_model: organisation/model" in (dropping.save(model, tmp_path / "hub") / "README.md").read_text()
    blocks = dropping.remove(tiny("Llama"), [BLOCK(2)])
    text = (dropping.save(blocks, tmp_path / "blocks") / "README.md").read_text()
    assert "trust_remote_code" not in text
    assert "AutoTokenizer" not in text
    assert "| whole blocks | 1 | 2 |" in text
    with pytest.raises(TypeError, match="flavour"):
        dropping.save(blocks, tmp_path / "odd", card={"flavour": "good"})
    assert not (tmp_path / "odd").exists()


STRANGER = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "entrodrop_utils":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
try:
    import entrodrop_utils
    raise SystemExit("the suite can be imported")
except ModuleNotFoundError:
    pass
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, out = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(folder)
    raise SystemExit("loaded without trust_remote_code")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokens = torch.tensor([[5, 6, 7, 8]])
with torch.no_grad():
    torch.save((model(tokens).logits, model.generate(tokens, max_new_tokens=12, do_sample=False)), out)
model.save_pretrained(folder + "-again")
said = pipeline("text-generation", model=folder, trust_remote_code=True)("w5 w6", max_new_tokens=5, do_sample=False)
assert said[0]["generated_text"].startswith("w5 w6w"), said
assert "entrodrop_utils" not in sys.modules
"""


def test_a_process_without_the_suite_loads_generates_and_saves(pruned, tmp_path, monkeypatch):
    model, folder = pruned
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    command = [sys.executable, "-I", "-c", STRANGER, str(folder), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    theirs, made = torch.load(tmp_path / "out.pt")
    tokens = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(theirs, logits(model, tokens))
    assert torch.equal(made, model.generate(tokens, max_new_tokens=12, do_sample=False))
    assert torch.equal(logits(dropping.load(f"{folder}-again")), logits(model))


def test_pipelines_take_it(pruned):
    model, folder = pruned
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for loaded in (model, dropping.load(folder)):
        said = pipeline("text-generation", model=loaded, tokenizer=tokenizer, device="cpu")("w5 w6", max_new_tokens=5, do_sample=False)
        assert said[0]["generated_text"].startswith("w5 w6w")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.model_type == "llama"
