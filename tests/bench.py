"""Speed as ratios of two ways to get the same number, measured side by side: `make bench`."""

import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from entrodrop_utils import entropy, residual, scoring


def one_hot(x: torch.Tensor, bins: int = 20) -> torch.Tensor:
    """The bucket entropy as the published code computes it: a one-hot tensor of token x dim x bins."""
    low, high = x.amin(0, keepdim=True), x.amax(0, keepdim=True)
    index = ((x - low) / (high - low) * bins).long().clamp(max=bins - 1)
    p = torch.nn.functional.one_hot(index, bins).double().mean(0)
    return -torch.special.xlogy(p, p).sum()


def brute_force(x: torch.Tensor, k: int = 25) -> torch.Tensor:
    """KNN radii from exact distances, without a matrix product."""
    distance = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return distance.topk(k + 1, largest=False).values[:, k].log().mean()


def seconds(call, runs: int = 7) -> float:
    call()
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def one_after_another(model, window: torch.Tensor) -> list[float]:
    """Every estimator of every state in turn, each with all threads."""
    found = []
    for state in residual.states(model, window)[:, 0]:
        with entropy.shared():
            found += [float(estimator(state)) for estimator in entropy.ESTIMATORS.values()]
    return found


if __name__ == "__main__":
    threads = torch.get_num_threads()
    config = LlamaConfig(vocab_size=576, hidden_size=576, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=9)
    model, window = LlamaForCausalLM(config).eval(), torch.arange(256)[None]
    at_once = seconds(lambda: scoring.measure(model, window, entropy.ESTIMATORS, (), ""), 3)
    in_turn = seconds(lambda: one_after_another(model, window), 3)
    print(f"5 estimators of the 17 states of 256 tokens x 576 dimensions, {threads} threads, median of 3")
    print(f"  a state in each thread against one after another: {in_turn:.2f} s / {at_once:.2f} s = {in_turn / at_once:.1f}x")
    torch.set_num_threads(1)
    x = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(entropy.bucket(x), one_hot(x), rtol=1e-6)
    print("256 tokens x 4096 dimensions, one thread, median of 7")
    for title, plain, ours in (
        ("bucket against one-hot", lambda: one_hot(x), lambda: entropy.bucket(x)),
        ("knn against exact distances", lambda: brute_force(x), lambda: entropy.knn(x)),
    ):
        slow, fast = seconds(plain), seconds(ours)
        print(f"  {title}: {1e3 * slow:.1f} ms / {1e3 * fast:.1f} ms = {slow / fast:.0f}x")
