"""Measures speed, memory and communication, and prints JSON lines.

varjax benchmark COMMAND --help

  sample        how fast a transformer of a released size draws images
  model         how fast a trained or converted model draws images with given options
  train         how fast it trains on one device
  operations    how fast single operations are: convolutions, attention, filters, encoder
  parity        whether this device computes what a CPU computes
  report        the most important of these on this machine's device, in eight minutes
  table         figures of docs/benchmarks.md, measured again and compared
  evaluate      how fast samples are evaluated: Inception's features, and the metrics
  data          how fast a config's images are read, decoded and augmented
  tpu           what the TPU's compiler estimates for sampling and training; no TPU is needed
  checksum      how long checksums take, compared with reading a checkpoint
  partitioning  a training step's memory and communication on many devices, estimated
"""

import importlib
import sys

from varjax.runtime.commands import run_command

NAMES = (
    *("sample", "model", "train", "operations", "parity", "report", "table"),
    *("evaluate", "data", "tpu", "checksum", "partitioning"),
)


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 0, 1 (error), 2 (wrong usage), 130 (Ctrl-C)."""
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    if name not in NAMES:
        print(f"usage: varjax benchmark {'|'.join(NAMES)} --help", file=sys.stderr)
        return 2
    # Imports only this benchmark: each sets up JAX in a different way, or needs no JAX.
    benchmark = importlib.import_module(f"varjax.benchmark.{name}")
    return run_command(f"varjax benchmark {name}", lambda: benchmark.main(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
