"""What the study of exports measures: the comparison with transformers, the parts of q8_0's difference, and the README's tables."""

import tempfile
from pathlib import Path

import gguf as library
import numpy as np
import pytest
import torch
from gguf import GGUFReader

from entrodrop_utils import SubBlock, dropped
from entrodrop_utils.export import gguf
from entrodrop_utils.studies import export_matrix, export_proof


def greedy(model, ids: torch.Tensor, n: int) -> list[int]:
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids[None], max_new_tokens=n, **options)[0, len(ids) :].tolist()


def test_the_comparison_counts_the_greedy_tokens_of_generate(model, windows):
    ids = windows[0]
    with torch.no_grad():
        logits = model(ids[None]).logits[0].numpy()
    continuation = greedy(model, ids, 12)
    same = export_proof.compare(model, ids, logits, continuation)
    assert same["max_difference"] < 1e-5
    assert (same["same_top"], same["same_tokens"]) == (1, 12)
    assert abs(same["kl"]) < 1e-9
    other = [*continuation[:5], (continuation[5] + 1) % 101, *continuation[6:]]
    shifted = logits + np.eye(101, dtype=np.float32)[3]  # one logit of every position is larger by 1
    differs = export_proof.compare(model, ids, shifted, other)
    assert abs(differs["max_difference"] - 1) < 1e-5
    assert differs["same_tokens"] == 5
    p = torch.softmax(torch.from_numpy(logits).double(), -1)[:, 3]
    np.testing.assert_allclose(differs["kl"], (torch.log1p((np.e - 1) * p) - p).mean(), rtol=1e-4)


def test_rounded_matrices_are_those_of_a_q8_0_file(model, tmp_path):
    own = {name: p.clone() for name, p in model.named_parameters()}
    tensors = GGUFReader(gguf(model, tmp_path / "m.gguf", dtype="q8_0").path).tensors
    written = {t.name: library.dequantize(t.data, t.tensor_type) for t in tensors}
    with export_proof.rounded_matrices(model):
        layer = model.model.layers[3]
        np.testing.assert_array_equal(layer.self_attn.v_proj.weight.detach().numpy(), written["blk.3.attn_v.weight"])
        np.testing.assert_array_equal(model.model.embed_tokens.weight.detach().numpy(), written["token_embd.weight"])
        assert not torch.equal(layer.self_attn.v_proj.weight, own["model.layers.3.self_attn.v_proj.weight"])
    assert all(torch.equal(p, own[name]) for name, p in model.named_parameters())


def test_rounded_inputs_are_those_of_linear_layers(model, windows):
    seen = []
    handle = model.model.layers[2].mlp.gate_proj.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        plain = model(windows[:1]).logits
        with export_proof.rounded_inputs(model):
            rounded = model(windows[:1]).logits
        handle.remove()
        assert torch.equal(model(windows[:1]).logits, plain)
    assert 0 < (rounded - plain).abs().max() < 0.1 * plain.std()
    (_, _), (inputs, output) = seen
    assert torch.equal(inputs, export_proof.as_q8_0(inputs))
    torch.testing.assert_close(output, inputs @ model.model.layers[2].mlp.gate_proj.weight.detach().T)


def test_a_matrix_cell_that_computes_something_else_says_so(tmp_path):
    (tmp_path / "m.csv").write_text("target,drop,family,outcome,difference,reason\nllama.cpp,MLPs,Llama,written,0.5,\n")
    line = next(x for x in export_matrix.matrix_table(tmp_path / "m.csv").splitlines() if x.startswith("| llama.cpp | MLPs"))
    assert line.startswith("| llama.cpp | MLPs | wrong by 0.5 | not tried |")


def test_the_tables_of_the_readme_are_those_of_the_results():
    text = export_matrix.README.read_text(encoding="utf-8")
    assert text == export_matrix.with_tables(text), "python -m entrodrop_utils.studies.export_matrix --tables"


FEW = ["Qwen 2"]


@pytest.mark.parametrize(
    "families", [FEW, pytest.param([f for f in export_matrix.FAMILIES if f not in FEW], marks=pytest.mark.slow)]
)
def test_the_exporters_write_and_refuse_what_the_results_say(tmp_path, families):
    for row in export_matrix.read_matrix():
        if row["family"] in families:
            model, (drop_set, maps) = export_matrix.random_model(row["family"]), export_matrix.DROPS[row["drop"]]
            repair = export_matrix.random_repair(drop_set, maps, model.config.hidden_size)
            with dropped(model, drop_set, repair), tempfile.TemporaryDirectory(dir=tmp_path) as folder:
                _, outcome, reason = export_matrix.written(row["target"], model, Path(folder) / "exported")
            assert (outcome, reason) == (row["outcome"], row["reason"]), row


def test_a_stopped_proof_continues_and_a_quick_one_is_completed(tmp_path, monkeypatch):
    asked = []

    class Few(export_proof.Proof):
        def __init__(self, name, folder, details):
            self.details = details

        def sets(self):
            gone = [SubBlock(0, "attention")]
            return {"dense": ([], None), "attention 0": (gone, None), "repaired": (gone, "linear")}

        def rows(self, drop_set, how, programs):
            for program, where in programs.items():
                asked.append((len(drop_set), how, program))
                parts = {"weights_difference": 1.0} if self.details and export_proof.has_parts(program, how) else {}
                sizes = {} if how else {"bytes": 123_456_789}
                yield {"program": "llama.cpp", "type": program.split()[1], "environment": where} | parts | sizes

    monkeypatch.setattr(export_proof, "Proof", Few)
    monkeypatch.setattr(export_proof, "environment", lambda program: "here")

    def ask(details: bool) -> list:
        asked.clear()
        export_proof.prove("m", ["llama.cpp f32", "llama.cpp q8_0"], details, tmp_path / "export.csv")
        return list(asked)

    assert len(ask(False)) == 6
    assert ask(False) == []
    lines = (tmp_path / "export.csv").read_text().splitlines()
    (tmp_path / "export.csv").write_text("\n".join([*lines[:2], *lines[3:]]))
    assert ask(False) == [(1, None, "llama.cpp f32")]
    assert ask(True) == [(0, None, "llama.cpp q8_0"), (1, None, "llama.cpp q8_0")]
    assert [line.split(",")[0] for line in lines] == ["drop", *["dense", "attention 0", "repaired"] * 2]
    assert (tmp_path / "export.csv").read_text().count(",123456789,") == 4
    monkeypatch.setattr(export_proof, "environment", lambda program: "elsewhere")
    assert len(ask(True)) == 6
