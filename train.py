"""Trains what a config file describes, or continues the run in its run_dir.

python train.py --config=configs/FILE.py[:ARGUMENT] [--config.FIELD.FIELD=VALUE ...]

For example, with some settings of the file changed:

python train.py --config=configs/digits.py --config.task.optimizer.base_lr=3e-4 --config.steps=200
"""

import argparse
import logging
import sys
import traceback

from varjax.core import config_tree


def main(arguments: list[str]) -> int:
    """Exit code 0 when the run is finished, 1 when it failed, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="a Python file with get_config(), and its argument")
    parser.add_argument("--debug", action="store_true", help="errors with their traceback")
    parser.add_argument("--distributed", action="store_true", help="one of several processes")
    parser.add_argument("--coordinator", default="", help="HOST:PORT of the first process")
    parser.add_argument("--processes", type=int, help="how many there are")
    parser.add_argument("--process", type=int, help="the number of this one, from 0")
    flags, others = parser.parse_known_args(arguments)
    if not flags.config:
        parser.print_help(sys.stderr)
        return 2
    try:
        if strange := [o for o in others if not o.startswith("--config.")]:
            raise ValueError(f"cannot read {strange}; settings are --config.FIELD=VALUE")
        experiment = config_tree.load_config(flags.config)
        experiment = config_tree.override(experiment, [o.removeprefix("--config.") for o in others])
    except ValueError as error:
        return _fail(error, 2, flags.debug)

    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax speaks of its own workings

    from varjax.core import distributed
    from varjax.training import loop

    one_of_several = (flags.coordinator, flags.processes, flags.process) != ("", None, None)
    try:
        if flags.distributed or one_of_several:
            distributed.connect(flags.coordinator, flags.processes, flags.process)
    except ValueError as error:
        return _fail(error, 2, flags.debug)
    try:
        loop.run(experiment)
    except Exception as error:
        expected = isinstance(error, ValueError | FloatingPointError | OSError)
        return distributed.end(_fail(error, 1, flags.debug or not expected))
    return 0


def _fail(error: Exception, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    else:
        print(f"train.py: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
