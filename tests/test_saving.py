"""Pruned models as files: what a folder says, who can load it, and what is refused."""

import copy
import json
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from families import VOCAB, ids, tiny
from reference import output, stranger_command, word_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    dynamic_module_utils,
    pipeline,
)

from entrodrop_utils import load_model, saving
from entrodrop_utils.families.decoder import decoder_layers
from entrodrop_utils.families.modeling_entrodrop import RECORD
from entrodrop_utils.residual import KINDS, SubBlock, find

ATTENTION, MLP, BLOCK = ((lambda layer, kind=kind: SubBlock(layer, kind)) for kind in KINDS)


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """Where transformers copies the code that a folder brings: not into the home of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture
def pruned(tmp_path):
    """A folder with a model that lacks an attention layer, an MLP and a block."""
    model = saving.remove(tiny("Llama"), [ATTENTION(1), MLP(2), BLOCK(0)])
    return model, saving.save_pruned(model, tmp_path / "pruned", word_tokenizer())


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
    assert torch.equal(output(saving.load_pruned(tmp_path / "by hand"), ids()), output(model, ids()))
    assert torch.equal(output(copy.deepcopy(model), ids()), output(model, ids()))
    with pytest.raises(ValueError, match=r"model\.push_to_hub"):
        model.save_pretrained(tmp_path / "up", push_to_hub=True)


BROKEN = {
    "a dropped branch that is there": lambda s: s[RECORD]["dropped"].pop(0),
    "a branch that is said to be dropped": lambda s: s[RECORD]["dropped"].append([3, "mlp"]),
    "no bypass where weights are gone": lambda s: s[RECORD]["bypasses"].pop("model.layers.0.self_attn"),
    "a bypass where weights are": lambda s: s[RECORD]["bypasses"].update({"model.layers.2.mlp": "zero"}),
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
        saving.load_pruned(folder)


def test_a_block_record_that_does_not_match_is_refused(tmp_path):
    folder = saving.save_pruned(saving.remove(tiny("Llama"), [BLOCK(0)]), tmp_path / "blocks")
    edited(folder, lambda s: s[RECORD].update(kept=[0, 1, 2, 3]))
    with pytest.raises(ValueError, match="does not match the layers"):
        saving.load_pruned(folder)


def test_another_version_of_the_record_is_refused(pruned):
    _, folder = pruned
    edited(folder, lambda s: s[RECORD].update(version=99))
    with pytest.raises(ValueError, match="written in format 99; this code reads formats 1 to 3"):
        saving.load_pruned(folder)
    with pytest.raises(ValueError, match="written in format 99"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def as_version_2(settings: dict) -> None:
    record = settings[RECORD]
    record["version"] = 2
    assert (record.pop("repairs"), record.pop("fitted")) == ({}, [])


def as_version_1(settings: dict) -> None:
    as_version_2(settings)
    record = settings[RECORD]
    record["version"], record["stand_ins"], record["model_type"] = 1, record.pop("bypasses"), record.pop("family")


def test_a_folder_in_version_1_of_the_record_still_loads(pruned, tmp_path):
    model, folder = pruned
    edited(folder, as_version_1)
    record = json.loads((folder / "config.json").read_text())[RECORD]
    assert record.keys() == {"version", "layers", "kept", "dropped", "stand_ins", "model_type"}
    back = saving.load_pruned(folder)
    assert torch.equal(output(back, ids()), output(model, ids()))
    remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(output(remote, ids()), output(model, ids()))
    again = saving.save_pruned(back, tmp_path / "again")
    assert json.loads((again / "config.json").read_text())[RECORD].keys() == record.keys() - {"stand_ins", "model_type"} | {
        "bypasses",
        "family",
        "repairs",
        "fitted",
    }
    assert torch.equal(output(saving.load_pruned(again), ids()), output(model, ids()))


def test_a_folder_in_version_2_of_the_record_still_loads(pruned, tmp_path):
    model, folder = pruned
    edited(folder, as_version_2)
    for back in (saving.load_pruned(folder), AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)):
        assert torch.equal(output(back, ids()), output(model, ids()))
        again = saving.save_pruned(back, tmp_path / type(back.config).__name__ / str(id(back)))
        assert torch.equal(output(saving.load_pruned(again), ids()), output(model, ids()))


def test_without_gaps_a_record_in_version_1_loads_too(tmp_path):
    model = saving.remove(tiny("Llama"), [BLOCK(1)])
    folder = saving.save_pruned(model, tmp_path / "blocks")
    edited(folder, lambda s: s[RECORD].update(version=1, stand_ins=s[RECORD].pop("bypasses")))  # the empty repairs do not matter
    assert torch.equal(output(saving.load_pruned(folder), ids()), output(model, ids()))


def test_the_familys_own_config_class_reads_the_sizes(pruned):
    """A nested ``model_type``, as version 1 had it, would be taken for a config of its own."""
    model, folder = pruned
    config = LlamaConfig.from_pretrained(folder)
    for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        assert getattr(config, name) == getattr(model.config, name), name
    assert (config.num_hidden_layers, config.vocab_size) == (3, VOCAB)


OWN = ["Gemma 3 (text)", "GPT-2", "Bloom", "Mixtral", "BERT", "T5 (encoder)", "Gemma 3 (image and text)"]
WRITTEN = {"architectures", "auto_map", "dtype", "model_type", "transformers_version", "_name_or_path", RECORD}  # not sizes


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("kinds", [(ATTENTION, MLP), (MLP,), (BLOCK,), (ATTENTION, BLOCK)], ids=lambda kinds: f"{len(kinds)} kinds")
def test_every_familys_own_config_class_reads_its_config(name, kinds, tmp_path):
    """Whatever is dropped, and also from a folder that was loaded and saved again."""
    model = saving.remove(tiny(name), [kind(place) for place, kind in enumerate(kinds, 1)])
    folder = saving.save_pruned(model, tmp_path / "smaller")
    again = saving.save_pruned(saving.load_pruned(folder), tmp_path / "again")
    for saved in (folder, again):
        assert sizes(type(model.config).from_pretrained(saved).to_dict()) == sizes(model.config.to_dict())
        text = type(model.config.get_text_config()).from_pretrained(saved)
        assert text.num_hidden_layers == len(decoder_layers(model))
        assert text.hidden_size == 32


def sizes(settings: dict) -> dict:
    found = {key: sizes(value) if isinstance(value, dict) else value for key, value in settings.items() if key not in WRITTEN}
    return json.loads(json.dumps(found))


def nested(settings: dict, path: tuple[str, ...] = ()):
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from ((*path, key, inner) for inner in value)
            yield from nested(value, (*path, key))


def test_the_record_has_no_key_that_transformers_gives_a_meaning_to(pruned, tmp_path):
    """It looks for nested configs by their ``model_type``, and for some by their name."""
    meant = {"model_type", "architectures", "auto_map", "dtype", "torch_dtype", "quantization_config", "transformers_version"}
    names = {config.base_config_key for config in transformers.CONFIG_MAPPING.values() if isinstance(config.base_config_key, str)}
    names |= {part for config in transformers.CONFIG_MAPPING.values() for part in config.sub_configs}
    _, folder = pruned
    blocks = saving.save_pruned(saving.remove(tiny("Llama"), [BLOCK(1)]), tmp_path / "blocks")
    assert RECORD not in names
    for saved in (folder, blocks):
        keys = list(nested(json.loads((saved / "config.json").read_text())))
        assert any(key[0] == RECORD for key in keys)
        assert not [key for key in keys if key[0] == RECORD and {*key[1:]} & (meant | names)]


@pytest.mark.filterwarnings("ignore")
def test_the_familys_own_model_class_builds_no_other_size(pruned, monkeypatch):
    """It cannot know of the gaps, which it fills and names; but it is the saved model's width and depth."""
    model, folder = pruned
    filled, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert (len(filled.model.layers), filled.config.hidden_size) == (3, 32)
    assert filled.num_parameters() == tiny("Llama").num_parameters() - sum(
        p.numel() for p in tiny("Llama").model.layers[0].parameters()
    )
    assert {key.split(".")[2] for key in info["missing_keys"]} == {"0", "1"}
    assert torch.equal(filled.lm_head.weight, model.lm_head.weight)


def test_a_pruned_model_that_transformers_saves_again_stays_readable(pruned, tmp_path):
    model, folder = pruned
    other = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    other.save_pretrained(tmp_path / "again")
    record = json.loads((tmp_path / "again" / "config.json").read_text())[RECORD]
    assert record == json.loads((folder / "config.json").read_text())[RECORD]
    assert record["family"] == "llama"
    assert LlamaConfig.from_pretrained(tmp_path / "again").num_hidden_layers == 3
    assert torch.equal(output(saving.load_pruned(tmp_path / "again"), ids()), output(model, ids()))


def test_folders_that_cannot_be_written_or_read(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        saving.save_pruned(tiny("Llama"), tmp_path / "full")
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "notes.txt"]
    with pytest.raises(ValueError, match=r"has no config\.json"):
        saving.load_pruned(tmp_path / "nowhere")
    model = tiny("Llama")
    model.save_pretrained = lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        saving.save_pruned(model, tmp_path / "half")
    assert not (tmp_path / "half").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_a_whole_model_is_saved_and_loaded_too(tmp_path):
    model = tiny("Llama")
    back = saving.load_pruned(saving.save_pruned(model, tmp_path / "whole"))
    assert torch.equal(output(back, ids()), output(model, ids()))
    assert not hasattr(back.config, RECORD)
    assert "Nothing was dropped" in (tmp_path / "whole" / "README.md").read_text()


def test_the_suite_drops_more_from_a_model_that_transformers_loaded(pruned):
    model, folder = pruned
    other = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert [find(other, kind) for kind in KINDS] == [find(model, kind) for kind in KINDS]
    assert torch.equal(output(saving.remove(other, [MLP(2)]), ids()), output(saving.remove(model, [MLP(2)]), ids()))
    again = saving.load_pruned(saving.save_pruned(other, folder.parent / "more"))
    assert torch.equal(output(again, ids()), output(model, ids()))


LLAMA_3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 3e5}, LLAMA_3], ids=lambda rope: rope["rope_type"])
def test_a_plain_folder_names_its_rotary_base_as_programs_of_transformers_4_read_it(tmp_path, rope):
    extra = {"original_max_position_embeddings": 32} if rope is LLAMA_3 else {}
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope | extra)).eval()
    folder = saving.save_pruned(saving.remove(model, [BLOCK(1)]), tmp_path / "plain")
    settings = json.loads((folder / "config.json").read_text())
    assert settings["rope_theta"] == rope["rope_theta"]
    assert settings.get("rope_scaling", {}).get("factor") == rope.get("factor")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.rope_parameters == model.config.rope_parameters
    assert not hasattr(loaded.config, "rope_theta")
    assert torch.equal(output(loaded, ids()), output(model, ids()))


def test_load_model_takes_a_folder_of_whole_blocks_dropped(tmp_path):
    model = saving.remove(tiny("Llama"), [BLOCK(1)])
    folder = saving.save_pruned(model, tmp_path / "blocks", word_tokenizer())
    back, tokenizer = load_model(str(folder), device="cpu")
    assert torch.equal(output(back, ids()), output(model, ids()))
    assert tokenizer("w5 w6").input_ids == [5, 6]


def test_the_model_card(tmp_path):
    model = saving.remove(tiny("Llama"), [ATTENTION(2), ATTENTION(1), MLP(0)])
    model.config._name_or_path = str(tmp_path)  # loaded from a folder: its path stays at home
    card = {"metric": "cosine", "calibration": "24 windows of docs", "digest": "0123456789ab"}
    card |= {"perplexity_before": 12.344, "perplexity_after": 23.456, "evaluation": "WikiText-2"}
    text = (saving.save_pruned(model, tmp_path / "saved", word_tokenizer(), card=card) / "README.md").read_text()
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
    assert "base_model: organisation/model" in (saving.save_pruned(model, tmp_path / "hub") / "README.md").read_text()
    blocks = saving.remove(tiny("Llama"), [BLOCK(2)])
    text = (saving.save_pruned(blocks, tmp_path / "blocks") / "README.md").read_text()
    assert "trust_remote_code" not in text
    assert "AutoTokenizer" not in text
    assert "| whole blocks | 1 | 2 |" in text
    with pytest.raises(TypeError, match="flavour"):
        saving.save_pruned(blocks, tmp_path / "odd", card={"flavour": "good"})
    assert not (tmp_path / "odd").exists()


STRANGER = """
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


def test_a_process_without_the_suite_loads_generates_and_saves(pruned, tmp_path):
    model, folder = pruned
    command = stranger_command(STRANGER, tmp_path, str(folder), str(tmp_path / "out.pt"))
    done = subprocess.run(**command, capture_output=True, stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    theirs, made = torch.load(tmp_path / "out.pt")
    tokens = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(theirs, output(model, tokens))
    assert torch.equal(made, model.generate(tokens, max_new_tokens=12, do_sample=False))
    assert torch.equal(output(saving.load_pruned(f"{folder}-again"), ids()), output(model, ids()))


def test_a_model_in_half_precision_keeps_it(tmp_path):
    saving.save_pruned(tiny("Llama"), tmp_path / "whole")
    model = saving.remove(saving.load_pruned(tmp_path / "whole", dtype=torch.bfloat16), [ATTENTION(1)])
    back = saving.load_pruned(saving.save_pruned(model, tmp_path / "half"))
    assert back.dtype == torch.bfloat16
    assert torch.equal(output(back, ids()), output(model, ids()))
    assert saving.load_pruned(tmp_path / "half", dtype=torch.float32).dtype == torch.float32


def test_pipelines_take_it(pruned):
    model, folder = pruned
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for loaded in (model, saving.load_pruned(folder)):
        speak = pipeline("text-generation", model=loaded, tokenizer=tokenizer, device="cpu")
        said = speak("w5 w6", max_new_tokens=5, do_sample=False)
        assert said[0]["generated_text"].startswith("w5 w6w")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.model_type == "llama"
