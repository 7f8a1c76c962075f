"""The same matrix of checks for every family; what passed goes into data/results/families.csv when the whole matrix ran."""

import csv
import functools
import inspect
import itertools
from pathlib import Path

import pytest
import torch
import transformers
from families import BY_NAME, DEPTH, FAMILIES, LENGTH, Family, ids, tiny
from reference import (
    cache_bytes,
    close,
    layout_name,
    output,
    owned,
    removable,
    sets,
    shortened,
    stranger,
    tensor_bytes,
    without_contribution,
)

from entrodrop_utils import dropping, evaluation, residual, saving
from entrodrop_utils.families.decoder import decoder_layers
from entrodrop_utils.residual import KINDS, SubBlock, find

RESULTS = Path(__file__).resolve().parents[1] / "data" / "results" / "families.csv"
CHECKS: dict[str, object] = {}
outcomes: dict[tuple[str, str], str] = {}
NEW = 64  # tokens


def check(column: str):
    """Run a check for every family, and keep its outcome for the table. A check that returns "not defined" says so."""

    def register(test):
        CHECKS[column] = test

        @pytest.mark.parametrize("name", [pytest.param(f.name, marks=[pytest.mark.slow] * f.slow) for f in FAMILIES])
        @functools.wraps(test)
        def run(name, **fixtures):
            outcomes[name, column] = "no"
            outcomes[name, column] = test(BY_NAME[name], **fixtures) or "yes"

        parameters = [p for p in inspect.signature(test).parameters.values() if p.name != "family"]
        name = inspect.Parameter("name", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        run.__signature__ = inspect.Signature([name, *parameters])
        return run

    return register


@pytest.fixture(scope="module", autouse=True)
def table():
    """Write the table once every family has had every check."""
    yield
    if outcomes.keys() >= set(itertools.product(BY_NAME, CHECKS)):
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        with open(RESULTS, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["family", "layout", *CHECKS])
            rows.writerows([name, layout_name(tiny(name)), *(outcomes[name, column] for column in CHECKS)] for name in BY_NAME)


@check("states")
@torch.no_grad()
def test_states_are_those_of_the_models_own_record_and_of_a_model_without_the_mlp(family):
    model, tokens = tiny(family.name), ids()
    states = residual.states(model, tokens)
    with torch.no_grad():
        uncached = {"use_cache": False} if family.generates else {}
        own = model(tokens, output_hidden_states=True, **uncached).hidden_states
    assert len(states) == 2 * DEPTH + 1
    for layer in range(DEPTH):
        assert torch.equal(states[2 * layer], own[layer])
        bare = without_contribution(family, tiny(family.name), [SubBlock(layer, "mlp")])
        nexts: list[torch.Tensor] = []
        hook = lambda _, args, out, keep=nexts: keep.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
        decoder_layers(bare)[layer].register_forward_hook(hook)
        output(bare, tokens)
        between = states[2 * layer + 1]
        if family.after:
            between = decoder_layers(bare)[layer].get_submodule(family.after[1])(between)
        assert close(nexts[0], between)
        assert not close(states[2 * layer + 1], states[2 * layer])  # a branch that adds nothing would prove nothing
        assert not close(states[2 * layer + 2], states[2 * layer + 1])
    final = model.get_submodule(family.norm) if family.norm else lambda state: state
    assert close(final(states[-1]), own[-1])


@check("drop = zero contribution")
def test_dropping_is_zeroing_the_contribution_in_the_dense_model(family):
    model, tokens = tiny(family.name), ids()
    dense = output(model, tokens)
    for chosen in sets(family):
        reference = without_contribution(family, tiny(family.name), [s for s in chosen if s.kind != "block"])
        if whole := {s.layer for s in chosen if s.kind == "block"}:
            if family.kept_first and 0 in whole:  # built shorter, its first layer would be another: zeroed, it does the same
                reference = without_contribution(family, reference, [SubBlock(layer, "block") for layer in whole])
            else:
                reference = shortened(family, reference, whole)
        with dropping.dropped(model, chosen):
            pruned = output(model, tokens)
            for kind in KINDS:
                assert len(find(model, kind)) < DEPTH or kind not in {s.kind for s in chosen}
        assert close(pruned, output(reference, tokens)), chosen
        assert not close(pruned, dense), chosen
        assert torch.equal(output(model, tokens), dense)  # as it was


def padded(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, mask = ids(batch), torch.ones(batch, LENGTH, dtype=torch.long)
    for row in range(1, batch):
        mask[row, : 2 * row + 1] = 0
    return tokens.masked_fill(mask == 0, 0), mask


def generation_sets(family: Family) -> list[list[SubBlock]]:
    attention = [[SubBlock(i, "attention") for i in some] for some in ((0, 2), (1, 3), (0, 1, 2))]  # in hybrids all of one type
    return [[], *attention, [SubBlock(0, "block"), SubBlock(1, "attention"), SubBlock(3, "mlp")]]


@check("cached = uncached, 64 tokens, left padding")
def test_cached_generation_is_what_whole_passes_give(family):
    if not family.generates:
        return "not defined"
    model = tiny(family.name)
    tokens, mask = padded()
    for chosen in generation_sets(family):
        with dropping.dropped(model, chosen), torch.no_grad():
            made = model.generate(
                tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            assert made.sequences.shape == (3, LENGTH + NEW)
            # One pass over all of it, without a cache, must choose each of the 64 tokens after those before it
            whole = torch.cat([mask, torch.ones(3, NEW, dtype=torch.long)], 1)
            extra = {}
            if "position_ids" in inspect.signature(model.forward).parameters:
                extra["position_ids"] = (whole.cumsum(-1) - 1).clamp(min=0)
            logits = model(made.sequences, attention_mask=whole, use_cache=False, **extra).logits[:, LENGTH - 1 : -1]
        cached = torch.stack(made.logits, 1)
        assert close(cached, logits), chosen
        gap = logits.topk(2).values.diff().abs().squeeze(-1)
        chose = logits.argmax(-1) == made.sequences[:, LENGTH:]
        assert bool((chose | (gap < 1e-4 * logits.abs().max())).all()), chosen  # but for ties
    return None


@check("save/load bit-equal")
def test_a_saved_model_comes_back_bit_for_bit(family, tmp_path):
    tokens = ids()
    for i, chosen in enumerate(removable(family)):
        model = saving.remove(tiny(family.name), chosen)
        folder = saving.save_pruned(model, tmp_path / str(i))
        back = saving.load_pruned(folder)
        assert torch.equal(output(back, tokens), output(model, tokens)), chosen
        mine, theirs = model.state_dict(), back.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)
        again = saving.load_pruned(saving.save_pruned(back, tmp_path / f"{i}-again"))
        assert torch.equal(output(again, tokens), output(model, tokens))
        assert [find(again, kind) for kind in KINDS] == [find(model, kind) for kind in KINDS]
        assert {file.suffix for file in folder.iterdir()} <= {".safetensors", ".json", ".md", ".py"}
        if all(kind == "block" for _, kind in chosen):
            plain = getattr(transformers, family.model).from_pretrained(folder)
            assert type(plain) is getattr(transformers, family.model)
            assert torch.equal(output(plain, tokens), output(model, tokens))
            reference = shortened(family, tiny(family.name), {layer for layer, _ in chosen})
            assert close(output(plain, tokens), output(reference, tokens))


@pytest.fixture(scope="module")
def other_process(tmp_path_factory):
    with stranger(tmp_path_factory.mktemp("stranger")) as ask:
        yield ask


@check("loads without the suite")
def test_a_process_without_the_suite_loads_it(family, tmp_path, other_process):
    task = family.model.split("For")[-1]
    auto = f"AutoModelFor{task}" if task in ("CausalLM", "MaskedLM") else "AutoModelForCausalLM"  # GPT2LMHeadModel
    auto = "AutoModelForTextEncoding" if family.model == "T5EncoderModel" else auto
    chosen = [SubBlock(1, "attention"), SubBlock(2, "mlp"), SubBlock(3, "block")]
    model = saving.remove(tiny(family.name), chosen)
    assert torch.equal(other_process(saving.save_pruned(model, tmp_path / "saved"), auto), output(model, ids()))


@check("layer lists aligned")
def test_lists_of_one_value_a_layer_follow_the_layers(family, tmp_path):
    whole = tiny(family.name)
    lists = [
        k
        for k in ("layer_types", "no_rope_layers", "mlp_only_layers")
        if getattr(whole.config.get_text_config(), k, None) is not None
    ]
    if not lists:
        return "not defined"
    kept = [1, 2] if family.kept_first is False else [0, 3]
    chosen = [SubBlock(i, "block") for i in range(DEPTH) if i not in kept] + [SubBlock(kept[1], "attention")]
    model = saving.load_pruned(saving.save_pruned(saving.remove(tiny(family.name), chosen), tmp_path / "saved"))
    for key in lists:
        before, after = (getattr(one.config.get_text_config(), key) for one in (whole, model))
        if key == "mlp_only_layers":
            assert list(after) == [new for new, old in enumerate(kept) if old in before]
        else:
            assert list(after) == [before[i] for i in kept]
    for new, old in enumerate(kept):
        there, here = decoder_layers(whole)[old], decoder_layers(model)[new]
        assert type(there.mlp) is type(here.mlp)
        for setting in ("sliding_window", "attention_type", "is_sliding", "use_rope", "scaling"):
            for path, part in here.named_modules():
                if setting in vars(part):
                    assert vars(part)[setting] == vars(there.get_submodule(path))[setting]
    return None


@check("file and KV cache shrink by what was dropped")
def test_what_was_dropped_is_gone_from_file_and_cache(family, tmp_path):
    whole = tiny(family.name)
    saving.save_pruned(whole, tmp_path / "whole")
    before = cache_bytes(whole, ids()) if family.generates else None
    for i, chosen in enumerate(removable(family)):
        model = saving.remove(tiny(family.name), chosen)
        saving.save_pruned(model, tmp_path / str(i))
        lost = 0
        for layer, kind in chosen:
            for path, value in decoder_layers(whole)[layer].named_parameters():
                lost += value.nbytes * (kind == "block" or path in owned(family.name, layer, kind))
        assert lost > 0
        assert tensor_bytes(tmp_path / "whole") - tensor_bytes(tmp_path / str(i)) == lost
        if before:
            after = cache_bytes(model, ids())
            gone = {layer for layer, kind in chosen if kind != "mlp"}
            assert sum(after.values()) == sum(size for layer, size in before.items() if layer not in gone)


@check("layer-by-layer evaluation")
def test_sets_evaluated_layer_by_layer_are_those_of_whole_passes(family):
    if not family.generates:
        return "not defined"
    model, windows = tiny(family.name), ids(3)
    chosen = [[], *sets(family)[::3]]
    swept = evaluation.losses_by_set(model, windows, chosen).groupby("set", sort=False).nll.mean()
    for one in chosen:
        with dropping.dropped(model, one):
            whole = evaluation.perplexity(model, windows).mean
        assert swept[tuple(sorted(one))] == pytest.approx(whole, rel=1e-4), one
    return None


@check("gradient checkpointing")
def test_gradient_checkpointing_gives_the_same_gradients(family):
    chosen = sets(family)[-1] if not family.fixed else [SubBlock(1, "attention"), SubBlock(2, "mlp")]
    grads = []
    for checkpointing in (False, True):
        model = saving.remove(tiny(family.name), [s for s in chosen if s.kind != "block"]).train()
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(0)
        model(ids())[0].square().mean().backward()
        grads.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) > 10
    assert all(close(grads[1][name], grads[0][name]) for name in grads[0])


@check("torch.compile")
def test_the_pruned_model_compiles(family):
    chosen = sets(family)[-1] if not family.fixed else [SubBlock(1, "attention"), SubBlock(2, "mlp")]
    model = tiny(family.name)
    with dropping.dropped(model, chosen):
        eager = output(model, ids())
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        assert close(output(compiled, ids()), eager)
    torch._dynamo.reset()
