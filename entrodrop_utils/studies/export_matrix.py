"""Which drops of which families each program computes, and the tables of export's README.

``python -m entrodrop_utils.studies.export_matrix`` writes small random models of every family for every program and runs them where
the program is here. ``data/results/export_families.csv`` keeps what it measured, and the tables are written from it.
"""

import argparse
import functools
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..dropping import Repair, dropped
from ..export import Exported, gguf, mlx, vllm
from ..export.llama_cpp import RuntimeUnavailable, load
from ..export.other_programs import ask
from ..families.decoder import UnsupportedModel
from ..files import with_part, write_text
from ..paths import PACKAGE, RESULTS
from ..progress import progress
from ..residual import SubBlock
from .export_proof import FOLDERS, environment, logits_of

RESULTS_FILE = RESULTS / "export_families.csv"
README = PACKAGE / "export" / "README.md"
COLUMNS = ["target", "drop", "family", "outcome", "difference", "reason", "environment"]
EXACT = 0.01  # of the logits' standard deviation: the largest difference of a program that computes the same
SHAPE = {"vocab_size": 128, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16}
FAMILIES = {
    "Llama": ("llama", SHAPE),
    "Mistral": ("mistral", SHAPE | {"sliding_window": None}),
    "Qwen 2": ("qwen2", SHAPE),
    "Qwen 3": ("qwen3", SHAPE | {"head_dim": 64}),
    "Gemma 3": ("gemma3_text", SHAPE | GEMMA),
    "others (GPT-2)": ("gpt2", {"n_layer": 6, "n_embd": 64, "n_head": 2, "vocab_size": 128}),
}
TARGETS: dict[str, Callable[..., Exported]] = {"llama.cpp": functools.partial(gguf, dtype="f32"), "vLLM": vllm, "mlx-lm": mlx}
DROPS: dict[str, tuple[list[SubBlock], tuple[str, ...]]] = {  # what is dropped, and the maps that repair it
    "whole blocks": ([SubBlock(5, "block")], ()),
    "attention layers": ([SubBlock(2, "attention"), SubBlock(5, "attention")], ()),
    "attention of layer 0": ([SubBlock(0, "attention")], ()),
    "MLPs": ([SubBlock(0, "mlp"), SubBlock(3, "mlp")], ()),
    "constant repair": ([SubBlock(2, "attention"), SubBlock(3, "mlp")], ("bias",)),
    "linear repair": ([SubBlock(2, "attention")], ("bias", "weight")),
}


def random_model(family: str) -> PreTrainedModel:
    """A small model of a family whose layers matter: weights three times as large as at the start of training."""
    kind, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3) if weight.ndim > 1 else weight.add_(0.2 * torch.randn_like(weight))
    return model


def random_repair(drop_set: list[SubBlock], maps: tuple[str, ...], dim: int) -> Repair | None:
    """One of random maps; None without any."""
    shapes = {"bias": (dim,), "weight": (dim, dim)}
    return Repair({s: {name: torch.randn(shapes[name]) / dim**0.5 for name in maps} for s in drop_set}) if maps else None


def written(target: str, model: PreTrainedModel, path: Path) -> tuple[Exported | None, str, str]:
    """An export, whether it is ``written``, written with ``zeros`` or ``refused``, and why it is not written as it is."""
    reason = ""
    for outcome, options in (("written", {}), ("zeros", {"zeros": True})) if target != "mlx-lm" else (("written", {}),):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="branches of zeros")
                return TARGETS[target](model, path, **options), outcome, reason
        except UnsupportedModel as error:
            reason = reason or str(error).replace(type(model).__name__, "the model").replace(
                f"a {model.config.model_type}", "this family"
            ).replace(f"repaired {model.config.model_type}", "repaired model of this family")
    return None, "refused", reason


def logits_in(target: str, path: Path, ids: list[int]) -> Float[np.ndarray, "token vocabulary"]:
    """What a program computes of an export.

    Raises:
        RuntimeUnavailable: it is not installed.
    """
    if target != "llama.cpp":
        return ask(FOLDERS[target][0], path, ids).logits
    with load(path) as runtime:
        return runtime.decode(ids)


def read_matrix(results: Path = RESULTS_FILE) -> list[dict[str, object]]:
    """The rows of ``measure_matrix``; what is missing is empty text."""
    return pd.read_csv(results, keep_default_na=False).to_dict("records") if results.exists() else []


def measure_matrix(results: Path = RESULTS_FILE, run: bool = True) -> pd.DataFrame:
    """Every program, drop and family: target, drop, family, outcome, reason, difference (of logits, in their standard deviations).

    Written after every row; a row from the same version of a program is kept, and so are those of programs that are not here.

    Args:
        run: the programs; else exports are only written, in rows that are not there.
    """
    rows = {(row["target"], row["drop"], row["family"]): row for row in read_matrix(results)}
    ids = torch.randint(3, 100, (64,), generator=torch.Generator().manual_seed(1))
    for target in TARGETS:
        try:
            here = environment(target) if run else ""
        except RuntimeUnavailable as error:
            print(f"{target} is left out: {error}", file=sys.stderr)
            continue
        keys = [(target, drop, family) for drop in DROPS for family in FAMILIES]
        for key in progress(keys, f"small models in {target}"):
            if key in rows and (not run or rows[key]["environment"] == here):
                continue
            model, (drop_set, maps) = random_model(key[2]), DROPS[key[1]]
            with (
                dropped(model, drop_set, random_repair(drop_set, maps, model.config.hidden_size)),
                tempfile.TemporaryDirectory() as d,
            ):
                exported, outcome, reason = written(target, model, Path(d) / "exported")
                row = dict(zip(("target", "drop", "family"), key, strict=True)) | {"outcome": outcome, "reason": reason}
                if exported is not None and run:
                    reference = logits_of(model, ids)
                    difference = np.abs(logits_in(target, exported.path, ids.tolist()) - reference).max() / reference.std()
                    row["difference"] = float(f"{difference:.3g}")
            rows[key] = {"difference": "", **row, "environment": here}
            order = {key: place for place, key in enumerate((t, d, f) for t in TARGETS for d in DROPS for f in FAMILIES)}
            table = pd.DataFrame([rows[key] for key in sorted(rows, key=order.__getitem__)], columns=COLUMNS)
            write_text(results, table.to_csv(index=False))
    return pd.DataFrame(rows.values())


def matrix_table(results: Path = RESULTS_FILE) -> str:
    """The table of programs, drops and families in Markdown, with the reasons of what is refused below it."""
    cells, reasons = {}, {}
    for row in read_matrix(results):
        ran = row["difference"] != ""
        cell = {"written": "yes", "zeros": "zeros", "refused": "no"}[row["outcome"]]
        if ran and float(row["difference"]) > EXACT:
            cell = f"wrong by {row['difference']}"
        elif row["outcome"] != "refused" and not ran:
            cell += ", not run"
        if row["reason"]:
            cell += f" ({reasons.setdefault(row['reason'], len(reasons) + 1)})"
        cells[row["target"], row["drop"], row["family"]] = cell
    lines = [f"| program | drop | {' | '.join(FAMILIES)} |", "|---|---|" + "---|" * len(FAMILIES)]
    for target in TARGETS:
        for drop in DROPS:
            lines.append(f"| {target} | {drop} | {' | '.join(cells.get((target, drop, f), 'not tried') for f in FAMILIES)} |")
    lines += [f"| SGLang | all | {' | '.join(['not tried'] * len(FAMILIES))} |", ""]
    return "\n".join(lines + [f"{number}. {reason}." for reason, number in reasons.items()])


def proof_table(names: Mapping[str, str]) -> str:
    """The table of trained models in Markdown: one line for each model, program and drop set."""
    lines = [
        "| model | program | drops | largest difference | same greedy tokens | keys and values of 2,048 tokens |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in names.items():
        for row in pd.read_csv(RESULTS / name / "export.csv").to_dict("records"):
            cells = [title, f"{row['program']}, {row['type']}", row["drop"]]
            if pd.isna(row["max_difference"]):
                cells += ["refused", "", ""]
            else:
                zeros = " (zeros)" if isinstance(row.get("note"), str) else ""
                cells[2] += zeros
                cells += [f"{row['max_difference']:.2g}", f"{row['same_tokens']:.0f} of 32", f"{row['kv_bytes'] / 1e6:.1f} MB"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def part_table(columns: Mapping[str, str], names: Mapping[str, str]) -> str:
    """Columns of the q8_0 rows that have them, in Markdown; a speedup is followed by its interval."""
    lines = [f"| model | drops | {' | '.join(columns.values())} |", "|---|---|" + "---|" * len(columns)]
    for name, title in names.items():
        for row in pd.read_csv(RESULTS / name / "export.csv").to_dict("records"):
            if row["type"] == "q8_0" and not any(pd.isna(row.get(key)) for key in columns):
                ends = {key: f" [{row[f'{key}_low']:.2f}, {row[f'{key}_high']:.2f}]" for key in columns if f"{key}_low" in row}
                cells = [f"{row[key]:.2f}{ends[key]}" if key in ends else f"{row[key]:.2g}" for key in columns]
                lines.append(f"| {title} | {row['drop']} | {' | '.join(cells)} |")
    return "\n".join(lines)


PARTS = {
    "max_difference": "in all",
    "weights_difference": "weights",
    "arithmetic_difference": "arithmetic",
    "simulated_difference": "arithmetic, simulated",
    "f32_difference": "f32 file of these weights",
}
SPEEDS = {"prompt_speedup": "reading, times as fast", "generation_speedup": "writing, times as fast"}
PROVEN = {"smollm2-135m-instruct": "SmolLM2-135M", "qwen2.5-coder-0.5b-instruct": "Qwen2.5-Coder-0.5B"}


def with_tables(text: str) -> str:
    """The README with its tables as the results say."""
    tables = {"families": matrix_table(), "trained models": proof_table(PROVEN)}
    for name, table in (tables | {"parts": part_table(PARTS, PROVEN), "speeds": part_table(SPEEDS, PROVEN)}).items():
        text = with_part(text, name, table)
    return text


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing and write the tables of export's README."""
    parser = argparse.ArgumentParser(prog="python -m entrodrop_utils.studies.export_matrix", description=main.__doc__)
    parser.add_argument("--tables", action="store_true", help="only write the tables, from the results that are there")
    parser.add_argument("--no-run", action="store_true", help="write exports that are not in the results, and run no program")
    chosen = parser.parse_args(arguments)
    if not chosen.tables:
        measure_matrix(run=not chosen.no_run)
    write_text(README, with_tables(README.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
