"""EntroDrop: drop the attention layers, MLPs or blocks of a language model that carry little information.

The core is six files: ``entropy`` and ``similarity`` (metrics of hidden states), ``residual`` (the states of a model), ``scoring``
(metrics of every sub-block), ``selection`` (which to drop) and ``dropping`` (drop them reversibly). The names below are imported
when they are first used, so that the core can be imported without the libraries of the rest.

>>> from entrodrop_utils import dropped, one_shot, perplexity, score
>>> scores = score(model, windows, ["cosine"], kinds=["attention"])
>>> with dropped(model, one_shot(scores, "cosine", "attention", n=2)):
...     loss = perplexity(model, held_out)
"""

import importlib

# Public name -> the module that defines it
_MODULES = {
    "SubBlock": "residual",
    "score": "scoring",
    "entropies": "scoring",
    "one_shot": "selection",
    "two_stage": "selection",
    "dropped": "dropping",
    "repair": "repairing",
    "load_model": "models",
    "windows": "text",
    "perplexity": "evaluation",
    "remove": "saving",
    "save_pruned": "saving",
    "load_pruned": "saving",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
