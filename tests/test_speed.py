"""Speed: the measurements' arithmetic against plain formulas, and memory against models that lack the parts. No wall time."""

import copy
import math

import bench
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from tiny_llama import tiny_llama

from entrodrop_utils.dropping import dropped
from entrodrop_utils.evaluation import perplexity
from entrodrop_utils.residual import KINDS, SubBlock, find
from entrodrop_utils.saving import remove
from entrodrop_utils.studies import speed, speed_answers


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def ids(n: int = 12) -> torch.Tensor:
    return torch.arange(2, 2 + n)[None]


def test_a_ratio_is_the_geometric_mean_over_the_rounds(monkeypatch):
    seconds = {"slow": iter([9.0, 2.0, 4.0, 8.0]), "fast": iter([9.0, 1.0, 1.0, 1.0])}  # the first call sets the number of calls

    class Clock:
        def __init__(self, _, globals, num_threads):
            self.name = globals["call"]()

        def timeit(self, number):
            return type("Measurement", (), {"mean": next(seconds[self.name])})

    monkeypatch.setattr(speed, "Timer", Clock)
    measured = speed.side_by_side(lambda: "slow", lambda: "fast", rounds=3)
    logs = np.log([2, 4, 8])
    half = stats.t.ppf(0.975, 2) * logs.std(ddof=1) / math.sqrt(3)
    assert (measured.reference, measured.seconds) == (4, 1)
    assert measured.ratio == pytest.approx((4, 4 * math.exp(-half), 4 * math.exp(half)))


def test_every_variant_is_compared_with_the_dense_model_of_its_round():
    rows = [("dense", 0, 0, 4.0, 2.0, 4.0, 2.0, 80), ("dense", 0, 1, 8.0, 2.0, 8.0, 2.0, 80)]
    rows += [("attention", 2, 0, 2.0, 1.0, 1.0, 1.0, 60), ("attention", 2, 1, 4.0, 1.0, 2.0, 0.5, 60)]
    columns = ["kind", "n_dropped", "round", "prefill", "decode", "ideal_prefill", "ideal_decode", "cache_bytes"]
    table = speed.speed_table(pd.DataFrame(rows, columns=columns)).set_index("kind").loc["attention"]
    assert (table.prefill_speedup, table.decode_speedup) == pytest.approx((2, 2))
    assert (table.prefill_of_ideal, table.decode_of_ideal) == pytest.approx((0.5, math.sqrt(0.5)))
    assert table.prefill_speedup_low == table.prefill_speedup_high, "the same in both rounds"
    assert table.decode_of_ideal_low < table.decode_of_ideal < table.decode_of_ideal_high


def test_all_variants_are_measured(model):
    table = speed.measured_setting(model, 2, 10, rounds=1)
    depth = len(find(model, "block"))
    assert set(zip(table.kind, table.n_dropped, strict=True)) == set(speed.variants(model))
    dense = table[table.kind == "dense"].cache_bytes.item()
    kept = np.where(table.kind.isin(["attention", "block"]), depth - table.n_dropped, depth)
    assert (table.cache_bytes * depth == kept * dense).all(), "exactly (L - n) / L"
    assert (table[["prefill_seconds", "decode_seconds"]] > 0).all(axis=None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_left_are_those_of_a_model_without_the_parts(model, kind):
    for drop_set in ([], [SubBlock(1, kind)], [SubBlock(0, "attention"), SubBlock(2, kind)]):
        smaller = remove(copy.deepcopy(model), drop_set) if drop_set else model
        assert speed.kept_bytes(model, drop_set) == sum(w.nbytes for w in set(smaller.parameters()))


def test_parts_are_timed_inside_their_layers_and_change_nothing(model):
    before = model(ids()).logits
    with speed.timed_parts(model) as seconds:
        assert torch.equal(model(ids()).logits, before)
    assert set(seconds) == {sub_block for kind in KINDS for sub_block in find(model, kind)}
    for layer in range(len(find(model, "block"))):
        assert seconds[SubBlock(layer, "attention")] + seconds[SubBlock(layer, "mlp")] <= seconds[SubBlock(layer, "block")]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_timed_run_continues_as_the_model_does(model, monkeypatch):
    chosen = []
    argmax = torch.Tensor.argmax
    monkeypatch.setattr(torch.Tensor, "argmax", lambda *args: chosen.append(argmax(*args)) or chosen[-1])
    speed.generate(model, ids(), 5)
    monkeypatch.undo()
    expected = model.generate(ids(), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)[0, -5:]
    assert torch.cat(chosen, 1)[0].tolist() == expected.tolist()


def test_prices_are_the_losses_of_the_sets_that_were_timed(model):
    table = speed.measured_setting(model, 1, 8, rounds=1)
    held_out = torch.arange(60).view(3, 20) % 50
    orders = {kind: find(model, kind)[::-1] for kind in KINDS}
    prices = speed_answers.price_table(model, held_out, orders, table)
    dense = perplexity(model, held_out).mean
    for row in prices.itertuples():
        with dropped(model, orders[row.kind][: row.n_dropped]):
            assert row.increase == pytest.approx(perplexity(model, held_out).mean - dense, abs=1e-5)
    assert (prices[prices.kind == "mlp"].cache_saved == 0).all()
    speed_answers.price_figure(prices, speed_answers.price_title(prices))
    speed_answers.speed_figure(table, speed_answers.speed_title(table))


def test_the_goal_is_judged_by_the_whole_interval():
    row = {"kind": "mlp", "n_dropped": 3, "batch": 1, "tokens": 8}
    row |= {"prefill_of_ideal": 0.99, "prefill_of_ideal_low": 0.96, "prefill_of_ideal_high": 1.02}
    row |= {"decode_of_ideal": 0.9, "decode_of_ideal_low": 0.8, "decode_of_ideal_high": 0.94}
    table = speed_answers.ideal_table(pd.DataFrame([row, row | {"kind": "block", "decode_of_ideal_high": 1.0}]))
    assert table.kind.tolist()[:2] == ["mlp", "block"]
    assert table.verdict.tolist() == ["does not hold", "inconclusive", "holds", "holds"]


@pytest.mark.parametrize("name", bench.REFERENCES)
def test_the_references_of_the_benchmark_compute_the_same(name):
    x = torch.randn(60, 24, generator=torch.Generator().manual_seed(0))
    for title, (reference, _) in bench.REFERENCES[name].items():
        assert float(reference(x)) == pytest.approx(float(bench.entropy.ESTIMATORS[name](x)), rel=1e-5), title


def test_memory_is_that_of_the_call():
    mib = speed.peak_memory(lambda: torch.ones(2**24).sum())
    assert math.isnan(mib) or 60 < mib < 80, "64 MiB of float32"


def test_a_machine_without_a_gpu_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        speed.main(["--device", "cuda"])
    assert "no GPU" in capsys.readouterr().err


def test_the_committed_speeds_hold_what_they_should():
    tables = speed_answers.measured_models()
    assert "smollm2-135m-instruct" in tables
    for table in tables.values():
        for _, rows in table.groupby(["batch", "tokens"]):
            dense = rows[rows.kind == "dense"].iloc[0]
            assert (rows[rows.kind == "mlp"].cache_bytes == dense.cache_bytes).all()
            assert (rows[rows.kind == "attention"].cache_bytes < dense.cache_bytes).all()
            ends = rows[["decode_speedup_low", "decode_speedup", "decode_speedup_high"]].to_numpy()
            assert (np.diff(ends) >= 0).all()


def test_a_ratio_is_shown_with_the_device_that_it_was_measured_on():
    rows = [
        ("knn", "9 tokens", "cdist", 2.0, "A, 2 threads"),
        ("scores", "one", "a pass", 1.5, "B"),
        ("knn", "slope of time", None, 1.0, "B"),
    ]
    table = pd.DataFrame(rows, columns=["what", "setting", "reference", "ratio", "device"])
    table = table.assign(low=table.ratio, high=table.ratio, ms=3.0, mib=1.0, reference_mib=1.0)
    assert speed_answers.bench_table(table, "")["measured on"].to_dict() == {"knn": "A", "scores": "B"}
    assert speed_answers.growth_lines(table) == ["On B:", "knn, slope of time: 1.00 [1.00, 1.00]"]
