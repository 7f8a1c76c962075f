"""The confirmation of lazy greedy: its table against plain losses, its counts and sentences against loops over the table."""

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_llama import tiny_llama

from entrodrop_utils import search
from entrodrop_utils.dropping import dropped
from entrodrop_utils.studies import confirmation as study
from entrodrop_utils.text import text_digest


def text_of(source: str, part: str, tokenizer, n: int, tokens: int, draw: int = 0) -> torch.Tensor:
    seed = sum(map(ord, source + part)) + draw
    return torch.randint(0, 101, (n, tokens), generator=torch.Generator().manual_seed(seed))


def plain_losses(model, windows, sub_blocks) -> np.ndarray:
    with torch.no_grad(), dropped(model, sub_blocks):
        return np.array([float(model(w[None], labels=w[None]).loss) for w in windows])


@contextmanager
def on_a_tiny_model(module, folder: Path, searched: tuple[int, int], scored: tuple[int, int]):
    """While open, the study in this module measures a tiny model on random tokens and writes into the folder."""
    texts = {"SEARCH_TEXT": searched, "SCORE_TEXT": scored, "HELD_OUT_TEXT": (4, 14), "windows": text_of}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in texts.items():
            patch.setattr(study, name, value)
        patch.setattr(module, "load_model", lambda name, dtype=None: (tiny_llama().to(getattr(torch, dtype or "float32")), None))
        patch.setattr(module, "RESULTS", folder)
        yield patch


@pytest.fixture(scope="module")
def confirmed(tmp_path_factory):
    with on_a_tiny_model(study, tmp_path_factory.mktemp("data"), (2, 12), (2, 30)):
        table = study.confirm("tiny", "a file", "c4", 2, ["attention"], {"attention": [0.5], "mlp": [0.34]}, 4)
        return table, study.confirmations()


def test_every_choice_is_its_searchs_and_its_difference_that_of_plain_losses(confirmed):
    table, _ = confirmed
    model, held = tiny_llama(), text_of("a file", "evaluation", None, 4, 14)
    rows = table[(table.domain == "c4") & (table.kind == "attention")].set_index("method")
    sets = {
        name: [method(model, text_of("a file", "calibration", None, 2, 12, draw), 3).order for draw in (0, 1)]
        for name, method in {"lazy greedy": search.lazy_greedy, "single drops": search.single_drops}.items()
    }
    losses = {}
    for name, of_draws in sets.items():
        assert rows.dropped[name] == "; ".join(" ".join(str(s.layer) for s in sorted(order)) for order in of_draws)
        losses[name] = np.mean([plain_losses(model, held, order) for order in of_draws], axis=0)
    difference = (losses["single drops"] - losses["lazy greedy"]).mean()
    assert rows.difference["single drops"] == pytest.approx(difference, abs=1e-5)
    assert rows.increase["lazy greedy"] == pytest.approx((losses["lazy greedy"] - plain_losses(model, held, [])).mean(), abs=1e-5)
    (two,) = {len(layers.split()) for cell in table[table.kind == "mlp"].dropped for layers in cell.split("; ")}
    assert two == 2 == table[table.kind == "mlp"].n_dropped.unique().item()
    assert {*table[table.kind == "attention"].method} - {*table[table.kind == "mlp"].method} == {"EvoPress"}


@pytest.mark.parametrize("shares", ["attention", "attention=", "attention=0", "attention=1.5", "attention=few", "heads=0.5", ""])
def test_shares_that_cannot_be_dropped_are_refused(capsys, shares):
    with pytest.raises(SystemExit):
        study.main(["tiny", "--shares", shares])
    assert f"{shares!r} is no kind of attention, mlp, block with shares between 0 and 1" in capsys.readouterr().err


def test_the_command_measures_the_shares_that_it_was_given(monkeypatch, confirmed):
    given = []
    monkeypatch.setattr(study, "confirm", lambda *arguments: given.append(arguments) or confirmed[0])
    study.main(["tiny", "--text", "a file", "--evolved", "mlp", "--shares", "attention=0.5,0.25", "mlp=0.34", "--windows", "4"])
    study.main(["tiny"])
    assert given[0] == ("tiny", "a file", "", 2, ["mlp"], {"attention": (0.5, 0.25), "mlp": (0.34,)}, 4, None)
    assert given[1] == ("tiny", "docs", "", 2, [], study.SHARES, study.HELD_OUT_TEXT[0], None)


def test_what_was_written_is_read_as_another_text_of_the_model(confirmed):
    table, read = confirmed
    assert {*zip(read.model, read.text, strict=True)} == {("tiny", "c4")}
    assert read.own.tolist() == (table.domain == "c4").tolist()
    assert read.difference.to_numpy() == pytest.approx(table.difference.to_numpy(), rel=1e-4, abs=1e-6)
    shown = study.rival_table(read)
    assert shown.index.tolist() == [("tiny", "c4", "attention", 3), ("tiny", "c4", "mlp", 2)]
    row = table[(table.domain == "c4") & (table.method == "cosine") & (table.kind == "mlp")].iloc[0]
    assert shown.cosine.iloc[1] == f"{row.difference:.2f} [{row.low:.2f}, {row.high:.2f}]" and shown.EvoPress.iloc[1] == "–"


def test_cases_are_counted_one_by_one(confirmed):
    _, read = confirmed
    counts = study.decided(read).set_index("method")
    for name, row in counts.iterrows():
        rows = read[read.method == name]
        assert [row.better, row.worse, row.cases] == [(rows.low > 0).sum(), (rows.high < 0).sum(), len(rows)]
        ours = read[read.method == "lazy greedy"].set_index(["domain", "kind", "n_dropped"]).tokens
        parts = [r.tokens / ours[r.domain, r.kind, r.n_dropped] for r in rows.itertuples()]
        assert row.share_of_tokens == pytest.approx(np.mean(parts))
    lines = study.confirmation_sentences(read)
    others = [name for name in counts.index if name not in study.AIM]
    assert len(lines) == 1 + len(others) + 1
    won = [name for name, row in counts.iterrows() if row.better > row.cases / 2 and row.worse == 0]
    assert lines[0].partition("than: ")[2].partition(";")[0] == (", ".join(won) or "none")
    for name in others:
        assert f"{name}: better in {counts.better[name]} of {counts.cases[name]} cases" in " ".join(lines)
    cosine = read[read.own & (read.kind == "attention") & (read.method == "cosine")].iloc[0]
    assert f"cosine {cosine.difference:.2f} [{cosine.low:.2f}, {cosine.high:.2f}]" in lines[-1]


def test_the_committed_confirmations_are_of_other_models_or_texts():
    table = study.confirmations()
    cases = table.groupby(["model", "text"])
    assert ("smollm2-135m-instruct", "docs") not in cases.groups and len(cases) >= 1
    for _, rows in cases:
        ours = rows[rows.method == "lazy greedy"]
        assert (ours[["difference", "low", "high"]] == 0).all(axis=None) and rows.own.any() and not rows.own.all()


@pytest.mark.parametrize(("precision", "measured"), [(None, "float32"), ("float64", "float64")])
def test_a_run_is_recorded_beside_its_table(tmp_path, precision, measured):
    with on_a_tiny_model(study, tmp_path, (2, 30), (2, 30)):
        study.confirm("tiny", "a file", "c4", 1, shares={"mlp": [0.34]}, held_out_windows=3, precision=precision)
    (path,) = tmp_path.glob("*/*/*_run.json")
    record = json.loads(path.read_text())
    assert record["windows and tokens"]["held out"] == [3, 14] and record["shares dropped"] == {"mlp": [0.34]}
    texts = {text_digest(text_of("a file", "calibration", None, 2, 30)), text_digest(text_of("a file", "evaluation", None, 3, 14))}
    assert record["calibration draws"] == 1 and texts <= {*record["texts"]} and record["commit"]
    assert record["precision"] == measured
    assert path.name == "07_confirmation_run.json" and (path.parent / study.FILE).is_file()


def test_the_aim_is_counted_one_by_one_on_every_decoder(confirmed):
    joined = pd.concat([confirmed[1], confirmed[1].assign(model="another")])
    counts = study.aim_table(joined)
    for row in counts.itertuples():
        rows = joined[(joined.model == row.model) & (joined.kind == row.kind) & (joined.method == row.method)]
        signs = np.sign(rows.difference)
        assert (row.less, row.more, row.same) == ((signs > 0).sum(), (signs < 0).sum(), (signs == 0).sum())
        assert (row.better, row.worse) == ((rows.low > 0).sum(), (rows.high < 0).sum())
        assert row.cases == len(rows) == 2
    assert set(counts.method) == set(study.AIM)
    lines = study.aim_sentences(joined)
    assert len(lines) == 3
    for line in lines:
        method = next(m for m in study.AIM if f"than {m} in" in line)
        of = counts[counts.method == method]
        assert f"in {of.less.sum()} of {of.cases.sum()} cases (decided in {of.better.sum()})" in line
        assert line.endswith("nowhere.") == (of.less == of.cases).all()
