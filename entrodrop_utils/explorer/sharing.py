"""What leaves the explorer: code that recreates its state, a saved model with its card, and files for other runtimes."""

import copy
from dataclasses import fields
from pathlib import Path

from ..export import Exported, gguf, mlx, vllm
from ..model_card import Card
from ..paths import ROOT
from ..profile import slug
from ..progress import report_step
from ..repairing import repair
from ..saving import remove, save_pruned
from ..text import text_digest
from .choice import Choice
from .settings import Settings
from .state import Ranking

RUNTIMES = {"gguf": gguf, "vllm": vllm, "mlx": mlx}  # for llama.cpp, vLLM and mlx-lm


def state_line(settings: Settings, choice: Choice) -> str:
    """One line of Python that shows the explorer in this state."""
    default = Settings()
    changed = {f.name: getattr(settings, f.name) for f in fields(settings) if getattr(settings, f.name) != getattr(default, f.name)}
    changed.pop("model", None)
    changed["n"] = choice.n
    for name, gone in (("drop", True), ("keep", False)):
        if some := [tuple(s) for s, was in choice.by_hand.items() if was == gone]:
            changed[name] = some
    arguments = "".join(f", {name}={value!r}" for name, value in changed.items())
    return f"from entrodrop_utils.explorer.page import explore; explore({settings.model!r}{arguments})"


def drop_code(settings: Settings, choice: Choice) -> str:
    """A notebook cell that has this model and selection, and says how it was made."""
    chosen = "".join(f'    SubBlock({layer}, "{kind}"),\n' for layer, kind in choice.dropped)
    return (
        f"# chosen by {choice.described(settings.measure)}; ranked on {settings.calibration}\n"
        "from entrodrop_utils import SubBlock, dropped, load_model\n\n"
        f"model, tokenizer = load_model({settings.model!r})\n"
        f"drop_set = [  # first dropped first\n{chosen}]\nwith dropped(model, drop_set):\n"
        '    print(f"{model.num_parameters():,} parameters")\n'
    )


def card_of(ranking: Ranking, choice: Choice) -> Card:
    """The card of what is saved: who chose, on which text, and what it cost."""
    settings, loaded = ranking.settings, ranking.loaded
    windows, held_out = loaded.calibration(settings), loaded.evaluation(settings)
    before, after = loaded.cost((), settings).loss, loaded.cost(choice.dropped, settings).loss
    return Card(
        base_model=settings.model if not Path(settings.model).exists() else Path(settings.model).name,
        metric=choice.described(settings.measure),
        calibration=f"{len(windows)} windows of {windows.shape[1]} tokens of {settings.calibration}",
        digest=text_digest(windows),
        perplexity_before=before.perplexity,
        perplexity_after=after.perplexity,
        evaluation=f"{len(held_out)} windows of {held_out.shape[1]} tokens of {settings.evaluation}",
    )


def folder_name(ranking: Ranking, choice: Choice) -> str:
    """A name for the folder of a saved model."""
    return f"build/pruned/{slug(ranking.settings.model)}-without-{len(choice.dropped)}-{ranking.settings.kind}"


def save(ranking: Ranking, choice: Choice, path: str, repaired: bool = False, runtime: str = "") -> Path | Exported:
    """Write the model without the selection for ``load_pruned``, or for another runtime; a relative path is under the project.

    Args:
        repaired: put a linear repair, fitted on the calibration text, in place of what is dropped; not for other runtimes.
        runtime: one of ``RUNTIMES``; empty for transformers.
    Returns:
        The folder; for another runtime what was written, and what that runtime keeps of it.
    Raises:
        ValueError: an unknown runtime, no path, nothing is dropped, or what the runtime cannot compute.
        FileExistsError: the folder is not empty.
    """
    if runtime and runtime not in RUNTIMES:
        raise ValueError(f"unknown runtime {runtime!r}: choose one of {', '.join(RUNTIMES)}")
    if not path.strip():
        raise ValueError("name a file or folder to write the pruned model to")
    loaded, target, card = ranking.loaded, ROOT / Path(path.strip()).expanduser(), card_of(ranking, choice)
    with loaded.alone():
        report_step(f"writing {target.name}", 0, None)
        maps = repair(loaded.model, choice.dropped, loaded.calibration(ranking.settings)) if repaired and not runtime else None
        smaller = remove(copy.deepcopy(loaded.model), choice.dropped, maps)
        if not runtime:
            return save_pruned(smaller, target, loaded.tokenizer, card)
        target.parent.mkdir(parents=True, exist_ok=True)
        return RUNTIMES[runtime](smaller, target, loaded.tokenizer)
