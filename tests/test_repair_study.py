"""Notebook 09: the table of costs against plain evaluation of one repaired model, and the comparison of methods."""

import numpy as np
import pandas as pd
import pytest
from families import ids, tiny

from entrodrop_utils import evaluation
from entrodrop_utils.dropping import dropped
from entrodrop_utils.repairing import repair
from entrodrop_utils.residual import SubBlock
from entrodrop_utils.studies import repair_study as study
from entrodrop_utils.studies.methods import RANDOM, Method

BUCKET, COSINE, DRAW = Method("bucket"), Method("cosine"), Method(RANDOM, RANDOM)
CHOICES = {
    ("attention", method, 2): tuple(SubBlock(layer, "attention") for layer in layers)
    for method, layers in ((BUCKET, (0, 2)), (COSINE, (1, 2)), (DRAW, (0, 3)))
}
SETS = list(CHOICES.values())[:2]
TEXT = ids(8, 16)
HELD_OUT = {"docs": ids(5, 12, seed=1), "code": ids(5, 12, seed=2), "english": ids(5, 12, seed=3)}


@pytest.fixture(scope="module")
def measured():
    model = tiny("Llama")
    repairs = {how: repair(model, [SubBlock(i, "attention") for i in range(3)], TEXT, how) for how in study.HOWS}
    choices = {key: value for key, value in CHOICES.items() if key[1] != DRAW}
    losses = study.repaired_losses(model, HELD_OUT, choices.values(), {study.NONE: None, **repairs})
    return model, repairs, choices, losses


def test_the_repairs_of_many_sets_are_those_of_each(measured):
    model, *_ = measured
    fitted = study.fit_repairs(model, [SETS[0], SETS[1]], TEXT)
    assert set(fitted) == set(study.HOWS)
    alone = repair(model, SETS[1], TEXT, "linear")
    for sub_block in SETS[1]:
        for name, value in alone.maps[sub_block].items():
            np.testing.assert_allclose(fitted["linear"].maps[sub_block][name], value, rtol=1e-4, atol=1e-5)


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
    """(repair, domain) -> set -> losses, of bucket's and cosine's set, with little spread."""
    spread = np.linspace(-0.01, 0.01, 6)
    tables = {}
    for name, pair in means.items():
        by_set = {SETS[i]: pd.DataFrame({"nll": mean + spread}) for i, mean in enumerate(pair)}
        tables[name, "docs"] = by_set | {(): pd.DataFrame({"nll": 1 + spread})}
    return tables


@pytest.mark.parametrize(("after", "verdict"), [((1.2, 1.6), "changed"), ((1.6, 1.2), "same")])
def test_the_best_method_before_and_after(after, verdict):
    choices = {key: value for key, value in CHOICES.items() if key[1] != DRAW}
    losses = planted(none=(2.0, 1.5), linear=after)
    (row,) = study.best_methods(losses, choices, "linear").itertuples()
    assert (row.before, row.verdict) == ("cosine", verdict)
    assert row.saved == pytest.approx(0.4 if verdict == "changed" else 0)
    table = study.repair_table(losses, choices, "docs")
    saved = (2.0 + 1.5 - sum(after)) / (2.0 + 1.5 - 2)
    assert study.share_saved(table, True, "linear") == pytest.approx(saved)
    gaps = study.gap_table(losses, choices, COSINE)
    assert gaps.loc["attention", 2, "bucket"]["none"] == "0.50 [0.50, 0.50]"


def test_parameters_of_each_repair(measured):
    model, repairs, choices, _ = measured
    table = study.parameter_table(model, choices, repairs)
    sizes = table[["none", "constant", "linear"]].sub(table.none, axis=0) * 1e6
    np.testing.assert_allclose(sizes, [[0, 2 * 32, 2 * (32 * 32 + 32 + 32)]] * 2, atol=1e-3)  # a linear map keeps the norm
