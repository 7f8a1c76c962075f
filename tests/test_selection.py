"""The selection rules on scores whose answer can be read off."""

import numpy as np
import pandas as pd
import pytest

from entrodrop_utils import selection
from entrodrop_utils.sub_blocks import SubBlock


def table(kind: str, values, metric: str = "m", noise: float = 0.0) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    rows = [(kind, layer, metric, s, v + noise * generator.normal()) for layer, v in enumerate(values) for s in range(4)]
    return pd.DataFrame(rows, columns=["kind", "layer", "metric", "sequence", "value"])


SCORES = pd.concat([table("attention", [5, 1, 4, 0, 3, 2, 9, 8]), table("block", [-3, -2, -1, 2, 4, 1, 3, 5])])


def test_one_shot_drops_the_smallest_first():
    layers = [s.layer for s in selection.one_shot(SCORES, "m", "attention", protected=())]
    assert layers == [3, 1, 5, 4, 2, 0, 7, 6]


def test_the_official_protection_keeps_layers_0_1_and_last():
    assert selection.one_shot(SCORES, "m", "attention", 3) == [
        SubBlock(3, "attention"),
        SubBlock(5, "attention"),
        SubBlock(4, "attention"),
    ]
    assert {s.layer for s in selection.one_shot(SCORES, "m", "attention")} == {2, 3, 4, 5, 6}


def test_the_stage_boundary_is_the_layer_input_of_least_entropy():
    # inputs, up to a constant: 0 -3 -5 -6 -4 0 1 4
    assert selection.stage_boundary(SCORES, "m") == 3
    assert selection.stage_boundary(table("block", [1, 1, 1]), "m") == 0


def test_two_stage_keeps_the_whole_falling_stage():
    assert [s.layer for s in selection.two_stage(SCORES, "m", "attention")] == [3, 5, 4, 7, 6]
    with pytest.raises(ValueError, match="cannot drop 6 of 8 sub-blocks of kind attention: 5 are not protected"):
        selection.two_stage(SCORES, "m", "attention", 6)


def test_ties_go_by_depth():
    assert [s.layer for s in selection.one_shot(table("mlp", [1, 1, 1, 1]), "m", "mlp", protected=())] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: selection.one_shot(SCORES, "other", "attention"),
            "do not hold other of attention: they hold m of attention, m of block",
        ),
        (lambda: selection.one_shot(SCORES, "m", "attention", 7), "cannot drop 7"),
        (lambda: selection.one_shot(SCORES, "m", "attention", -1), "cannot drop -1"),
        (lambda: selection.one_shot(SCORES, "m", "attention", protected=[8]), r"cannot protect layers \[8\]"),
        (lambda: selection.two_stage(table("attention", [1, 2]), "m", "attention"), "do not hold m of block"),
    ],
)
def test_bad_input_says_what_is_wrong(call, says):
    with pytest.raises(ValueError, match=says):
        call()
