"""The full grid of choices and repairs on a tiny model: against plain evaluation, from its files, and continued."""

import numpy as np
import pandas as pd
import pytest
import torch
from families import ids, tiny

from entrodrop_utils import cache, evaluation, profile
from entrodrop_utils.dropping import dropped
from entrodrop_utils.repairing import repair
from entrodrop_utils.residual import SubBlock, endpoints, states
from entrodrop_utils.studies import repair_extras as extras
from entrodrop_utils.studies import repair_grid as grid
from entrodrop_utils.studies import repair_study as study
from entrodrop_utils.studies.methods import RANDOM, Method

SIZES = {"SCORED": (3, 32), "FITTED": (8, 16), "CHOSEN": (2, 16), "HELD_OUT": (3, 12), "PUBLISHED_PROTECTED": (0,)}
DOMAINS = ("docs", "code", "spanish")


def text(source, part, tokenizer, n, tokens):
    return ids(n, tokens, seed=sum(f"{source} {part}".encode()))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The grid of a model of four layers, of which one sub-block of each kind is dropped, or two attention layers."""
    folder = tmp_path_factory.mktemp("grid")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SIZES.items():
            patch.setattr(grid, name, value)
        patch.setattr(grid, "CASES", {"attention": (0.5, 0.25), "mlp": (0.25,), "block": (0.25,)})
        patch.setattr(grid, "load_model", lambda name: (tiny("Llama"), None))
        patch.setattr(grid, "windows", text)
        patch.setattr(grid, "DATA", folder)
        patch.setattr(cache, "CACHE", folder / "cache")
        patch.setattr(profile, "RESULTS", folder / "results")
        table = grid.grid("toy", domains=DOMAINS, draws=2)
        yield table, grid.committed_grid(profile.Profile(model="toy")), folder / "cache"


def test_every_choice_has_every_repair_on_every_domain(toy):
    table, *_ = toy
    ranked = table[table.rule != RANDOM]
    counts = ranked.groupby(["kind", "n_dropped", "metric", "domain"]).repair.agg(set)
    for (kind, *_), repairs in counts.items():
        assert repairs == {"none", *grid.REPAIRS[kind]}
    assert {m for kind, _, m, _ in counts.index if kind == "mlp"} == {*grid.SCORES, study.SINGLE, study.LEFT, grid.OURS}
    drawn = table[table.rule == RANDOM].groupby("kind").repair.agg(set)
    assert all({"none", grid.DRAWN[kind]} <= repairs for kind, repairs in drawn.items())
    assert set(table.domain[table.in_domain]) == {"docs"}


@pytest.mark.parametrize(("kind", "how"), [("attention", "fold"), ("mlp", "linear"), ("block", "patch"), ("attention", "scale")])
def test_its_losses_are_those_of_one_repaired_model(toy, kind, how):
    losses, choices = toy[1]
    drop_set = next(chosen for (of, method, _), chosen in choices.items() if of == kind and method.rule != RANDOM)
    fit = text("docs", "calibration", None, *SIZES["FITTED"])
    fit = fit[: grid.N_MAGNITUDES] if how in ("scale", "patch") else fit
    model, held_out = tiny("Llama"), text("spanish", "evaluation", None, *SIZES["HELD_OUT"])
    with dropped(model, drop_set, repair(model, drop_set, fit, how)):
        expected = evaluation.perplexity(model, held_out).per_window
    np.testing.assert_allclose(losses[how, "spanish"][drop_set].nll, expected, rtol=1e-4)
    np.testing.assert_allclose(losses["none", "spanish"][()].nll, evaluation.perplexity(model, held_out).per_window, rtol=1e-4)


def test_the_files_hold_all_of_it(toy):
    table, (losses, choices), *_ = toy
    again = study.repair_table(losses, choices, "docs")
    keys = ["repair", "domain", "kind", "metric", "draw", "n_dropped"]
    values = [t.set_index(keys).sort_index()[["increase", "increase_low", "saved"]] for t in (table, again)]
    pd.testing.assert_frame_equal(*values, rtol=1e-3, atol=1e-4)


def test_a_stopped_run_fits_and_measures_nothing_twice(toy):
    table, _, kept = toy

    def refuse(*_, **__):
        raise AssertionError("measured again")

    with pytest.MonkeyPatch.context() as again:
        again.setattr(cache, "CACHE", kept)
        for name in ("folds_by_set", "repair", "perplexity"):
            again.setattr(grid, name, refuse)
        pd.testing.assert_frame_equal(grid.grid("toy", domains=DOMAINS, draws=2), table)


def test_the_first_token_gets_its_own_mean():
    model, drop_set = tiny("Llama"), (SubBlock(1, "attention"), SubBlock(2, "attention"))
    fit, held_out = ids(8, 16), ids(4, 12, seed=1)
    means = extras.first_token_means(model, drop_set, fit)
    stream = torch.stack([states(model, window[None])[:, 0, 0] for window in fit])
    for s in drop_set:
        start, end = endpoints(s)
        torch.testing.assert_close(means[s], (stream[:, end] - stream[:, start]).mean(0), rtol=1e-4, atol=1e-5)
    constant = repair(model, drop_set, fit, "constant")
    with dropped(model, drop_set, constant):
        plain = evaluation.perplexity(model, held_out).per_window
    same = {s: constant.maps[s]["bias"] for s in drop_set}
    np.testing.assert_allclose(extras.losses_with_first(model, held_out, drop_set, constant, same), plain, rtol=1e-6)
    assert not np.allclose(extras.losses_with_first(model, held_out, drop_set, constant, means), plain, rtol=1e-6)
    choices = {("attention", Method("cosine"), 2): drop_set}
    (row,) = extras.first_token_table(model, {"docs": held_out}, choices, fit).itertuples()
    assert row.saved == pytest.approx(row.constant - row.own, abs=1e-6)


def test_both_loops_are_fitted_on_the_same_windows():
    model, drop_set, fit = tiny("Llama"), (SubBlock(1, "attention"), SubBlock(2, "attention")), ids(10, 16)
    held_out = {"docs": ids(3, 12, seed=1), "code": ids(3, 12, seed=2)}
    table = extras.loop_table(model, held_out, drop_set, fit, [8, 10])
    assert table[["windows", "tokens"]].drop_duplicates().to_numpy().tolist() == [[8, 128], [10, 160]]
    row = table.query("windows == 8 and domain == 'code'").iloc[0]
    dense = evaluation.perplexity(model, held_out["code"]).mean
    for loop in ("open", "closed"):
        with dropped(model, drop_set, repair(model, drop_set, fit[:8], loop=loop)):
            assert row[loop] == pytest.approx(evaluation.perplexity(model, held_out["code"]).mean - dense, abs=1e-6)
    assert row.saved == pytest.approx(row.open - row.closed, abs=1e-6)


@pytest.mark.slow
def test_what_training_adds_is_measured_on_every_domain(tmp_path):
    pytest.importorskip("peft", reason="peft is an optional dependency")
    model, drop_set = tiny("Llama"), (SubBlock(2, "attention"),)
    held_out = {"docs": ids(3, 12, seed=1), "code": ids(3, 12, seed=2)}
    table = extras.healed_table(model, held_out, drop_set, ids(8, 16), tmp_path, steps=3)
    assert table.groupby("repair").domain.agg(list).to_dict() == {"fold": ["docs", "code"], "fold, healed": ["docs", "code"]}
    healed = table[table.repair == "fold, healed"]
    assert (healed.steps == 3).all() and (healed.seconds > 0).all() and (healed.saved != 0).all()
