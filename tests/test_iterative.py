"""The 95% promise against a plain loop, and what a run that is stopped, or another run, does to its log."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from families import ids, tiny
from scipy import stats
from tiny_llama import tiny_llama

from entrodrop_utils import entropy, iterative, scoring, similarity
from entrodrop_utils.dropping import dropped
from entrodrop_utils.iterative import prune_until
from entrodrop_utils.residual import SubBlock, endpoints, find, states
from entrodrop_utils.saving import remove

VALIDATION = torch.randint(0, 101, (7, 20), generator=torch.Generator().manual_seed(2))
METRICS = {"bucket": entropy.bucket, "cosine": similarity.cosine}


def losses(model) -> np.ndarray:
    with torch.no_grad():
        return np.array([float(model(w[None], labels=w[None]).loss) for w in VALIDATION])


def plain(windows, metric: str, kind: str, retention: float, protected: tuple[int, ...], confidence: float = 0.95):
    """The process as one would write it down, on a fresh copy of the model for every step."""
    dense, gone, log = losses(tiny_llama()), [], []
    t = stats.t.ppf(confidence, len(VALIDATION) - 1) / len(VALIDATION) ** 0.5
    best, share = 0, 1.0
    while share >= retention:
        left = [layer for layer in range(6) if layer not in protected and layer not in gone]
        if kind != "mlp" and len(gone) == 5:
            left = []  # without the last one no token sees another
        if not left:
            break
        model = remove(tiny_llama(), [SubBlock(layer, kind) for layer in gone])
        now = [layer for layer in range(6) if layer not in gone] if kind == "block" else list(range(6))
        scores = {}
        for place, layer in enumerate(now):
            if layer in left:
                values = []
                for window in windows:
                    stream, (i, o) = states(model, window[None])[:, 0], endpoints(SubBlock(place, kind))
                    f = METRICS[metric]
                    values.append(float(f(stream[o]) - f(stream[i]) if metric == "bucket" else f(stream[i], stream[o])))
                scores[layer] = np.mean(values)
        gone.append(min(scores, key=scores.get))
        loss = losses(remove(tiny_llama(), [SubBlock(layer, kind) for layer in gone]))
        share, low = np.exp((dense - loss).mean()), np.exp((dense - loss).mean() - t * (dense - loss).std(ddof=1))
        log.append((len(gone), gone[-1], scores[gone[-1]], share, low))
        if share >= retention and low >= retention:
            best = len(gone)
    return [SubBlock(layer, kind) for layer in gone[:best]], log


SOME = [("attention", "bucket", 0.95, ()), ("mlp", "cosine", 0.98, (0, 1)), ("block", "bucket", 0.95, ())]
MORE = [("attention", "cosine", 0.98, (0, 1)), ("mlp", "bucket", 0.95, ()), ("block", "cosine", 0.98, (0, 1))]


@pytest.mark.parametrize(
    ("kind", "metric", "retention", "protected"), SOME + [pytest.param(*more, marks=pytest.mark.slow) for more in MORE]
)
def test_it_is_the_plain_loop(model, windows, kind, metric, retention, protected):
    found, log = prune_until(model, windows, VALIDATION, metric, kind, retention, protected=protected)
    want, steps = plain(windows, metric, kind, retention, protected)
    assert found == want
    assert log[["step", "layer"]].to_numpy().tolist() == [[n, layer] for n, layer, *_ in steps]
    assert log[["score", "retention", "low"]].to_numpy() == pytest.approx(
        np.array([step[2:] for step in steps]), rel=1e-4, abs=1e-6
    )
    assert log.chosen.tolist() == [n < len(want) for n in range(len(steps))] and (log.kind == kind).all()
    n = log.step.to_numpy()
    assert log.passes.tolist() == (n * len(windows) + (n + 1) * len(VALIDATION)).tolist()
    assert log.tokens.tolist() == (n * windows.numel() + (n + 1) * VALIDATION.numel()).tolist()


def test_the_bound_decides_and_not_the_estimate(model, windows):
    """Of the same steps, the more confidence is asked for, the fewer are kept."""
    counts = []
    for confidence in (0.5, 0.8, 0.9999):
        found, log = prune_until(model, windows, VALIDATION, "cosine", retention=0.93, confidence=confidence, protected=())
        assert found == [SubBlock(layer, "attention") for layer in log.layer[: max(log.step[log.low >= 0.93], default=0)]]
        counts.append(len(found))
    assert len(log) == 5 and counts[0] > counts[1] > counts[2]


def silent(model, layers=(2, 4)):
    """A model in which the attention of some layers adds nothing."""
    for layer in layers:
        model.model.layers[layer].self_attn.o_proj.weight.data.zero_()
    return model


def test_the_whole_promised_drops_only_what_costs_nothing(model, windows):
    found, log = prune_until(silent(model), windows, VALIDATION, "cosine", retention=1.0)
    assert found == [SubBlock(2, "attention"), SubBlock(4, "attention")]
    assert log.retention.tolist()[:2] == [1, 1] and (log.low[2:] < 1).all() and len(log) > 2


def test_nothing_promised_drops_everything_it_may(model, windows):
    for kind, protected, n in [("attention", (), 5), ("mlp", (), 6), ("block", (), 5), ("block", (0, -1), 4), ("mlp", range(6), 0)]:
        found, log = prune_until(model, windows, VALIDATION, "cosine", kind, 0.0, protected=protected)
        assert len(found) == len(set(found)) == len(log) == n
        assert not {s.layer for s in found} & {layer % 6 for layer in protected}


def test_layers_are_those_of_a_model_that_lost_some_before(windows):
    model = remove(tiny_llama(), [SubBlock(2, "attention"), SubBlock(4, "block")])
    found, _ = prune_until(model, windows, VALIDATION, "cosine", retention=0.0, protected=(0,))
    assert sorted(found) == [SubBlock(1, "attention"), SubBlock(3, "attention"), SubBlock(4, "attention")]


def test_a_first_attention_that_cannot_go_stays():
    """T5's holds the position bias of all layers."""
    model, items = tiny("T5 (encoder)"), lambda encoder: encoder(ids(3)).last_hidden_state.abs().mean((1, 2)).detach().numpy()
    found, log = prune_until(model, ids(4, 30), items, "cosine", retention=0.0, protected=())
    assert sorted(s.layer for s in found) == [1, 2, 3]
    assert log.passes.tolist() == [4 + 6, 8 + 9, 12 + 12]


def test_a_performance_of_ones_own_is_its_mean_over_the_dense_mean(model, windows):
    """Top-1 accuracy, item by item; the passes that it takes are counted."""

    def accuracy(smaller):
        with torch.no_grad():
            return (smaller(VALIDATION).logits[:, :-1].topk(20).indices == VALIDATION[:, 1:, None]).any(-1).float().mean(1).numpy()

    found, log = prune_until(model, windows, accuracy, "cosine", retention=0.7)
    with dropped(model, [SubBlock(layer, "attention") for layer in log.layer[:1]]) as smaller:
        now = accuracy(smaller).astype(float)
    dense = accuracy(model).astype(float)
    assert log.retention[0] == pytest.approx(now.mean() / dense.mean())
    # Fieller's bound: the share r whose test statistic against "now = r dense" is that of 95%
    shares = np.linspace(0, log.retention[0], 20_001)[:, None]
    gaps = now - shares * dense
    t = gaps.mean(1) / (gaps.std(1, ddof=1) / 7**0.5)
    assert log.low[0] == pytest.approx(float(shares[t <= stats.t.ppf(0.95, 6)].min()), abs=1e-3)
    assert log.passes[0] == 2 * len(VALIDATION) + len(windows)
    assert all(log.retention[: len(found)] >= 0.7)


def test_an_aborted_run_goes_on_and_does_nothing_twice(model, windows, tmp_path, monkeypatch):
    """Interrupted in the middle of every step in turn, before it is measured."""
    settings = {"metric": "cosine", "retention": 0.0, "kind": "block", "protected": (0,)}
    want, steps = prune_until(model, windows, VALIDATION, **settings)
    measured, real = [], iterative.perplexity

    def failing(model, validation):
        if len(measured) and measured[-1] is not None:
            measured.append(None)
            raise KeyboardInterrupt
        measured.append(find(model, "block")[-1].layer)
        return real(model, validation)

    monkeypatch.setattr(iterative, "perplexity", failing)
    file, before = tmp_path / "runs" / "log.json", model(VALIDATION).logits
    for done in range(1, len(steps) + 1):
        with pytest.raises(KeyboardInterrupt):
            prune_until(model, windows, VALIDATION, **settings, log=file)
        assert len(json.loads(file.read_text())["steps"]) == done
        assert torch.equal(model(VALIDATION).logits, before)
    assert prune_until(model, windows, VALIDATION, **settings, log=file)[0] == want
    found, log = prune_until(model, windows, VALIDATION, **settings, log=file)
    pd.testing.assert_frame_equal(log, steps)
    assert found == want and [m for m in measured if m is not None] == [5, 4, 3, 2, 1, 0], "each step was measured once"
    assert [path.name for path in file.parent.iterdir()] == ["log.json"]


def test_an_order_is_followed_as_it_is(model, windows, tmp_path):
    order = [SubBlock(4, "mlp"), SubBlock(2, "attention"), SubBlock(0, "mlp")]
    found, log = prune_until(model, windows, VALIDATION, order, retention=0.0, log=tmp_path / "log.json")
    assert found == order and log.kind.tolist() == ["mlp", "attention", "mlp"] and log.layer.tolist() == [4, 2, 0]
    plain = [np.exp((losses(tiny_llama()) - losses(remove(tiny_llama(), order[:n]))).mean()) for n in (1, 2, 3)]
    assert log.retention.tolist() == pytest.approx(plain, rel=1e-4)
    assert log.tokens.tolist() == [(n + 1) * VALIDATION.numel() for n in (1, 2, 3)]
    again, steps = prune_until(model, windows, VALIDATION, order, retention=0.99, log=tmp_path / "log.json")
    assert again == order[: len(again)] and steps.retention.tolist() == log.retention[: len(steps)].tolist()
    with pytest.raises(ValueError, match="with another metric"):
        prune_until(model, windows, VALIDATION, order[::-1], log=tmp_path / "log.json")
    everything = prune_until(model, windows, VALIDATION, [SubBlock(i, "attention") for i in range(6)], retention=0.0)[0]
    assert len(everything) == 5, "one attention layer stays"


def test_another_promise_reads_the_same_steps(model, windows, tmp_path, monkeypatch):
    file = tmp_path / "log.json"
    prune_until(model, windows, VALIDATION, "cosine", retention=0.0, log=file)
    monkeypatch.setattr(iterative, "cached_score", None)
    found, log = prune_until(model, windows, VALIDATION, "cosine", retention=0.9, confidence=0.8, log=file)
    monkeypatch.undo()
    want, steps = prune_until(model, windows, VALIDATION, "cosine", retention=0.9, confidence=0.8)
    pd.testing.assert_frame_equal(log, steps)
    assert found == want


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": tiny_llama(seed=1)}, "model"),
        ({"windows": torch.ones(3, 24, dtype=torch.long)}, "calibration text"),
        ({"validation": VALIDATION[:6]}, "validation"),
        ({"validation": losses}, "validation"),
        ({"metric": "bucket"}, "metric"),
        ({"metric": {"cosine": scoring.without_first(similarity.cosine)}}, "metric"),
        ({"kind": "mlp"}, "kind"),
        ({"protected": (0, 1), "kind": "mlp"}, "kind, protected layers"),
    ],
)
def test_the_log_of_another_run_is_refused_and_left(model, windows, tmp_path, change, says):
    file, settings = tmp_path / "log.json", {"model": model, "windows": windows, "validation": VALIDATION, "metric": "cosine"}
    prune_until(**settings, log=file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=rf"log.json is the log of another run \(with another {says}\): name another file"):
        prune_until(**settings | change, log=file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"a": 1}', '{"run": 1, "steps": []}', "step,layer\n1,2\n"])
def test_a_file_that_is_no_log_is_refused_and_left(model, windows, tmp_path, content):
    file = tmp_path / "log.csv"
    file.write_text(content)
    with pytest.raises(ValueError, match="log.csv is no log of prune_until: name another file, or delete it"):
        prune_until(model, windows, VALIDATION, log=file)
    assert file.read_text() == content


def test_after_a_kill_it_goes_on(model, windows, tmp_path):
    """kill -9 while a step is computed, in a process of its own."""
    settings = {"metric": "cosine", "retention": 0.0, "protected": ()}
    want, steps = prune_until(model, windows, VALIDATION, **settings)
    file, torn = tmp_path / "log.json", tmp_path / "windows.pt"
    torch.save((windows, VALIDATION), torn)
    code = (
        "import pathlib, sys, time, torch\n"
        "from tiny_llama import tiny_llama\n"
        "from entrodrop_utils import cache, iterative\n"
        "cache.CACHE = pathlib.Path(sys.argv[2]).with_name('cache of the other')\n"
        "real, calls = iterative.cached_score, []\n"
        "def slow(*args):\n"
        "    calls.append(1)\n"
        "    time.sleep(600 if len(calls) == 3 else 0)\n"
        "    return real(*args)\n"
        "iterative.cached_score = slow\n"
        f"iterative.prune_until(tiny_llama(), *torch.load(sys.argv[1]), log=sys.argv[2], **{settings!r})"
    )
    here = Path(__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(torn), str(file)], env={**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    )
    deadline = time.monotonic() + 120
    while not (file.exists() and len(json.loads(file.read_text())["steps"]) == 3) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = json.loads(file.read_text())["steps"]
    found, log = prune_until(model, windows, VALIDATION, **settings, log=file)
    assert found == want
    pd.testing.assert_frame_equal(log, steps)
    assert json.loads(file.read_text())["steps"][:3] == kept


def test_the_model_is_left_as_it_was(model, windows):
    before, hooks = model(VALIDATION).logits, lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    there = hooks()
    for kind in ("attention", "mlp", "block"):
        prune_until(model, windows, VALIDATION, "cosine", kind, 0.0, protected=())

        def failing(smaller, calls=[]):  # noqa: B006
            calls.append(1)
            if len(calls) > 2:
                raise RuntimeError("out of memory")
            return losses(smaller)

        with pytest.raises(RuntimeError, match="out of memory"):
            prune_until(model, windows, failing, "cosine", kind, 0.0)
        assert torch.equal(model(VALIDATION).logits, before) and hooks() == there and len(find(model, kind)) == 6


def test_progress_is_shown(model, windows, tmp_path, monkeypatch):
    monkeypatch.setenv("ENTRODROP_PROGRESS", str(tmp_path / "progress"))
    prune_until(model, windows, VALIDATION, retention=0.5)
    assert "dropping attention until 0.5" in (tmp_path / "progress").read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"retention": 1.01}, "cannot promise a retention of 1.01"),
        ({"retention": -0.1}, "cannot promise a retention of -0.1"),
        ({"retention": float("nan")}, "cannot promise a retention of nan"),
        ({"confidence": 1.0}, "cannot give a confidence of 1.0"),
        ({"confidence": 0.0}, "cannot give a confidence of 0.0"),
        ({"metric": "entropi"}, "unknown metric 'entropi'"),
        ({"metric": {}}, "one metric ranks the sub-blocks, got none"),
        ({"metric": {"a": entropy.bucket, "b": partial(entropy.knn, k=3)}}, "one metric ranks the sub-blocks, got a, b"),
        ({"kind": "head"}, "unknown kind 'head'"),
        ({"protected": (6,)}, r"cannot protect layers \[6\]: there are 6 layers"),
        ({"validation": VALIDATION[:1]}, r"at least two windows or items, one value each, got shape \(1,\)"),
        ({"validation": lambda model: np.zeros((2, 2))}, r"got shape \(2, 2\)"),
    ],
)
def test_bad_input_says_what_is_wrong(model, windows, change, says):
    with pytest.raises(ValueError, match=says):
        prune_until(**{"model": model, "windows": windows, "validation": VALIDATION} | change)


def test_validation_text_that_is_calibration_text_is_refused(model, windows):
    """Also where it is only the beginning of a calibration window."""
    with pytest.raises(ValueError, match="2 of 9 validation windows are in the calibration text"):
        prune_until(model, windows, torch.cat([VALIDATION, windows[:2, :20]]))


def test_a_model_from_which_nothing_can_go_says_why(model, windows):
    model.is_quantized = True
    with pytest.raises(ValueError, match="the model is quantised"):
        prune_until(model, windows, VALIDATION)
