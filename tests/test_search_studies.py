"""The studies of notebooks 05 and 07 on a tiny model: their numbers against plain ones, their sentences against their tables."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kendalltau
from tiny_llama import tiny_llama

from entrodrop_utils import search
from entrodrop_utils.dropping import dropped
from entrodrop_utils.entropy import bucket
from entrodrop_utils.evaluation import perplexity
from entrodrop_utils.repairing import repair
from entrodrop_utils.residual import SubBlock, find
from entrodrop_utils.saving import remove
from entrodrop_utils.similarity import cosine
from entrodrop_utils.studies import promise, tradeoff, writing
from entrodrop_utils.studies import search_study as study

HELD = {
    name: torch.randint(0, 101, (5, 20), generator=torch.Generator().manual_seed(i)) for i, name in enumerate(("docs", "english"))
}
SCORES = {"bucket": bucket, "cosine": cosine}


def plain_loss(model, windows, sub_blocks) -> float:
    with torch.no_grad(), dropped(model, sub_blocks):
        return float(np.mean([float(model(w[None], labels=w[None]).loss) for w in windows]))


@pytest.fixture(scope="module")
def compared():
    model = tiny_llama()
    draws = [torch.randint(0, 101, (3, 16), generator=torch.Generator().manual_seed(9 + i)) for i in range(2)]
    methods = {name: study.SEARCHES[name] for name in ("single drops", "lazy greedy", "greedy", "EvoPress")}
    parts = [study.rankings(model, draws, m, ["attention"], [2]) for m in (study.scores_of(SCORES), methods)]
    choices = study.joined_choices([*parts, study.random_sets(model, ["attention"], [2], 4)])
    table, losses = study.judged(model, choices, HELD)
    return model, draws, choices, table, losses


def test_choices_are_those_of_the_methods_and_their_costs_plain_losses(compared):
    model, draws, choices, table, _ = compared
    row = table[(table.method == "greedy") & (table.draw == 1) & (table.domain == "english")].iloc[0]
    ranking = search.greedy(model, draws[1], 2)
    assert row.set == tuple(sorted(ranking.order)) and (row.forward_passes, row.tokens) == ranking[1:]
    dense = plain_loss(model, HELD["english"], [])
    assert row.increase == pytest.approx(plain_loss(model, HELD["english"], row.set) - dense, abs=1e-5)
    assert len(choices) == 2 * 8 + 4 and len(table) == 2 * len(choices)


def test_evolution_gets_the_passes_that_ours_spent(compared):
    _, _, choices, _, _ = compared
    spent = choices.set_index(["method", "draw"]).forward_passes
    for draw in (0, 1):  # it stops before a generation that would start beyond them
        whole = search.evopress(tiny_llama(), torch.zeros(3, 16, dtype=torch.long), 2).passes
        assert spent["EvoPress", draw] < whole


def test_differences_are_paired_and_ours_has_none(compared):
    *_, table, losses = compared
    against = study.against_ours(table, losses).set_index(["domain", "method"])
    assert (against.loc[(slice(None), "lazy greedy"), ["difference", "low", "high"]] == 0).all(axis=None)
    of = lambda method: table[(table.method == method) & (table.domain == "docs")]  # noqa: E731
    mean = of("cosine").increase.mean()
    assert against.loc[("docs", "cosine"), "difference"] == pytest.approx(mean - of("lazy greedy").increase.mean())
    assert against.loc[("docs", "greedy"), "share"] == 1


def test_the_audit_is_kendalls_tau_with_single_drops(compared):
    model, draws, _, table, losses = compared
    orders = {"ours": search.lazy_greedy(model, draws[0]).order, "backwards": find(model, "attention")[::-1]}
    audit = study.audit(model, HELD["docs"], "attention", orders, study.against_ours(table, losses))
    true = {s: plain_loss(model, HELD["docs"], [s]) for s in find(model, "attention")}
    rank = {s: 5 - s.layer for s in true}
    assert audit.set_index("method").tau["backwards"] == pytest.approx(
        kendalltau(list(rank.values()), list(true.values())).statistic
    )
    assert (audit.low <= audit.tau).all() and (audit.tau <= audit.high).all()


def test_claims_and_sentences_follow_the_table(compared):
    _, _, _, table, losses = compared
    against = study.against_ours(table, losses)
    claims = study.search_claims(against, losses, table, "attention", 2, "5 windows")
    rows = against[against.domain == "docs"].set_index("method")
    rival = claims.claim[0].partition("(")[2].partition(")")[0]
    assert claims.measured[0] == pytest.approx(rows.difference[rival])
    cheap = rows[(rows.share <= 1.05 * rows.share["lazy greedy"]) & ~rows.index.isin(["lazy greedy", "random"])]
    assert rival == cheap.increase.idxmin() and len(claims) == 1 + 2
    sentence = study.search_finding(rows, "attention", 2, 6)
    assert f"{rows.increase['lazy greedy']:.2f} nats" in sentence and len(sentence.split()) <= 30
    assert f"costs {rows.increase['lazy greedy']:.2f} nats" in study.search_title(rows.reset_index(), "attention", 2)
    assert study.search_details(against, claims).count("\n- ") == 3
    assert len(study.search_figure(against, table, "A title").axes) == 2


def test_the_differences_of_every_case_and_the_aim_against_greedy():
    values = {"lazy greedy": (1.04, 0.3), "greedy": (1.0, 1.0), "cosine": (2.0, 0.1), "random": (3.0, 0.0)}
    rows = [
        ("docs", kind, n, name, increase * factor, share, increase - 1.04, 0.0, 1.0)
        for kind, n, factor in (("attention", 2, 1.0), ("mlp", 1, 2.0))
        for name, (increase, share) in values.items()
    ]
    table = pd.DataFrame(rows, columns=["domain", "kind", "n_dropped", "method", "increase", "share", "difference", "low", "high"])
    shown = study.difference_table(table, "docs")
    assert list(shown.index) == ["greedy", "cosine"] and shown.loc["cosine", ("mlp", 1)] == "0.96 [0.00, 1.00]"
    assert study.greedy_sentence(table).startswith("Lazy greedy costs at most 5% more than greedy in 2 of 2 cases, with 30% to 30%")
    table.loc[(table.kind == "mlp") & (table.method == "lazy greedy"), "increase"] = 3.0
    assert "in 1 of 2 cases" in study.greedy_sentence(table)


def test_interactions_are_told_by_distance(compared):
    model, draws, *_ = compared
    pairs = study.with_distance(search.interactions(model, draws[0], "attention"))
    assert len(pairs) == 15 and (pairs.distance <= 3).sum() == 5 + 4 + 3
    assert study.interaction_table(pairs).pairs.tolist() == [12, 3]


@pytest.fixture(scope="module")
def traded():
    model, windows = tiny_llama(), torch.randint(0, 101, (3, 16), generator=torch.Generator().manual_seed(9))
    orders = tradeoff.tradeoff_orders(model, windows, ("attention", "block", "mixed"), SCORES, windows, share=0.5)
    return model, orders, tradeoff.tradeoff_table(model, HELD["docs"], orders, 4)


def test_the_tradeoff_has_plain_losses_and_the_sizes_of_what_is_removed(traded):
    model, orders, table = traded
    assert ("mixed", "bucket") not in orders and ("mixed", "cosine") in orders
    dense, layers = plain_loss(model, HELD["docs"], []), list(model.model.layers.parameters())
    for row in table[table.n_dropped == 3].itertuples():
        chosen = orders[row.kind, row.method].order[:3]
        assert row.increase == pytest.approx(plain_loss(model, HELD["docs"], chosen) - dense, abs=1e-5)
        smaller = remove(tiny_llama(), chosen)
        left = sum(w.numel() for w in smaller.model.layers.parameters())
        assert row.parameters == pytest.approx(1 - left / sum(w.numel() for w in layers))
        assert row.cache == pytest.approx(1 - len(find(smaller, "attention")) / 6)
        assert row.retention == pytest.approx(np.exp(-row.increase))


def test_counts_go_from_none_to_all():
    order = [SubBlock(i, "mlp") for i in range(20)]
    assert tradeoff.counts_of(order, 99) == list(range(21))
    few = tradeoff.counts_of(order, 5)
    assert few[0] == 0 and few[-1] == 20 and len(few) == 5 and few[1] < 5


def test_the_front_holds_what_nothing_beats_and_the_limit_what_stays_below(traded):
    *_, table = traded
    front = tradeoff.pareto(table, "parameters")
    for row in table.itertuples():
        beaten = ((table.parameters >= row.parameters) & (table.increase < row.increase)).any()
        assert not ((front.parameters == row.parameters) & (front.increase == row.increase)).any() or not beaten
    for row in tradeoff.falls_off(table, 0.05).itertuples():
        of_method = table[(table.kind == row.kind) & (table.method == row.method)]
        assert row.increase <= 0.05 and (of_method[of_method.n_dropped <= row.n_dropped].increase <= 0.05).all()


def test_the_loss_by_share_is_that_of_the_nearest_count(traded):
    *_, table = traded
    shares = tradeoff.loss_by_share(table, (0.4, 1.0))
    for (kind, method), row in shares.iterrows():
        rows = table[(table.kind == kind) & (table.method == method)].set_index("n_dropped").increase
        nearest = min(rows.index, key=lambda n: abs(n - 0.4 * rows.index.max()))
        assert row.tolist() == [rows[nearest], rows[rows.index.max()]]


def test_repaired_beginnings_cost_what_each_repaired_model_costs(traded):
    model, orders, _ = traded
    fit = torch.randint(0, 101, (8, 16), generator=torch.Generator().manual_seed(4))
    table = tradeoff.repaired_table(model, HELD, orders, fit, 3)
    assert set(table.kind) == {"attention"} and set(table.domain) == set(HELD)
    for row in table.itertuples():
        drop_set = orders[row.kind, "lazy greedy"].order[: row.n_dropped]
        dense, bare = (plain_loss(model, HELD[row.domain], s) for s in ([], drop_set))
        with dropped(model, drop_set, repair(model, drop_set, fit)):
            repaired = perplexity(model, HELD[row.domain]).mean
        assert [row.bare, row.repaired] == pytest.approx([bare - dense, repaired - dense], abs=1e-5)
        assert row.saved == pytest.approx(bare - repaired, abs=1e-5)
    (panel,) = tradeoff.repaired_figure(table, tradeoff.repaired_title(table)).axes
    assert len(panel.lines) == 2 * len(HELD)


def test_repetition_counts_pieces_that_occurred_before(monkeypatch):
    model = tiny_llama()
    texts = torch.tensor([[7, 7, *[1, 2, 3, 4, 5] * 3], [7, 7, *range(10, 25)]])
    monkeypatch.setattr(type(model), "generate", lambda self, *args, **kwargs: texts)
    # Of 12 pieces of four tokens in the first text 5 differ; none is repeated in the second
    assert writing.repeated_shares(model, texts[:, :2], 15).tolist() == pytest.approx([1 - 5 / 12, 0])


def test_repetition_of_the_dense_model_and_sentences(traded):
    model, orders, table = traded
    sets = tradeoff.growing_sets(orders, ["attention", "block"], 2)
    assert [n for _, n in sets] == [0, 2, 3, 0, 2, 3] and sets["attention", 0] == ()
    table = tradeoff.tradeoff_table(model, HELD["docs"], orders, 9)
    repeated = tradeoff.repetition_table(model, HELD["docs"][:2, :4], table, sets, 8)
    assert repeated.repetition.between(0, 1).all() and (repeated[repeated.n_dropped == 0].increase == 0).all()
    limits = tradeoff.falls_off(table)
    assert len(limits) == len(orders) and "lazy greedy drops" in tradeoff.tradeoff_title(limits)
    assert tradeoff.tradeoff_details(limits, repeated).count("\n- ") == 4
    assert tradeoff.pareto_title(table).endswith("of the KV cache")
    assert tradeoff.tradeoff_figure(table, "A title").axes and len(tradeoff.pareto_figure(table, "A title").axes) == 2


def test_a_set_saves_the_time_that_its_sub_blocks_took(traded):
    *_, table = traded
    of_dense = {"attention": 0.02, "mlp": 0.05, "block": 0.07}  # of the time, each; the measured speed-ups are exact
    speeds = pd.DataFrame(
        [("dense", 0, 1.0), *((kind, n, 1 / (1 - n * share)) for kind, share in of_dense.items() for n in (2, 3))],
        columns=["kind", "n_dropped", "decode_speedup"],
    )
    timed = tradeoff.with_time(table, speeds)
    for row in timed.itertuples():
        kinds = [next(kind for kind in of_dense if kind[0] == name[0]) for name in row.dropped.split()]
        assert row.time == pytest.approx(sum(of_dense[kind] for kind in kinds))
    assert tradeoff.with_time(table, None) is table and tradeoff.resources(timed) == ["parameters", "cache", "time"]
    assert tradeoff.pareto_title(timed).endswith("of the decoding time")
    assert len(tradeoff.pareto_figure(timed, "A title").axes) == 3


@pytest.mark.slow
def test_promises_by_likelihood_and_accuracy(traded, tmp_path):
    model, orders, _ = traded
    order = orders["attention", "lazy greedy"].order
    methods = {("attention", "lazy greedy"): order, ("attention", "cosine"): cosine}
    calibration, validation, evaluation = torch.randint(0, 101, (3, 6, 20), generator=torch.Generator().manual_seed(4))
    results = promise.processes(model, calibration, validation, methods, [0.5, 0.999], (), tmp_path)
    table = promise.promise_table(model, evaluation, results)
    assert len(table) == 2 * 2 * 2
    for row in table.itertuples():
        chosen, log = results[row.measure, row.kind, row.method, row.promised]
        smaller = remove(tiny_llama(), chosen)
        if row.measure == "likelihood":
            share = np.exp(plain_loss(tiny_llama(), evaluation, []) - plain_loss(smaller, evaluation, []))
        else:
            hits = [(m(evaluation).logits[:, :-1].argmax(-1) == evaluation[:, 1:]).double().mean() for m in (smaller, model)]
            share = float(hits[0] / hits[1])
        if chosen:
            assert row.evaluation == pytest.approx(share, rel=1e-4)
        else:
            assert row.verdict == promise.NOT_SHOWN and row.validation_low == log.low.iloc[0] < row.promised
    assert set(table[table.n_dropped == 0].verdict) <= {promise.NOT_SHOWN}
    shown = promise.display_table(table)
    assert "at least" in shown.validation.iloc[0]
    assert len(promise.promise_finding(table, 6).split()) <= 30
