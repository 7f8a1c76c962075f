"""The cache: a key for all that a number depends on, and the same numbers with and without it."""

import errno
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from entrodrop_utils import cache, entropy, scoring, similarity
from entrodrop_utils.cached_scoring import cached_entropies, cached_score
from entrodrop_utils.dropping import dropped
from entrodrop_utils.residual import SubBlock


def test_what_is_kept_is_read_back_exactly():
    table = pd.DataFrame({"a": [1, 2], "b": [0.1, np.nextafter(0.1, 1)], "c": ["x", "y"]})
    assert cache.read("some", "k") is None
    cache.write("some", "k", table)
    pd.testing.assert_frame_equal(cache.read("some", "k"), table, check_exact=True)
    assert [p.name for p in (cache.CACHE / "some").iterdir()] == ["k.parquet"]


def test_a_write_that_fails_leaves_nothing(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.warns(UserWarning, match=r"cannot be kept in .* \(No space left on device\)"):
        cache.write("some", "k", pd.DataFrame({"a": [1]}))
    assert not list((cache.CACHE / "some").iterdir())


def test_every_change_of_a_model_shows(model):
    seen = {cache.fingerprint(model)}
    assert cache.fingerprint(model) in seen
    with dropped(model, [SubBlock(1, "mlp")]):
        seen.add(cache.fingerprint(model))
    with dropped(model, [SubBlock(2, "block")]):
        seen.add(cache.fingerprint(model))
    model.model.layers[3].mlp.up_proj.weight.data[0, 0] += 1e-3
    seen.add(cache.fingerprint(model))
    model.config.rms_norm_eps *= 2
    seen.add(cache.fingerprint(model))
    seen.add(cache.fingerprint(model.double()))
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
    assert cache.fingerprint(first) == cache.fingerprint(again) != cache.fingerprint(other)
    with dropped(again, [SubBlock(3, "attention")]):
        assert cache.fingerprint(first) != cache.fingerprint(again)
    assert all(weight.is_meta for weight in first.model.layers[5].parameters()), "they went back to where they were"
    scores = cached_score(first, windows, ["bucket"])
    monkeypatch.setattr(scoring, "measure", lambda *_: pytest.fail("scored again"))
    pd.testing.assert_frame_equal(cached_score(again, windows, ["bucket"]), scores)


def test_a_model_without_weights_has_no_key(model):
    with pytest.raises(cache.NotCacheable, match=r"model.embed_tokens.weight is on no device"):
        cache.fingerprint(model.to("meta"))
    assert cache.model_key(model, "evaluation") is None
    assert cache.subkey(None, "anything") is None
    assert cache.subkey("base", lambda x: x) is None


def test_the_settings_of_a_metric_are_in_its_name():
    metrics = [entropy.bucket, entropy.knn, similarity.cosine, partial(entropy.bucket, bins=10), partial(entropy.bucket, bins=40)]
    metrics += [scoring.without_first(metric) for metric in metrics]
    assert len({cache.function_name(metric) for metric in metrics}) == len(metrics)
    with pytest.raises(cache.NotCacheable, match="is not a function of entrodrop_utils"):
        cache.function_name(lambda x: x)
    with pytest.raises(cache.NotCacheable):
        cache.function_name(scoring.without_first(lambda x: x))


@pytest.mark.parametrize("module", ["scoring", "evaluation", "tasks.loglikelihoods"])
@pytest.mark.parametrize(
    "below", ["families/modeling_entrodrop", "families/layouts", "families/self_check", "residual", "progress"]
)
def test_the_key_changes_with_any_file_that_a_number_depends_on(module, below, tmp_path):
    copy = tmp_path / cache.PACKAGE.name
    shutil.copytree(cache.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = cache.code(module, package=copy)
    assert before == cache.code(module)
    cache.code.cache_clear()
    with open(copy / f"{below}.py", "a") as file:
        file.write("# an edit at the end of a chain of imports\n")
    assert cache.code(module, package=copy) != before
    cache.code.cache_clear()


def test_the_key_does_not_change_with_a_file_that_nothing_below_imports(tmp_path):
    copy = tmp_path / cache.PACKAGE.name
    shutil.copytree(cache.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "explorer" / "page.py").write_text("raise NotImplementedError\n")
    assert cache.code("scoring", package=copy) == cache.code("scoring")


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
    before = cache.code("top", package=package)
    cache.code.cache_clear()
    (package / "last.py").write_text("y = 2\n")
    assert cache.code("top", package=package) != before


def test_scores_are_measured_once(model, windows, monkeypatch):
    calls, first_layer = [], model.model.layers[0]
    forward = first_layer.forward
    monkeypatch.setattr(first_layer, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    metrics = {"bucket": entropy.bucket, "cosine": similarity.cosine}
    first = cached_score(model, windows, metrics)
    passes = len(calls)
    again = cached_score(model, windows, {"other name": entropy.bucket, **metrics})
    assert len(calls) == passes
    pd.testing.assert_frame_equal(again[again.metric != "other name"].reset_index(drop=True), first, check_exact=True)
    cached_score(model, windows, {**metrics, "knn": partial(entropy.knn, k=3)})  # one new metric: one more pass over the windows
    assert len(calls) == passes + len(windows)
    other = cached_score(model, windows.flip(0), metrics)
    assert not np.array_equal(other.value, first.value)


def test_cached_numbers_are_those_that_are_measured(model, windows):
    metrics = ["bucket", "cosine"]
    pd.testing.assert_frame_equal(cached_score(model, windows, metrics), scoring.score(model, windows, metrics))
    pd.testing.assert_frame_equal(cached_score(model, windows, metrics), scoring.score(model, windows, metrics))
    plain, labels = scoring.entropies(model, windows, ["bucket"]), ("estimator", "bins")
    pd.testing.assert_frame_equal(cached_entropies(model, windows, ["bucket"]), plain)
    labelled = cached_entropies(model, windows, {("bucket", 20): entropy.bucket}, labels)
    assert list(labelled.columns) == ["endpoint", *labels, "sequence", "value"]
    pd.testing.assert_frame_equal(labelled.drop(columns="bins"), plain)


def test_a_metric_of_ones_own_is_measured_each_time(model, windows):
    values = iter(range(10_000))
    one, two = (cached_entropies(model, windows[:1], {"mine": lambda x: torch.tensor(float(next(values)))}) for _ in range(2))
    assert (two.value.min()) > one.value.max()
