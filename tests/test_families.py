"""The same matrix of checks for every family; what passed goes into data/results/families.csv when the whole matrix ran."""

import csv
import functools
import inspect
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from families import BY_NAME, FAMILIES, LENGTH, Family, ids, tiny
from safetensors import safe_open

from entrodrop_utils import dropping, evaluation, residual
from entrodrop_utils.sub_blocks import KINDS, SubBlock, find, layers, layout_name

RESULTS = Path(__file__).resolve().parents[1] / "data" / "results" / "families.csv"
CHECKS: dict[str, object] = {}
outcomes: dict[tuple[str, str], str] = {}
DEPTH, NEW = 4, 64


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


def sets(family: Family) -> list[list[SubBlock]]:
    """First, middle and last layer of each kind, several at once, and all kinds mixed."""
    found = [[SubBlock(layer, kind)] for kind in KINDS for layer in (0, 2, DEPTH - 1)]
    found += [[SubBlock(layer, kind) for layer in some] for kind in KINDS for some in ((0, 2), (1, 3), (0, 1, 2))]
    found += [[SubBlock(0, "attention"), SubBlock(0, "mlp"), SubBlock(1, "mlp"), SubBlock(2, "block"), SubBlock(3, "mlp")]]
    return [one for one in found if not any(layer in family.fixed and kind != "mlp" for layer, kind in one)]


def removable(family: Family) -> list[list[SubBlock]]:
    """Those that a config can describe afterwards, one of each sort."""
    wanted = [s for s in sets(family) if not (family.kept_first and SubBlock(0, "block") in s)]
    return [next(s for s in reversed(wanted) if s[0].kind == kind and len(s) < 4) for kind in KINDS] + [wanted[-1]]


def without_contribution(family: Family, model, sub_blocks):
    """The dense model with the last step of these branches at zero."""
    for layer, kind in sub_blocks:
        for wanted in ("attention", "mlp") if kind == "block" else (kind,):
            hit = 0
            for path, value in layers(model)[layer].named_parameters():
                if any(path == end or path.startswith(f"{end}.") for end in getattr(family, wanted)):
                    value.data.zero_()
                    hit += 1
            assert hit, f"the table of families names no parameter of {wanted} {layer}"
    return model


def shortened(family: Family, model, gone: set[int]):
    """A model of the same class built with fewer layers and given the weights of those that are left."""
    prefix = next(name for name, part in model.named_modules() if part is layers(model))
    kept = [i for i in range(DEPTH) if i not in gone]
    settings = {**family.common, **family.settings}
    for depth in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
        if depth in settings:
            settings[depth] = len(kept)
    for key in ("layer_types", "no_rope_layers"):
        if getattr(model.config, key, None) is not None:
            settings[key] = [getattr(model.config, key)[i] for i in kept]
    if "mlp_only_layers" in settings:
        settings["mlp_only_layers"] = [kept.index(i) for i in settings["mlp_only_layers"] if i in kept]
    fresh = type(model)(type(model.config)(**settings)).eval()
    weights = {}
    for name, value in model.state_dict().items():
        if name.startswith(f"{prefix}."):
            layer, rest = name[len(prefix) + 1 :].split(".", 1)
            if int(layer) in gone:
                continue
            name = f"{prefix}.{kept.index(int(layer))}.{rest}"
        weights[name] = value
    fresh.load_state_dict(weights)
    return fresh


def output(model, input_ids) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids)[0]


def close(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.shape == y.shape and torch.allclose(x, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))


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
        handle = layers(bare)[layer].register_forward_hook(lambda _, args, out, keep=nexts: keep.append(out[0] if isinstance(out, tuple) else out))
        output(bare, tokens)
        handle.remove()
        between = states[2 * layer + 1]
        if family.after:
            between = layers(bare)[layer].get_submodule(family.after[1])(between)
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


def cache_bytes(model, tokens) -> dict[int, int]:
    """Bytes of keys and values that each layer keeps."""
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    return {i: sum(t.nbytes for t in (layer.keys, layer.values) if t is not None) for i, layer in enumerate(cache.layers)}


def tensor_bytes(folder: Path) -> int:
    """Bytes of all tensors in a folder's safetensors files."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(tensors.get_tensor(key).nbytes for key in tensors.keys())
    return total


@check("save/load bit-equal")
def test_a_saved_model_comes_back_bit_for_bit(family, tmp_path):
    tokens = ids()
    for i, chosen in enumerate(removable(family)):
        model = dropping.remove(tiny(family.name), chosen)
        folder = dropping.save(model, tmp_path / str(i))
        back = dropping.load(folder)
        assert torch.equal(output(back, tokens), output(model, tokens)), chosen
        mine, theirs = model.state_dict(), back.state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
        again = dropping.load(dropping.save(back, tmp_path / f"{i}-again"))
        assert torch.equal(output(again, tokens), output(model, tokens))
        assert [find(again, kind) for kind in KINDS] == [find(model, kind) for kind in KINDS]
        assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt"))
        if all(kind == "block" for _, kind in chosen):
            plain = getattr(transformers, family.model).from_pretrained(folder)
            assert type(plain).__mro__[1].__name__ != "Pruned" and torch.equal(output(plain, tokens), output(model, tokens))
            reference = shortened(family, tiny(family.name), {layer for layer, _ in chosen})
            assert close(output(plain, tokens), output(reference, tokens))


STRANGER = """
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "entrodrop_utils":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch, transformers
for line in sys.stdin:
    folder, auto = json.loads(line)
    try:
        import entrodrop_utils
        answer = "the suite can be imported"
    except ModuleNotFoundError:
        model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
        with torch.no_grad():
            torch.save(model(torch.load(folder + "/tokens"))[0], folder + "/output")
        answer = "done"
    print("answer:", answer, flush=True)
"""


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A process that cannot import the suite, and loads folders that it is told."""
    folder = tmp_path_factory.mktemp("stranger")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(folder / "modules")}
    with open(folder / "errors", "w+") as errors:
        command = [sys.executable, "-I", "-c", STRANGER]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        process = subprocess.Popen(command, text=True, cwd=folder, env=environment, **pipes)

        def ask(path: Path, auto: str) -> torch.Tensor:
            torch.save(ids(), path / "tokens")
            process.stdin.write(json.dumps([str(path), auto]) + "\n")
            process.stdin.flush()
            answer = next((line for line in process.stdout if line.startswith("answer:")), (folder / "errors").read_text()[-2000:])
            assert answer == "answer: done\n"
            return torch.load(path / "output")

        yield ask
        process.stdin.close()
        process.wait(60)


@check("loads without the suite")
def test_a_process_without_the_suite_loads_it(family, tmp_path, stranger):
    autos = {"T5EncoderModel": None, "BertForMaskedLM": "AutoModelForMaskedLM", "ModernBertForMaskedLM": "AutoModelForMaskedLM"}
    auto = autos.get(family.model, "AutoModelForCausalLM")
    if auto is None:
        return "not defined"  # no Auto class builds T5's encoder alone
    chosen = [SubBlock(0, "attention"), SubBlock(2, "mlp"), SubBlock(3, "block")]
    model = dropping.remove(tiny(family.name), chosen)
    assert torch.equal(stranger(dropping.save(model, tmp_path / "saved"), auto), output(model, ids()))
    return None


@check("layer lists aligned")
def test_lists_of_one_value_a_layer_follow_the_layers(family, tmp_path):
    whole = tiny(family.name)
    lists = [k for k in ("layer_types", "no_rope_layers", "mlp_only_layers") if getattr(whole.config.get_text_config(), k, None) is not None]
    if not lists:
        return "not defined"
    kept = [1, 2] if family.kept_first is False else [0, 3]
    chosen = [SubBlock(i, "block") for i in range(DEPTH) if i not in kept] + [SubBlock(kept[1], "attention")]
    model = dropping.load(dropping.save(dropping.remove(tiny(family.name), chosen), tmp_path / "saved"))
    for key in lists:
        before, after = getattr(whole.config, key), getattr(model.config, key)
        if key == "mlp_only_layers":
            assert list(after) == [new for new, old in enumerate(kept) if old in before]
        else:
            assert list(after) == [before[i] for i in kept]
    for new, old in enumerate(kept):
        there, here = layers(whole)[old], layers(model)[new]
        assert type(there.mlp) is type(here.mlp)
        for setting in ("sliding_window", "attention_type", "is_sliding", "use_rope", "scaling"):
            for path, part in here.named_modules():
                if setting in vars(part):
                    assert vars(part)[setting] == vars(there.get_submodule(path))[setting]
    return None


@check("file and KV cache shrink by what was dropped")
def test_what_was_dropped_is_gone_from_file_and_cache(family, tmp_path):
    whole = tiny(family.name)
    dropping.save(whole, tmp_path / "whole")
    before = cache_bytes(whole, ids()) if family.generates else None
    for i, chosen in enumerate(removable(family)):
        model = dropping.remove(tiny(family.name), chosen)
        dropping.save(model, tmp_path / str(i))
        lost = 0
        for layer, kind in chosen:
            for path, value in layers(whole)[layer].named_parameters():
                lost += value.nbytes * (kind == "block" or path in owned(family.name, layer, kind))
        assert lost > 0
        assert tensor_bytes(tmp_path / "whole") - tensor_bytes(tmp_path / str(i)) == lost
        if before:
            after = cache_bytes(model, ids())
            gone = {layer for layer, kind in chosen if kind != "mlp"}
            assert sum(after.values()) == sum(size for layer, size in before.items() if layer not in gone)


@functools.lru_cache(maxsize=None)
def owned(name: str, layer: int, kind: str) -> tuple[str, ...]:
    """Parameters of a layer that serve one branch alone, found without the suite: with the branch cut off they get no gradient."""
    family = BY_NAME[name]
    model = without_contribution(family, tiny(name), [SubBlock(layer, kind)])
    parameters = dict(layers(model)[layer].named_parameters())
    for path, value in parameters.items():
        value.requires_grad_(not any(path == end or path.startswith(f"{end}.") for end in getattr(family, kind)))
    model(ids())[0].square().sum().backward()
    return tuple(path for path, value in parameters.items() if value.grad is None or not value.grad.any())


@check("layer-by-layer evaluation")
def test_sets_evaluated_layer_by_layer_are_those_of_whole_passes(family):
    if not family.generates:
        return "not defined"
    model, windows = tiny(family.name), ids(3)
    chosen = [[], *sets(family)[::3]]
    swept = evaluation.sweep(model, windows, chosen).groupby("set", sort=False).nll.mean()
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
        model = dropping.remove(tiny(family.name), [s for s in chosen if s.kind != "block"]).train()
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(0)
        model(ids())[0].square().mean().backward()
        grads.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
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
