"""Notebook 09: the table of costs against plain evaluation of one repaired model, and the comparison of methods."""

import numpy as np
import pandas as pd
import pytest
from families import ids, tiny

from entrodrop_utils import evaluation
from entrodrop_utils.dropping import dropped
from entrodrop_utils.repairing import folds_by_set, maps_by_how, repair
from entrodrop_utils.residual import SubBlock
from entrodrop_utils.studies import repair_answers as answered
from entrodrop_utils.studies import repair_study as study
from entrodrop_utils.studies.comparison import extra_cost
from entrodrop_utils.studies.methods import RANDOM, Method

BUCKET, COSINE, DRAW = Method("bucket"), Method("cosine"), Method(RANDOM, RANDOM)
CHOICES = {
    ("attention", method, 2): tuple(SubBlock(layer, "attention") for layer in layers)
    for method, layers in ((BUCKET, (0, 2)), (COSINE, (1, 2)), (DRAW, (0, 3)))
}
SETS = list(CHOICES.values())[:2]
TEXT = ids(8, 16)
FIRST_COLUMNS = ["kind", "metric", "n_dropped", "domain", "constant", "own", "saved", "low", "high"]
HEALED_COLUMNS = ["repair", "domain", "increase", "low", "high", "saved", "saved_low", "saved_high", "steps", "seconds"]
HELD_OUT = {"docs": ids(5, 12, seed=1), "code": ids(5, 12, seed=2), "english": ids(5, 12, seed=3)}


@pytest.fixture(scope="module")
def measured():
    model = tiny("Llama")
    repairs = {how: repair(model, [SubBlock(i, "attention") for i in range(3)], TEXT, how) for how in study.HOWS}
    choices = {key: value for key, value in CHOICES.items() if key[1] != DRAW}
    losses = study.repaired_losses(model, HELD_OUT, choices.values(), {study.NONE: None, **repairs})
    return model, repairs, choices, losses


def test_the_repairs_of_many_sub_blocks_are_those_of_each(measured):
    model, *_ = measured
    fitted = maps_by_how(model, [*SETS[0], *SETS[1]], TEXT)
    assert set(fitted) == set(study.HOWS)
    for how in study.HOWS:
        alone = repair(model, SETS[1], TEXT, how)
        for sub_block in SETS[1]:
            for name, value in alone.maps[sub_block].items():
                np.testing.assert_allclose(fitted[how].maps[sub_block][name], value, rtol=1e-4, atol=1e-5)


def test_candidates_are_ranked_on_other_text_than_the_fit(measured):
    model, *_ = measured
    orders, repairs = study.rankings_by_cost(model, "attention", TEXT, HELD_OUT["code"], (0,))
    assert {s.layer for s in orders[Method(study.SINGLE)]} == {1, 2, 3} == {s.layer for s in repairs["linear"].maps}
    by_kl = study.rank_for_repair(model, list(repairs["linear"].maps), HELD_OUT["code"], repairs["linear"])
    assert orders[Method(study.LEFT)] == by_kl


def test_sets_with_repairs_of_their_own_are_evaluated_in_whole_passes(measured):
    model, _, choices, losses = measured
    folds = folds_by_set(model, [SETS[1]], TEXT)
    folded = study.repaired_losses(model, HELD_OUT, choices.values(), {"fold": folds})
    assert folded["fold", "docs"].keys() == {SETS[1]}
    with dropped(model, SETS[1], repair(model, SETS[1], TEXT, "fold")):
        expected = evaluation.perplexity(model, HELD_OUT["docs"]).per_window
    np.testing.assert_allclose(folded["fold", "docs"][SETS[1]].nll, expected, rtol=1e-5)
    table = study.repair_table(losses | folded, choices, "docs")
    assert (table.repair == "fold").sum() == len(HELD_OUT)
    gaps = study.gap_table(losses | folded, choices, COSINE)
    assert gaps.repair.tolist() == ["none", "linear"]
    assert [case[:3] for case in study.repaired_cases(losses | folded, choices)] == [("attention", 2, "linear")]
    renamed = {({"linear": "fold"}.get(name, name), domain): value for (name, domain), value in losses.items()}
    assert [case[2] for case in study.repaired_cases(renamed, choices)] == ["fold"]
    everywhere = np.concatenate([folded["fold", d][SETS[1]].nll - losses["none", d][()].nll for d in ("code", "english")])
    assert study.increase_elsewhere(losses | folded, SETS[1], "fold", "docs").estimate == pytest.approx(everywhere.mean())


def test_costs_are_those_of_one_model_after_another(measured):
    model, repairs, choices, losses = measured
    table = study.repair_table(losses, choices, "docs+english").set_index(["domain", "repair", "metric"])
    assert table.in_domain.groupby("domain").all().to_dict() == {"docs": True, "code": False, "english": True}
    for domain, windows in HELD_OUT.items():
        dense = evaluation.perplexity(model, windows).per_window
        for (_, method, _), drop_set in choices.items():
            values = {}
            for name, fitted in {study.NONE: None, **repairs}.items():
                with dropped(model, drop_set, fitted):
                    values[name] = evaluation.perplexity(model, windows).per_window
                row = table.loc[domain, name, method.metric]
                assert row.increase == pytest.approx((values[name] - dense).mean(), abs=1e-4)
                assert row.saved == pytest.approx((values[study.NONE] - values[name]).mean(), abs=1e-4)
                assert row.increase_low <= row.increase <= row.increase_high
    away = study.saved_elsewhere(losses, SETS[0], "linear", "docs+english")
    assert away.mean() == pytest.approx(table.loc["code", "linear", "bucket"].saved, abs=1e-4)
    with pytest.raises(ValueError, match="fitted on every domain"):
        study.saved_elsewhere(losses, SETS[0], "linear", "docs+english+code")


def planted(**means: tuple[float, float]) -> dict:
    """(repair, domain) -> set -> losses, of bucket's and cosine's set, with little spread; code costs half a nat more."""
    spread = np.linspace(-0.01, 0.01, 6)
    tables = {}
    for name, pair in means.items():
        for domain, more in (("docs", 0.0), ("code", 0.5)):
            by_set = {SETS[i]: pd.DataFrame({"nll": mean + more + spread}) for i, mean in enumerate(pair)}
            tables[name, domain] = by_set | {(): pd.DataFrame({"nll": 1 + spread})}
    return tables


@pytest.mark.parametrize(("after", "verdict"), [((1.2, 1.6), "changed"), ((1.6, 1.2), "same")])
def test_the_best_method_before_and_after(after, verdict):
    choices = {key: value for key, value in CHOICES.items() if key[1] != DRAW}
    losses = planted(none=(2.0, 1.5), linear=after)
    table = study.best_methods(losses, choices, "docs")
    assert table.domain.tolist() == ["docs", "elsewhere"] and set(table.repair) == {"linear"}
    for row in table.itertuples():
        assert (row.before, row.verdict) == ("cosine", verdict)
        assert row.saved == pytest.approx(0.4 if verdict == "changed" else 0)
    gaps = study.gap_table(losses, choices, COSINE)
    assert gaps.gap.tolist() == pytest.approx([0.5, after[0] - after[1]])
    assert study.gap_sentence(gaps, COSINE).endswith(f"1 of 1 cases bare, {int(verdict == 'same')} of 1 after repair")
    (panel,) = study.gap_figure(gaps, COSINE, "title").axes
    assert [drawn.lines[0].get_xdata()[0] for drawn in panel.containers] == pytest.approx(gaps.gap.tolist())


def test_costs_of_inference(measured):
    """Parameters, products and keys and values of a Llama of 4 layers of width 32 with 2 of 4 heads, in closed form."""
    model, repairs, *_ = measured
    drop_set, tokens = SETS[0], 10
    table = study.inference_costs(model, {name: (drop_set, fitted) for name, fitted in repairs.items()}, ids(1, tokens), rounds=2)
    attention, mlp = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 48
    parameters = {"dense": 4 * (attention + mlp + 64) + 32 + 2 * 96 * 32}
    parameters["constant"] = parameters["dense"] - 2 * attention - 2 * 32 + 2 * 32  # the norm goes, the constant comes
    parameters["linear"] = parameters["dense"] - 2 * attention + 2 * (32 * 32 + 32)
    assert dict(zip(table.repair, table.parameters * 1e6, strict=True)) == pytest.approx(parameters)
    flops = table.set_index("repair").mflop * 1e6
    pairs = {
        "dense": 4,
        "constant": 2,
        "linear": 2,
    }  # layers with attention, each 4 * tokens * width per token for scores and values
    products = {name: 2 * (n * attention + 4 * mlp + 96 * 32) + n * 4 * tokens * 32 for name, n in pairs.items()}
    products["linear"] += 2 * 2 * 32 * 32
    assert flops.to_dict() == pytest.approx(products, rel=1e-6)
    assert table.kv_bytes.tolist() == [4 * 2 * 16 * 4, 2 * 2 * 16 * 4, 2 * 2 * 16 * 4]
    assert table.latency[0] == 1


def test_the_promise_is_counted_up_to_the_first_number_that_breaks_it(measured):
    model, repairs, *_ = measured
    order = [SubBlock(i, "attention") for i in (2, 0, 1)]
    names = {"none": None, "linear": repairs["linear"]}
    losses = study.repaired_losses(model, HELD_OUT, [tuple(sorted(order[:n])) for n in (1, 2, 3)], names)
    table = study.kept_by_count(losses, order, [1, 2, 3], list(names), -np.inf)
    assert table.holds.all() and (study.most_kept(table) == 3).all(axis=None)
    with dropped(model, order[:2], repairs["linear"]):
        pruned = evaluation.perplexity(model, HELD_OUT["code"]).per_window
    kept = np.exp(evaluation.perplexity(model, HELD_OUT["code"]).per_window - pruned).mean()
    row = table.query("repair == 'linear' and domain == 'code' and n_dropped == 2").iloc[0]
    assert row.kept == pytest.approx(kept, rel=1e-4)
    broken = table.assign(holds=[n != 2 for n in table.n_dropped])
    assert (study.most_kept(broken) == 1).all(axis=None)


def test_repetition(measured):
    model, repairs, *_ = measured
    table = study.repetition(model, ids(3, 6), {"linear": (SETS[0], repairs["linear"])}, n_new=8, gram=2)
    assert table.variant.tolist() == ["dense", "linear"]
    assert table.repeated.between(0, 1).all()


def test_the_figures_are_drawn(measured):
    model, repairs, choices, losses = measured
    table = study.repair_table(losses, choices, "docs")
    figure = study.repair_figure(table, "attention", 2, "A repair saves most of the loss.")
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["the fitted domain", "other domains"]
    costs = study.inference_costs(model, {"linear": (SETS[0], repairs["linear"])}, ids(1, 8), rounds=2)
    costs[["elsewhere", "elsewhere_low", "elsewhere_high"]] = [(0.0, 0.0, 0.0), (0.3, 0.2, 0.4)]
    assert study.budget_figure(costs, "A title.").axes


def test_the_answers_of_the_notebook(measured):
    """Every question is answered, with the intervals of the tables."""
    model, repairs, *_ = measured
    orders = {
        m: [SubBlock(i, "attention") for i in layers]
        for m, layers in (
            (BUCKET, (0, 2, 1)),
            (COSINE, (1, 2, 0)),
            (Method(study.SINGLE), (2, 1, 0)),
            (Method(study.LEFT), (0, 1, 2)),
        )
    }
    choices = answered.choices_of(orders, "attention", 2)
    drop_set = choices["attention", COSINE, 2]
    every = {"none": None, **repairs, "fold": folds_by_set(model, [drop_set], TEXT)}
    sets = [*choices.values(), tuple(sorted(orders[Method(study.LEFT)][:1]))]
    losses = study.repaired_losses(model, HELD_OUT, sets, every)
    variants = {name: (drop_set, of[drop_set] if name == "fold" else of) for name, of in every.items()}
    costs = answered.costs_elsewhere(study.inference_costs(model, variants, ids(1, 8), rounds=2), losses, drop_set, "docs")
    kept = study.kept_by_count(losses, orders[Method(study.LEFT)], [1, 2], ["none", "linear"], 0.95)
    texts = study.increase_table(
        {("docs+code", d): losses["linear", d] for d in HELD_OUT} | {("none", d): losses["none", d] for d in HELD_OUT}, drop_set
    )
    repeated = study.repetition(model, ids(2, 6), {}, n_new=6)
    lines = answered.answers(losses, choices, COSINE, "docs", texts, kept, repeated, costs)
    starts = ["Cost", "Best method", "Choosing", "Choosing", "Entropy", "Text", "Promise", "Promise", "Repetition"]
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * len(starts)
    left = study.increase_elsewhere(losses, drop_set, "fold", "docs")
    assert f"fold {left:.2f} at" in lines[0]
    gap = study.gap_everywhere(losses, choices["attention", BUCKET, 2], drop_set, "linear")
    assert f"bare, {extra_cost(gap)} after linear repair" in lines[4]
    other = {("mlp", method, n): drop_set for (_, method, n), drop_set in choices.items()}
    assert "without 2 MLPs" in answered.answers(losses, choices, COSINE, "docs", texts, kept, repeated, costs, (losses, other))[1]
    finding = answered.repair_finding(losses, choices, COSINE, "docs", 4)
    assert finding.startswith("Without 2 of 4 attention layers by cosine, a linear repair saves") and len(finding.split()) <= 30
    first = pd.DataFrame([("mlp", "cosine", 2, "docs", 0.3, 0.1, 0.2, 0.1, 0.3)], columns=FIRST_COLUMNS)
    healed = pd.DataFrame([("fold, healed", "docs", 0.3, 0.2, 0.4, 0.1, 0.0, 0.2, 60, 90.0)], columns=HEALED_COLUMNS)
    rows = [(20, 5120, domain, 0.3, 0.3 - saved, saved, saved - 0.1, saved + 0.1) for domain, saved in (("docs", 0.2), ("code", 0))]
    loops = pd.DataFrame(rows, columns=["windows", "tokens", "domain", "open", "closed", "saved", "low", "high"])
    first_line, loop_line, trained = answered.grid_answers(first, loops, healed)
    assert "20 windows (5120 tokens) better in 1 of 2 domains, worse in 0 (docs 0.20 [0.10, 0.30]" in loop_line
    assert "2 MLPs by cosine it saves docs 0.200 [0.100, 0.300]" in first_line
    assert "60 steps" in trained and "docs 0.10 [0.00, 0.20] of 0.40" in trained
    assert "saves" in answered.saved_sentence(losses, drop_set, "docs", 4)
    assert "the linear map leaves" in answered.budget_sentence(costs)


def test_a_family_that_cannot_carry_a_repair_in_its_weights_has_none_and_says_why(capsys):
    made = study.repairs_in_weights(tiny("Gemma 3 (text)"), SETS[1], TEXT)
    assert "fold" not in made and "no fold: Gemma3ForCausalLM cannot carry a repair in its" in capsys.readouterr().out
    made = study.repairs_in_weights(tiny("Llama"), SETS[1], TEXT)
    assert {name: [*of] for name, of in made.items()} == {"fold": [SETS[1]], "scale": [SETS[1]]}
    assert capsys.readouterr().out == ""
