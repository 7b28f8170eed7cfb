"""python -m varjax.benchmark sample --preset=d16 --batch_size=8"""

import argparse
import sys
from typing import get_args

import jax

from varjax.benchmark import sample
from varjax.nn.compute import Attention, Compute


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("varjax.benchmark")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("sample", help="drawing images with random weights")
    one.add_argument("--preset", default="d16", help="d16, d20, d24, d30 or d36")
    one.add_argument("--batch_size", type=int, default=8)
    one.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    one.add_argument("--attention", choices=get_args(Attention), default="auto")
    one.add_argument("--repeats", type=int, default=3)
    one.add_argument("--compile_only", action="store_true", help="for models too large for memory")
    one.add_argument("--cache", help="a folder for compiled programs, used again by the next run")
    flags = parser.parse_args(arguments)
    try:
        if flags.batch_size < 1 or flags.repeats < 1:
            raise ValueError("batch_size and repeats must be 1 or more")
        if flags.cache:
            jax.config.update("jax_compilation_cache_dir", flags.cache)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compute = Compute(dtype=flags.dtype, attention=flags.attention)
        sample.run(flags.preset, flags.batch_size, compute, flags.repeats, flags.compile_only)
    except ValueError as error:
        print(f"varjax.benchmark: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
