"""The retention of guessing and the bias of choosing tasks, against a plain loop and a simulation."""

import numpy as np
import pandas as pd
import pytest

from entrodrop_utils.studies import accuracy

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
