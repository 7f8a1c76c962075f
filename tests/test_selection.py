"""The selection rules on scores whose answer can be read off."""

import numpy as np
import pandas as pd
import pytest

from entrodrop_utils import selection
from entrodrop_utils.residual import SubBlock


def table(kind: str, values, metric: str = "m", noise: float = 0.0) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    rows = [(kind, layer, metric, s, v + noise * generator.normal()) for layer, v in enumerate(values) for s in range(4)]
    return pd.DataFrame(rows, columns=["kind", "layer", "metric", "sequence", "value"])


SCORES = pd.concat([table("attention", [5, 1, 4, 0, 3, 2, 9, 8]), table("block", [-3, -2, -1, 2, 4, 1, 3, 5])])


def test_one_shot_drops_the_smallest_first():
    layers = [s.layer for s in selection.one_shot(SCORES, "m", "attention", protected=())]
    assert layers == [3, 1, 5, 4, 2, 0, 7, 6]


def test_the_published_protection_keeps_layers_0_1_and_last():
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


def test_two_stage_is_refused_where_the_curve_never_falls():
    rising = pd.concat([table("attention", [1, 2, 3]), table("block", [1, 1, 1])])
    with pytest.raises(selection.NoFallingStage, match="not applicable: the m entropy curve has no falling stage"):
        selection.two_stage(rising, "m", "attention")


def test_ties_go_by_depth():
    assert [s.layer for s in selection.one_shot(table("mlp", [1, 1, 1, 1]), "m", "mlp", protected=())] == [0, 1, 2, 3]


def test_a_random_order_follows_from_the_seed_alone():
    candidates = [SubBlock(layer, kind) for layer in range(6) for kind in ("attention", "mlp")]
    order = selection.random_order(candidates, 3)
    assert sorted(order) == sorted(candidates) and order != sorted(candidates)
    assert selection.random_order(candidates[::-1], 3) == order
    assert selection.random_order(candidates, [3, 1]) != order != selection.random_order(candidates, 4)
    first = {selection.random_order(candidates, seed)[0] for seed in range(200)}
    assert first == set(candidates), "each of twelve comes first for some of 200 seeds"


def test_the_deepest_first():
    candidates = [SubBlock(layer, "block") for layer in (2, 5, 0)]
    assert [s.layer for s in selection.deepest_first(candidates)] == [5, 2, 0]


@pytest.mark.parametrize(
    ("fraction", "total", "n"), [(0.25, 32, 8), (0.375, 32, 12), (0.01, 32, 1), (0.9, 32, 29), (1.0, 30, 27), (0.5, 3, 1)]
)
def test_a_fraction_as_a_number(fraction, total, n):
    assert selection.count_of(fraction, total) == n


def test_protected_layers_count_from_both_ends():
    assert selection.protected_layers((0, 1, -1), 6) == {0, 1, 5}
    assert selection.protected_layers((), 6) == set()


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
