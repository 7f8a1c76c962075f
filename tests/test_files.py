"""What is kept on disk is checked before it is used: what is damaged is made again, what cannot be kept is computed."""

import errno
import json
import os
import resource
import shutil
import subprocess
import threading
import warnings

import numpy as np
import pandas as pd
import pytest
import tiny_gguf

from entrodrop_utils import cache, files, models, progress
from entrodrop_utils.cached_scoring import cached_score
from entrodrop_utils.evaluation import losses_by_set
from entrodrop_utils.models import sources
from entrodrop_utils.paths import ROOT
from entrodrop_utils.tasks import local_tasks
from entrodrop_utils.text import corpus, harvest

TABLE = pd.DataFrame({"set": ["a", "b"] * 50, "value": np.random.default_rng(0).normal(size=100)})


def kept() -> list:
    return sorted(cache.CACHE.rglob("*.parquet"))


def unfinished(folder) -> list:
    return [path for path in folder.rglob(".*") if path.name.endswith("unfinished")]


# The cache of results


class Results:
    """A table that is kept under some keys; counts how often it is computed."""

    def __init__(self):
        self.computed = 0

    def compute(self, names) -> pd.DataFrame:
        self.computed += 1
        return TABLE[TABLE.set.isin(names)].reset_index(drop=True)

    def ask(self, *keys: str) -> None:
        for key in keys:
            pd.testing.assert_frame_equal(cache.rows_by_set("some", key, ["a", "b"], self.compute, lambda: None), TABLE)


@pytest.mark.parametrize("damage", ["cut", "empty", "no parquet", "its first half twice"])
def test_a_damaged_table_is_computed_again_and_replaced(damage):
    results = Results()
    results.ask("k")
    (file,) = kept()
    whole = file.read_bytes()
    contents = {"cut": whole[:100], "empty": b"", "no parquet": b"x" * 500, "its first half twice": whole[: len(whole) // 2] * 2}
    file.write_bytes(contents[damage])
    with pytest.warns(UserWarning, match=f"{file} cannot be read .*: it is computed again") as said:
        results.ask("k", "k")
    assert len(said) == 1 and results.computed == 2
    assert file.read_bytes() == whole and not unfinished(cache.CACHE)


def test_scores_and_losses_are_computed_again_as_well(model, windows):
    scores, losses = cached_score(model, windows, ["cosine"]), losses_by_set(model, windows, [()])
    for file in kept():
        file.write_bytes(file.read_bytes()[:50])
    with pytest.warns(UserWarning, match="scores.* cannot be read"):
        pd.testing.assert_frame_equal(cached_score(model, windows, ["cosine"]), scores)
    with pytest.warns(UserWarning, match="losses.* cannot be read"):
        pd.testing.assert_frame_equal(losses_by_set(model, windows, [()]), losses)


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_no_flipped_bit_gives_another_number():
    cache.write("some", "k", TABLE)
    (file,) = kept()
    whole, random = file.read_bytes(), np.random.default_rng(0)
    refused = 0
    for place, bit in zip(random.integers(len(whole), size=300), random.integers(8, size=300), strict=True):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        file.write_bytes(damaged)
        found = cache.read("some", "k")
        refused += found is None
        assert found is None or list(found.columns) != list(TABLE.columns) or found.equals(TABLE), (place, bit)
    assert refused > 150


def test_sets_of_a_damaged_table_are_computed_again():
    def compute(names):
        computed.append(sorted(names))
        return pd.DataFrame({"set": names, "value": [float(len(name)) for name in names]})

    computed = []
    cache.rows_by_set("some", "k", ["a", "bb"], compute, lambda: None)
    cache.rows_by_set("some", "k", ["bb", "ccc"], compute, lambda: None)
    (file,) = kept()
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.warns(UserWarning, match="cannot be read"):
        found = cache.rows_by_set("some", "k", ["a", "ccc"], compute, lambda: None)
    assert computed == [["a", "bb"], ["ccc"], ["a", "ccc"]]
    assert dict(zip(found.set, found.value, strict=True)) == {"a": 1, "ccc": 3}


@pytest.mark.parametrize("trouble", ["full", "read-only", "no folder can be made", "too large"])
def test_where_nothing_can_be_kept_all_is_computed_with_one_notice(trouble, tmp_path, monkeypatch):
    results = Results()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if trouble == "too large":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    elif trouble == "no folder can be made":
        (tmp_path / "a file").write_text("")
        monkeypatch.setattr(cache, "CACHE", tmp_path / "a file" / "cache")
    else:
        number = errno.ENOSPC if trouble == "full" else errno.EROFS

        def fails(self, path, *_, **__):
            path.write_bytes(b"half")
            raise OSError(number, f"Failed to open local file '{path}'. Detail: [errno {number}]")  # as pyarrow says it

        monkeypatch.setattr(pd.DataFrame, "to_parquet", fails)
    try:
        with pytest.warns(UserWarning, match="results cannot be kept in .*: they will be computed again next time") as said:
            results.ask("k", "k", "another", "k")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(said) == 1 and results.computed == 4 and not unfinished(tmp_path) and not kept()


def test_a_table_that_is_damaged_where_nothing_can_be_written_is_noticed_once(monkeypatch):
    cache.write("some", "k", TABLE)
    (file,) = kept()
    file.write_bytes(b"damaged")

    def read_only(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", read_only)
    with pytest.warns(UserWarning, match="cannot be") as said:
        Results().ask("k", "k", "k")
    assert [str(one.message).split(" cannot be ")[1].split()[0] for one in said] == ["read", "kept"]


def test_a_notice_that_cannot_be_written_does_not_end_a_run(monkeypatch):
    """The log of a headless run may be on the disk that is full."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    monkeypatch.setenv(progress.HEADLESS, "/dev/full")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        progress.notice("of this test alone: the disk is full")


# Text that is harvested, tasks that are built, models that are converted


@pytest.mark.parametrize(
    "damage", [b"", b"[", b'[{"file": "a", "text": "b"},', b'[{"file": "a", \0\0\0 "b"}]', b"[]", b"{}", b"\xff\xfe]"]
)
def test_harvested_text_that_cannot_be_read_is_harvested_again(damage, tmp_path, monkeypatch):
    harvests = []

    def docstrings(_):
        harvests.append(1)
        yield from (("a.py", "a text"), ("b.py", "another"))

    monkeypatch.setattr(harvest, "TEXT", tmp_path / "text")
    monkeypatch.setattr(harvest, "_installed", docstrings)
    path = harvest.harvested("docs")
    whole = path.read_bytes()
    assert harvest.harvested("docs") == path and len(harvests) == 1
    path.write_bytes(damage)
    assert list(corpus._documents("docs")) == [("a.py", "a text"), ("b.py", "another")]
    assert path.read_bytes() == whole and len(harvests) == 2 and not unfinished(tmp_path)


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder of tasks with one small task, and how often it was built."""
    built = []

    def write_small(folder):
        built.append(1)
        return write(folder)

    write = local_tasks.write_tasks
    monkeypatch.setattr(local_tasks, "TASKS", tmp_path / "[2024]" / "tasks")
    monkeypatch.setattr(local_tasks, "write_tasks", write_small)
    monkeypatch.setattr(harvest, "harvested", lambda source: tmp_path / f"{source}.json")
    monkeypatch.setattr(local_tasks.text, "documents", lambda *_: ())
    monkeypatch.setattr(local_tasks, "phenomena", lambda: [])
    for maker in ("continuations", "last_words", "signatures"):
        monkeypatch.setattr(local_tasks, maker, lambda *_: [])
    item = {"context": "one two", "choices": [" three", " four"], "gold": 0}
    monkeypatch.setattr(local_tasks, "repetitions", lambda *_: [item])
    return local_tasks.build_tasks(), built


def test_tasks_are_built_once(tasks):
    folder, built = tasks
    assert local_tasks.build_tasks() == folder and len(built) == 1
    listed = json.loads((folder / local_tasks.COMPLETE).read_text())
    assert set(listed) == {path.name for path in folder.iterdir()} - {local_tasks.COMPLETE}
    (folder / "a note of mine").write_text("which is no reason to build them again")
    assert local_tasks.build_tasks() == folder and len(built) == 1


@pytest.mark.parametrize(
    "damage", ["no last file", "a file is gone", "a file is cut", "another word", "the last file is empty", "[]", "7"]
)
def test_half_a_folder_of_tasks_is_built_again(damage, tasks):
    folder, built = tasks
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if damage == "no last file":
        (folder / local_tasks.COMPLETE).unlink()
    elif damage == "a file is gone":
        (folder / "induction.jsonl").unlink()
    elif damage == "a file is cut":
        (folder / "induction.jsonl").write_bytes(before["induction.jsonl"][:-5])
    elif damage == "another word":
        (folder / "induction.jsonl").write_bytes(before["induction.jsonl"].replace(b"two", b"ten"))
    else:
        (folder / local_tasks.COMPLETE).write_text("" if "empty" in damage else damage)
    assert local_tasks.build_tasks() == folder and len(built) == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.filterwarnings("default")
def test_the_harness_finds_tasks_in_a_folder_with_an_odd_name(tasks):
    from lm_eval.tasks import TaskManager

    assert "[2024]" in str(tasks[0])
    manager = TaskManager(include_path=str(tasks[0]), include_defaults=False)
    assert "induction" in manager.all_tasks
    loaded = manager.load(["induction"])["tasks"]["induction"]
    assert [one["context"] for one in loaded.test_docs()] == ["one two"]


@pytest.mark.parametrize(
    "content", ["", "[]", "null", '"text"', '{"source": 1}', '{"files": [], "source": ""}', '{"files": {"a": 1}}', "\0"]
)
def test_a_converted_model_whose_list_of_files_is_damaged_is_made_again(content, tmp_path, monkeypatch):
    made = []

    def convert(name, path, out):
        made.append(name)
        (out / "config.json").write_text("{}")

    monkeypatch.setattr(sources, "MODELS", tmp_path / "models")
    monkeypatch.setattr(sources, "convert", convert)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    folder = sources.folder(str(tmp_path / "tiny.gguf"))
    assert sources.folder(str(tmp_path / "tiny.gguf")) == folder and len(made) == 1
    (folder / sources.MANIFEST).write_text(content)
    assert sources.folder(str(tmp_path / "tiny.gguf")) == folder and len(made) == 2
    assert json.loads((folder / sources.MANIFEST).read_text())["files"].keys() == {"config.json"}
    assert [path.name for path in sources.MODELS.iterdir() if path.suffix != ".lock"] == [folder.name]


def test_a_converted_model_with_a_file_too_few_loads_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MODELS", tmp_path / "models")
    expected = tiny_gguf.write(tmp_path / "tiny.gguf")
    folder = sources.folder(str(tmp_path / "tiny.gguf"))
    (folder / "tokenizer.json").unlink()
    model, _ = models.load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    np.testing.assert_array_equal(model.model.norm.weight.detach().numpy(), expected["model.norm.weight"])
    assert (folder / "tokenizer.json").exists()


# Files in one step


def test_a_file_is_replaced_in_one_step_or_not_at_all(tmp_path):
    path = tmp_path / "more" / "file"
    files.write_text(path, "first")

    def half():
        with files.replacing(path) as unfinished:
            unfinished.write_text("sec")
            assert path.read_text() == "first"
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        half()
    assert path.read_text() == "first" and [one.name for one in path.parent.iterdir()] == ["file"]
    files.write_text(path, "second")
    assert path.read_text() == "second"


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with files.replacing(tmp_path / "file") as one, files.replacing(tmp_path / "file") as two:
        one.write_text("one")
        two.write_text("two")
        assert one != two
    assert (tmp_path / "file").read_text() == "one" and len(list(tmp_path.iterdir())) == 1


def test_what_is_built_once_is_built_once_by_many(tmp_path):
    built = []

    def build(unfinished):
        built.append(1)
        unfinished.mkdir()
        (unfinished / "part").write_text("whole")

    work = [threading.Thread(target=files.build_once, args=(tmp_path / "folder", build)) for _ in range(8)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(built) == 1 and (tmp_path / "folder" / "part").read_text() == "whole"


def test_what_fails_while_it_is_built_is_built_by_the_next(tmp_path):
    def fails(unfinished):
        unfinished.mkdir()
        (unfinished / "half").touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        files.build_once(tmp_path / "folder", fails)
    assert not (tmp_path / "folder").exists() and not unfinished(tmp_path)
    (tmp_path / ".folder.unfinished").mkdir()  # of a process that was killed
    (tmp_path / ".folder.unfinished" / "rest").touch()
    made = files.build_once(tmp_path / "folder", lambda path: path.mkdir())
    assert made.is_dir() and not list(made.iterdir()) and not unfinished(tmp_path)


def test_what_is_complete_is_used_where_nothing_can_be_written(tmp_path, monkeypatch):
    files.build_once(tmp_path / "file", lambda path: path.write_text("whole"))

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files, "FileLock", read_only)
    assert files.build_once(tmp_path / "file", read_only).read_text() == "whole"
    with pytest.raises(OSError, match="Read-only"):
        files.build_once(tmp_path / "other", read_only)


def test_a_link_is_removed_and_not_what_it_points_to(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    files.remove_path(tmp_path / "link")
    files.remove_path(tmp_path / "nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.skipif(not shutil.which("make"), reason="this system has no make")
def test_the_cache_is_removed_with_how_much_that_frees(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("cache/scores", "models"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "file").write_bytes(os.urandom(3_000_000))
    command = ["make", "--no-print-directory", "clean-cache"]

    def run() -> str:
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert run().startswith(("2.9M freed", "3.0M freed"))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["models"]
    assert run() == "nothing to free: there is no data/cache\n"
