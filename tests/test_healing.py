"""Self-distillation of a pruned model: it learns, continues where it stopped, and leaves the model alone."""

import copy

import pytest
import torch
from families import ids, tiny
from reference import close, output

from entrodrop_utils import dropping, saving
from entrodrop_utils.evaluation import divergence
from entrodrop_utils.repairing import repair
from entrodrop_utils.repairing.healing import heal
from entrodrop_utils.residual import SubBlock

pytest.importorskip("peft", reason="peft is an optional dependency")
DROP_SET = [SubBlock(1, "attention"), SubBlock(2, "attention")]
TEXT = ids(8, 16)


def left(model, fitted, drop_set=DROP_SET) -> float:
    with dropping.dropped(model, drop_set, fitted):
        return divergence(tiny("Llama"), model, TEXT).mean


def test_training_reduces_the_divergence_that_a_repair_leaves(tmp_path):
    model = tiny("Llama")
    weights = copy.deepcopy(model.state_dict())
    for start in (None, repair(model, DROP_SET, TEXT), repair(model, DROP_SET, TEXT, "fold")):
        healed = heal(model, DROP_SET, TEXT, start, steps=20, rank=4, rate=3e-3)
        assert left(model, healed) < left(model, start)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    with dropping.dropped(model, DROP_SET, healed):
        expected = output(model, ids())
    folder = saving.save_pruned(saving.remove(model, DROP_SET, healed), tmp_path / "healed")
    assert torch.equal(output(saving.load_pruned(folder), ids()), expected)
    assert "self-distillation" in (folder / "README.md").read_text()


def test_a_stopped_training_continues(tmp_path):
    model, settings = tiny("Llama"), {"rank": 2, "layers": [3]}
    whole = heal(model, DROP_SET, TEXT, steps=12, **settings)
    heal(model, DROP_SET, TEXT, steps=7, folder=tmp_path, **settings)
    continued = heal(model, DROP_SET, TEXT, steps=12, folder=tmp_path, **settings)
    assert whole.changed.keys() == continued.changed.keys()
    assert all(name.startswith("3.") for name in whole.changed)
    for name, value in whole.changed.items():
        torch.testing.assert_close(continued.changed[name], value)
    with pytest.raises(ValueError, match="another training"):
        heal(model, DROP_SET, TEXT, steps=12, folder=tmp_path, rank=3, layers=[3])


def test_whole_blocks_are_counted_as_in_the_dense_model():
    model, drop_set = tiny("Llama"), [SubBlock(1, "block")]
    healed = heal(model, drop_set, TEXT, steps=10, rank=4, rate=3e-3)
    assert {name.split(".")[0] for name in healed.changed} == {"0", "2"}
    assert left(model, healed, drop_set) < left(model, None, drop_set)


def test_no_step_changes_nothing_and_no_matrix_is_an_error():
    model = tiny("Llama")
    healed = heal(model, DROP_SET, TEXT, steps=0)
    with dropping.dropped(model, DROP_SET):
        bare = output(model, TEXT)
    with dropping.dropped(model, DROP_SET, healed):
        assert close(output(model, TEXT), bare)
    with pytest.raises(ValueError, match="no layer among"):
        heal(model, DROP_SET, TEXT, layers=[])
