"""Where the project's files are: one constant per folder."""

import os
from pathlib import Path

from platformdirs import user_cache_path

PACKAGE = Path(__file__).resolve().parent


def _project() -> Path:
    """The checkout that this code runs from or is called in; the user's cache folder where there is none.

    ``ENTRODROP_HOME`` names another folder.
    """
    if home := os.environ.get("ENTRODROP_HOME"):
        return Path(home).expanduser().resolve()
    candidates = [PACKAGE.parent, Path.cwd(), *Path.cwd().parents]
    checkouts = (folder for folder in candidates if (folder / "notebooks" / "02_entropy_vs_cosine.ipynb").is_file())
    return next(checkouts, user_cache_path("entrodrop"))


ROOT = _project()
DATA = ROOT / "data"
RESULTS = DATA / "results"
PUBLISHED = DATA / "published"
MODELS = DATA / "models"
CACHE = DATA / "cache"
TEXT = DATA / "text"
TASKS = DATA / "tasks"
FIGURES = ROOT / "figures"
NOTEBOOKS = ROOT / "notebooks"
SIZES = NOTEBOOKS / "sizes"
BUILD = ROOT / "build"
