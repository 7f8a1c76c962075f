"""What the tests compare with: dense models whose branches add nothing, models built shorter, processes without the suite."""

import copy
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from families import BY_NAME, DEPTH, VOCAB, Family, ids, tiny
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from entrodrop_utils.families.decoder import decoder_layers
from entrodrop_utils.families.layouts import LAYOUTS
from entrodrop_utils.residual import KINDS, SubBlock, layout_of


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
            for path, value in decoder_layers(model)[layer].named_parameters():
                if any(path == end or path.startswith(f"{end}.") for end in getattr(family, wanted)):
                    value.data.zero_()
                    hit += 1
            assert hit, f"the table of families names no parameter of {wanted} {layer}"
    return model


def shortened(family: Family, model, gone: set[int]):
    """A model of the same class built with fewer layers and given the weights of those that are left."""
    prefix = next(name for name, part in model.named_modules() if part is decoder_layers(model))
    kept = [i for i in range(DEPTH) if i not in gone]
    whole = copy.deepcopy({**family.common, **family.settings})
    settings = whole.get("text_config", whole)
    for depth in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
        if depth in settings:
            settings[depth] = len(kept)
    for key in ("layer_types", "no_rope_layers"):
        if getattr(model.config.get_text_config(), key, None) is not None:
            settings[key] = [getattr(model.config.get_text_config(), key)[i] for i in kept]
    if "mlp_only_layers" in settings:
        settings["mlp_only_layers"] = [kept.index(i) for i in settings["mlp_only_layers"] if i in kept]
    fresh = type(model)(type(model.config)(**whole)).eval()
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


def layout_name(model) -> str:
    return next(name for name, layout in LAYOUTS.items() if layout is layout_of(model))


def output(model, input_ids) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids)[0]


def close(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.shape == y.shape and torch.allclose(x, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Knows the words w0, w1 and so on; every other one is w2."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w2", pad_token="w0", bos_token="w1")


def cache_bytes(model, tokens) -> dict[int, int]:
    """Bytes of keys and values that each layer keeps."""
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    return {i: sum(t.nbytes for t in (layer.keys, layer.values) if t is not None) for i, layer in enumerate(cache.layers)}


def tensor_bytes(folder: Path) -> int:
    """Bytes of all tensors in a folder's safetensors files."""
    return sum(tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values())


@functools.cache
def owned(name: str, layer: int, kind: str) -> tuple[str, ...]:
    """Parameters of a layer that serve one branch alone, found without the suite: with the branch cut off they get no gradient."""
    family = BY_NAME[name]
    model = without_contribution(family, tiny(name), [SubBlock(layer, kind)])
    parameters = dict(decoder_layers(model)[layer].named_parameters())
    for path, value in parameters.items():
        value.requires_grad_(not any(path == end or path.startswith(f"{end}.") for end in getattr(family, kind)))
    model(ids())[0].square().sum().backward()
    return tuple(path for path, value in parameters.items() if value.grad is None or not value.grad.any())


# Run first in another process: from then on the suite cannot be imported, installed or not
WITHOUT_SUITE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "entrodrop_utils":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
try:
    import entrodrop_utils
    raise SystemExit("the suite can be imported")
except ModuleNotFoundError:
    pass
"""
LOADS = """
import json, torch, transformers
for line in sys.stdin:
    folder, auto = json.loads(line)
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        torch.save(model(torch.load(folder + "/tokens"))[0], folder + "/output")
    print("answer: done", flush=True)
"""


def stranger_command(script: str, home: Path, *arguments: str) -> dict[str, object]:
    """How to start a Python that cannot import the suite, in a folder of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(home / "modules")}
    command = [sys.executable, "-I", "-c", WITHOUT_SUITE + script, *arguments]
    return {"args": command, "text": True, "cwd": home, "env": environment}


@contextmanager
def stranger(home: Path) -> Iterator:
    """A process that cannot import the suite, and says what the model in a folder makes of ``ids()``."""
    with open(home / "errors", "w+") as errors:
        process = subprocess.Popen(**stranger_command(LOADS, home), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)

        def ask(folder: Path, auto: str) -> torch.Tensor:
            torch.save(ids(), folder / "tokens")
            process.stdin.write(json.dumps([str(folder), auto]) + "\n")
            process.stdin.flush()
            answer = next((line for line in process.stdout if line.startswith("answer:")), None)
            assert answer == "answer: done\n", (home / "errors").read_text()[-2000:]
            return torch.load(folder / "output")

        try:
            yield ask
        finally:
            process.stdin.close()
            process.wait(60)
