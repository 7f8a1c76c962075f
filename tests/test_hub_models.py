"""Models that are known by a short name but too large or gated to be here: a small random one in their place in the hub's cache."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import nbformat
import pandas as pd
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, MistralConfig, PreTrainedTokenizerFast, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from entrodrop_utils import scoring, text
from entrodrop_utils.models import ModelUnavailable, loading, sources
from entrodrop_utils.paths import ROOT
from entrodrop_utils.paths import SIZES as PARAMETERS
from entrodrop_utils.profile import Profile
from entrodrop_utils.selection import count_of

LAYERS, COMMIT = 6, "c" * 40
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 64}
ROPE |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Registered name -> the architecture of that model, small, and whether its tokenizer begins a text with a token of its own
STAND_INS = {
    "qwen3-0.6b": (Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True), False),
    "llama-3.1-8b": (LlamaConfig(**SIZES, num_key_value_heads=2, rope_parameters=ROPE), True),
    "mistral-7b-v0.3": (MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=None), True),
}


@pytest.fixture(scope="session")
def tokenizers():
    """A byte-level BPE of 600 tokens trained on the default text; with and without a beginning-of-sequence token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([document for _, document in text.documents("docs", "validation")[:200]], trainer)
    plain = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return {False: plain, True: PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")}


def fill(cache: Path, name: str, tokenizers) -> AutoModelForCausalLM:
    """Put a small random model, in bfloat16, under the hub name of a registered one, as the hub's client lays it out."""
    config, begins = STAND_INS[name]
    torch.manual_seed(0)
    tokenizer = tokenizers[begins]
    settings = config.to_dict() | {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1}
    model = AutoModelForCausalLM.from_config(type(config)(**settings), dtype=torch.bfloat16)
    repository = cache / f"models--{sources.KNOWN[name]['hub'].replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    for folder in (blobs, repository / "refs"):
        folder.mkdir(parents=True)
    model.save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    for file in list(snapshot.iterdir()):
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.move(file, blob)
        file.symlink_to(Path("../../blobs") / blob.name)
    (repository / "refs" / "main").write_text(COMMIT)
    return model


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("name", STAND_INS)
def test_it_comes_from_the_cache_as_it_was_published(name, offline, tokenizers):
    assert not sources.is_local(name)
    published = fill(offline, name, tokenizers)
    assert sources.is_local(name)
    model, tokenizer = loading.load_model(name)
    assert type(model) is type(published) and not model.training
    assert model.dtype == torch.bfloat16
    for key, value in published.state_dict().items():
        assert torch.equal(model.state_dict()[key].cpu(), value), key
    ids = tokenizer("some text").input_ids
    assert (ids[0] == 0) == STAND_INS[name][1] and tokenizer.decode(ids, skip_special_tokens=True) == "some text"


def test_what_is_asked_for_goes_before_the_registry(offline, tokenizers, monkeypatch):
    fill(offline, "llama-3.1-8b", tokenizers)
    asked, read = [], loading._read
    monkeypatch.setattr(loading, "_read", lambda path, **placed: asked.append(placed) or read(path, **placed))
    loading.load_model("llama-3.1-8b")
    model, _ = loading.load_model("llama-3.1-8b", "float32", "cpu")
    assert asked == [{"dtype": torch.bfloat16, "device_map": "auto"}, {"dtype": torch.float32, "device_map": None}]
    assert model.dtype == torch.float32 and model.device.type == "cpu"
    by_hub_name, _ = loading.load_model(sources.KNOWN["llama-3.1-8b"]["hub"])
    assert by_hub_name.dtype == torch.float32, "the registry speaks of the names that it knows"


def test_one_that_does_not_fit_stays_spread_and_gives_the_same_scores(offline, tokenizers, monkeypatch):
    """Two of its layers stay on the disk: such a model refuses to be moved, and its weights come only when they are needed."""
    fill(offline, "llama-3.1-8b", tokenizers)
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", *(f"model.layers.{i}" for i in range(LAYERS))]
    placed = {name: "disk" if name[-1] in "45" else "cpu" for name in names}
    whole, _ = loading.load_model("llama-3.1-8b", device="cpu")
    monkeypatch.setitem(sources.KNOWN["llama-3.1-8b"], "device_map", placed)
    spread, _ = loading.load_model("llama-3.1-8b")
    assert any(weight.is_meta for weight in spread.parameters())
    windows = torch.randint(2, 600, (3, 40), generator=torch.Generator().manual_seed(0))
    found, wanted = (scoring.score(model, windows, ("bucket", "cosine")) for model in (spread, whole))
    pd.testing.assert_frame_equal(found, wanted)


def test_the_paper_drops_8_and_12_of_32_at_its_size():
    parameters = yaml.safe_load((PARAMETERS / "paper.yaml").read_text())
    assert {8, 12} <= {count_of(fraction, 32) for fraction in parameters["fractions"]}
    assert (parameters["n_sequences"], parameters["n_tokens"]) == (128, 256)


@pytest.mark.parametrize("name", STAND_INS)
def test_without_it_the_message_says_how_to_get_it(name, offline):
    with pytest.raises(ModelUnavailable, match=f"{name} is not whole in the local hub cache .* connect to the network .*HF_HOME"):
        loading.load_model(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAND_INS)
def test_the_whole_suite_runs_on_it_offline(name, tokenizers, tmp_path):
    """In a copy of the tree, with no network and a home of its own for the hub; two notebooks suffice for the other two models."""
    from entrodrop_utils.runner.run import chosen_notebooks

    only = "" if name == "llama-3.1-8b" else "01,02"
    fill(tmp_path / "home" / "hub", name, tokenizers)
    copy = tmp_path / "copy"
    everywhere = shutil.ignore_patterns(".*", "__pycache__", "build", "figures", "cache", "*.lock")

    def left_out(folder: str, names: list[str]) -> set[str]:
        return everywhere(folder, names) | ({"models"} if Path(folder) == ROOT / "data" else set())

    shutil.copytree(ROOT, copy, ignore=left_out)
    (copy / "data" / "models").mkdir()
    for model in (ROOT / "data" / "models").iterdir() if (ROOT / "data" / "models").exists() else ():
        (copy / "data" / "models" / model.name).symlink_to(model.resolve())  # what a notebook compares with is only read
    before = {path: path.read_bytes() for path in (copy / "notebooks").glob("*.*")}
    settings = {"PYTHONPATH": str(copy), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "ENTRODROP_"))}
    done = subprocess.run(
        [sys.executable, "-m", "entrodrop_utils.runner", "--model", name, "--size", "smoke", "--only", only],
        cwd=copy,
        env=inherited | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Profile(name, "smoke").folder
    for path in chosen_notebooks(only):
        rendered = nbformat.read(copy / "build" / folder / path.name, 4)
        assert "> **Finding:** \n" not in rendered.cells[0].source and name in str(rendered), path.name
    assert list((copy / "data" / "results" / folder).glob("*.csv"))
    assert {path: path.read_bytes() for path in (copy / "notebooks").glob("*.*")} == before
    assert not (ROOT / "data" / "results" / folder).exists() and not (ROOT / "build" / folder).exists()
