"""The registry of models with a short name, and the check of a name before anything is downloaded."""

import tomllib
from pathlib import Path

KNOWN: dict[str, dict] = tomllib.loads(Path(__file__).with_name("registry.toml").read_text(encoding="utf-8"))


def check_model(name: str) -> None:
    """Refuse a name that is no registered model, folder, .gguf file or hub name.

    Raises:
        ValueError: with the list of registered models.
    """
    if not name.strip():
        raise ValueError(f"no model is named: choose one of {', '.join(KNOWN)}, a folder, a .gguf file or a hub name")
    path = Path(name).expanduser()
    if name in KNOWN or path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return
    parts = name.partition("@")[0].split("/")
    plain = all(part and part.translate(str.maketrans("", "", "-_.")).isalnum() for part in parts)
    if name.startswith((".", "/", "~")) or path.is_file() or len(parts) != 2 or not plain or name.endswith("@"):
        raise ValueError(
            f"unknown model {name!r}: choose one of {', '.join(KNOWN)}, a folder that holds a transformers model, "
            "a .gguf file, or a hub name of the form organisation/model or organisation/model@revision"
        )
