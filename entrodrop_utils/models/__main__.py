"""``python -m entrodrop_utils.models list`` and ``python -m entrodrop_utils.models fetch NAME``."""

import argparse
import sys

from .downloads import ModelUnavailable
from .registry import KNOWN
from .sources import folder, is_local


def _size(megabytes: int) -> str:
    return f"{megabytes / 1000:.1f} GB" if megabytes >= 1000 else f"{megabytes} MB"


def main(arguments: list[str] | None = None) -> int:
    """``list`` the registered models, or ``fetch`` one: download, convert and check it against its hashes."""
    parser = argparse.ArgumentParser(prog="python -m entrodrop_utils.models", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what is known, with licence, size of the download and whether it is on this machine")
    commands.add_parser("fetch", help="get a model and check it").add_argument("name", help="as for load_model")
    chosen = parser.parse_args(arguments)
    if chosen.command == "list":
        rows = [("name", "here", "download", "licence", "what it is")]
        rows += [(n, "yes" if is_local(n) else "-", _size(k["megabytes"]), k["licence"], k["about"]) for n, k in KNOWN.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return 0
    if terms := KNOWN.get(chosen.name, {}).get("terms"):
        print(f"{chosen.name} comes under the {KNOWN[chosen.name]['licence']}: {terms}")
    try:
        print(f"{chosen.name} is whole, in {folder(chosen.name, verify=True)}")
    except (ValueError, ModelUnavailable) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
