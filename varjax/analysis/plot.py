"""Draws the curves of several training runs into one PNG.

varjax plot runs/a runs/b --out=plot.png
varjax plot runs/var_d16 --reference=d16

The upper panels show loss and accuracy (PSNR for tokenizers) over the images seen, so that runs
with different batch sizes can be compared. Below is one panel for each scale. Thin lines are
training, thick lines its running means, dots held-out images. Runs may still be in progress.
"""

import sys

from varjax.analysis.curves import draw_curves
from varjax.analysis.run_log import PUBLISHED_LOGS, read_run_log
from varjax.runtime.commands import command_parser, run_command


def main(arguments: list[str]) -> int:
    """Returns 0, 1 when it failed, 2 for a wrong command line, 130 after Ctrl-C."""
    parser = command_parser("varjax plot", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directories of the runs")
    parser.add_argument("--out", default="plot.png", help="picture to write (plot.png)")
    parser.add_argument(
        "--reference", choices=tuple(PUBLISHED_LOGS), help="published log to draw as well"
    )
    parser.add_argument(
        "--by_scale",
        default="",
        help="metric of the lower panels (the first of loss_at_scale, perplexity that is there)",
    )
    flags = parser.parse_args(arguments)

    def plot() -> None:
        logs = [read_run_log(directory) for directory in flags.runs]
        draw_curves(logs, flags.out, PUBLISHED_LOGS.get(flags.reference), flags.by_scale)
        print(f"{flags.out} is written")

    return run_command("varjax plot", plot)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
