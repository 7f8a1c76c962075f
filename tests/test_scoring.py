"""Scores against the states taken one by one."""

import weakref
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from entrodrop_utils import entropy, residual, scoring, similarity
from entrodrop_utils.residual import KINDS


def test_scores_are_those_of_the_states(model, windows):
    scores = scoring.score(model, windows, {"knn": partial(entropy.knn, k=3), "cosine": similarity.cosine})
    assert list(scores.columns) == ["kind", "layer", "metric", "sequence", "value"]
    assert len(scores) == 3 * 6 * 2 * len(windows)
    for row in scores.itertuples():
        first, last = {"attention": (0, 1), "mlp": (1, 2), "block": (0, 2)}[row.kind]
        states = residual.states(model, windows[row.sequence][None])[:, 0]
        x, y = states[2 * row.layer + first], states[2 * row.layer + last]
        want = entropy.knn(y, 3) - entropy.knn(x, 3) if row.metric == "knn" else similarity.cosine(x, y)
        assert row.value == pytest.approx(float(want), rel=1e-6, abs=1e-9)


def test_increases_of_a_layer_add_up(model, windows):
    scores = scoring.score(model, windows, ("bucket",)).pivot_table(index=["layer", "sequence"], columns="kind", values="value")
    assert np.allclose(scores.attention + scores.mlp, scores.block)


def test_without_the_first_token(model, windows):
    both = scoring.score(model, windows, {"all": entropy.bucket, "rest": scoring.without_first(entropy.bucket)}, ["block"])
    states = residual.states(model, windows[:1])[:, 0, 1:]
    want = entropy.bucket(states[2]) - entropy.bucket(states[0])
    got = both[(both.metric == "rest") & (both.layer == 0) & (both.sequence == 0)].value.item()
    assert got == pytest.approx(float(want))
    assert got != pytest.approx(both[(both.metric == "all") & (both.layer == 0) & (both.sequence == 0)].value.item())


def test_a_similarity_without_the_first_token_is_no_entropy():
    assert not scoring.is_entropy(scoring.without_first(similarity.cosine))
    assert scoring.is_entropy(scoring.without_first(partial(entropy.knn, k=3)))


def test_first_tokens_are_those_of_short_windows(model, windows):
    """The model is causal: scoring long windows says what windows of any shorter length would have said."""
    metrics = {"knn": partial(entropy.knn, k=3), "cosine": similarity.cosine}
    within = scoring.score(model, windows, {name: scoring.first_tokens(metric, 9) for name, metric in metrics.items()})
    short = scoring.score(model, windows[:, :9], metrics)
    key = ["kind", "layer", "metric", "sequence"]
    assert np.allclose(within.sort_values(key).value, short.sort_values(key).value, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="30 tokens were asked for, the sequences have 24"):
        scoring.score(model, windows, {"long": scoring.first_tokens(entropy.bucket, 30)})


def test_same_numbers_every_time(model, windows):
    pd.testing.assert_frame_equal(
        scoring.score(model, windows, ("bucket", "cosine")), scoring.score(model, windows, ("bucket", "cosine"))
    )


def test_entropies_at_every_endpoint(model, windows):
    found = scoring.entropies(model, windows, ("bucket",))
    assert sorted(found.endpoint.unique()) == list(range(13))
    with pytest.raises(ValueError, match="cosine compares two states"):
        scoring.entropies(model, windows, ("cosine",))


def test_labels_are_the_columns_that_name_a_metric(model, windows):
    metrics = {("knn", k): partial(entropy.knn, k=k) for k in (3, 5)}
    found = scoring.score(model, windows, metrics, ["mlp"], labels=("metric", "k"))
    assert list(found.columns) == ["kind", "layer", "metric", "k", "sequence", "value"]
    for (name, k), metric in metrics.items():
        rows = found[(found.metric == name) & (found.k == k)].drop(columns="k").reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, scoring.score(model, windows, {name: metric}, ["mlp"]))
    curves = scoring.entropies(model, windows, metrics, labels=("estimator", "k"))
    assert list(curves.columns) == ["endpoint", "estimator", "k", "sequence", "value"]
    assert curves.groupby(["estimator", "k"]).size().to_dict() == dict.fromkeys(metrics, 13 * len(windows))


def test_settings_reach_the_metrics_that_have_them(model, windows):
    state = residual.states(model, windows[:1])[3, 0]
    assert float(scoring.configured("knn", bins=40, k=3)(state)) == float(entropy.knn(state, k=3))
    assert scoring.configured("knn", bins=40) is scoring.configured("knn", k=25) is entropy.knn
    assert scoring.configured("cosine", bins=40, k=3) is similarity.cosine
    with pytest.raises(ValueError, match="unknown metric 'entropi'"):
        scoring.configured("entropi", k=3)


def test_unknown_names_are_refused_with_the_list(model, windows):
    with pytest.raises(ValueError, match=r"unknown metric 'entropi': choose from bucket, knn"):
        scoring.score(model, windows, ("entropi",))
    with pytest.raises(ValueError, match="unknown kind 'head': choose one of attention, mlp, block"):
        scoring.score(model, windows, ("bucket",), ("head",))


def test_memory_does_not_grow_with_the_windows(model):
    """However many windows there are, at most the states of one are alive."""
    alive: list[weakref.ref] = []
    most = 0

    def spy(x, y):
        nonlocal most
        alive.extend((weakref.ref(x), weakref.ref(y)))
        most = max(most, len({id(state) for r in alive if (state := r()) is not None}))
        return similarity.cosine(x, y)

    scoring.score(model, torch.randint(0, 101, (8, 16)), {"spy": spy}, KINDS)
    assert 0 < most <= 2 * 6 + 1


def test_values_do_not_depend_on_the_number_of_threads(model, windows, monkeypatch):
    metrics = {name: scoring.METRICS[name] for name in ("bucket", "knn", "matrix_renyi", "cosine")}
    metrics["knn"] = partial(metrics["knn"], k=3)
    threads, found = torch.get_num_threads(), []
    for at_once in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda at_once=at_once: at_once)
        found.append(scoring.score(model, windows, metrics))
        pd.testing.assert_frame_equal(found[-1], found[0], check_exact=True)
    monkeypatch.undo()
    assert torch.get_num_threads() == threads, "what a thread of its own sets is its own"


def test_an_error_of_a_metric_comes_through(model, windows):
    def wrong(x):
        raise ArithmeticError("this one")

    with pytest.raises(ArithmeticError, match="this one"):
        scoring.score(model, windows, {"wrong": wrong})
