"""Speed as ratios of two ways to the same result, measured side by side: `make bench` writes data/results/bench-<device>.csv.

The references are the published formulas, written plainly here, and other libraries. Every pair is checked for equal results first.
"""

import argparse
import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import lm_eval
import numpy as np
import pandas as pd
import scipy.spatial
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from scipy import stats
from sklearn.metrics.pairwise import paired_cosine_distances
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from entrodrop_utils import cache, entropy, evaluation, scoring, similarity
from entrodrop_utils.dropping import dropped
from entrodrop_utils.files import write_text
from entrodrop_utils.paths import RESULTS
from entrodrop_utils.progress import progress
from entrodrop_utils.residual import find
from entrodrop_utils.saving import remove
from entrodrop_utils.statistics import Interval
from entrodrop_utils.studies import speed
from entrodrop_utils.tasks import task_scores_by_set
from entrodrop_utils.tasks.harness import quiet_harness
from entrodrop_utils.tasks.local_tasks import build_tasks

SHAPES = ((256, 192), (256, 576), (256, 4096), (256, 8192), (2048, 576))  # tokens, dimensions
SMALL, MIDDLE, LARGE = 256 * 576, 256 * 4096, 256 * 8192  # elements of the largest state that a reference is given
Row = dict[str, object]


def one_hot(x: torch.Tensor, bins: int = 20) -> torch.Tensor:
    """Bucket entropy as the published code computes it: a one-hot tensor of token x dim x bins."""
    low, high = x.amin(0, keepdim=True), x.amax(0, keepdim=True)
    index = ((x - low) / (high - low) * bins).long().clamp(max=bins - 1)
    p = torch.nn.functional.one_hot(index, bins).double().mean(0)
    return -torch.special.xlogy(p, p).sum()


def histograms(x: torch.Tensor, bins: int = 20) -> float:
    """Bucket entropy by numpy.histogram, a dimension at a time."""
    return sum(float(stats.entropy(np.histogram(column, bins)[0])) for column in x.numpy().T)


def cdist_topk(x: torch.Tensor, k: int = 25) -> torch.Tensor:
    """KNN entropy as the published code computes it, in float32; its constants are ours."""
    return _knn_of_radii(torch.cdist(x, x).topk(k + 1, largest=False)[0][:, k].double(), x, k)


def kd_tree(x: torch.Tensor, k: int = 25) -> torch.Tensor:
    """KNN entropy with SciPy's k-d tree, as NPEET computes it."""
    values = x.numpy()
    return _knn_of_radii(torch.from_numpy(scipy.spatial.cKDTree(values).query(values, k + 1)[0][:, k]), x, k)


def _knn_of_radii(radii: torch.Tensor, x: torch.Tensor, k: int) -> torch.Tensor:
    tokens, dim = x.shape
    ball = 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim + 1)
    count = torch.special.digamma(torch.tensor([tokens, k], dtype=torch.float64))
    return dim * radii.log().mean() + ball + count[0] - count[1]


def renyi_kernel(x: torch.Tensor, alpha: float = 4.0) -> torch.Tensor:
    """Renyi entropy of the kernel between standardised tokens, from SciPy's pairwise distances."""
    x = x.double()
    pairs = scipy.spatial.distance.pdist(((x - x.mean(0)) / x.std(0)).numpy(), "sqeuclidean")
    middle = np.sort(pairs)[(len(pairs) - 1) // 2]
    kernel = np.exp(-scipy.spatial.distance.squareform(pairs) / (2 * middle))
    return torch.tensor(np.log((kernel ** (alpha - 1)).mean()) / (1 - alpha))


def singular_values(x: torch.Tensor) -> torch.Tensor:
    """Matrix-based entropy from the singular values of the states."""
    squares = torch.linalg.svdvals(x.double()).square()
    p = squares / squares.sum()
    return -torch.special.xlogy(p, p).sum()


# estimator -> title of the reference -> reference; the second is the largest state that it is given
REFERENCES: dict[str, dict[str, tuple[Callable, int]]] = {
    "bucket": {"published one-hot formula": (one_hot, LARGE), "numpy.histogram": (histograms, SMALL)},
    "knn": {"published cdist and topk": (cdist_topk, LARGE), "scipy.spatial.cKDTree": (kd_tree, SMALL)},
    "renyi": {"scipy.spatial.distance.pdist": (renyi_kernel, MIDDLE)},
    "matrix_renyi": {"singular values": (singular_values, MIDDLE)},
}


def _row(
    what: str, setting: str, reference: str, measured: speed.SideBySide, memory: Sequence[float] = (math.nan, math.nan)
) -> Row:
    return {
        "what": what, "setting": setting, "reference": reference, "reference_ms": 1e3 * measured.reference,
        "ms": 1e3 * measured.seconds, "ratio": measured.ratio.estimate, "low": measured.ratio.low, "high": measured.ratio.high,
        "reference_mib": memory[0], "mib": memory[1],
    }  # fmt: skip


def estimators() -> Iterator[Row]:
    """Every estimator against the published formula and against a library, with one thread: time and peak memory."""
    for tokens, dim in SHAPES:
        x = torch.randn(tokens, dim, generator=torch.Generator().manual_seed(0))
        for name, references in REFERENCES.items():
            ours = functools.partial(entropy.ESTIMATORS[name], x)
            for title, (reference, largest) in references.items():
                if x.numel() > largest:
                    continue
                other = functools.partial(reference, x)
                assert math.isclose(float(ours()), float(other()), rel_tol=1e-4), (name, title, float(ours()), float(other()))
                memory = [speed.peak_memory(call) for call in (other, ours)]
                yield _row(name, f"{tokens} tokens x {dim}", title, speed.side_by_side(other, ours, least=0.02), memory)
        y = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        pair = functools.partial(similarity.cosine, x, y), functools.partial(paired_cosine_distances, x.numpy(), y.numpy())
        assert math.isclose(float(pair[0]()), float(pair[1]().mean()), rel_tol=1e-3)
        yield _row("cosine", f"{tokens} tokens x {dim}", "scikit-learn", speed.side_by_side(pair[1], pair[0], least=0.02))


def scoring_pass(model: PreTrainedModel, name: str) -> Iterator[Row]:
    """A window's scores against its plain forward pass without logits; the ratio is how many passes the scores cost."""
    ids = torch.randint(0, model.config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(0))
    sets = {"bucket, knn, cosine": ["bucket", "knn", "cosine"], "all registered metrics": list(scoring.METRICS)}

    @torch.inference_mode()
    def forward() -> None:
        model.base_model(ids.to(model.device), use_cache=False)
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    for title, metrics in sets.items():
        score = functools.partial(scoring.measure, model, ids, scoring.resolve(metrics), scoring.KINDS, "")
        memory = [speed.peak_memory(call, model.device) for call in (score, forward)]
        timed = speed.side_by_side(score, forward, rounds=9, threads=torch.get_num_threads(), least=0.01)
        yield _row(f"scores: {title}", f"{name}, 256 tokens", "forward pass without logits", timed, memory)


@contextmanager
def nothing_kept() -> Iterator[None]:
    """While open, the cache on disk has nothing and gets nothing."""
    with mock.patch.object(cache, "read", return_value=None), mock.patch.object(cache, "write"):
        yield


def many_sets(model: PreTrainedModel, name: str) -> Iterator[Row]:
    """The losses of 10 nested sets: one after another as a plain loop, and with the layers that they share run once."""
    ids = torch.randint(0, model.config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(0))
    deepest = find(model, "attention")[::-1]
    sets = [deepest[:n] for n in range(2, 22, 2)]

    def loop() -> list[float]:
        losses = []
        for drop_set in sets:
            with dropped(model, drop_set):
                losses.append(evaluation.perplexity(model, ids).mean)
        return losses

    def shared() -> list[float]:
        with nothing_kept():
            return evaluation.losses_by_set(model, ids, sets).groupby("set", sort=False).nll.mean().tolist()

    np.testing.assert_allclose(shared(), loop(), rtol=1e-4)
    timed = speed.side_by_side(loop, shared, rounds=3, threads=torch.get_num_threads(), least=0.01)
    yield _row("losses of 10 nested sets", f"{name}, 2 x 128 tokens", "a loop over the sets", timed)


def many_answers(model: PreTrainedModel, name: str) -> Iterator[Row]:
    """A task for the dense model and three pruned ones: lm-evaluation-harness one model at a time, and all of them together."""
    if name in speed.SHAPES:  # random weights have no tokenizer
        return
    tokenizer, task, limit = AutoTokenizer.from_pretrained(model.name_or_path), "docs_continuation", 8
    deepest, manager = find(model, "attention")[::-1], TaskManager(include_path=str(build_tasks()))
    sets = [(), *(tuple(sorted(deepest[2:n])) for n in (6, 10, 13))]

    def harness() -> list[float]:
        with quiet_harness():
            lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=16)
        values = []
        for drop_set in sets:
            with quiet_harness(), dropped(model, drop_set):
                found = lm_eval.simple_evaluate(lm, tasks=[task], limit=limit, task_manager=manager, bootstrap_iters=0)
            values.append(found["results"][task]["acc,none"])
        return values

    def ours() -> list[float]:
        with nothing_kept():
            table = task_scores_by_set(model, tokenizer, [task], sets, limit)[0]
        return table[table.metric == "acc"].set_index("set").value[sets].tolist()

    np.testing.assert_allclose(ours(), harness())
    timed = speed.side_by_side(harness, ours, rounds=3, threads=torch.get_num_threads(), least=0.01)
    yield _row("answers of 4 models", f"{name}, {limit} items of {task}", "lm-evaluation-harness, 16 at a time", timed)


def compiled(model: PreTrainedModel, name: str) -> Iterator[Row]:
    """Decoding with torch.compile and a static cache: against decoding without, and a pruned model against the dense one."""
    n_dropped, n_tokens = round(0.375 * len(find(model, "attention"))), 16
    smaller = remove(copy.deepcopy(model), find(model, "attention")[-n_dropped:])
    start = torch.zeros(1, 1, dtype=torch.long, device=model.device)

    @torch.inference_mode()
    def written(step: Callable, cache: Callable[[], Cache]) -> list[int]:
        token, kept, tokens = start, cache(), []
        for place in range(n_tokens):
            output = step(token, past_key_values=kept, position_ids=torch.full_like(start, place), use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
            tokens.append(token.item())
        return tokens

    plain = functools.partial(written, model, DynamicCache)
    dense, pruned = (
        functools.partial(written, torch.compile(each.forward), functools.partial(StaticCache, each.config, 2 * n_tokens))
        for each in (model, smaller)
    )
    assert dense() == plain()
    setting, how = f"{name}, {n_tokens} tokens", {"threads": torch.get_num_threads(), "least": 0.01}
    yield _row("decoding, compiled", setting, "without torch.compile", speed.side_by_side(plain, dense, **how))
    what = f"decoding, {n_dropped} attention layers less"
    assert pruned() == written(smaller, DynamicCache)
    yield _row(what, setting, "dense, both compiled", speed.side_by_side(dense, pruned, **how))


def growth() -> Iterator[Row]:
    """How time grows: the slope of log time over log size, 1 where it is proportional, with the interval of the regression."""
    x = {n: torch.randn(n, 1024) for n in (128, 256, 512, 1024, 2048)}
    wide = {dim: torch.randn(256, dim) for dim in (256, 512, 1024, 2048, 4096, 8192)}
    for name, estimator in entropy.ESTIMATORS.items():
        yield _slope(name, "tokens, 1024 dimensions", {n: functools.partial(estimator, state) for n, state in x.items()})
        yield _slope(name, "dimensions, 256 tokens", {dim: functools.partial(estimator, state) for dim, state in wide.items()})
    shape = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4}
    models = {n: LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=n)).eval() for n in (4, 8, 16, 32)}
    ids = torch.randint(0, 256, (16, 128), generator=torch.Generator().manual_seed(0))
    metrics = scoring.resolve(["bucket", "knn", "cosine"])

    def score(model, n: int) -> Callable:
        return functools.partial(scoring.measure, model, ids[:n], metrics, scoring.KINDS, "")

    yield _slope("scores", "layers", {n: score(model, 2) for n, model in models.items()})
    yield _slope("scores", "windows", {n: score(models[8], n) for n in (2, 4, 8, 16)})
    memory = [speed.peak_memory(score(models[8], n)) for n in (2, 16)]
    yield {"what": "scores", "setting": "memory, MiB of 2 and of 16 windows", "reference_mib": memory[0], "mib": memory[1]}


def _slope(what: str, setting: str, calls: dict[int, Callable]) -> Row:
    seconds = [speed.Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=0.15).median for call in calls.values()]
    fit = stats.linregress(np.log(list(calls)), np.log(seconds))
    half = stats.t.ppf(0.975, len(calls) - 2) * fit.stderr
    slope = Interval(fit.slope, fit.slope - half, fit.slope + half)
    return {"what": what, "setting": f"slope of time over {setting}", "ratio": slope.estimate, "low": slope.low, "high": slope.high}


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests/bench.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="smollm2-135m-instruct", help=f"a model's name, or one of {', '.join(speed.SHAPES)}")
    chosen = parser.parse_args()
    device = torch.device(chosen.device).type
    model = speed.load_for_speed(chosen.model, chosen.device)
    of_model = [functools.partial(part, model, chosen.model) for part in (scoring_pass, many_sets, many_answers, compiled)]
    rows = []
    for part in progress(of_model if device == "cuda" else [estimators, *of_model, growth], "bench"):
        for row in part():
            rows.append(row | {"device": speed.device_name(chosen.device), "torch": torch.__version__})
            write_text(RESULTS / f"bench-{device}.csv", pd.DataFrame(rows).to_csv(index=False, float_format="%.4g"))
            ratio = Interval(*(row.get(end, math.nan) for end in ("ratio", "low", "high")))
            print(f"{row['what']}, {row['setting']}, {row.get('reference', '')}: {ratio:.3g}", flush=True)


if __name__ == "__main__":
    main()
