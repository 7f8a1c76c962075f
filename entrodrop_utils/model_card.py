"""The README.md that travels with a pruned model: what was dropped, why, what it cost, how to load it."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from .modeling_entrodrop import RECORD


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


def _layers(layers: list[int]) -> str:
    return ", ".join(map(str, layers))


def _why(card: Card) -> list[str]:
    text = f"Chosen by {card.metric or 'hand'}"
    if card.calibration:
        text += f", measured on {card.calibration}"
    if card.digest:
        text += f" (hash of the tokens: `{card.digest}`)"
    return [text + "."]


def render(model: PreTrainedModel, card: Card) -> str:
    """The model card in Markdown, with the metadata that model hubs read."""
    record = getattr(model.config, RECORD, None) or {"layers": 0, "kept": [], "dropped": [], "stand_ins": {}}
    base = card.base_model or _base_model(model)
    by_kind = {kind: sorted(layer for layer, k in record["dropped"] if k == kind) for kind in ("attention", "mlp", "block")}
    names = {"attention": "attention layers", "mlp": "MLPs", "block": "whole blocks"}
    dropped = [f"| {names[kind]} | {len(layers)} | {_layers(layers)} |" for kind, layers in by_kind.items() if layers]
    head = ["---", "library_name: transformers", "tags:", "- entrodrop", "- pruned"]
    if base.count("/") == 1:
        head += [f"base_model: {base}"]
    lines = [*head, "---", "", f"# {base or type(model).__name__} without some of its layers", ""]
    lines += [f"{base or 'The model'} had {record['layers']} layers. Dropped from it, counted in its layers from 0:", ""] if dropped else []
    lines += ["| what | how many | which |", "|---|---|---|", *dropped, ""] if dropped else ["Nothing was dropped.", ""]
    lines += _why(card) if dropped else []
    if card.perplexity_before is not None and card.perplexity_after is not None:
        where = f" on {card.evaluation}" if card.evaluation else ""
        lines += ["", f"Perplexity{where}: {card.perplexity_before:.2f} before, {card.perplexity_after:.2f} after."]
    lines += ["", "## How to load it", "", "```python", "from transformers import AutoModelForCausalLM", ""]
    if record["stand_ins"]:
        lines += ['model = AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)', "```", ""]
        lines += ["`modeling_entrodrop.py` beside the weights is the code that this trusts: it leaves out what was dropped and holds"]
        lines += ["nothing else. Plain transformers refuses the folder, as it would fill the gaps with random weights. With"]
        lines += ['`entrodrop_utils` installed, `dropping.load("this folder")` does the same.']
    else:
        lines += ['model = AutoModelForCausalLM.from_pretrained("this folder")', "```", "", "A plain transformers checkpoint."]
    lines += ["", "Method: EntroDrop ([arXiv 2504.03794](https://arxiv.org/abs/2504.03794)) and its baselines."]
    return "\n".join(lines) + "\n"
