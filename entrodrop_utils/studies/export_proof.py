"""Pruned models in the programs that serve them: do they compute the same, with a smaller cache, and faster?

``python -m entrodrop_utils.studies.export_proof NAME`` writes ``data/results/NAME/export.csv`` with the programs that are here
(``make test-export`` gets them). A row that is there from the same program and version is kept, so a stopped run continues.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import gguf as library
import numpy as np
import pandas as pd
import torch
from gguf import GGMLQuantizationType
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..cached_scoring import cached_score
from ..dropping import dropped
from ..export import gguf, mlx, vllm
from ..export.llama_cpp import RuntimeUnavailable, llama_cpp_version, load
from ..export.other_programs import ask, program_version
from ..families.decoder import UnsupportedModel
from ..files import write_table
from ..models import load_model
from ..paths import RESULTS
from ..progress import progress
from ..repairing import repair
from ..residual import SubBlock, find
from ..selection import one_shot
from ..statistics import CONFIDENCE, mean_interval
from ..text import windows
from .speed import processor

CONTEXT, PROMPT, CONTINUATION = 2048, 64, 32
ROUNDS, STEPS = 9, 12  # of the comparison of speeds; the first round warms up
PROGRAMS = ("llama.cpp f32", "llama.cpp q8_0", "mlx-lm f32", "vLLM f32")
COLUMNS = ["drop", "sub_blocks", "program", "type", "max_difference", "same_top", "kl", "kl_low", "kl_high", "same_tokens"]
COLUMNS += [f"{part}_difference" for part in ("weights", "arithmetic", "simulated", "f32")] + ["bytes", "architecture", "kv_bytes"]
COLUMNS += [f"{file}{what}_tps" for what in ("prompt", "generation") for file in ("dense_", "")]
COLUMNS += [f"{what}_speedup{end}" for what in ("prompt", "generation") for end in ("", "_low", "_high")] + ["note", "environment"]
WHOLE = dict.fromkeys(["same_tokens", "bytes", "kv_bytes"], "Int64")  # also where a refused row lacks them
FOLDERS = {"mlx-lm": ("mlx", mlx), "vLLM": ("vllm", vllm)}


def sets_to_prove(model: PreTrainedModel, calibration: Int[Tensor, "sequence token"]) -> dict[str, list[SubBlock]]:
    """The sets that are tried: of each kind those that cosine ranks first, and the first and the last layer alone."""
    last = len(find(model, "block")) - 1
    scores = cached_score(model, calibration, ["cosine"])
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


def logits_of(model: PreTrainedModel, ids: Int[Tensor, " token"]) -> Float[np.ndarray, "token vocabulary"]:
    """After each token, in transformers."""
    with torch.no_grad():
        return model(ids[None]).logits[0].float().numpy()


def compare(
    model: PreTrainedModel, ids: Int[Tensor, " token"], logits: Float[np.ndarray, "token vocabulary"], continuation: Sequence[int]
) -> dict[str, float]:
    """What a program computes of a prompt against transformers.

    Returns:
        max_difference of the logits; same_top, the share of positions with the same likeliest token; kl, the mean over positions of
        KL(transformers || program) in nats, with its interval; same_tokens of the greedy continuation, before the first that
        differs.
    """
    reference = logits_of(model, torch.cat([ids, ids.new_tensor(list(continuation)[:-1])]))
    # up to the first difference, the greedy continuation in transformers is the likeliest token after each of these
    equal = reference[len(ids) - 1 :].argmax(-1) == continuation
    reference = reference[: len(ids)]
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (reference, logits))
    kl = mean_interval((p.exp() * (p - q)).sum(-1).numpy())
    return {
        "max_difference": float(np.abs(logits - reference).max()),
        "same_top": float((logits.argmax(-1) == reference.argmax(-1)).mean()),
        "kl": kl.estimate,
        "kl_low": kl.low,
        "kl_high": kl.high,
        "same_tokens": len(equal) if equal.all() else int(equal.argmin()),
    }


def as_q8_0(values: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
    """Values as q8_0 holds them: blocks of 32 as integers of 8 bits and a scale of 16. Other rows stay as they are."""
    if values.shape[-1] % 32:
        return values
    rows = np.ascontiguousarray(values.detach().float().numpy())
    kind = GGMLQuantizationType.Q8_0
    return torch.from_numpy(library.dequantize(library.quantize(rows, kind), kind))


@contextlib.contextmanager
def rounded_matrices(model: PreTrainedModel) -> Iterator[None]:
    """All matrices as ``as_q8_0`` has them, until the context closes."""
    own = {p: p.data for p in model.parameters() if p.ndim == 2}
    try:
        for p in own:
            p.data = as_q8_0(p.data)
        yield
    finally:
        for p, values in own.items():
            p.data = values


@contextlib.contextmanager
def rounded_inputs(model: PreTrainedModel) -> Iterator[None]:
    """The inputs of all linear layers as ``as_q8_0`` has them: llama.cpp multiplies q8_0 matrices by vectors of q8_0."""
    linear = [part for part in model.modules() if isinstance(part, nn.Linear)]
    handles = [part.register_forward_pre_hook(lambda _, inputs: (as_q8_0(inputs[0]), *inputs[1:])) for part in linear]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def parts_of_difference(
    model: PreTrainedModel, ids: Int[Tensor, " token"], logits: Float[np.ndarray, "token vocabulary"], path: Path
) -> dict[str, float]:
    """Where the difference of a q8_0 file comes from, as largest differences of logits; ``path`` is overwritten.

    Returns:
        weights_difference: transformers with the file's weights against its own. arithmetic_difference: llama.cpp against
        transformers with the file's weights. simulated_difference: transformers against itself with these weights, when the inputs
        of its linear layers have 8 bits. f32_difference: llama.cpp's f32 file of these weights against transformers with them.
    """
    own = logits_of(model, ids)
    with rounded_matrices(model):
        weights = logits_of(model, ids)
        with rounded_inputs(model):
            simulated = logits_of(model, ids)
        gguf(model, path, dtype="f32", overwrite=True)
        with load(path) as runtime:
            exact = runtime.decode(ids.tolist())
    pairs = {"weights": (weights, own), "arithmetic": (logits, weights)}
    pairs |= {"simulated": (simulated, weights), "f32": (exact, weights)}
    return {f"{name}_difference": float(np.abs(a - b).max()) for name, (a, b) in pairs.items()}


def has_parts(program: str, how: str | None) -> bool:
    """Whether the difference of a row has parts: q8_0 rounds; the inputs of a linear repair are none of a linear layer."""
    return program == "llama.cpp q8_0" and how != "linear"


def speed(dense: Path, pruned: Path, ids: Sequence[int]) -> dict[str, float]:
    """Tokens per second of two files, measured in turns on one thread: medians, and the median of the ratios of a turn.

    Returns:
        tokens per second of reading the prompt and of generation, of both files, and the speedups with their intervals.
    """
    measured: dict[str, float] = {}
    with load(dense, CONTEXT, kv_type="f16") as whole, load(pruned, CONTEXT, kv_type="f16") as smaller:
        runs = [(whole.tokens_per_second(ids, STEPS), smaller.tokens_per_second(ids, STEPS)) for _ in range(ROUNDS)][1:]
    for place, name in enumerate(("prompt", "generation")):
        measured[f"dense_{name}_tps"] = statistics.median(a[place] for a, _ in runs)
        measured[f"{name}_tps"] = statistics.median(b[place] for _, b in runs)
        ratios = [b[place] / a[place] for a, b in runs]
        low, high = stats.quantile_test(ratios, p=0.5).confidence_interval(CONFIDENCE)
        measured |= {f"{name}_speedup": statistics.median(ratios), f"{name}_speedup_low": low, f"{name}_speedup_high": high}
    return measured


def environment(program: str) -> str:
    """Where the numbers of a program were measured.

    Raises:
        RuntimeUnavailable: it is not installed.
    """
    here = llama_cpp_version() if program == "llama.cpp" else program_version(FOLDERS[program][0])
    return f"{here}, {processor()}, 1 thread, transformers {version('transformers')}"


class Proof:
    """A model's exports in the programs, one row for each drop set and program."""

    def __init__(self, name: str, folder: Path, details: bool = True):
        self.model, self.tokenizer = load_model(name, device="cpu")
        self.folder, self.details = folder, details
        self.calibration = windows("docs", "calibration", self.tokenizer, 8, 128)
        self.ids = windows("docs", "evaluation", self.tokenizer, 1, PROMPT)[0]

    def sets(self) -> dict[str, tuple[list[SubBlock], str | None]]:
        """The sets to prove, and how they are repaired."""
        sets = sets_to_prove(self.model, self.calibration)
        some = [s for s in next(s for n, s in sets.items() if n.startswith("1 block")) if s.kind != "block"]
        repaired = {f"4 attention layers, 2 MLPs, {how} repair": (some, how) for how in ("constant", "linear")}
        return {label: (drop_set, None) for label, drop_set in sets.items()} | repaired

    def rows(self, drop_set: list[SubBlock], how: str | None, programs: Mapping[str, str]) -> Iterator[dict[str, object]]:
        """The row of each program, with its ``environment``."""
        if self.details and "llama.cpp q8_0" in programs and (whole := self.folder / "dense.gguf") and not whole.exists():
            gguf(self.model, whole, self.tokenizer, "q8_0")
        fitted = repair(self.model, drop_set, self.calibration, how) if how else None
        with dropped(self.model, drop_set, fitted):
            for program, where in programs.items():
                runtime, kind = program.split()
                row = self._in_llama_cpp(kind, drop_set, how) if runtime == "llama.cpp" else self._in(runtime)
                yield {"program": runtime, "type": kind} | row | {"environment": where}

    def _in_llama_cpp(self, kind: str, drop_set: list[SubBlock], how: str | None) -> dict[str, object]:
        path, ids = self.folder / "pruned.gguf", self.ids.tolist()
        exported = gguf(self.model, path, self.tokenizer, kind, overwrite=True)
        with load(path) as runtime:
            logits, continuation = runtime.decode(ids), runtime.greedy(ids, CONTINUATION)
        row: dict[str, object] = compare(self.model, self.ids, logits, continuation)
        if self.details and has_parts(f"llama.cpp {kind}", how):
            row |= parts_of_difference(self.model, self.ids, logits, self.folder / "rounded.gguf")
        with load(path, CONTEXT, kv_type="f16") as runtime:  # llama.cpp's own default
            row |= {"bytes": exported.nbytes, "architecture": exported.architecture, "kv_bytes": runtime.kv_bytes}
        if self.details and kind == "q8_0" and len(drop_set) != 1:  # one sub-block of many is within the noise
            row |= speed(self.folder / "dense.gguf", path, ids)
        return row

    def _in(self, runtime: str) -> dict[str, object]:
        program, write = FOLDERS[runtime]
        row: dict[str, object] = {}
        with tempfile.TemporaryDirectory(dir=self.folder) as there:
            folder = Path(there) / "exported"
            for options in ({}, {"zeros": True}) if program == "vllm" else ({},):
                try:
                    exported = write(self.model, folder, self.tokenizer, **options)
                except UnsupportedModel as error:
                    row["note"] = f"refused: {error}"
                else:
                    break
            else:
                return row
            if options:
                row["note"] += "; measured with zeros=True"
            answer = ask(program, folder, self.ids.tolist(), CONTINUATION)
        row |= compare(self.model, self.ids, answer.logits, answer.continuation)
        row |= {"bytes": exported.nbytes, "architecture": exported.architecture}
        return row | {"kv_bytes": round(CONTEXT * answer.kv_bytes_per_token)}


def prove(name: str, programs: Iterable[str] = PROGRAMS, details: bool = True, results: Path | None = None) -> pd.DataFrame:
    """Every drop set of a model in every program that is here, against transformers in float32; written after every row.

    Args:
        details: of q8_0, the parts of its difference and the speed, which take longest.
    """
    results = results or RESULTS / name / "export.csv"
    here: dict[str, str] = {}
    for program in programs:
        try:
            here[program] = environment(program.split()[0])
        except RuntimeUnavailable as error:
            print(f"{program} is left out: {error}", file=sys.stderr)
    table = pd.read_csv(results) if results.exists() else pd.DataFrame()
    rows = {
        (row["drop"], program): {key: value for key, value in row.items() if not pd.isna(value)}
        for row in table.to_dict("records")
        if row["environment"] == here.get(program := f"{row['program']} {row['type']}", row["environment"])
    }
    with tempfile.TemporaryDirectory() as folder:
        proof = Proof(name, Path(folder), details)
        sets = proof.sets()
        keys = [(label, program) for program in PROGRAMS for label in sets]
        for label, (drop_set, how) in progress(sets.items(), f"{name} in {', '.join(here)}", total=len(sets)):
            missing = {
                program: where
                for program, where in here.items()
                if (label, program) not in rows
                or (details and has_parts(program, how) and "weights_difference" not in rows[label, program])
            }
            for row in proof.rows(drop_set, how, missing) if missing else ():
                key = label, f"{row['program']} {row['type']}"
                rows[key] = {"drop": label, "sub_blocks": "; ".join(map(str, drop_set))} | row
                table = pd.DataFrame([rows[key] for key in keys if key in rows], columns=COLUMNS).astype(WHOLE)
                write_table(results, table)
    return table


def main(arguments: list[str] | None = None) -> int:
    """Prove a model's exports and print the table."""
    parser = argparse.ArgumentParser(prog="python -m entrodrop_utils.studies.export_proof", description=main.__doc__)
    parser.add_argument("name", nargs="?", default="smollm2-135m-instruct", help="as for load_model, a registered name")
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    parser.add_argument("--quick", action="store_true", help="without the parts of q8_0's difference, and without speed")
    chosen = parser.parse_args(arguments)
    print(prove(chosen.name, chosen.programs, not chosen.quick).drop(columns=["sub_blocks", "environment"]).to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
