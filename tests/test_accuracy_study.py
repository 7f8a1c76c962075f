"""The retention of guessing and the bias of choosing tasks, against a plain loop and a simulation."""

import numpy as np
import pandas as pd
import pytest
from families import ids, tiny
from reference import word_tokenizer

from entrodrop_utils.residual import SubBlock
from entrodrop_utils.studies import accuracy
from entrodrop_utils.studies.methods import Method

# task, dense accuracy, standard error, chance; the last is not above chance
TASKS = [("a", 0.60, 0.05, 0.25), ("b", 0.45, 0.06, 0.25), ("c", 0.52, 0.04, 0.50)]


@pytest.fixture
def table():
    rows = [("dense", "none", 0, "", 0, task, "acc", value, stderr, chance, 100) for task, value, stderr, chance in TASKS]
    mean, guessing = np.mean([row[1] for row in TASKS]), np.mean([row[3] for row in TASKS])
    rows.append(("dense", "none", 0, "", 0, "mean", "accuracy", mean, np.nan, guessing, 300))
    names = ["metric", "rule", "draw", "kind", "n_dropped", "task", "task_metric", "value", "stderr", "chance", "n"]
    return pd.DataFrame(rows, columns=names).assign(note="", best_other=False)


def test_guessing_keeps_the_mean_chance_over_the_dense_mean(table):
    assert accuracy.floor(table) == pytest.approx((0.25 + 0.25 + 0.5) / (0.6 + 0.45 + 0.52))


def test_the_bias_of_choosing_tasks_is_that_of_a_simulation(table):
    rng, inflated, excess = np.random.default_rng(0), [], []
    for _, value, stderr, chance in TASKS[:2]:
        measured = rng.normal(value, stderr, 400_000)
        inflated.append(measured[measured - chance > 2 * stderr].mean() - value)
        excess.append(value - chance)
    assert accuracy.selection_bias(table) == pytest.approx(np.mean(inflated) / np.mean(excess), rel=0.02)


def test_repaired_choices_are_rows_of_their_own(table, monkeypatch):
    """Beside the bare ones, on the same items, with the repair of all their sub-blocks."""
    model, drop_set = tiny("Llama"), (SubBlock(1, "attention"), SubBlock(2, "attention"))
    asked = {}

    def scored(model, tokenizer, tasks, sets, limit, repair):
        asked.update(sets=sets, repaired=sorted(repair.maps))
        right = {(): [1, 1, 1, 0] * 10, drop_set: [1, 0, 1, 0] * 10}
        items = [(s, "a", "", "acc", i, float(value)) for s in sets for i, value in enumerate(right[s])]
        means = [(s, "a", "acc", np.mean(right[s]), 0.07, 0.25, 40, "") for s in sets]
        columns = ["set", "task", "metric", "value", "stderr", "chance", "n", "note"]
        return pd.DataFrame(means, columns=columns), pd.DataFrame(items, columns=["set", "task", "part", "metric", "item", "value"])

    monkeypatch.setattr(accuracy, "task_scores_by_set", scored)
    choices = {("attention", Method("cosine"), 2): drop_set}
    repair = accuracy.linear_repair(model, choices.values(), ids(4, 12))
    whole = accuracy.with_repaired(table, model, word_tokenizer(), ["a"], {"a": 40}, choices, repair)
    assert asked == {"sets": [(), drop_set], "repaired": list(drop_set)}
    new = whole.iloc[len(table) :].set_index("task")
    assert set(new.metric) == {"cosine, repaired"} and set(new.n_dropped) == {2}
    assert new.value["a"] == 0.5
    assert new.retention["mean"] == pytest.approx(0.5 / 0.75)
    assert whole.value[: len(table)].tolist() == table.value.tolist()


def test_the_place_of_a_method_is_the_share_of_random_choices_that_are_less_accurate(table):
    """Against a plain count, for each number of sub-blocks apart; Wilson's interval by its formula."""
    random = {8: [0.41, 0.35, 0.52, 0.30], 11: [0.30, 0.29]}
    values = {("bucket", 8): 0.40, ("cosine", 8): 0.60, ("bucket", 11): 0.25}
    rows = [(metric, "one-shot", 0, "attention", n, value) for (metric, n), value in values.items()]
    rows += [("random", "random", draw, "attention", n, v) for n, draws in random.items() for draw, v in enumerate(draws, 1)]
    means = pd.DataFrame(rows, columns=["metric", "rule", "draw", "kind", "n_dropped", "value"]).assign(task="mean")
    places = accuracy.place_among_choices(pd.concat([table, means])).set_index(["metric", "n_dropped"])
    for (metric, n), value in values.items():
        hits, draws = sum(v < value for v in random[n]), len(random[n])
        place = places.loc[(metric, n)]
        assert place.share == hits / draws and place.draws == draws
        z = 1.959963984540054
        centre, spread = hits + z**2 / 2, z * np.sqrt(hits * (draws - hits) / draws + z**2 / 4)
        assert [place.low, place.high] == pytest.approx([(centre - spread) / (draws + z**2), (centre + spread) / (draws + z**2)])
    assert "50% [15%, 85%] less accurate than bucket" in accuracy.place_sentence(places.reset_index(), 8, ["bucket", "cosine"])
