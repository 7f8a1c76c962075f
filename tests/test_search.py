"""Every search method against a plain loop over pruned models, a closed form, or the best of all sets."""

import copy
import doctest
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from families import ids, tiny
from tiny_llama import tiny_llama

from entrodrop_utils import search
from entrodrop_utils.dropping import dropped
from entrodrop_utils.evaluation import check_counted
from entrodrop_utils.residual import SubBlock, find, states
from entrodrop_utils.search.costs import shared_passes, take
from entrodrop_utils.search.gates import _descended

MIXED = ("attention", "mlp")


def uneven(layers: int = 6, seed: int = 0):
    """A tiny model whose branches differ in size, so that orders are decided by more than rounding."""
    model, generator = tiny_llama(layers, seed), torch.Generator().manual_seed(seed + 7)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 1 + 4 * torch.rand((), generator=generator)
        layer.mlp.down_proj.weight.data *= 1 + 4 * torch.rand((), generator=generator)
    model.lm_head.weight.data *= 4
    return model


@pytest.fixture(scope="module")
def big():
    return uneven()


@pytest.fixture(scope="module")
def text():
    return torch.randint(0, 101, (4, 16), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def plain_cost(model, windows, sub_blocks, measure: str, counted=None) -> float:
    """Of one set, by whole forward passes in float64: the mean over windows of that over the tokens that count."""
    log_p = model(windows).logits.double().log_softmax(-1)[:, :-1]
    with dropped(model, sub_blocks):
        log_q = model(windows).logits.double().log_softmax(-1)[:, :-1]
    targets = windows[:, 1:, None]
    kl, nll = (log_p.exp() * (log_p - log_q)).sum(-1), (log_p.gather(-1, targets) - log_q.gather(-1, targets)).squeeze(-1)
    costs = kl if measure == "kl" else nll
    counted = torch.ones_like(windows, dtype=torch.bool) if counted is None else counted
    return float(np.mean([float(cost[of[1:]].mean()) for cost, of in zip(costs, counted, strict=True)]))


def plain_greedy(model, windows, n: int, kinds, measure: str, counted=None) -> list[SubBlock]:
    """SLEB and BlockPruner as one would write them down: a double loop."""
    gone: list[SubBlock] = []
    left = [s for kind in kinds for s in find(model, kind)]
    for _ in range(n):
        costs = {s: plain_cost(model, windows, [*gone, s], measure, counted) for s in left}
        gone.append(min(costs, key=costs.get))
        left.remove(gone[-1])
    return gone


@pytest.mark.parametrize(
    ("kinds", "measure"),
    [
        (("block",), "nll"),
        (("attention",), "kl"),
        pytest.param(MIXED, "nll", marks=pytest.mark.slow),
        pytest.param(("mlp",), "kl", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_greedy_is_the_double_loop(big, text, kinds, measure):
    assert search.greedy(big, text, 4, kinds, measure).order == plain_greedy(big, text, 4, kinds, measure)


@pytest.mark.parametrize("measure", ["kl", "nll"])
def test_single_drops_are_sorted_by_their_cost(big, text, measure):
    order = search.single_drops(big, text, kinds="block", measure=measure).order
    costs = [plain_cost(big, text, [s], measure) for s in order]
    assert costs == sorted(costs) and len(order) == 5, "one block stays"


def test_a_shortlist_of_all_is_greedy_and_of_one_measures_little(big, text):
    want = search.greedy(big, text, 3, MIXED)
    assert search.lazy_greedy(big, text, 3, MIXED, shortlist=12) == want
    little = search.lazy_greedy(big, text, 3, MIXED, shortlist=1)
    assert little.order[0] == want.order[0] and little.passes < want.passes * 0.7


def test_the_kept_costs_are_those_of_the_plain_algorithm(big, text):
    """Lazy greedy as its docstring says it, over whole forward passes."""
    left = {s: plain_cost(big, text, [s], "kl") for kind in MIXED for s in find(big, kind)}
    gone, total = [], 0.0
    for _ in range(4):
        for s in sorted(left, key=left.get)[:2]:
            left[s] = plain_cost(big, text, [*gone, s], "kl") - total
        gone.append(min(left, key=left.get))
        total = plain_cost(big, text, gone, "kl")
        del left[gone[-1]]
    assert search.lazy_greedy(big, text, 4, MIXED, shortlist=2).order == gone


def test_among_proposals_is_greedy_on_a_model_with_no_others(big, text):
    among = [s for kind in MIXED for s in find(big, kind)][1::2]
    left, gone = list(among), []
    for _ in range(3):
        gone.append(min(left, key=lambda s: plain_cost(big, text, [*gone, s], "kl")))
        left.remove(gone[-1])
    chosen = search.lazy_greedy(big, text, 3, MIXED, shortlist=None, among=among)
    assert chosen.order == gone and chosen.passes < search.greedy(big, text, 3, MIXED).passes


@pytest.mark.parametrize(("n", "evolves"), [(2, False), pytest.param(3, True, marks=pytest.mark.slow)])
def test_the_best_of_all_sets_is_found_on_eight_layers(text, n, evolves):
    model = uneven(8, seed=1)
    costs = {chosen: plain_cost(model, text, chosen, "kl") for chosen in combinations(find(model, "mlp"), n)}
    best = list(min(costs, key=costs.get))
    assert search.exhaustive(model, text, n, "mlp").order == best
    assert not evolves or search.evopress(model, text, n, "mlp").order == best
    assert sorted(search.lazy_greedy(model, text, n, "mlp").order) == best


def test_costs_and_passes_are_those_of_whole_models(big, text):
    """The layers that really ran, counted by a hook."""
    sets = [[SubBlock(1, "mlp")], [SubBlock(1, "mlp"), SubBlock(4, "attention")], [SubBlock(0, "block"), SubBlock(5, "block")]]
    for kind in ("attention", "mlp", "block"):  # the first use of a kind runs a check
        take(big, find(big, kind), 1)
        with dropped(big, [SubBlock(2, kind)]):
            pass
    for measure in ("kl", "nll"):
        costs = search.SetCosts(big, text, measure)
        assert costs.mean(sets) == pytest.approx([plain_cost(big, text, s, measure) for s in sets], rel=1e-3, abs=1e-6)
    costs, calls = search.SetCosts(big, text), []
    costs.key = None  # nothing is read
    assert len(costs.dense.forwards) == 1
    handles = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in big.model.layers]
    before = costs.passes
    costs(sets)
    dense = 1 + len(sets) + 1  # heads: the final norm and head are computed by a pass whose layers return the state
    assert (costs.passes - before) / len(text) == pytest.approx(shared_passes([tuple(sorted(s)) for s in sets], 6))
    for handle in handles:
        handle.remove()
    spent = costs.passes
    costs(sets)
    assert costs.passes == spent and costs.tokens == spent * 16 and dense and calls


@pytest.mark.parametrize("measure", ["kl", "nll"])
def test_only_the_tokens_that_count_decide(big, text, measure):
    counted = torch.rand(text.shape, generator=torch.Generator().manual_seed(5)) < 0.3
    counted[:, -1] = True
    sets = [[SubBlock(1, "mlp")], [SubBlock(0, "block"), SubBlock(5, "block")]]
    some, every = (search.SetCosts(big, text, measure, of).mean(sets) for of in (counted, None))
    assert some == pytest.approx([plain_cost(big, text, s, measure, counted) for s in sets], rel=1e-3, abs=1e-6)
    assert abs(some - every).min() > 1e-3  # the cache keeps them apart
    order = plain_greedy(big, text, 3, MIXED, measure, counted)
    assert search.greedy(big, text, 3, MIXED, measure, counted).order == order
    singles = [[s] for s in sorted(find(big, "attention"))]
    cheapest = min(singles, key=lambda s: plain_cost(big, text, s, measure, counted))
    assert search.single_drops(big, text, 1, measure=measure, counted=counted).order == cheapest


def test_a_search_counts_every_token_unless_told_otherwise(big, text):
    counted = torch.ones_like(text, dtype=torch.bool)
    assert search.lazy_greedy(big, text, 4, counted=counted).order == search.lazy_greedy(big, text, 4).order


def test_a_window_in_which_no_token_counts_is_refused(big, text):
    counted = torch.zeros_like(text, dtype=torch.bool)
    counted[[0, 1, 3], 4] = counted[2, 0] = True  # no model predicts the first token
    with pytest.raises(ValueError, match="in window 2 of 4 no token counts"):
        search.lazy_greedy(big, text, 1, counted=counted)


@pytest.mark.parametrize("counted", [torch.ones(4, 15, dtype=torch.bool), torch.ones(4, 16, dtype=torch.int64)])
def test_what_counts_is_a_truth_value_for_each_token(text, counted):
    with pytest.raises(ValueError, match=rf"for each of the tokens \(4, 16\), got {counted.dtype} of \(4, {counted.shape[1]}\)"):
        check_counted(text, counted)


def test_interactions_are_differences_of_plain_costs(big, text):
    table = search.interactions(big, text, "mlp")
    rows = {(row.first, row.second): row for row in table.itertuples()}
    a, b = SubBlock(1, "mlp"), SubBlock(4, "mlp")
    plain = [plain_cost(big, text, s, "kl") for s in ([a], [b], [a, b])]
    assert [rows[pair].cost for pair in ((a, a), (b, b), (a, b))] == pytest.approx(plain, rel=1e-3)
    assert rows[a, b].interaction == pytest.approx(plain[2] - plain[0] - plain[1], abs=1e-4)
    assert len(table) == 6 + 15


def gated_loss(model, window, scales) -> float:
    """The loss with the weights of each branch's last projection scaled, which is a gate on the branch."""
    weights = [
        (layer.self_attn.o_proj if s.kind == "attention" else layer.mlp.down_proj).weight
        for s in scales
        for layer in [model.model.layers[s.layer]]
    ]
    for weight, scale in zip(weights, scales.values(), strict=True):
        weight.data *= scale
    with torch.no_grad():
        loss = float(torch.nn.functional.cross_entropy(model(window[None]).logits[0, :-1], window[1:]))
    for weight, scale in zip(weights, scales.values(), strict=True):
        weight.data /= scale
    return loss


def test_gradients_of_gates_are_finite_differences(text):
    model = uneven().double()
    gated = [SubBlock(0, "attention"), SubBlock(3, "mlp"), SubBlock(5, "mlp")]
    step = 3e-3  # a norm computes in float32 whatever the dtype
    plain = [
        [(gated_loss(model, window, {s: 1 + step}) - gated_loss(model, window, {s: 1 - step})) / (2 * step) for s in gated]
        for window in text
    ]
    assert search.gate_gradients(model, text, gated) == pytest.approx(np.array(plain), rel=1e-2, abs=1e-3)


def test_gradients_of_gates_of_rounded_weights_are_near(big, text):
    possible = [s for kind in MIXED for s in find(big, kind)]
    exact = search.gate_gradients(big, text, possible)
    rounded = search.gate_gradients(copy.deepcopy(big).bfloat16(), text, possible)
    assert np.corrcoef(exact.ravel(), rounded.ravel())[0, 1] > 0.98


def test_a_gate_on_a_block_is_one_on_both_branches(big, text):
    both = search.gate_gradients(big, text, [SubBlock(2, "attention"), SubBlock(2, "mlp")]).sum(1)
    assert search.gate_gradients(big, text, [SubBlock(2, "block")])[:, 0] == pytest.approx(both, rel=1e-4, abs=1e-6)


def test_gates_of_a_family_with_output_norms_are_behind_them():
    """Gemma 3: a gate before the norm of the branch's output would change nothing."""
    model, windows = tiny("Gemma 3 (text)"), ids(2, 12)
    s = SubBlock(1, "mlp")
    norm, losses = model.model.layers[1].post_feedforward_layernorm, []
    for scale in (1 + 1e-2, 1 - 1e-2):
        weight = norm.weight.data.clone()
        norm.weight.data = (1 + weight) * scale - 1
        with torch.no_grad():
            losses.append([float(model(w[None], labels=w[None]).loss) for w in windows])
        norm.weight.data = weight
    plain = (np.array(losses[0]) - losses[1]) / 2e-2
    assert search.gate_gradients(model, windows, [s])[:, 0] == pytest.approx(plain, rel=0.05, abs=1e-4)


def test_fisher_information_is_the_curvature_of_the_divergence():
    """KL(dense || gated) = x' F x / 2 for small steps, with F over labels drawn from the model, one token at a time."""
    model, window = uneven().double(), ids(1, 2)[:, :2] % 101
    gated = [SubBlock(1, "mlp"), SubBlock(4, "attention")]
    draws = search.gate_gradients(model, window.expand(1000, -1), gated, sampled=True)
    information = draws.T @ draws / len(draws)
    step = 0.02
    with torch.no_grad():
        log_p = model(window).logits[0, 0].log_softmax(-1)
        weight = model.model.layers[1].mlp.down_proj.weight
        weight.data *= 1 - step
        log_q = model(window).logits[0, 0].log_softmax(-1)
        weight.data /= 1 - step
    curvature = 2 * float((log_p.exp() * (log_p - log_q)).sum()) / step**2
    assert information[0, 0] == pytest.approx(curvature, rel=0.35)
    assert abs(draws.mean(0)) == pytest.approx(0, abs=4 * draws.std(0).max() / 1000**0.5)


def test_gates_are_the_contractions_of_explicit_jacobians_per_token(text):
    """J is d logits / d gates, p the prediction and e the label of a token: gradient J'(p - e), Fisher J'(diag p - pp')J."""
    model, window = uneven().double(), text[:1, :5]
    model.set_attn_implementation("eager")
    gates = {SubBlock(1, "mlp"): "mlp.down_proj", SubBlock(4, "attention"): "self_attn.o_proj", SubBlock(5, "mlp"): "mlp.down_proj"}

    def logits(scales):
        names = [f"model.layers.{s.layer}.{path}.weight" for s, path in gates.items()]
        weights = {name: model.get_parameter(name) * scale for name, scale in zip(names, scales, strict=True)}
        return torch.func.functional_call(model, weights, (window,), {"use_cache": False}).logits[0, :-1]

    dense = torch.ones(len(gates), dtype=torch.float64)
    with torch.no_grad():
        jacobians, p = torch.func.jacrev(logits)(dense), logits(dense).softmax(-1)  # token, vocab, gate
    label = torch.nn.functional.one_hot(window[0, 1:], p.shape[1])
    gradient = torch.einsum("tvg,tv->g", jacobians, p - label) / len(p)
    assert search.gate_gradients(model, window, list(gates))[0] == pytest.approx(gradient.numpy(), rel=1e-3, abs=1e-6)
    # Labels of different tokens are independent, so of the mean's outer product the tokens' own terms are left
    mean = torch.einsum("tvg,tv->tg", jacobians, p)
    fisher = (torch.einsum("tvg,tv,tvh->gh", jacobians, p, jacobians) - mean.T @ mean).numpy() / len(p) ** 2
    draws = search.gate_gradients(model, window.expand(2000, -1), list(gates), sampled=True)
    products = draws[:, :, None] * draws[:, None]
    assert (abs(products.mean(0) - fisher) < 5 * products.std(0) / len(draws) ** 0.5).all()
    assert (products.std(0) / len(draws) ** 0.5 < 0.2 * abs(np.diag(fisher)).max()).all(), "the draws decide something"


def test_the_descent_ends_in_the_lowest_energy_of_small_problems():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(10):
        g = rng.normal(size=(5, 9))
        hessian = g.T @ g
        energy = lambda chosen, h=hessian: h[np.ix_(chosen, chosen)].sum()  # noqa: E731
        lowest = min(energy(list(c)) for c in combinations(range(9), 4))
        found = [energy(_descended(hessian, rng.permutation(9)[:4])) for _ in range(30)]
        assert min(found) >= lowest - 1e-9
        hits += min(found) == pytest.approx(lowest, abs=1e-9)
    assert hits == 10


def test_cbo_returns_the_best_of_the_states_it_measures(big, text):
    """Its states are the sets that no exchange improves; here they are found among all sets."""
    mlps = find(big, "mlp")
    g = search.gate_gradients(big, text, mlps)
    energy = {c: float((g[:, list(c)].sum(1) ** 2).mean()) for c in combinations(range(6), 3)}
    minima = [c for c in energy if all(energy[c] <= energy[d] for d in energy if len({*c, *d}) == 4)]
    costs = {c: plain_cost(big, text, [mlps[i] for i in c], "kl") for c in minima}
    assert search.cbo(big, text, 3, "mlp").order == [mlps[i] for i in min(costs, key=costs.get)]


def test_fisher_sorts_by_squared_gradients(big, text):
    order = search.fisher(big, text, kinds=MIXED).order
    squares = (search.gate_gradients(big, text, order) ** 2).mean(0)
    assert (np.diff(squares) >= 0).all() and len(order) == 11


def test_taylor_sums_weight_times_gradient(big, text):
    ranking = search.taylor(big, text, kinds="mlp", protected=(0,))
    loss = sum(torch.nn.functional.cross_entropy(big(w[None]).logits[0, :-1], w[1:]) for w in text)
    loss.backward()
    scores = {}
    for i, layer in enumerate(big.model.layers):
        weights = [*layer.mlp.parameters(), *layer.post_attention_layernorm.parameters()]
        scores[SubBlock(i, "mlp")] = sum(float((w.detach() * w.grad).abs().sum()) for w in weights)
    big.zero_grad(set_to_none=True)
    assert ranking.order == [*sorted((s for s in scores if s.layer), key=scores.get), SubBlock(0, "mlp")]
    assert ranking.passes == 3 * len(text)


def test_an_angular_window_has_the_smallest_angle_at_the_last_token(big, text):
    stream = states(big, text)[::2, :, -1].double()
    angles = [float(torch.nn.functional.cosine_similarity(stream[i], stream[i + 3], dim=-1).arccos().mean()) for i in range(4)]
    assert [s.layer for s in search.angular_window(big, text, 3).order] == list(range(np.argmin(angles), np.argmin(angles) + 3))


def test_scoring_anew_is_the_plain_loop(big, text):
    gone: list[SubBlock] = []
    for _ in range(3):
        with dropped(big, gone):
            scores = {s: search.by_score(big, text, kinds="mlp").order.index(s) for s in find(big, "mlp")}
        gone.append(min(scores, key=scores.get))
    assert search.by_score(big, text, 3, "mlp", rescored=True).order == gone
    assert search.by_score(big, text, 3, "block", rescored=True).passes == 3 * len(text)


@pytest.mark.parametrize("rho", [0.3, 0.9])
def test_mutual_information_of_gaussians_is_the_closed_form(rho):
    x, noise = torch.randn(2, 20_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = rho * x + math.sqrt(1 - rho**2) * noise
    value = -search.INFORMATION["MI-PRUN, Gaussian"](x, y @ torch.randn(3, 3, dtype=torch.float64))  # any mixture of y
    assert float(value) == pytest.approx(-1.5 * math.log(1 - rho**2), rel=0.05)


def test_matrix_information_of_what_is_copied_is_its_entropy():
    information = search.INFORMATION["MI-PRUN, matrix"]
    x = torch.eye(6)[[0, 0, 1, 2, 3, 4, 5, 5]]  # a copy of orthogonal tokens knows all of them
    p = np.array([2, 1, 1, 1, 1, 2]) / 8
    assert float(-information(x, x)) == pytest.approx(-(p * np.log(p)).sum())
    assert float(information(x, torch.ones(8, 3))) == pytest.approx(0, abs=1e-9)


def test_tale_is_greedy_by_accuracy(big, text):
    def accuracy(smaller):
        with torch.no_grad():
            return (smaller(text).logits[:, :-1].topk(30).indices == text[:, 1:, None]).any(-1).double().numpy().ravel()

    order, accuracies = search.tale(big, accuracy, 2, "mlp")
    gone: list[SubBlock] = []
    for s, value in zip(order, accuracies, strict=True):
        best = []
        for other in find(big, "mlp")[::-1]:
            if other not in gone:
                with dropped(big, [*gone, other]):
                    best.append((accuracy(big).mean(), other))
        assert (value, s) == (max(b[0] for b in best), next(o for a, o in best if a == max(b[0] for b in best)))
        gone.append(s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # large models have their weights in bfloat16
@pytest.mark.parametrize("name", sorted({*search.__all__} - {"INFORMATION", "SearchResult", "candidates"}))
def test_the_examples_are_true(name, dtype, model, windows):
    model = copy.deepcopy(model).to(dtype)
    shown = {public: getattr(search, public) for public in search.__all__}
    names = shown | {"model": model, "windows": windows, "n_layers": 6, "SubBlock": SubBlock, "np": np}
    (examples,) = doctest.DocTestFinder(recurse=False).find(shown[name], name, globs=names)
    report: list[str] = []
    failed, tried = doctest.DocTestRunner(verbose=False).run(examples, out=report.append)
    assert tried and not failed, "".join(report)


@pytest.mark.parametrize("name", ["greedy", "lazy_greedy", "single_drops", "by_score", "fisher", "taylor", "random_draw"])
def test_a_longer_order_begins_with_the_shorter_and_ends_where_one_attention_is_left(big, text, name):
    method = getattr(search, name)
    whole = method(big, text, kinds="attention").order
    assert len(whole) == len(set(whole)) == 5
    assert method(big, text, 2, kinds="attention").order == whole[:2]


def test_a_second_run_reads_the_costs_and_reports_the_same_passes(big, text, monkeypatch):
    first = search.lazy_greedy(big, text, 3)
    monkeypatch.setattr("entrodrop_utils.search.costs.SetCosts._losses", lambda *_: pytest.fail("computed again"))
    assert search.lazy_greedy(big, text, 3) == first


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, w: search.lazy_greedy(m, w, 6), "cannot drop 6 of 6 sub-blocks: at most 5 can be dropped together"),
        (lambda m, w: search.greedy(m, w, -1), "cannot drop -1 sub-blocks"),
        (lambda m, w: search.greedy(m, w, 1, ("block", "mlp")), "a block is its attention layer and its MLP"),
        (lambda m, w: search.greedy(m, w, 1, "heads"), "unknown kind 'heads'"),
        (lambda m, w: search.greedy(m, w, 1, measure="acc"), "unknown measure 'acc'"),
        (lambda m, w: search.lazy_greedy(m, w, 2, among=find(m, "attention")[:1]), "cannot drop 2 of 1 sub-blocks"),
        (lambda m, w: search.lazy_greedy(m, w, 1, among=find(m, "mlp")[:1]), "cannot search .*: not among the 6 sub-blocks"),
        (lambda m, w: search.evopress(m, w, 6), "at most 5"),
        (lambda m, w: search.cbo(m, w, 7, "mlp"), "at most 6"),
        (lambda m, w: search.angular_window(m, w, 2, "mlp"), "angular windows are of whole blocks"),
        (lambda m, w: search.greedy(m, w + 200, 1), "past the 101 rows"),
    ],
)
def test_bad_input_says_what_is_wrong(big, text, call, says):
    with pytest.raises(ValueError, match=says):
        call(big, text)
