"""The command line behind ``make reproduce`` and ``make lint``: ``python -m entrodrop_utils.runner``."""

import argparse
import sys

import nbformat

from ..profile import DEFAULT_MODEL, DEFAULT_SIZE, DEFAULT_TEXT
from .checks import available, problems
from .run import reason_of, reproduce


def main() -> int:
    """Run notebooks, or check the committed ones; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m entrodrop_utils.runner", description="Run notebooks headless.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a registered name, a folder, a .gguf file or a hub name")
    parser.add_argument("--size", default=DEFAULT_SIZE, help="default, or a file of notebooks/sizes: smoke, paper")
    parser.add_argument("--text", default=DEFAULT_TEXT, help="calibration text: docs, a .txt or .jsonl file, or a hub dataset")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice")
    parser.add_argument("--only", default="", help="notebooks by number or name, separated by commas")
    parser.add_argument("--set", default="", help="parameters of the notebooks, as in 'k=50 fractions=[0.5]'")
    parser.add_argument("--jobs", type=int, default=0, help="notebooks beside each other; 0: 2 for the default model, else 1")
    parser.add_argument("--check", action="store_true", help="check the committed notebooks and run nothing")
    args = parser.parse_args()
    if args.check:
        found = [f"{path.name}: {problem}" for path in available() for problem in problems(nbformat.read(path, as_version=4))]
        print("\n".join(found) or f"{len(available())} notebooks have no problem")
        return int(bool(found))
    try:
        return reproduce(args.model, args.size, args.text, args.seed, args.only, args.set, args.jobs)
    except (ValueError, OSError) as error:  # an OSError: build or data cannot be written
        print(f"error: {reason_of(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the committed files are unchanged, and the next run starts this notebook again", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
