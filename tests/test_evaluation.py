"""Losses and divergences against transformers' own loss and a plain loop; the tree of sets against one set at a time."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_llama import tiny_llama

from entrodrop_utils import evaluation
from entrodrop_utils.dropping import dropped
from entrodrop_utils.residual import KINDS, SubBlock


def test_loss_is_that_of_transformers(model, windows):
    found = evaluation.perplexity(model, windows)
    with torch.no_grad():
        own = [float(model(w[None], labels=w[None]).loss) for w in windows]
    assert found.per_window == pytest.approx(own, rel=1e-5)
    assert found.mean == pytest.approx(np.mean(own), rel=1e-5)
    assert found.stderr == pytest.approx(np.std(own, ddof=1) / math.sqrt(len(own)), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(np.mean(own)), rel=1e-4)


def test_the_loss_over_a_large_vocabulary_is_that_of_float64():
    """With logits of standard deviation 3, a sum of 49,152 float32 terms in order is off by 5e-5 nats."""
    model, ids = tiny_llama(1, vocab_size=49_152), torch.arange(80).view(2, 40)
    with torch.no_grad():
        model.lm_head.weight.mul_(3 / model(ids).logits.std())
        logits = model(ids).logits[:, :-1].double()
    exact = torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none").mean(-1)
    assert evaluation.perplexity(model, ids).per_window == pytest.approx(exact.numpy(), abs=3e-6, rel=0)


def test_divergence_is_a_sum_over_the_vocabulary(model, windows):
    with torch.no_grad():
        p = model(windows).logits.double().softmax(-1)
        with dropped(model, [SubBlock(2, "attention")]) as smaller:
            q = smaller(windows).logits.double().softmax(-1)
    plain = (p * (p / q).log()).sum(-1)[:, :-1].mean(1)
    sets = evaluation.losses_by_set(model, windows, [[SubBlock(2, "attention")]])
    assert sets.kl.to_numpy() == pytest.approx(plain.numpy(), rel=1e-3, abs=1e-5)


def test_divergence_between_two_models(model, windows):
    assert evaluation.divergence(model, model, windows).mean == pytest.approx(0, abs=1e-6)


def test_the_tree_gives_what_single_evaluations_give(model, windows):
    a, m, b = (lambda i: SubBlock(i, "attention")), (lambda i: SubBlock(i, "mlp")), (lambda i: SubBlock(i, "block"))
    sets = [(), (a(0),), (a(3), a(1)), (a(1), a(3), m(3)), (m(5),), (b(0), b(4)), (b(2), a(4), m(0)), tuple(map(a, range(5)))]
    found = evaluation.losses_by_set(model, windows, [*sets, sets[2], sets[2][::-1]])
    assert len(found) == len(sets) * len(windows)
    for one in sets:
        rows = found[[s == tuple(sorted(one)) for s in found.set]].sort_values("window")
        with dropped(model, one) as smaller:
            alone = evaluation.perplexity(smaller, windows)
        assert rows.nll.to_numpy() == pytest.approx(alone.per_window, rel=1e-5)


def test_shared_layers_are_run_once(model, windows):
    """Sets that differ in the last layer only: the dense layers before it are those of the recorded pass, checked once."""
    for kind in KINDS:  # the first use of a model and of a kind runs a check
        with dropped(model, [SubBlock(1, kind)]):
            pass
    calls = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    sets = [[SubBlock(5, "attention")], [SubBlock(5, "mlp")], [SubBlock(5, "block")]]
    evaluation.losses_by_set(model, windows[:1], sets)
    # The recorded pass, the layers one by one that check it and their norm; the logits of the dense model and of three sets
    assert len(calls) == 3 + 4
    evaluation.losses_by_set(model, windows[1:2], sets)
    assert len(calls) == 7 + 1 + 4
    handle.remove()


def test_what_was_evaluated_before_is_not_evaluated_again(model, windows, monkeypatch):
    sets = [(), (SubBlock(1, "mlp"),), (SubBlock(2, "attention"), SubBlock(1, "attention"))]
    first = evaluation.losses_by_set(model, windows, sets)
    again = evaluation.losses_by_set(model, windows, [*sets, (SubBlock(3, "block"),)])
    pd.testing.assert_frame_equal(again[again.set.isin(first.set)].reset_index(drop=True), first, check_exact=True)
    monkeypatch.setattr(evaluation.LayerwiseForward, "layer", lambda *_: pytest.fail("evaluated again"))
    evaluation.losses_by_set(model, windows, sets[::-1])
    with dropped(model, [SubBlock(4, "mlp")]), pytest.raises(pytest.fail.Exception):
        evaluation.losses_by_set(model, windows, sets)  # another model


def test_a_search_pays_for_no_disk_and_results_that_are_kept_are_the_same(model, windows, monkeypatch):
    sets = [(), (SubBlock(1, "mlp"),), (SubBlock(2, "attention"), SubBlock(1, "mlp"))]
    kept = evaluation.CachedLosses(model, windows)
    costs = [kept(drop_set) for drop_set in sets]
    with monkeypatch.context() as without:
        without.setattr(evaluation, "cache", None)
        losses = evaluation.IncrementalLosses(model, windows)
        expected = [losses(drop_set) for drop_set in sets]
    again = evaluation.CachedLosses(model, windows)
    monkeypatch.setattr(evaluation, "IncrementalLosses", lambda *_: pytest.fail("evaluated again"))
    for drop_set, *results in zip(sets, expected, costs, strict=True):
        for estimates in zip(*results, again(drop_set[::-1]), strict=True):
            first, *others = (list(estimate.per_window) for estimate in estimates)
            assert others == [first, first]


def test_a_difference_of_estimates_is_paired():
    loss, dense = (evaluation.Estimate.of(np.array(values)) for values in ([3.0, 5.0, 7.0], [1.0, 2.0, 3.0]))
    assert f"{loss - dense:+.3f}" == f"+3.000 ± {1 / math.sqrt(3):.3f}"
    assert str(dense) == f"{dense}" == "2.0000 ± 0.5774"


def test_the_model_is_left_as_it_was(model, windows):
    before = model(windows).logits
    hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match="does not exist"):
        evaluation.losses_by_set(model, windows, [[SubBlock(9, "mlp")]])
    evaluation.losses_by_set(model, windows, [[SubBlock(1, "mlp")]])
    assert torch.equal(model(windows).logits, before)
    assert {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()} == hooks
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)


@pytest.mark.parametrize("bad", [torch.zeros(2, 1, dtype=torch.long), torch.zeros(0, 5, dtype=torch.long)])
def test_too_short_windows_are_refused(model, bad):
    with pytest.raises(ValueError, match="at least two tokens"):
        evaluation.perplexity(model, bad)
