"""The store: a key for all that a number depends on, and the same numbers with and without it."""

import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from entrodrop_utils import entropy, scoring, similarity, store
from entrodrop_utils.dropping import dropped
from entrodrop_utils.sub_blocks import SubBlock


def test_what_is_kept_is_read_back_exactly():
    table = pd.DataFrame({"a": [1, 2], "b": [0.1, np.nextafter(0.1, 1)], "c": ["x", "y"]})
    assert store.load("some", "k") is None
    store.keep("some", "k", table)
    pd.testing.assert_frame_equal(store.load("some", "k"), table, check_exact=True)
    assert [p.name for p in (store.CACHE / "some").iterdir()] == ["k.parquet"]


def test_a_write_that_fails_leaves_nothing(monkeypatch):
    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(OSError, match="no space"):
        store.keep("some", "k", pd.DataFrame({"a": [1]}))
    assert not list((store.CACHE / "some").iterdir())


def test_every_change_of_a_model_shows(model):
    seen = {store.fingerprint(model)}
    assert store.fingerprint(model) in seen
    with dropped(model, [SubBlock(1, "mlp")]):
        seen.add(store.fingerprint(model))
    with dropped(model, [SubBlock(2, "block")]):
        seen.add(store.fingerprint(model))
    model.model.layers[3].mlp.up_proj.weight.data[0, 0] += 1e-3
    seen.add(store.fingerprint(model))
    model.config.rms_norm_eps *= 2
    seen.add(store.fingerprint(model))
    seen.add(store.fingerprint(model.double()))
    assert len(seen) == 6


def test_weights_that_wait_on_disk_show_as_well(model, windows, tmp_path, monkeypatch):
    def spread(at):
        model.save_pretrained(tmp_path / at)
        names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", *(f"model.layers.{i}" for i in range(6))]
        places = {name: "disk" if name[-1] in "35" else "cpu" for name in names}
        return type(model).from_pretrained(tmp_path / at, device_map=places, offload_folder=tmp_path / f"{at} on disk")

    first, again = spread("first"), spread("again")
    model.model.layers[5].mlp.up_proj.weight.data[0, 0] += 1e-3
    other = spread("other")
    assert any(weight.is_meta for weight in first.parameters())
    assert store.fingerprint(first) == store.fingerprint(again) != store.fingerprint(other)
    with dropped(again, [SubBlock(3, "attention")]):
        assert store.fingerprint(first) != store.fingerprint(again)
    assert all(weight.is_meta for weight in first.model.layers[5].parameters()), "they went back to where they were"
    scores = scoring.score(first, windows, ["bucket"])
    monkeypatch.setattr(scoring, "_pass", lambda *_: pytest.fail("scored again"))
    pd.testing.assert_frame_equal(scoring.score(again, windows, ["bucket"]), scores)


def test_a_model_without_weights_has_no_key(model):
    with pytest.raises(store.NotCacheable, match=r"model.embed_tokens.weight is on no device"):
        store.fingerprint(model.to("meta"))
    assert store.base(model, "evaluation") is None
    assert store.under(None, "anything") is None
    assert store.under("base", lambda x: x) is None


def test_the_settings_of_a_metric_are_in_its_name():
    metrics = [entropy.bucket, entropy.knn, similarity.cosine, partial(entropy.bucket, bins=10), partial(entropy.bucket, bins=40)]
    metrics += [scoring.without_first(metric) for metric in metrics]
    assert len({store.name(metric) for metric in metrics}) == len(metrics)
    with pytest.raises(store.NotCacheable, match="is not a function of entrodrop_utils"):
        store.name(lambda x: x)
    with pytest.raises(store.NotCacheable):
        store.name(scoring.without_first(lambda x: x))


@pytest.mark.parametrize("module", ["scoring", "evaluation", "answers"])
@pytest.mark.parametrize("below", ["modeling_entrodrop", "families", "sub_blocks", "self_check", "progress"])
def test_the_key_changes_with_any_file_that_a_number_depends_on(module, below, tmp_path):
    copy = tmp_path / store.PACKAGE.name
    shutil.copytree(store.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = store.code(module, package=copy)
    assert before == store.code(module)
    store.code.cache_clear()
    with open(copy / f"{below}.py", "a") as file:
        file.write("# an edit at the end of a chain of imports\n")
    assert store.code(module, package=copy) != before
    store.code.cache_clear()


def test_the_key_does_not_change_with_a_file_that_nothing_below_imports(tmp_path):
    copy = tmp_path / store.PACKAGE.name
    shutil.copytree(store.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "explorer_page.py").write_text("raise NotImplementedError\n")
    assert store.code("scoring", package=copy) == store.code("scoring")


@pytest.mark.parametrize(
    "statement",
    [
        "import suite.deep.end",
        "from suite.deep import end",
        "from .deep import end",
        "from .deep.end import x",
        "from . import deep",
    ],
)
def test_every_form_of_import_is_followed(statement, tmp_path):
    package = tmp_path / "suite"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "deep" / "__init__.py").write_text("def late():\n    from . import end\n")
    (package / "deep" / "end.py").write_text("from ..last import y\nx = 1\n")
    (package / "last.py").write_text("y = 1\n")
    (package / "top.py").write_text(f"def inside():\n    {statement}\n")
    before = store.code("top", package=package)
    store.code.cache_clear()
    (package / "last.py").write_text("y = 2\n")
    assert store.code("top", package=package) != before


def test_scores_are_measured_once(model, windows, monkeypatch):
    calls, first_layer = [], model.model.layers[0]
    forward = first_layer.forward
    monkeypatch.setattr(first_layer, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    metrics = {"bucket": entropy.bucket, "cosine": similarity.cosine}
    first = scoring.score(model, windows, metrics)
    passes = len(calls)
    again = scoring.score(model, windows, {"other name": entropy.bucket, **metrics})
    assert len(calls) == passes
    pd.testing.assert_frame_equal(again[again.metric != "other name"].reset_index(drop=True), first, check_exact=True)
    scoring.score(model, windows, {**metrics, "knn": partial(entropy.knn, k=3)})  # one new metric: one more pass over the windows
    assert len(calls) == passes + len(windows)
    other = scoring.score(model, windows.flip(0), metrics)
    assert not np.array_equal(other.value, first.value)


def test_a_metric_of_ones_own_is_measured_each_time(model, windows):
    values = iter(range(10_000))
    one, two = (scoring.entropies(model, windows[:1], {"mine": lambda x: torch.tensor(float(next(values)))}) for _ in range(2))
    assert (two.value.min()) > one.value.max()
