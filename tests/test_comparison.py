"""Entropy against cosine and random choices: what is compared, how it is judged, and sentences that follow the numbers."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from entrodrop_utils.residual import SubBlock
from entrodrop_utils.statistics import Interval, half_means
from entrodrop_utils.studies import comparison, methods
from entrodrop_utils.studies.methods import Method

COSINE, BUCKET, KNN, TWICE = Method("cosine"), Method("bucket"), Method("knn"), Method("knn", "two-stage")


def measured(losses: dict[Method, float], n: int = 3, windows: int = 12):
    """Choices of one sub-block each, and their losses: noise that differs between sets."""
    generator, choices, by_set = np.random.default_rng(0), {}, {}
    for number, (method, loss) in enumerate(losses.items()):
        drop_set = (SubBlock(1 if method == TWICE else number, "attention"),)  # TWICE has the set of the second method
        choices["attention", method, n] = drop_set
        by_set.setdefault(drop_set, pd.DataFrame({"nll": loss + generator.normal(0, 0.1, windows)}))
    return by_set, choices


def test_differences_are_paired_and_controlled_for_their_number():
    by_set, choices = measured({COSINE: 2.0, KNN: 2.07, TWICE: 2.07, BUCKET: 3.0, Method("norm_ratio"): 1.5})
    table = methods.compared_with(COSINE, by_set, choices)
    assert len(table) == 4 and len(methods.distinct(table)) == 3
    reference = by_set[choices["attention", COSINE, 3]].nll
    p = [stats.ttest_1samp(by_set[choices["attention", method, 3]].nll - reference, 0).pvalue for method in (KNN, BUCKET)]
    assert table.p.iloc[[0, 2]].tolist() == pytest.approx(p)
    m, ordered = 3, np.sort(methods.distinct(table).p)  # Benjamini and Hochberg, as they write it
    q = [min(m * ordered[j] / (j + 1) for j in range(i, m)) for i in range(m)]
    assert np.sort(methods.distinct(table).q) == pytest.approx(q)
    assert table.verdict.iloc[2:].tolist() == ["worse", "better"]
    assert table.verdict[0] == table.verdict[1] == ("worse" if max(q) <= 0.05 else "undecided")


def test_the_same_set_as_the_reference_is_no_comparison():
    by_set, choices = measured({COSINE: 2.0, BUCKET: 3.0})
    choices["attention", KNN, 3] = choices["attention", COSINE, 3]
    assert methods.compared_with(COSINE, by_set, choices).verdict.tolist() == ["worse", "same"]


def test_a_place_among_draws_is_a_share_with_its_interval():
    draws = [("attention", *Method("random", "random", draw=d), 3, str(d), float(d)) for d in range(40)]
    rows = [*draws, ("attention", *BUCKET, 3, "7 5", 35.5), ("attention", *KNN, 3, "8", 20.5), ("attention", *COSINE, 4, "8", 0.0)]
    pruning = pd.DataFrame(rows, columns=["kind", *methods.METHOD_COLUMNS, "n_dropped", "dropped", "nll"])
    table = methods.place_among_draws(pruning)  # no draws at 4
    assert table.share.tolist() == [0.1, 19 / 40]
    assert table.verdict.tolist() == ["worse", "undecided"]
    assert table.dropped[0] == "5 7"
    z, share, n = stats.norm.ppf(0.975), 0.1, 40
    middle, half = share + z**2 / 2 / n, z * np.sqrt(share * (1 - share) / n + z**2 / 4 / n**2)
    assert (table.low[0], table.high[0]) == pytest.approx(((middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)))


@pytest.mark.parametrize(
    ("verdicts", "sentence"),
    [
        (["worse"] * 3, "loses to cosine similarity in all 3 distinct comparisons"),
        (["better"] * 2, "beats cosine similarity in all 2 distinct comparisons"),
        (["better", "worse", "undecided", "same"], "beats cosine similarity in 1 of 4 distinct comparisons and loses in 1"),
    ],
)
def test_outcome_follows_the_verdicts(verdicts, sentence):
    assert comparison.outcome(pd.Series(verdicts)) == sentence


def test_a_negative_extra_cost_is_less():
    assert comparison.extra_cost(Interval(0.47, 0.37, 0.57)) == "0.47 nats [0.37, 0.57] more"
    assert comparison.extra_cost(Interval(-0.47, -0.57, 0.1)) == "0.47 nats [-0.10, 0.57] less"


def test_claims_follow_the_compared_fractions():
    by_set, choices = measured({COSINE: 2.0, BUCKET: 3.0, KNN: 1.5})
    places = [("attention", *BUCKET, 3, "1", 40, 0.9, 0.8, 0.95, "better")]
    columns = ["kind", *methods.METHOD_COLUMNS, "n_dropped", "dropped", "draws", "share", "low", "high", "verdict"]
    claims = comparison.paper_claims(by_set, choices, {0.5: 3}, pd.DataFrame(places, columns=columns), "12 windows")
    assert list(claims.verdict) == ["does not hold", "holds", "holds"]  # no MLPs, so no claim about them
    assert claims.claim.str.contains("50% of attention layers").all()
    assert list(claims.goal) == [0, 0, 0.5]
    assert claims.evidence.tolist() == ["held-out text: 12 windows"] * 2 + ["held-out text: 12 windows; 40 draws"]


def test_each_kind_has_its_own_number_of_random_choices():
    drawn = [Method("random", "random", draw=d) for d in range(3)]
    choices = {(kind, m, n): () for kind in ("attention", "mlp") for m in (COSINE, *drawn) for n in (4, 8)}
    kept = comparison.to_measure(choices, {"attention": 3, "mlp": 1})
    assert [choice for choice in kept if choice[1] == COSINE] == [c for c in choices if c[1] == COSINE]
    of_attention = [("attention", d, n) for d in range(3) for n in (4, 8)]
    assert [(kind, m.draw, n) for kind, m, n in kept if m != COSINE] == [*of_attention, ("mlp", 0, 4), ("mlp", 0, 8)]


def test_choices_from_halves_are_those_of_the_halves_own_means():
    generator = np.random.default_rng(3)
    values = generator.normal(np.linspace(0, 1, 8), 0.5, (10, 8))
    places = [(s, layer, values[s, layer]) for s in range(10) for layer in range(8)]
    scores = pd.DataFrame(places, columns=["sequence", "layer", "value"]).assign(kind="attention", metric="bucket")
    sets = comparison.chosen_from_halves(scores, ["bucket"], "attention", 3, protected=[0], draws=6)
    assert list(sets) == [("bucket", draw) for draw in range(-1, 6)]
    by_hand = [values.mean(0), *half_means(values, 6)]
    for (_, drop_set), means in zip(sets.items(), by_hand, strict=True):
        assert [sub_block.layer for sub_block in drop_set] == sorted(1 + np.argsort(means[1:])[:3])


def test_the_uncertainty_of_a_choice_is_the_spread_of_the_halves_about_it():
    whole, half, other = (tuple(SubBlock(layer, "attention") for layer in layers) for layers in ((1, 2), (1, 3), (4, 5)))
    sets = {("knn", -1): whole, ("knn", 0): half, ("knn", 1): other, ("cosine", -1): half, ("cosine", 0): half, ("cosine", 1): half}
    table = comparison.choice_table(sets, {whole: 1.0, half: 1.3, other: 0.6}, 24).set_index("metric")
    width = stats.t.ppf(0.975, 23) * np.sqrt((0.3**2 + 0.4**2) / 2)
    assert table.loc["knn"].tolist() == pytest.approx([1.0, 1 - width, 1 + width, 2, 0.25])
    assert table.loc["cosine"].tolist() == pytest.approx([1.3, np.nan, np.nan, 1, 1], nan_ok=True)
