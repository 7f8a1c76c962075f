"""The few things that only the real model can show."""

import copy
import re

import pytest
import torch

from entrodrop_utils import dropping, entropy, evaluation, residual, scoring
from entrodrop_utils.paths import PACKAGE, ROOT
from entrodrop_utils.residual import SubBlock

TEXT = (
    "The harbour lies on the eastern side of the island, where two rivers meet the sea. In the eighteenth century it was the "
    "busiest port of the province, and most of its houses date from that time. A lighthouse was built on the northern pier after "
    "a winter storm had sunk nine ships within sight of the town, and it has been kept by the same family ever since."
)


@pytest.fixture(scope="module")
def ids(smollm2):
    return torch.tensor([smollm2[1](TEXT).input_ids])


def test_it_is_a_language_model(smollm2, ids):
    assert evaluation.perplexity(smollm2[0], ids).perplexity < 40


@pytest.mark.parametrize("layer", [0, 14, 29])
def test_dropping_is_zeroing_the_output_projection(smollm2, ids, layer):
    model = smollm2[0]
    for kind, projection in (("attention", "self_attn.o_proj"), ("mlp", "mlp.down_proj")):
        zeroed = copy.deepcopy(model)
        zeroed.model.layers[layer].get_submodule(projection).weight.data.zero_()
        with torch.inference_mode(), dropping.dropped(model, [SubBlock(layer, kind)]):
            assert torch.equal(model(ids).logits, zeroed(ids).logits)


def test_cached_decoding_without_layer_0_is_uncached_decoding(smollm2, ids):
    model = smollm2[0]
    settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 2}
    with dropping.dropped(model, [SubBlock(0, "attention"), SubBlock(17, "attention"), SubBlock(20, "mlp")]):
        cached, uncached = (model.generate(ids[:, :12], use_cache=c, **settings) for c in (True, False))
    assert torch.equal(cached, uncached)


def test_the_first_token_is_a_sink_from_layer_12_on(smollm2, ids):
    """Fact of this model that notebook 01 is about: the bucket valley is that token."""
    states = residual.states(smollm2[0], ids)[:, 0]
    largest = states.abs().amax(-1)
    assert largest[24].argmax() == 0
    assert largest[24, 0] > 50 * largest[24, 1:].max()
    every, rest = entropy.bucket(states), scoring.without_first(entropy.bucket)(states)
    assert every[24] < 0.8 * every[22]
    assert rest[24] > 0.95 * rest[22]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_readmes_python_runs_as_written(smollm2, ids, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    blocks = lambda page: re.findall(r"```python\n(.*?)```", page.read_text(), re.S)  # noqa: E731
    for code in blocks(ROOT / "README.md"):
        exec(code, space)
        if "load_pruned" in code:
            with dropping.dropped(smollm2[0], space["drop_set"]):
                assert torch.equal(space["smaller"](ids).logits, smollm2[0](ids).logits)
    assert (tmp_path / "smaller.gguf").stat().st_size > 1e8  # of the last block
    space["model"] = smollm2[0]  # the one of the front page is the smaller one by now
    for code in blocks(PACKAGE / "README.md"):
        exec(code, space)
    assert "±" in capsys.readouterr().out
    assert len(space["drop_set"]) == 4
    assert len(space["largest"]) == space["steps"].chosen.sum() < len(space["steps"])
    assert set(space["scores"].task) == {"induction"}
