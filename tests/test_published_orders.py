"""Published removal orders: how they count, and that our baselines write theirs in the same way.

The models are too large for a test, so a small model is given branches whose size follows a published order.
"""

import pytest
import torch
from tiny_llama import tiny_llama

from entrodrop_utils import search
from entrodrop_utils.claims import published_figures
from entrodrop_utils.residual import SubBlock
from entrodrop_utils.search.gates import TAYLOR_PROTECTED
from entrodrop_utils.selection import PUBLISHED_PROTECTED, protected_layers
from entrodrop_utils.similarity import norm_ratio

TABLE = published_figures("others")
LISTS = TABLE[TABLE.metric.isin(["order", "first dropped first", "layers"])]
ORDERS = {(row.source, row.model, row.method, row.unit): [int(layer) for layer in row.value.split()] for row in LISTS.itertuples()}
SIZE_SCORES = ("cosine", "block influence", "ShortGPT", "norm ratio")  # methods that rank by the size of the change


def order_of(source: str, model: str, unit: str = "block", method: str = "") -> list[int]:
    (order,) = [
        order for key, order in ORDERS.items() if source in key[0] and key[1] == model and method in key[2] and unit == key[3]
    ]
    return order


@pytest.mark.parametrize("row", LISTS.itertuples(), ids=lambda row: f"{row.model}-{row.method}-{row.unit}")
def test_a_list_names_as_many_layers_as_it_says_and_each_once(row):
    layers = [int(layer) for layer in row.value.split()]
    assert len(layers) == len(set(layers)) == int(row.n_dropped) and set(layers) <= set(range(int(row.n_total)))


def test_two_sources_of_one_method_count_from_the_same_layer_and_in_the_same_direction():
    """A list that counted from 1, or put the last dropped first, would not agree with the other source's."""
    configs, evolution = order_of("LLM-Drop", "Mistral-7B-v0.1"), order_of("EvoPress", "Mistral-7B-v0.3", method="ShortGPT")
    assert evolution[: len(configs)] == configs
    paper, files = order_of("ShortGPT paper", "Llama-2-7B"), order_of("EvoPress", "Llama-2-7B", method="ShortGPT")
    assert set(files[: len(paper)]) == set(paper) and paper[0] == files[0]


def test_published_orders_spare_the_layers_that_their_method_protects():
    shortened = [order for (source, _, method, _), order in ORDERS.items() if "shortened" in method or "Taylor" in method]
    assert len(shortened) == 2
    for order in shortened:
        assert not {layer % 32 for layer in TAYLOR_PROTECTED} & {*order}
    entrodrop = order_of("SalesforceAIResearch", "Llama-3-8B (decoded from a rank-per-layer list)", "attention")
    assert not protected_layers(PUBLISHED_PROTECTED, 32) & {*entrodrop}


@torch.no_grad()
def graded(order: list[int], kind: str, windows: torch.Tensor):
    """A model of 32 layers in which the branch of each layer adds more to the stream the later the layer stands in the order."""
    model = tiny_llama(32)
    for i, layer in enumerate(model.model.layers):
        ours, idle = layer.mlp.down_proj.weight, layer.self_attn.o_proj.weight
        if kind == "attention":
            ours, idle = idle, ours
        idle.zero_()

        def grade(layer, args, kwargs, i=i, ours=ours):  # right before the layer runs in the one pass below
            ratio = norm_ratio(args[0], layer.forward(*args, **kwargs)).mean()
            ours.mul_((1e-3 * 1.5 ** order.index(i) if i in order else 0.7) / ratio)

        layer.register_forward_pre_hook(grade, with_kwargs=True)
    model(windows)
    for layer in model.model.layers:
        layer._forward_pre_hooks.clear()
    return model


LIKE = {key[2:]: key for key in ORDERS if key[2] in SIZE_SCORES}  # one list of each method and kind


@pytest.mark.parametrize(
    "key", [pytest.param(key, marks=[pytest.mark.slow] * (i > 1)) for i, key in enumerate(LIKE.values())], ids=" ".join
)
def test_our_scores_return_a_published_order_where_the_sizes_follow_it(key):
    order, kind = ORDERS[key], key[3]
    windows = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(5))
    model = graded(order, kind, windows)
    for metric in ("cosine", "norm_ratio"):
        assert search.by_score(model, windows, len(order), kind, metric).order == [SubBlock(i, kind) for i in order], metric
