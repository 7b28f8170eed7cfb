"""python -m varjax.benchmark sample|train|data|scaling --help"""

import importlib
import sys

NAMES = ("sample", "train", "data", "scaling")


def main(arguments: list[str]) -> int:
    """Exit code 0, 1 when it failed, 2 for a wrong command line."""
    if not arguments or arguments[0] not in NAMES:
        print(f"usage: python -m varjax.benchmark {'|'.join(NAMES)} --help", file=sys.stderr)
        return 2
    # Only the one that is asked for: they set up JAX, or do without it, each in its own way.
    benchmark = importlib.import_module(f"varjax.benchmark.{arguments[0]}")
    try:
        benchmark.main(arguments[1:])
    except ValueError as error:
        print(f"varjax.benchmark: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
