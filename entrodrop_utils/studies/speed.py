"""Speed and memory of pruned models: what ``make bench`` measures on one machine, and what notebook 08 shows of it.

``python -m entrodrop_utils.studies.speed --model NAME`` writes ``data/results/NAME/speed-<device>.csv``. All variants are measured
in turns, in a random order, so that a change of the machine's load meets them alike; what decides is a ratio inside a round.
"""

import argparse
import ctypes
import gc
import math
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig

from ..attention import cache_bytes
from ..dropping import dropped
from ..families.decoder import decoder_layers
from ..files import write_text
from ..models import load_model
from ..paths import RESULTS
from ..profile import DEFAULT_MODEL, slug
from ..progress import progress
from ..residual import KINDS, SubBlock, find, layout_of
from ..statistics import Interval, mean_interval

SHARES = (0.25, 0.375, 0.5)
CONTEXTS = {1: (128, 512), 8: (128,)}  # batch size -> prompt lengths
ROUNDS, STEPS = 4, 8  # measured rounds, and decoded tokens of each; one more round warms up
# Published shapes, with random weights: times do not depend on the values
SHAPES = {
    "llama-3.1-8b-shape": lambda: LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131_072,
    ),
    "mistral-7b-shape": lambda: MistralConfig(
        vocab_size=32_768, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, sliding_window=None,
    ),
}  # fmt: skip


class SideBySide(NamedTuple):
    """Two ways to the same result, in turns: seconds of one call of each (medians), and how many times faster the second is."""

    reference: float
    seconds: float
    ratio: Interval


def processor() -> str:
    """The processor as its maker calls it, or its architecture where the system does not say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def device_name(device: str | torch.device) -> str:
    """What a device is: a GPU with its memory, or the processor with its number of threads."""
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    n = torch.get_num_threads()
    return f"{processor()}, {n} thread{'s' if n > 1 else ''}"


def geometric_interval(ratios: Float[np.ndarray, " round"]) -> Interval:
    """The geometric mean of ratios with its 95% interval, from Student's t of their logarithms."""
    return Interval(*(math.exp(value) for value in mean_interval(np.log(ratios))))


def side_by_side(
    reference: Callable[[], object], ours: Callable[[], object], rounds: int = 9, threads: int = 1, least: float = 0.05
) -> SideBySide:
    """Time two functions in turns, in a random order within each round.

    Args:
        threads: of torch, for both.
        least: seconds that one measurement takes at least, by repeated calls.
    """
    timers = [Timer("call()", globals={"call": call}, num_threads=threads) for call in (reference, ours)]
    numbers = [max(1, math.ceil(least / timer.timeit(1).mean)) for timer in timers]
    generator = np.random.default_rng(0)
    seconds = np.empty((rounds, 2))
    for row in seconds:
        for i in generator.permutation(2):
            row[i] = timers[i].timeit(numbers[i]).mean
    return SideBySide(*np.median(seconds, axis=0), geometric_interval(seconds[:, 0] / seconds[:, 1]))


def peak_memory(call: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """MiB that a call holds at its peak beyond what is held before; nan where the system does not say (it needs Linux on a CPU)."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        with suppress(AttributeError, OSError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory that was freed but not returned hides what the call needs
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        call()
        return (_status("VmHWM") - before) / 2**10
    except (OSError, StopIteration):
        return math.nan


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def variants(model: PreTrainedModel, shares: Sequence[float] = SHARES) -> dict[tuple[str, int], list[SubBlock]]:
    """(kind, number dropped) -> the deepest so many sub-blocks, and the dense model. Layers of one shape take the same time."""
    sets: dict[tuple[str, int], list[SubBlock]] = {("dense", 0): []}
    for kind in KINDS:
        sub_blocks = find(model, kind)
        sets |= {(kind, n): sub_blocks[-n:] for n in sorted({round(share * len(sub_blocks)) for share in shares} - {0})}
    return sets


def generate(model: PreTrainedModel, ids: Int[Tensor, "batch token"], steps: int) -> tuple[float, float, int]:
    """One run with a cache: seconds of the prompt, seconds of a decoded token, and the cache's bytes after the prompt."""
    with torch.inference_mode():
        start = _now(model)
        output = _read(model, ids)
        prefill, nbytes = _now(model) - start, cache_bytes(output.past_key_values)
        start = _now(model)
        _write(model, output, steps)
        return prefill, (_now(model) - start) / steps, nbytes


def _read(model: PreTrainedModel, ids: Tensor) -> CausalLMOutputWithPast:
    return model(ids, use_cache=True, logits_to_keep=1)


def _write(model: PreTrainedModel, output: CausalLMOutputWithPast, steps: int) -> None:
    for _ in range(steps):
        output = model(output.logits[:, -1:].argmax(-1), past_key_values=output.past_key_values, use_cache=True)


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return perf_counter()


@contextmanager
def timed_parts(model: PreTrainedModel) -> Iterator[dict[SubBlock, float]]:
    """While open, the seconds that a forward pass spends in every attention branch, MLP branch and layer add up in the dictionary.

    On a GPU every part is waited for, so the sum of the parts is more than the pass takes without; it bounds the ideal from above.
    """
    layout, seconds, started, handles = layout_of(model), {}, {}, []

    def watch(module: nn.Module, sub_block: SubBlock) -> None:
        def before(*_) -> None:
            started[module] = _now(model)

        def after(*_) -> None:
            seconds[sub_block] = seconds.get(sub_block, 0.0) + _now(model) - started[module]

        handles.extend((module.register_forward_pre_hook(before), module.register_forward_hook(after)))

    for number, layer in enumerate(decoder_layers(model)):
        watch(layer, SubBlock(number, "block"))
        for kind in ("attention", "mlp"):
            paths = sorted(layout.branch(kind))
            for path in paths:
                if not any(path.startswith(f"{other}.") for other in paths):
                    watch(layer.get_submodule(path), SubBlock(number, kind))
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def measure_speed(
    model: PreTrainedModel, batch: int, tokens: int, rounds: int = ROUNDS, steps: int = STEPS, seed: int = 0
) -> pd.DataFrame:
    """Every variant in every round, in a random order: prefill and decoding, and the ideal that the dense model's parts give.

    The ideal of a variant is the dense model's time less the time that its own parts take, measured in the same round.

    Returns:
        kind, n_dropped, round, prefill, decode (seconds), ideal_prefill, ideal_decode, cache_bytes.
    """
    sets, generator, rows = variants(model), np.random.default_rng(seed), []
    ids = torch.from_numpy(generator.integers(model.config.get_text_config().vocab_size, size=(batch, tokens))).to(model.device)
    for number in progress(range(-1, rounds), f"batch {batch}, {tokens} tokens"):
        runs, parts = {}, {}
        order = [*sets, "parts"]
        for i in generator.permutation(len(order)):
            if order[i] == "parts":
                parts = _parts(model, ids, steps)
                continue
            with dropped(model, sets[order[i]]) if sets[order[i]] else nullcontext():
                runs[order[i]] = generate(model, ids, steps)
        whole = runs["dense", 0]
        for name, drop_set in sets.items():
            ideal = [whole[place] - sum(part[s] for s in drop_set) for place, part in enumerate(parts)]
            # On a busy machine the parts may take longer than the whole
            ideal = [seconds if seconds > 0 else math.nan for seconds in ideal]
            rows.append((*name, number, *runs[name][:2], *ideal, runs[name][2]))
    columns = ["kind", "n_dropped", "round", "prefill", "decode", "ideal_prefill", "ideal_decode", "cache_bytes"]
    table = pd.DataFrame(rows, columns=columns)
    return table[table["round"] >= 0]


def _parts(model: PreTrainedModel, ids: Tensor, steps: int) -> tuple[dict[SubBlock, float], dict[SubBlock, float]]:
    """Seconds of every part of the dense model, in the prompt and in one decoded token."""
    with torch.inference_mode():
        with timed_parts(model) as prompt:
            output = _read(model, ids)
        with timed_parts(model) as decoding:
            _write(model, output, steps)
    return prompt, {sub_block: seconds / steps for sub_block, seconds in decoding.items()}


def speed_table(rounds: pd.DataFrame) -> pd.DataFrame:
    """One row a variant, of the table of ``measure_speed``, with intervals over the rounds.

    Returns:
        kind, n_dropped, and for prefill and decode: seconds (median), speedup, its low and high, of_ideal (speed-up over ideal
        speed-up), its low and high; cache_bytes.
    """
    dense = rounds[rounds.kind == "dense"].set_index("round")
    rows = []
    for (kind, n), group in rounds.groupby(["kind", "n_dropped"], sort=False):
        group, row = group.set_index("round"), {"kind": kind, "n_dropped": n}
        for phase in ("prefill", "decode"):
            row[f"{phase}_seconds"] = group[phase].median()
            intervals = {"speedup": dense[phase] / group[phase], "of_ideal": group[f"ideal_{phase}"] / group[phase]}
            for name, values in intervals.items():
                interval = geometric_interval(values.to_numpy())
                row |= {f"{phase}_{name}{end}": value for end, value in zip(("", "_low", "_high"), interval, strict=True)}
        rows.append(row | {"cache_bytes": group.cache_bytes.iloc[0]})
    return pd.DataFrame(rows)


def kept_bytes(model: PreTrainedModel, drop_set: Sequence[SubBlock]) -> int:
    """Bytes of the weights that a model without these sub-blocks still has, each shared weight once."""
    with dropped(model, drop_set):
        return sum(weight.nbytes for weight in model.parameters())


def load_for_speed(name: str, device: str) -> PreTrainedModel:
    """A model by name, or one of ``SHAPES`` with random weights in bfloat16.

    Raises:
        ValueError: as ``load_model``.
    """
    if name not in SHAPES:
        return load_model(name, device=device)[0]
    with torch.device(device):
        return AutoModelForCausalLM.from_config(SHAPES[name](), dtype=torch.bfloat16).eval()


def measured_setting(model: PreTrainedModel, batch: int, tokens: int, rounds: int = ROUNDS) -> pd.DataFrame:
    """``speed_table`` of one batch size and prompt length, with the memory of every variant and what it was measured on.

    Returns:
        batch, tokens, the columns of ``speed_table``, weight_bytes, working_mib (at the peak, beyond the weights; nan where it is
        not known), device, dtype, rounds.
    """
    table = speed_table(measure_speed(model, batch, tokens, rounds))
    ids = torch.zeros(batch, tokens, dtype=torch.long, device=model.device)
    for i, drop_set in enumerate(variants(model).values()):
        with dropped(model, drop_set) if drop_set else nullcontext():
            table.loc[i, "working_mib"] = peak_memory(lambda: generate(model, ids, 1), model.device)
        table.loc[i, "weight_bytes"] = kept_bytes(model, drop_set)
    table.insert(0, "tokens", tokens)
    table.insert(0, "batch", batch)
    return table.assign(device=device_name(model.device), dtype=str(model.dtype).removeprefix("torch."), rounds=rounds)


def bench(name: str, device: str, rounds: int = ROUNDS, results: Path = RESULTS) -> pd.DataFrame:
    """Measure a model at every batch size and prompt length; the table is written after each, and says on what it was measured."""
    model, tables = load_for_speed(name, device), []
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    for batch, contexts in CONTEXTS.items():
        for tokens in (n for n in contexts if n + STEPS <= longest):
            tables.append(measured_setting(model, batch, tokens, rounds))
            text = pd.concat(tables).to_csv(index=False, float_format="%.5g")
            write_text(results / slug(name) / f"speed-{torch.device(device).type}.csv", text)
    return pd.concat(tables, ignore_index=True)


def main(arguments: list[str] | None = None) -> int:
    """Measure the speed of a model without a quarter, 37.5% and half of each kind of sub-block."""
    parser = argparse.ArgumentParser(prog="python -m entrodrop_utils.studies.speed", description=main.__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"as for load_model, or one of {', '.join(SHAPES)}")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; times of one thread vary least")
    chosen = parser.parse_args(arguments)
    if torch.device(chosen.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {chosen.device}: this machine has no GPU that torch can use; leave it out to measure the CPU")
    torch.set_num_threads(chosen.threads)
    table = bench(chosen.model, chosen.device, chosen.rounds)
    print(table[["batch", "tokens", "kind", "n_dropped", "prefill_speedup", "decode_speedup"]].to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
