"""Retention against a plain loop over resampled items."""

import numpy as np
import pandas as pd
import pytest

from entrodrop_utils.residual import SubBlock
from entrodrop_utils.tasks.retention import Retention, above_chance, accuracies

DROPPED = (SubBlock(1, "attention"), SubBlock(2, "attention"))
RIGHT = {  # task -> accuracy of the dense and of the pruned model, chance
    "easy": (0.8, 0.6, 0.25),
    "hard": (0.4, 0.3, 0.25),
    "guess": (0.5, 0.5, 0.5),
}


def tables(n: int = 200, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    generator, scores, items = np.random.default_rng(seed), [], []
    for task, (*rates, chance) in RIGHT.items():
        for one, rate in zip(((), DROPPED), rates, strict=True):
            for metric in ("acc", "acc_norm") if task == "hard" else ("acc",):
                value = (generator.permutation(n) < rate * n).astype(float)
                items += [(one, task, task, metric, i, v) for i, v in enumerate(value)]
                scores.append((one, task, metric, value.mean(), value.std(ddof=1) / np.sqrt(n), chance, n, ""))
    columns = ["set", "task", "metric", "value", "stderr", "chance", "n", "note"]
    items = pd.DataFrame(items, columns=["set", "task", "part", "metric", "item", "value"])
    return pd.DataFrame(scores, columns=columns), items


def test_one_accuracy_a_task_normed_where_there_is_one():
    assert accuracies(tables()[0]).metric.tolist() == ["acc", "acc", "acc_norm", "acc_norm", "acc", "acc"]


def test_tasks_on_which_the_dense_model_guesses_are_known():
    assert above_chance(tables()[0]) == ["easy", "hard"]


@pytest.mark.parametrize(("tasks", "above"), [(None, False), (["easy", "hard"], True)])
def test_retention_is_that_of_a_plain_loop(tasks, above):
    scores, items = tables()
    found = Retention.of(scores, items, tasks)
    used = tasks or list(RIGHT)
    off = np.mean([RIGHT[t][2] for t in used]) if above else 0
    dense, pruned = (np.mean([RIGHT[t][i] for t in used]) - off for i in (0, 1))
    share, low, high = found.share([DROPPED], above)
    assert share == pytest.approx(pruned / dense)
    of = accuracies(items).sort_values("item")
    by_task = {t: [of[(of.task == t) & (of.set.map(len) == len(one))].value.to_numpy() for one in ((), DROPPED)] for t in used}
    generator, draws = np.random.default_rng(1), []
    for _ in range(2000):
        mean = np.zeros(2)
        for task in used:
            pick = generator.integers(200, size=200)
            mean += [values[pick].mean() / len(used) for values in by_task[task]]
        draws.append((mean[1] - off) / (mean[0] - off))
    assert (low, high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])), abs=0.01)
    assert found.share([()], above) == (1, 1, 1)
    assert found.draws([(), DROPPED], above).mean() == pytest.approx((1 + np.mean(draws)) / 2, abs=0.01)


def test_without_a_task_or_the_dense_model_it_says_so():
    scores, items = tables()
    with pytest.raises(ValueError, match=r"need the dense model .* got 2 sets and tasks \[\]"):
        Retention.of(scores, items, [])
    some = [len(one) > 0 for one in scores.set]
    with pytest.raises(ValueError, match="need the dense model"):
        Retention.of(scores[some], items)
