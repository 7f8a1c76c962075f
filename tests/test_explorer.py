"""The explorer without a browser: settings, rankings, choices, costs, and work in the background."""

import threading

import numpy as np
import pytest
import torch

from entrodrop_utils import evaluation, models, saving, scoring, text
from entrodrop_utils.entropy import bucket
from entrodrop_utils.explorer import page as page_module
from entrodrop_utils.explorer import state, view
from entrodrop_utils.explorer.background import Background
from entrodrop_utils.explorer.choice import Choice
from entrodrop_utils.explorer.state import Explorer, pasted_windows
from entrodrop_utils.profile import Profile
from entrodrop_utils.progress import HEADLESS, progress
from entrodrop_utils.residual import SubBlock, find, states


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
    loaded = []
    monkeypatch.setattr(state, "load_model", lambda name: loaded.append(name) or (model, Letters()))
    monkeypatch.setattr(text, "windows", lambda _, part, *rest: windows if part == "calibration" else held_out)
    explorer = Explorer(Profile(size="smoke"), 4, 64)
    explorer.loaded = loaded
    explorer.use()
    return explorer


def changed(explorer, **settings):
    return explorer.use(type(explorer.settings)(**{**vars(explorer.settings), **settings}))


def test_curve_and_importance_are_those_of_the_states(explorer, model, windows):
    curve = np.array([[float(bucket(x)) for x in states(model, w[None])[:, 0]] for w in windows]).mean(0)
    ranking = explorer.ranking
    assert ranking.curve == pytest.approx(curve)
    assert [ranking.importance[SubBlock(i, "attention")] for i in range(6)] == pytest.approx(np.diff(curve)[0::2])
    assert [s.layer for s in ranking.order] == sorted((2, 3, 4), key=lambda i: np.diff(curve)[2 * i])
    mlp = changed(explorer, kind="mlp").importance
    assert [mlp[SubBlock(i, "mlp")] for i in range(6)] == pytest.approx(np.diff(curve)[1::2])


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


def test_a_similarity_comes_with_an_entropy_curve(explorer, model, windows):
    before = explorer.ranking
    ranking = changed(explorer, metric="cosine")
    scores = scoring.score(model, windows, ["cosine"], ["attention"]).groupby("layer").value.mean()
    assert list(ranking.importance.values()) == pytest.approx(list(scores))
    assert (ranking.entropy, list(ranking.curve)) == ("bucket", list(before.curve))


@pytest.mark.parametrize("settings", [{}, {"first": False}, {"metric": "cosine", "first": False}, {"bins": 7}])
def test_what_another_explorer_left_in_the_cache_serves(explorer, settings, monkeypatch):
    first = changed(explorer, **settings)
    monkeypatch.setattr(scoring, "measure", lambda *_: pytest.fail("scored again"))
    again = Explorer(Profile(size="smoke"), 4, 64).use(explorer.settings)
    assert list(again.curve) == list(first.curve)
    assert (again.importance, again.order) == (first.importance, first.order)


def test_nothing_is_computed_twice(explorer, monkeypatch):
    drop = explorer.ranking.order[:2]
    first = explorer.size(drop), explorer.cost(drop), explorer.sample(drop)
    monkeypatch.setattr(state, "cached_score", lambda *_: pytest.fail("scored again"))
    monkeypatch.setattr(evaluation.LayerwiseForward, "layer", lambda *_: pytest.fail("evaluated again"))
    monkeypatch.setattr(type(explorer.model), "generate", lambda *_, **__: pytest.fail("generated again"))
    changed(explorer, kind="block")
    assert (explorer.size(drop[::-1]), explorer.cost(drop[::-1]), explorer.sample(drop)) == first == explorer.known(drop)
    assert explorer.loaded == [explorer.settings.model]


def test_costs_are_those_of_a_sweep(explorer, model, held_out):
    sets = [find(model, "attention")[2:4], find(model, "mlp")[1:3], find(model, "block")[4:], find(model, "attention")[2:5], []]
    for one in sets:
        (loss, kl), swept = explorer.cost(one), evaluation.losses_by_set(model, held_out, [one])
        assert loss.per_window == pytest.approx(swept.nll.to_numpy(), rel=1e-5)
        assert kl.per_window == pytest.approx(swept.kl.to_numpy(), rel=1e-4, abs=1e-6)


def test_shared_layers_are_not_run_again(explorer):
    """Without 3 and then without 3 and 5: layers 0 to 4 are known."""
    explorer.cost([SubBlock(3, "attention")])
    calls = []
    handle = explorer.model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(0))
    deep = explorer.model.model.layers[4].self_attn.register_forward_hook(lambda *_: calls.append(4))
    explorer.cost([SubBlock(3, "attention"), SubBlock(5, "attention")])
    handle.remove(), deep.remove()
    assert calls == []


def test_states_kept_are_bounded(explorer, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_BYTES", 3 * 4 * 32 * 32 * 4)
    explorer.cost([SubBlock(1, "mlp")])
    assert len(explorer._cost.states) == 3


def test_size_is_counted(explorer, model):
    dense, smaller = explorer.size(()), explorer.size([SubBlock(2, "attention"), SubBlock(4, "block")])
    assert dense.parameters == model.num_parameters()
    assert dense.cache == 6 * 2 * 2 * 8 * 4 * 1024  # layers, keys and values, heads, width of a head, bytes, tokens
    assert smaller.cache == 4 / 6 * dense.cache
    layer = model.model.layers[0]
    gone = sum(p.numel() for part in (layer, layer.self_attn, layer.input_layernorm) for p in part.parameters())
    assert smaller.parameters == dense.parameters - gone


def test_what_is_saved_is_what_was_measured(explorer, tmp_path, held_out):
    drop = explorer.ranking.order[:2]
    saved = saving.load_pruned(explorer.save(drop, str(tmp_path / "mine")))
    assert evaluation.perplexity(saved, held_out).mean == pytest.approx(explorer.cost(drop).loss.mean, rel=1e-5)
    assert len(find(explorer.model, "attention")) == 6
    with pytest.raises(FileExistsError, match="is not empty"):
        explorer.save(drop, str(tmp_path / "mine"))


def test_exported_code_runs(explorer, monkeypatch, capsys):
    monkeypatch.setattr(models, "load_model", state.load_model)
    drop = explorer.ranking.order[:2]
    found = {}
    exec(explorer.code(drop), found)
    assert found["drop_set"] == drop
    assert capsys.readouterr().out == f"{explorer.size(drop).parameters:,} parameters\n"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": "nonsense"}, "unknown model 'nonsense': choose one of"),
        ({"metric": "knn", "k": 99}, "k must be a whole number between 1 and"),
        ({"pasted": "short"}, "the pasted text has 5 tokens: at least 32"),
    ],
)
def test_a_bad_setting_says_so_and_leaves_what_was(explorer, settings, says):
    before = explorer.settings, explorer.ranking
    with pytest.raises(ValueError, match=says):
        changed(explorer, **settings)
    assert (explorer.settings, explorer.ranking) == before


def test_pasted_text_is_what_is_scored(explorer, model):
    said = "It was the best of times, it was the worst of times, " * 3
    ids = torch.tensor(Letters()(said).input_ids)
    windows = pasted_windows(said, Letters(), 4, 64)
    assert windows.tolist() == ids[: 2 * 64].view(2, 64).tolist()
    expected = scoring.entropies(model, windows, ["bucket"]).groupby("endpoint").value.mean()
    assert changed(explorer, pasted=said).curve == pytest.approx(pasted_curve := expected.to_numpy())
    assert changed(explorer, pasted="").curve != pytest.approx(pasted_curve)


def test_choices():
    order = [SubBlock(i, "mlp") for i in (4, 2, 3)]
    choice = Choice(order, 2)
    assert choice.dropped == order[:2]
    choice.toggle(order[0])  # kept by hand, and nothing comes in its place
    assert choice.dropped == [order[1]]
    choice.toggle(other := SubBlock(0, "mlp"))  # dropped by hand, though the rule protects it
    assert choice.dropped == [other, order[1]]
    assert choice.limits == (1, 3)
    choice.n = 3
    assert choice.dropped == [other, order[1], order[2]]
    choice.toggle(other)
    assert choice.dropped == order[1:]
    assert choice.limits == (0, 2)


def test_views_name_every_number(explorer):
    drop = explorer.ranking.order[:1]
    rows = view.rows(explorer, drop, view.COMPUTING)
    assert [pruned for *_, pruned in rows] == [view.COMPUTING] * 5
    for step in (explorer.size, explorer.cost, explorer.sample):
        step(())
        step(drop)
    rows = {what: (dense, pruned) for what, dense, pruned in view.rows(explorer, drop)}
    assert rows["parameters"][0] == "0.1 M"
    assert rows["KV cache at 1,024 tokens"][1].endswith("(-17%)")
    assert rows["perplexity"][1].startswith(f"{explorer.cost(drop).loss.perplexity:.1f} (")
    assert view.table(explorer, drop).count("<tr>") == 6
    assert view.markdown(explorer, drop).count("\n") == 6
    figure = view.picture(explorer, drop, {n: explorer.ranking.order[:n] for n in range(4)})
    hatched = [bar for bar in figure.axes[1].patches if bar.get_hatch()]
    assert [round(bar.get_x() + bar.get_width() / 2) for bar in hatched] == [drop[0].layer]
    assert list(figure.axes[2].lines[0].get_xdata()) == [0, 1]  # what was measured, and no more


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


def test_cancelling_leaves_the_model_whole(explorer):
    worker, *_ = background()
    worker.do(lambda: [explorer.cost([SubBlock(i, "attention"), SubBlock(j, "mlp")]) for i in range(6) for j in range(6)])
    worker.cancel()
    assert worker.wait(20)
    assert len(find(explorer.model, "attention")) == 6
    explorer.cost([SubBlock(0, "attention")])  # nobody holds the model


@pytest.fixture
def page(explorer):
    shown = page_module.Page(explorer)
    assert shown.background.wait(60)
    yield shown
    shown.close()


def test_the_page_follows_slider_and_clicks(page):
    first = page.choice.dropped
    assert f"without {len(first)} of 6 attention layers" in page.table.value
    page.slider.value = 3
    assert page.background.wait(60)
    assert page.choice.dropped == page.explorer.ranking.order
    assert f"{page.explorer.cost(page.choice.dropped).kl.mean:.3f}" in page.table.value
    bar = page.bars._buttons[SubBlock(0, "attention")]
    bar.click()
    assert page.background.wait(60)
    assert (page.slider.value, page.slider.min) == (4, 1)
    assert bar.tooltip.endswith("dropped by hand")
    page.forget.click()
    assert page.background.wait(60)
    assert bar.tooltip.endswith("kept")


def test_the_page_says_what_is_wrong_and_goes_on(page):
    page.fields["model"].value = "nonsense"
    assert page.background.wait(60)
    assert "role='alert'>unknown model &#x27;nonsense&#x27;" in page.said.value
    page.fields["model"].value = page.explorer.settings.model
    page.fields["kind"].value = "block"
    assert page.background.wait(60)
    assert page.said.value == ""
    assert "of 6 blocks" in page.table.value
    assert [name for name in ("bins", "k", "alpha") if page.fields[name].layout.display != "none"] == ["bins"]


def test_the_page_saves_and_exports(page, tmp_path):
    page.path.value = str(tmp_path / "saved")
    page.save.click()
    assert page.background.wait(60)
    assert "load_pruned(" in page.saved.value
    assert len(find(saving.load_pruned(tmp_path / "saved"), "attention")) == 6 - len(page.choice.dropped)
    page.save.click()
    assert page.background.wait(60)
    assert "role='alert'" in page.saved.value
    assert "is not empty" in page.saved.value
    page.export.click()
    assert page.code.value == page.explorer.code(page.choice.dropped)


def test_no_widget_where_nobody_looks(explorer, monkeypatch):
    monkeypatch.setenv(HEADLESS, "somewhere")
    monkeypatch.setattr(page_module, "display", lambda *_: pytest.fail("a widget was shown"))
    page_module.show_explorer(explorer)
