"""The explorer without a browser: settings, rankings, choices, costs, its one state, and work in the background."""

import copy
import html
import itertools
import math
import threading
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as hypothesis_settings
from IPython.core.interactiveshell import InteractiveShell
from transformers import BertConfig, BertForMaskedLM

from entrodrop_utils import evaluation, models, repair, saving, scoring, text
from entrodrop_utils.dropping import dropped
from entrodrop_utils.entropy import bucket
from entrodrop_utils.explorer import background as background_module
from entrodrop_utils.explorer import drawing, loaded, sharing
from entrodrop_utils.explorer import page as page_module
from entrodrop_utils.explorer.background import Background
from entrodrop_utils.explorer.choice import Choice, Ranking, preset
from entrodrop_utils.explorer.settings import Settings
from entrodrop_utils.explorer.state import Explorer, Session
from entrodrop_utils.profile import Profile
from entrodrop_utils.progress import HEADLESS, progress
from entrodrop_utils.residual import SubBlock, find, states
from entrodrop_utils.studies import explorer_view as view
from entrodrop_utils.text import pasted_windows


class Letters:
    """A tokenizer with a token for each character."""

    pad_token_id = 0

    def __call__(self, said):
        return type("Encoded", (), {"input_ids": [ord(c) % 101 for c in said]})

    def decode(self, ids, **_):
        return " ".join(str(int(i)) for i in ids)

    def save_pretrained(self, path):
        (path / "letters").write_text("")


@pytest.fixture
def held_out():
    return torch.randint(0, 101, (4, 32), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def explorer(model, windows, held_out, monkeypatch):
    """An explorer of the tiny model."""
    opened = []
    monkeypatch.setattr(loaded, "load_model", lambda name: opened.append(name) or (model, Letters()))
    monkeypatch.setattr(text, "windows", lambda _, part, *rest: windows if part == "calibration" else held_out)
    explorer = Explorer(Profile(size="smoke"), 4, 64)
    explorer.opened = opened
    explorer.settings = replace(explorer.settings, k=3)
    return explorer


@pytest.fixture
def ranking(explorer):
    return explorer.use()


def changed(explorer, **settings):
    return explorer.use(explorer.settings.changed(**settings))


def test_curve_and_importance_are_those_of_the_states(explorer, ranking, model, windows):
    curve = np.array([[float(bucket(x)) for x in states(model, w[None])[:, 0]] for w in windows]).mean(0)
    assert ranking.curve == pytest.approx(curve)
    assert [ranking.importance[SubBlock(i, "attention")] for i in range(6)] == pytest.approx(np.diff(curve)[0::2])
    assert [ranking.importance[SubBlock(i, "mlp")] for i in range(6)] == pytest.approx(np.diff(curve)[1::2])
    assert [s.layer for s in ranking.order] == sorted((2, 3, 4), key=lambda i: np.diff(curve)[2 * i])
    assert {s.kind for s in changed(explorer, kind="mlp").order} == {"mlp"}


@pytest.mark.parametrize("drop", [[SubBlock(2, "attention"), SubBlock(3, "mlp")], [SubBlock(0, "block"), SubBlock(4, "block")]])
def test_the_pruned_curve_is_that_of_the_pruned_states(ranking, model, windows, drop):
    """Without a whole block the stream has no endpoint inside it: it passes unchanged."""
    with dropped(model, drop):
        curve = np.array([[float(bucket(x)) for x in states(model, w[None])[:, 0]] for w in windows]).mean(0)
    full = ranking.loaded.curve(drop, ranking.settings)
    assert len(full) == 13
    gone = [2 * s.layer + i for s in drop if s.kind == "block" for i in (1, 2)]
    assert np.delete(full, gone) == pytest.approx(curve)
    assert all(full[i] == full[i - 1] for i in gone)


@pytest.mark.parametrize(
    ("settings", "metric"),
    [
        ({"metric": "knn", "k": 3}, lambda x: scoring.METRICS["knn"](x, k=3)),
        ({"bins": 5, "first": False}, lambda x: bucket(x[..., 1:, :], bins=5)),
        ({"metric": "renyi", "alpha": 2.0}, lambda x: scoring.METRICS["renyi"](x, alpha=2.0)),
    ],
)
def test_settings_reach_the_estimator(explorer, model, windows, settings, metric):
    expected = scoring.entropies(model, windows, {"mine": metric}).groupby("endpoint").value.mean()
    assert changed(explorer, **settings).curve == pytest.approx(expected.to_numpy())


def test_a_metric_comes_with_its_own_order():
    assert Settings().changed(metric="matrix_renyi").alpha == 1.0
    assert Settings().changed(metric="matrix_renyi").changed(metric="renyi").alpha == 4.0
    assert Settings().changed(metric="renyi", alpha="2").alpha == 2.0


def test_a_similarity_comes_with_an_entropy_curve(explorer, ranking, model, windows):
    similar = changed(explorer, metric="cosine")
    scores = scoring.score(model, windows, ["cosine"], ["attention"]).groupby("layer").value.mean()
    assert [similar.importance[SubBlock(i, "attention")] for i in range(6)] == pytest.approx(list(scores))
    assert (similar.settings.entropy, list(similar.curve)) == ("bucket", list(ranking.curve))


@pytest.mark.parametrize("settings", [{}, {"first": False}, {"metric": "cosine", "first": False}, {"bins": 7}])
def test_what_another_explorer_left_in_the_cache_serves(explorer, settings, monkeypatch):
    first = changed(explorer, **settings)
    first.loaded.cost(first.order, first.settings)
    monkeypatch.setattr(scoring, "measure", lambda *_: pytest.fail("scored again"))
    again = Explorer(Profile(size="smoke"), 4, 64).use(first.settings)
    assert list(again.curve) == list(first.curve)
    assert (again.importance, again.order) == (first.importance, first.order)
    monkeypatch.setattr(evaluation, "LayerwiseForward", lambda *_: pytest.fail("evaluated again"))
    costs = [one.loaded.cost(first.order, first.settings).kl.per_window for one in (again, first)]
    assert costs[0] == pytest.approx(costs[1])


def test_nothing_is_computed_twice(explorer, ranking, monkeypatch):
    held, drop = ranking.loaded, ranking.order[:2]

    def results(order):
        return held.size(order), held.cost(order, ranking.settings), held.continuation(order, "a"), held.reading(order, "abc")

    first = results(drop)
    monkeypatch.setattr(loaded, "cached_score", lambda *_: pytest.fail("scored again"))
    monkeypatch.setattr(evaluation.LayerwiseForward, "layer", lambda *_: pytest.fail("evaluated again"))
    monkeypatch.setattr(type(held.model), "forward", lambda *_, **__: pytest.fail("run again"))
    changed(explorer, kind="block")
    assert results(drop[::-1]) == first
    assert (held.known("size", drop), held.known("cost", drop, ranking.settings), held.known("continuation", drop, "a")) == first[
        :3
    ]
    assert explorer.opened == [explorer.settings.model]


def test_costs_are_those_of_a_sweep(ranking, model, held_out):
    sets = [find(model, "attention")[2:4], find(model, "mlp")[1:3], find(model, "block")[4:], find(model, "attention")[2:5], []]
    for one in sets:
        (loss, kl), swept = ranking.loaded.cost(one, ranking.settings), evaluation.losses_by_set(model, held_out, [one])
        assert loss.per_window == pytest.approx(swept.nll.to_numpy(), rel=1e-5)
        assert kl.per_window == pytest.approx(swept.kl.to_numpy(), rel=1e-4, abs=1e-6)


def test_shared_layers_are_not_run_again(ranking, model):
    """Without 3 and then without 3 and 5: layers 0 to 4 are known."""
    ranking.loaded.cost([SubBlock(3, "attention")], ranking.settings)
    calls = []
    handles = [model.model.layers[i].self_attn.register_forward_hook(lambda *_, i=i: calls.append(i)) for i in (0, 4)]
    ranking.loaded.cost([SubBlock(3, "attention"), SubBlock(5, "attention")], ranking.settings)
    [handle.remove() for handle in handles]
    assert calls == []


def test_states_kept_are_bounded(ranking, monkeypatch):
    monkeypatch.setattr(loaded, "MAX_STATES", 3 * 4 * 32 * 32 * 4)
    ranking.loaded.cost([SubBlock(1, "mlp")], ranking.settings)
    assert len(ranking.loaded._losses(ranking.settings.evaluation_text).incremental.states) == 3


def test_size_is_counted(ranking, model):
    dense, smaller = ranking.loaded.size(()), ranking.loaded.size([SubBlock(2, "attention"), SubBlock(4, "block")])
    assert dense.parameters == model.num_parameters()
    assert dense.cache == 6 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width of a head, bytes
    assert smaller.cache == 4 / 6 * dense.cache
    layer = model.model.layers[0]
    gone = sum(p.numel() for part in (layer, layer.self_attn, layer.input_layernorm) for p in part.parameters())
    assert smaller.parameters == dense.parameters - gone


def test_a_reading_is_the_models_own_loss(ranking, model):
    said, drop = "How do transformers read?", ranking.order[:2]
    ids = torch.tensor([Letters()(said).input_ids])
    with torch.no_grad(), dropped(model, drop):
        output = model(ids, labels=ids)
    reading = ranking.loaded.reading(drop, said)
    assert np.nanmean(reading.losses) == pytest.approx(float(output.loss), rel=1e-5)
    assert len(reading.tokens) == len(reading.losses) == len(said)
    p = output.logits[0, -1].softmax(-1)
    assert reading.candidates[-1][0] == (str(int(p.argmax())), pytest.approx(float(p.max()), rel=1e-5))


def test_a_continuation_is_greedy_and_heard_as_it_comes(ranking, model):
    heard, drop = [], ranking.order[:2]
    said = ranking.loaded.continuation(drop, "abc", hear=heard.append)
    ids = Letters()("abc").input_ids
    with torch.no_grad(), dropped(model, drop):
        for _ in range(loaded.NEW_TOKENS):
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    assert said == Letters().decode(ids[3:]) == heard[-1]
    assert len(heard) == loaded.NEW_TOKENS
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(heard))


def test_a_repaired_loss_is_that_of_the_repaired_model(ranking, model, windows, held_out):
    drop = ranking.order[:2]
    smaller = saving.remove(copy.deepcopy(model), drop, repair(model, drop, windows))
    expected = evaluation.perplexity(smaller, held_out).mean
    assert ranking.loaded.repaired(drop, ranking.settings, ranking.settings).mean == pytest.approx(expected, rel=1e-5)
    assert ranking.loaded.repaired([SubBlock(2, "block")], ranking.settings, ranking.settings) is loaded.NOTHING


def test_random_choices_have_as_many_of_each_kind(ranking):
    held = ranking.loaded
    drop = [SubBlock(0, "attention"), SubBlock(3, "mlp"), SubBlock(4, "mlp")]
    draws = held.draws(drop)
    assert len(draws) == loaded.DRAWS
    assert {tuple(sorted(s.kind for s in draw)) for draw in draws} == {("attention", "mlp", "mlp")}
    assert {s.layer for draw in draws for s in draw} == {2, 3, 4}
    assert held.draws([SubBlock(2, "block"), SubBlock(3, "mlp")]) == held.draws(find(held.model, "mlp")) == held.draws([]) == []
    for draw in [(), *draws]:
        held.cost(draw, ranking.settings)
    cost = held.cost(drop, ranking.settings).loss.mean
    share, n = held.better_than(drop, ranking.settings)
    assert share.estimate == np.mean([held.cost(draw, ranking.settings).loss.mean > cost for draw in draws])
    assert n == loaded.DRAWS


def test_what_is_saved_is_what_was_measured_and_says_so(ranking, model, tmp_path, held_out):
    choice, settings = Choice(ranking, 2), ranking.settings
    folder = sharing.save(choice, str(tmp_path / "mine"))
    saved = saving.load_pruned(folder)
    cost = ranking.loaded.cost(choice.dropped, settings).loss
    assert evaluation.perplexity(saved, held_out).mean == pytest.approx(cost.mean, rel=1e-5)
    assert len(find(model, "attention")) == 6
    card = (folder / "README.md").read_text()
    assert "Chosen by bucket (bins 20), one-shot, measured on 5 windows of 24 tokens of docs" in card
    assert f"{cost.perplexity:.2f} after." in card
    with pytest.raises(FileExistsError, match="is not empty"):
        sharing.save(choice, str(tmp_path / "mine"))
    repaired = saving.load_pruned(sharing.save(choice, str(tmp_path / "repaired"), repaired=True))
    expected = ranking.loaded.repaired(choice.dropped, settings, settings).mean
    assert evaluation.perplexity(repaired, held_out).mean == pytest.approx(expected, rel=1e-5)


def test_exported_code_runs(ranking, monkeypatch, capsys):
    monkeypatch.setattr(models, "load_model", loaded.load_model)
    choice = Choice(ranking, 2)
    found = {}
    exec(sharing.drop_code(choice), found)
    assert found["drop_set"] == choice.dropped
    assert capsys.readouterr().out == f"{ranking.loaded.size(choice.dropped).parameters:,} parameters\n"


def test_the_shared_line_recreates_the_state(explorer, monkeypatch):
    shown = []
    monkeypatch.setattr(page_module, "display", lambda _: shown.append(page_module._shown[-1]))
    monkeypatch.delenv(HEADLESS, raising=False)
    settings = explorer.settings.changed(kind="mlp", metric="cosine", first=False, k=3)
    ranking = explorer.use(settings)
    choice = Choice(ranking, 3, {ranking.order[1]: False, SubBlock(0, "attention"): True})
    exec(sharing.state_line(choice), {})
    try:
        assert shown[0].background.wait(60)
        assert shown[0].session.choice.settings == settings
        assert shown[0].session.choice.dropped == choice.dropped
        assert shown[0].session.choice.by_hand == choice.by_hand
    finally:
        shown[0].close()


def test_an_export_holds_what_is_chosen(ranking, tmp_path):
    ranking.loaded.tokenizer = None  # a file that reads ids: these letters are no tokenizer that a file can hold
    exported = sharing.save(Choice(ranking, 2), str(tmp_path / "new" / "smaller.gguf"), runtime="gguf")
    assert exported.path.stat().st_size == exported.nbytes
    assert (exported.layers, exported.kv_layers) == (6, 4)
    assert len(find(ranking.loaded.model, "attention")) == 6
    with pytest.raises(ValueError, match="unknown runtime 'onnx': choose one of gguf, vllm, mlx"):
        sharing.save(Choice(ranking, 1), str(tmp_path / "x"), runtime="onnx")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": "nonsense"}, "unknown model 'nonsense': choose one of"),
        ({"metric": "knn", "k": 99}, "k must be a whole number between 1 and"),
        ({"metric": "knn", "k": "9999"}, "k must be a whole number from 1 to 1000, not '9999'"),
        ({"metric": "knn", "k": "abc"}, "k must be a whole number from 1 to 1000, not 'abc'"),
        ({"alpha": "0"}, "alpha must be a number from 0.05 to 100, not '0'"),
        ({"alpha": "nan"}, "alpha must be a number from 0.05 to 100, not 'nan'"),
        ({"metric": "luck"}, "metric cannot be 'luck': choose one of bucket, knn"),
        ({"pasted": "short", "role": "ranking"}, "the pasted text has 5 tokens: at least 32"),
    ],
)
def test_a_bad_setting_says_so(explorer, settings, says):
    with pytest.raises(ValueError, match=says):
        changed(explorer, **settings)


def test_an_encoder_is_not_offered_and_says_why(explorer, monkeypatch):
    config = BertConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    monkeypatch.setattr(loaded, "load_model", lambda _: (BertForMaskedLM(config).eval(), Letters()))
    with pytest.raises(ValueError, match="minilm-l6 is an encoder"):
        changed(explorer, model="minilm-l6")
    assert "minilm-l6" not in page_module.OFFERED
    assert {"smollm2-135m-instruct", "gemma-3-270m"} <= set(page_module.OFFERED)
    assert models.opening_cost("minilm-l6").startswith("an encoder")
    assert "GB of memory" in models.opening_cost("gemma-3-270m")


def test_pasted_text_is_what_it_is_said_to_be(explorer, ranking, model):
    said = "It was the best of times, it was the worst of times, " * 3
    ids = torch.tensor(Letters()(said).input_ids)
    windows = pasted_windows(said, Letters(), 4, 64)
    assert windows.tolist() == ids[: 2 * 64].view(2, 64).tolist()
    expected = scoring.entropies(model, windows, ["bucket"]).groupby("endpoint").value.mean().to_numpy()
    read, ranked, evaluated = (changed(explorer, pasted=said, role=role) for role in ("reading", "ranking", "evaluation"))
    assert ranked.curve == pytest.approx(expected)
    assert list(read.curve) == list(evaluated.curve) == list(ranking.curve)
    drop = ranking.order[:1]
    own = ranking.loaded.cost(drop, evaluated.settings).loss.mean
    assert own == pytest.approx(float(evaluation.losses_by_set(model, windows, [drop]).nll.mean()), rel=1e-5)
    assert ranking.loaded.cost(drop, ranked.settings) == ranking.loaded.cost(drop, read.settings) != own


def ranked(order: list[SubBlock], **settings) -> Ranking:
    """A ranking of a model of six layers that nobody opened."""
    parts = {kind: [SubBlock(i, kind) for i in range(6)] for kind in ("attention", "mlp", "block")}
    opened = type("Opened", (), {"sub_blocks": parts, "depth": 6, "name": "tiny"})()
    values = {"settings": Settings(**settings), "loaded": opened, "curve": np.arange(13.0), "importance": {}, "order": order}
    ranking = Ranking.__new__(Ranking)  # whose types nobody checks
    ranking.__dict__.update(values)
    return ranking


def test_choices():
    order = [SubBlock(i, "mlp") for i in (4, 2, 3)]
    choice = Choice(ranking := ranked(order, kind="mlp"), 2)
    assert choice.dropped == order[:2]
    choice = choice.marked([order[0]])  # kept by hand, and nothing comes in its place
    assert choice.dropped == [order[1]]
    choice = choice.marked([other := SubBlock(0, "mlp")])  # dropped by hand, though the rule protects it
    assert choice.dropped == [other, order[1]]
    assert choice.limits == (1, 3)
    assert choice.made_by == "bucket (bins 20), one-shot; mlp 0 dropped by hand; mlp 4 kept by hand"
    choice = replace(choice, n=3)
    assert choice.dropped == [other, order[1], order[2]]
    choice = choice.marked([other])
    assert choice.dropped == order[1:]
    assert choice.limits == (0, 2)
    assert Choice(ranking, 1, {other: True}).made_by == "hand"
    assert [Choice(ranking, n).n for n in (-1, None, 9)] == [0, 2, 3]
    assert [Choice(ranking, 2).name, Choice(ranking, 2, {other: True}).name] == ["bucket (bins 20) mlp, 2", "mine, 2"]


def test_a_block_and_its_parts_are_not_dropped_twice():
    choice = Choice(ranked([SubBlock(i, "attention") for i in (3, 4, 5)]), 2)
    choice = choice.marked([SubBlock(3, "block")])
    assert choice.dropped == [SubBlock(3, "block"), SubBlock(4, "attention")]
    choice = choice.marked([SubBlock(3, "mlp")])  # a part of it: the block stays no longer whole in the choice
    assert choice.dropped == [SubBlock(3, "mlp"), SubBlock(4, "attention")]
    assert choice.by_hand[SubBlock(3, "attention")] is False  # which the ranking would drop now that it can
    choice = choice.marked([SubBlock(i, "attention") for i in range(5)], True)
    with pytest.raises(ValueError, match="one attention layer must stay"):
        choice.marked([SubBlock(5, "block")])
    assert len(choice.dropped) == 6


def test_drawings_name_every_number(explorer):
    ranking = changed(explorer, metric="knn", k=3)
    choice, held = Choice(ranking, 1), ranking.loaded
    dense, now = drawing.table_of(choice, [])
    assert {name for name, cell in now["cells"].items() if cell is None} == {*drawing.columns(64)}
    for drop in ((), choice.dropped):
        held.size(drop), held.cost(drop, ranking.settings), held.continuation(drop, ranking.settings.prompt)
    dense, now = drawing.table_of(choice, [])
    assert now["name"] == "now: knn (k 3), one-shot"
    assert (now["set"], now["ranked"]) == ("without 1 of 6 attention layers", "ranked on docs")
    assert dense["cells"]["parameters"] == "0.1 M"
    assert now["cells"]["cache"].endswith("(-17%)")
    cost = held.cost(choice.dropped, ranking.settings)
    factor = math.exp(cost.loss.mean - held.cost((), ranking.settings).loss.mean)
    assert now["cells"]["perplexity"] == f"{cost.loss.perplexity:.1f} (×\u00a0{factor:.1f})"
    assert now["cells"]["kl"] == f"{cost.kl.mean:.3f}\u00a0±\u00a0{cost.kl.stderr:.3f}"
    assert drawing.map_of(ranking)["title"] == "entropy increase, knn (k 3) (nats), ranked on docs"
    assert drawing.map_of(ranking)["protected"] == [0, 1, 5]
    (line,) = drawing.curves_of(choice, [])["lines"]
    assert [n for n, _ in line["points"]] == [0, 1]  # what was measured, and no more
    table = view.markdown(choice)
    perplexities = [row["cells"]["perplexity"].replace("\u00a0", " ") for row in (dense, now)]
    more = cost.loss.per_window - held.cost((), ranking.settings).loss.per_window
    assert now["cells"]["loss"] == f"{more.mean():+.2f}\u00a0±\u00a0{more.std(ddof=1) / 2:.2f}"  # of four windows, paired
    assert dense["cells"]["loss"] == "–"
    assert f"| perplexity in windows of up to 64 tokens | {' | '.join(perplexities)} |" in table
    assert "linear repair" not in table  # which was not measured
    drawn = view.numbers(choice, []).set_index(["panel", "series", "at"]).value.sort_index()
    assert drawn["loss increase", "knn (k 3)", 1] == pytest.approx(more.mean(), abs=1e-5)
    assert list(drawn["entropy", "dense"]) == pytest.approx(list(ranking.curve), abs=1e-5)
    assert len(drawn["score", "knn (k 3)"]) == 18
    figure = view.picture(choice, [], "A sentence.")
    hatched = [bar for axis in figure.axes for bar in axis.patches if bar.get_hatch()]
    assert [(round(bar.get_x() + 0.5), round(bar.get_y() + 0.5)) for bar in hatched] == [(choice.dropped[0].layer, 0)]


def test_published_lists_are_ghosts_at_their_depth():
    by_name = {ghost["name"]: ghost for ghost in drawing.ghosts()}
    ghost = by_name["block influence on Llama-2-7B: 9 of 32 blocks"]
    assert (ghost["kind"], ghost["depths"][0]) == ("block", 27.5 / 32)
    assert all(0 < depth < 1 for one in by_name.values() for depth in one["depths"])


# The state: what is drawn, exported and saved belongs to the settings that the fields show


@pytest.fixture(scope="module")
def answers():
    """Rankings of three settings of one model; the state machine asks nothing else of them."""
    opened, rankings = None, {}
    for number, metric in enumerate(("bucket", "knn", "cosine")):
        rankings[metric] = ranked([SubBlock((i + number) % 3 + 2, "attention") for i in range(3)], metric=metric)
        opened = opened or rankings[metric].loaded
        rankings[metric].__dict__["loaded"] = opened
    return rankings


EVENTS = ("ask bucket", "ask knn", "ask cosine", "ask nonsense", "cancel", "error", "answer", "late answer", "late error")


def played(answers, events) -> Session:
    """A session after a first answer and these events; what holds after each of them is checked."""
    session, open_questions = Session(Settings()), []

    def asked(metric: str) -> None:
        with suppress(ValueError):  # what cannot be, which changes nothing
            open_questions.append((session.ask(metric=metric), metric))

    asked("bucket")
    session.answer(*(open_questions[0][0], answers["bucket"]))
    for event in events:
        before = session.choice
        if event.startswith("ask "):
            asked(event.removeprefix("ask "))
            assert session.waiting or event == "ask nonsense"
        elif event == "cancel":
            session.cancel()
        else:
            ticket, metric = open_questions[0] if event.startswith("late") else open_questions[-1]
            newest = ticket == open_questions[-1][0] and session.waiting
            if event.endswith("answer"):
                assert session.answer(ticket, answers[metric]) == newest
                assert (session.choice.ranking is answers[metric]) if newest else (session.choice is before)
            else:
                assert session.fail(ticket, "no such text") == newest
                assert session.choice is before
        if not session.waiting:  # nothing is dimmed: fields, drawing, code and card must agree
            assert session.fields == session.choice.settings
        else:
            assert session.fields.metric == open_questions[-1][1]
        choice = session.choice
        measure = choice.ranking.settings.measure
        assert f"chosen by {measure}, one-shot" in sharing.drop_code(choice)
        assert ("metric=" in sharing.state_line(choice)) == (choice.ranking.settings.metric != "bucket")
        assert choice.n == 2  # a quarter of 6, which no change forgets
    return session


@given(strategies.lists(strategies.sampled_from(EVENTS), max_size=8))
@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fields_and_drawings_agree_after_any_events(answers, events):
    played(answers, events)


def test_fields_and_drawings_agree_after_every_sequence_up_to_four(answers):
    for length in range(1, 5):
        for events in itertools.product([event for event in EVENTS if event not in ("ask bucket", "ask cosine")], repeat=length):
            played(answers, events)


def test_a_refused_value_changes_nothing_and_says_why(answers):
    session = played(answers, [])
    with pytest.raises(ValueError, match="k must be a whole number from 1 to 1000, not 'abc'"):
        session.ask(k="abc")
    assert not session.waiting
    assert session.fields == session.choice.settings


def test_presets(answers, explorer, ranking):
    def chosen(name: str, where: Ranking) -> tuple[dict, Choice]:
        wanted, start = preset(name, now=Choice(where, 2), seed=5)
        return wanted, start(where)

    for name, metric in (("paper", "bucket"), ("cosine", "cosine")):
        wanted, choice = chosen(name, answers[metric])
        assert (wanted, choice.n, choice.by_hand) == ({"metric": metric, "kind": "attention"}, 2, {})  # 37.5% of 6
    wanted, choice = chosen("random", answers["cosine"])
    assert (wanted, choice.n) == ({}, 2)
    assert sorted(choice.by_hand) == sorted(choice.dropped)
    assert (choice.made_by, choice.name) == ("at random (seed 5)", "at random (seed 5), 2")
    falls = {s: value for s, value in ranking.importance.items() if s.kind != "block"}
    assert chosen("sink", ranking)[1].dropped == [min(falls, key=falls.__getitem__)]
    with pytest.raises(ValueError, match="unknown preset 'luck': choose one of paper, cosine, sink, random"):
        chosen("luck", ranking)


def background():
    said, errors = [], []
    return Background(lambda what, fraction: said.append((what, fraction)), errors.append), said, errors


def test_the_newest_job_stops_the_one_before():
    worker, _, errors = background()
    began, results = threading.Event(), []

    def endless():
        for _ in progress(iter(int, 1), "counting"):
            began.set()
        results.append("finished")

    worker.do(endless)
    assert began.wait(5)
    worker.do(lambda: results.append("second"))
    assert worker.wait(5)
    worker.do(endless)
    worker.cancel()
    assert worker.wait(5)
    assert (results, errors) == (["second"], [])


def test_an_error_is_a_sentence_and_not_the_end():
    worker, said, errors = background()

    def failing():
        for _ in progress(range(4), "trying"):
            raise ValueError("no such\nthing")

    worker.do(failing)
    assert worker.wait(5)
    worker.do(lambda: 1 / 0)
    assert worker.wait(5)
    assert errors == ["no such thing", "ZeroDivisionError: division by zero"]
    assert ("trying", 0.0) in said
    assert said[-1] == ("", None)


def test_work_that_nobody_waits_for_lets_cells_go_first(monkeypatch):
    shell = InteractiveShell()
    monkeypatch.setattr(background_module, "get_ipython", lambda: shell)
    monkeypatch.setattr(background_module, "QUIET", 0.2)
    cells, (worker, said, errors) = background_module.Cells(), background()
    done = []

    def ahead():
        cells.wait()
        done.append("ahead")

    worker.do(ahead)
    assert not worker.wait(0.3)  # made in a cell, which still runs
    assert ("a cell runs", None) in said
    shell.events.trigger("post_run_cell", None)
    shell.events.trigger("pre_run_cell", None)  # Run All goes on
    assert not worker.wait(0.5)
    shell.events.trigger("post_run_cell", None)
    assert worker.wait(5)
    assert (done, errors) == (["ahead"], [])
    cells.close()
    shell.events.trigger("pre_run_cell", None)
    cells.wait()  # it hears of no cell any more


def test_cancelling_leaves_the_model_whole(ranking):
    worker, *_ = background()
    sets = [[SubBlock(i, "attention"), SubBlock(j, "mlp")] for i in range(6) for j in range(6)]
    worker.do(lambda: [ranking.loaded.cost(drop, ranking.settings) for drop in sets])
    worker.cancel()
    assert worker.wait(20)
    assert len(find(ranking.loaded.model, "attention")) == 6
    ranking.loaded.cost([SubBlock(0, "attention")], ranking.settings)  # nobody holds the model


@pytest.fixture
def page(explorer, monkeypatch):
    monkeypatch.setattr(loaded, "DRAWS", 6)
    shown = page_module.Page(explorer)
    assert shown.background.wait(60)
    yield shown
    shown.close()


def told(page, **message):
    page.receive(message)
    assert page.background.wait(60)
    return page.widget


def cell(widget, name, row=1):
    return widget.table[row]["cells"][name]


def test_the_page_follows_slider_and_clicks(page):
    widget = page.widget
    assert widget.choice["counted"] == "without 2 of 6 attention layers"
    told(page, do="slide", n=3)
    assert page.session.choice.dropped == page.session.choice.ranking.order
    cost = page.session.choice.ranking.loaded.cost(page.session.choice.dropped, page.session.choice.settings)
    assert cell(widget, "kl").startswith(f"{cost.kl.mean:.3f}")
    told(page, do="mark", sub_blocks=[[0, "attention"]])
    assert (widget.choice["n"], widget.choice["least"], widget.choice["hand"]) == (4, 1, [[0, "attention"]])
    told(page, do="mark", sub_blocks=[[2, "mlp"], [3, "mlp"]], gone=True)
    assert widget.choice["counted"] == "without 4 of 6 attention layers and 2 of 6 MLPs"
    told(page, do="mark", sub_blocks=[[i, "attention"] for i in range(6)], gone=True)
    assert widget.status["error"].startswith("one attention layer must stay")
    told(page, do="follow")
    assert widget.choice["hand"] == []


def test_everything_on_the_page_is_measured_in_the_end(page):
    told(page, do="pin")
    widget = told(page, do="set", metric="cosine")
    told(page, do="pin")
    assert [row["name"] for row in widget.table] == ["dense", "now: cosine, one-shot", "bucket (bins 20), 2", "cosine, 2"]
    assert all(row["cells"][name] for row in widget.table for name in drawing.columns(64))
    assert [line["name"] for line in widget.curves["lines"]] == ["cosine", "bucket (bins 20)"]
    assert [[n for n, _ in line["points"]] for line in widget.curves["lines"]] == [[0, 1, 2, 3]] * 2
    cells = [cell for row in widget.map["rows"].values() for cell in row]
    assert len(cells) == 18
    assert all(cell["alone"].endswith(" nats") for cell in cells)
    assert {metric for cell in cells for metric in cell["ranks"]} == {metric.replace("_", " ") for metric in scoring.METRICS}
    assert {"dense", "pruned"} <= widget.said.keys()
    assert len(widget.reading["tokens"]) == len(page.session.choice.settings.prompt)
    assert widget.status["phase"] == ""
    told(page, do="unpin", number=0)
    assert [row["name"] for row in widget.table][2:] == ["cosine, 2"]


def test_the_page_says_what_is_wrong_and_its_fields_go_back(page):
    before = page.widget.fields
    widget = told(page, do="set", model="nonsense")
    assert widget.status["error"].startswith("unknown model 'nonsense'")
    assert widget.fields == before
    told(page, do="set", kind="block")
    assert widget.status["error"] == ""
    assert "of 6 blocks" in widget.choice["counted"]
    assert widget.fields["options"] == ["bins"]
    told(page, do="nothing known")
    assert "nothing known" in widget.status["error"]


def test_cancelling_while_it_scores_leaves_what_was(page, monkeypatch):
    began, settings = threading.Event(), page.session.choice.settings

    def endless(*_):
        for _ in progress(iter(int, 1), "scoring"):
            began.set()

    monkeypatch.setattr(loaded, "cached_score", endless)
    page.receive({"do": "set", "bins": "7"})
    assert began.wait(60)
    assert page.widget.fields["bins"] == 7
    assert page.widget.status["waiting"]
    page.receive({"do": "slide", "n": 1})  # a move while it scores does not end the scoring
    assert page.widget.status["waiting"]
    page.receive({"do": "cancel"})
    assert not page.widget.status["waiting"]
    told(page, do="slide", n=3)
    assert page.widget.fields["bins"] == settings.bins == 20
    assert page.widget.table[1]["name"] == "now: bucket (bins 20), one-shot"
    assert page.widget.share["code"].startswith("# chosen by bucket (bins 20), one-shot")


def test_another_model_is_kept_only_once_it_is_shown(page, explorer, monkeypatch):
    first = page.session.choice.ranking.loaded
    monkeypatch.setattr(models.registry, "KNOWN", {})
    monkeypatch.setattr(loaded, "check_model", lambda _: None)
    real = loaded.LoadedModel.scores
    monkeypatch.setattr(loaded.LoadedModel, "scores", lambda *_: (_ for _ in ()).throw(ValueError("no such text")))
    told(page, do="set", model="another")
    assert page.widget.status["error"] == "no such text"
    monkeypatch.setattr(loaded.LoadedModel, "scores", real)
    told(page, do="set", kind="mlp")
    assert page.session.choice.ranking.loaded is first
    told(page, do="set", model="another")
    assert [*explorer._loaded] == ["another"]
    assert page.session.pins == []


def test_the_page_saves(page, tmp_path):
    widget = told(page, do="save", path=str(tmp_path / "saved"))
    assert "load_pruned(" in widget.share["saved"]
    assert len(find(saving.load_pruned(tmp_path / "saved"), "attention")) == 6 - len(page.session.choice.dropped)
    told(page, do="save", path=str(tmp_path / "saved"))
    assert "is not empty" in widget.share["failed"]


def test_no_widget_where_nobody_looks(explorer, monkeypatch):
    monkeypatch.setenv(HEADLESS, "somewhere")
    monkeypatch.setattr(page_module, "display", lambda *_: pytest.fail("a widget was shown"))
    page_module.show_explorer(explorer)


def test_a_word_that_a_pruned_model_repeats_does_not_widen_the_table():
    cell = view._cell("so " + 3 * "&entropy|" * 9)
    assert max(map(len, html.unescape(cell.replace("<wbr>", " ")).split())) <= view.LONGEST and "|" not in cell
    assert html.unescape(cell.replace("<wbr>", "")) == "so " + 3 * "&entropy|" * 9
