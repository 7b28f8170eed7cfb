"""python -m varjax.benchmark sample|train|… --help"""

import sys

from varjax.benchmark import sample, train

COMMANDS = {"sample": sample.main, "train": train.main}


def main(arguments: list[str]) -> int:
    """Exit code 0, 1 when it failed, 2 for a wrong command line."""
    if not arguments or arguments[0] not in COMMANDS:
        print(f"usage: python -m varjax.benchmark {'|'.join(COMMANDS)} --help", file=sys.stderr)
        return 2
    try:
        COMMANDS[arguments[0]](arguments[1:])
    except ValueError as error:
        print(f"varjax.benchmark: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
