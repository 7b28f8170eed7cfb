"""Draws the curves of training runs beside one another, as a PNG.

varjax plot runs/a runs/b --out=plot.png
varjax plot runs/var_d16 --reference=d16

Above: loss, and accuracy (of tokenizers PSNR), over the images seen, so that runs of different
batches compare. Below: one panel for each scale. Lines are training (the thick ones running means),
dots held-out images. Runs may still be going on.
"""

import sys

from varjax.analysis.curves import draw_curves
from varjax.analysis.run_log import PUBLISHED_LOGS, read_run_log
from varjax.core.commands import command_parser, run_command


def main(arguments: list[str]) -> int:
    """Returns 0, 1 when it failed, 2 for a wrong command line, 130 after Ctrl-C."""
    parser = command_parser("varjax plot", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run")
    parser.add_argument("--out", default="plot.png", help="the picture to write (plot.png)")
    parser.add_argument(
        "--reference", choices=tuple(PUBLISHED_LOGS), help="also draw a published log"
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
