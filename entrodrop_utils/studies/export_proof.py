"""Pruned models in the programs that serve them: do they compute the same, with a smaller cache, and faster?

``python -m entrodrop_utils.studies.export_proof NAME`` writes ``data/results/NAME/export.csv``; it needs the wheel ``xllamacpp``.
A row that is there from the same export and wheel is kept, so a stopped run continues.
"""

import argparse
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from ..dropping import Repair, dropped
from ..export import gguf
from ..export.llama_cpp import WHEEL, LlamaCpp, load
from ..files import write_text
from ..models import load_model
from ..paths import RESULTS
from ..progress import progress
from ..repairing import repair
from ..residual import SubBlock, find
from ..scoring import score
from ..selection import one_shot
from ..text import windows

CONTEXT, PROMPT, CONTINUATION = 2048, 64, 32
ROUNDS, STEPS = 4, 12  # of the comparison of speeds; the first round warms up
SPEED_TYPE = "q8_0"  # what is served; speeds of the others are not measured


def sets_to_prove(model: PreTrainedModel, calibration: Int[Tensor, "sequence token"]) -> dict[str, list[SubBlock]]:
    """The sets that are tried: of each kind those that cosine ranks first, and the first and the last layer alone."""
    last = len(find(model, "block")) - 1
    scores = score(model, calibration, ["cosine"])
    ranked = {kind: one_shot(scores, "cosine", kind) for kind in ("attention", "mlp", "block")}
    eleven = ranked["attention"][: round(11 / 30 * (last + 1))]
    block = ranked["block"][0]
    apart = {kind: [s for s in ranked[kind] if s.layer != block.layer] for kind in ("attention", "mlp")}
    return {
        "dense": [],
        f"{len(eleven)} attention layers": eleven,
        "attention 0": [SubBlock(0, "attention")],
        "4 MLPs": ranked["mlp"][:4],
        "4 blocks": ranked["block"][:4],
        "1 block, 4 attention layers, 2 MLPs": [block, *apart["attention"][:4], *apart["mlp"][:2]],
        "last attention": [SubBlock(last, "attention")],
        "last MLP": [SubBlock(last, "mlp")],
    }


def compare(model: PreTrainedModel, runtime: LlamaCpp, ids: Int[Tensor, " token"]) -> dict[str, float]:
    """A model in transformers and llama.cpp: logits after each token, and the greedy continuation.

    Returns:
        max_difference of the logits, same_top (share of positions with the same likeliest token), same_tokens (of the greedy
        continuation, before the first that differs).
    """
    with torch.no_grad():
        reference = model(ids[None]).logits[0].float().numpy()
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids[None])}
        expected = model.generate(ids[None], max_new_tokens=CONTINUATION, **options)[0, len(ids) :].tolist()
    logits, continuation = runtime.decode(ids.tolist()), runtime.greedy(ids.tolist(), CONTINUATION)
    equal = [a == b for a, b in zip(continuation, expected, strict=True)]
    return {
        "max_difference": float(np.abs(logits - reference).max()),
        "same_top": float((logits.argmax(-1) == reference.argmax(-1)).mean()),
        "same_tokens": equal.index(False) if False in equal else len(equal),
    }


def speed(dense: Path, pruned: Path, ids: Sequence[int]) -> dict[str, float]:
    """Tokens per second of two files, measured in turns on one thread: medians, and the median of the ratios of a turn.

    Returns:
        tokens per second of reading the prompt and of generation, of both files, and the speedups.
    """
    measured: dict[str, float] = {}
    with load(dense, CONTEXT, kv_type="f16") as whole, load(pruned, CONTEXT, kv_type="f16") as smaller:
        runs = [(whole.tokens_per_second(ids, STEPS), smaller.tokens_per_second(ids, STEPS)) for _ in range(ROUNDS)][1:]
    for place, name in enumerate(("prompt", "generation")):
        measured[f"dense_{name}_tps"] = statistics.median(a[place] for a, _ in runs)
        measured[f"{name}_tps"] = statistics.median(b[place] for _, b in runs)
        measured[f"{name}_speedup"] = statistics.median(b[place] / a[place] for a, b in runs)
    return measured


def environment() -> str:
    """Where the numbers were measured."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.machine()
    )
    return f"{WHEEL} {version(WHEEL)}, {cpu}, 1 thread, transformers {version('transformers')}"


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def prove(name: str, types: Iterable[str] = (SPEED_TYPE, "f32"), results: Path | None = None) -> pd.DataFrame:
    """Every drop set of a model as a GGUF file in llama.cpp, against transformers in float32; written after every row."""
    results = results or RESULTS / name / "export.csv"
    rows = pd.read_csv(results).to_dict("records") if results.exists() else []
    rows = [row for row in rows if row["environment"] == environment()]
    done = {(row["drop"], row["type"]) for row in rows}
    model, tokenizer = load_model(name, device="cpu")
    calibration = windows("docs", "calibration", tokenizer, 8, 128)
    ids = windows("docs", "evaluation", tokenizer, 1, PROMPT)[0]
    sets: dict[str, tuple[list[SubBlock], Repair | None]] = {n: (s, None) for n, s in sets_to_prove(model, calibration).items()}
    some = [s for s in next(s for n, (s, _) in sets.items() if n.startswith("1 block")) if s.kind != "block"]
    for how in ("constant", "linear"):
        sets[f"4 attention layers, 2 MLPs, {how} repair"] = (some, how)
    with tempfile.TemporaryDirectory() as folder:
        for kind in types:
            whole = Path(folder) / f"dense-{kind}.gguf"
            for label, (drop_set, how) in progress(sets.items(), f"{name} as {kind} in llama.cpp", total=len(sets)):
                if (label, kind) in done:
                    continue
                if not whole.exists():
                    gguf(model, whole, tokenizer, kind)
                fitted = repair(model, drop_set, calibration, how) if how else None
                path = whole if label == "dense" else Path(folder) / "pruned.gguf"
                with dropped(model, drop_set, fitted):
                    exported = gguf(model, path, tokenizer, kind, overwrite=True)
                    with load(path) as runtime:
                        row = compare(model, runtime, ids)
                with load(path, CONTEXT, kv_type="f16") as runtime:  # llama.cpp's own default
                    row |= {"bytes": exported.nbytes, "architecture": exported.architecture, "kv_bytes": runtime.kv_bytes}
                row |= speed(whole, path, ids.tolist()) if kind == SPEED_TYPE else {}
                about = {"drop": label, "sub_blocks": "; ".join(map(str, drop_set))}
                rows.append(about | {"type": kind} | row | {"environment": environment()})
                write_text(results, pd.DataFrame(rows).to_csv(index=False, float_format="%.6g"))
            whole.unlink(missing_ok=True)
    return pd.DataFrame(rows)


def main(arguments: list[str] | None = None) -> int:
    """Prove a model's exports and print the table."""
    parser = argparse.ArgumentParser(prog="python -m entrodrop_utils.studies.export_proof", description=main.__doc__)
    parser.add_argument("name", nargs="?", default="smollm2-135m-instruct", help="as for load_model, a registered name")
    parser.add_argument("--types", nargs="+", default=[SPEED_TYPE, "f32"])
    chosen = parser.parse_args(arguments)
    print(prove(chosen.name, chosen.types).drop(columns=["sub_blocks", "environment"]).to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
