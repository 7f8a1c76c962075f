"""What leaves the explorer: code that recreates its state, a saved model with its card, and files for other runtimes."""

import copy
from dataclasses import asdict
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

RUNTIMES = {"gguf": gguf, "vllm": vllm, "mlx": mlx}  # for llama.cpp, vLLM and mlx-lm


def state_line(choice: Choice) -> str:
    """One line of Python that shows the explorer in this state."""
    model = choice.settings.model
    default = asdict(Settings(model))
    changed = {name: value for name, value in asdict(choice.settings).items() if value != default[name]} | {"n": choice.n}
    for name, gone in (("drop", True), ("keep", False)):
        if some := [tuple(s) for s, was in choice.by_hand.items() if was == gone]:
            changed[name] = some
    arguments = "".join(f", {name}={value!r}" for name, value in changed.items())
    return f"from entrodrop_utils.explorer.page import explore; explore({model!r}{arguments})"


def drop_code(choice: Choice) -> str:
    """A notebook cell that has this model and selection, and says how it was made."""
    chosen = "".join(f'    SubBlock({layer}, "{kind}"),\n' for layer, kind in choice.dropped)
    return (
        f"# chosen by {choice.made_by}; ranked on {choice.settings.calibration}\n"
        "from entrodrop_utils import SubBlock, dropped, load_model\n\n"
        f"model, tokenizer = load_model({choice.settings.model!r})\n"
        f"drop_set = [  # first dropped first\n{chosen}]\nwith dropped(model, drop_set):\n"
        '    print(f"{model.num_parameters():,} parameters")\n'
    )


def card_of(choice: Choice) -> Card:
    """The card of what is saved: who chose, on which text, and what it cost."""
    settings, loaded = choice.settings, choice.ranking.loaded
    windows, held_out = loaded.calibration(settings), loaded.evaluation(settings)
    before, after = (loaded.cost(drop, settings).loss.perplexity for drop in ((), choice.dropped))
    calibration, evaluation = (
        f"{len(some)} windows of {some.shape[1]} tokens of {source}"
        for some, source in ((windows, settings.calibration), (held_out, settings.evaluation))
    )
    model = settings.model if not Path(settings.model).exists() else Path(settings.model).name
    return Card(model, choice.made_by, calibration, text_digest(windows), before, after, evaluation)


def folder_name(choice: Choice) -> str:
    """A name for the folder of a saved model."""
    return f"build/pruned/{slug(choice.settings.model)}-without-{choice.n}-{choice.settings.kind}"


def save(choice: Choice, path: str, repaired: bool = False, runtime: str = "") -> Path | Exported:
    """Write the model without what is dropped for ``load_pruned`` or another runtime; a relative path is under the project.

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
    loaded, target, card = choice.ranking.loaded, ROOT / Path(path.strip()).expanduser(), card_of(choice)
    with loaded.alone():
        report_step(f"writing {target.name}", 0, None)
        maps = repair(loaded.model, choice.dropped, loaded.calibration(choice.settings)) if repaired and not runtime else None
        smaller = remove(copy.deepcopy(loaded.model), choice.dropped, maps)
        if not runtime:
            return save_pruned(smaller, target, loaded.tokenizer, card)
        target.parent.mkdir(parents=True, exist_ok=True)
        return RUNTIMES[runtime](smaller, target, loaded.tokenizer)
