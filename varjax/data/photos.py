"""Writes a folder of real images without any download: crops of scikit-learn's two photographs.

python -m varjax.data.photos --out=DIR [--size=64] [--train=200] [--val=40]

There are two classes, china and flower, in train/ and val/, which are cut from separate parts of
the photographs. Use it only to try things out: a model learns nothing useful from two photographs.
"""

import sys

import numpy as np
from PIL import Image

from varjax.data.sources.photos import HELD_OUT_WIDTH, PHOTO_NAMES, photo_parts
from varjax.data.stream import Split
from varjax.errors import check_setting
from varjax.runtime.commands import command_parser, run_command
from varjax.storage import files, folders

MIN_SIZE, MAX_SIZE = 8, HELD_OUT_WIDTH // 2  # crops are up to twice as wide


def write_photos(out: str, size: int = 64, train: int = 200, val: int = 40) -> str:
    """Writes JPEGs of random crops, always the same ones, `size` to twice as high and wide.

    Args:
        out: a new folder, or an empty one.
        size: pixels of both sides, 8 to 64.
        train: number of images of each class in train/.
        val: number of images of each class in val/.

    Returns:
        A line that says what was written.

    Raises:
        InputError: `out` is not empty, or the size is out of range.
    """
    check_setting("size", size, MIN_SIZE <= size <= MAX_SIZE, f"from {MIN_SIZE} to {MAX_SIZE}")
    folders.check_replaceable(out)
    rng = np.random.default_rng(0)
    with files.atomic_path(out) as temporary:
        splits: dict[str, tuple[Split, int]] = {"train": ("train", train), "val": ("held_out", val)}
        for folder, (split, count) in splits.items():
            for label, name in enumerate(PHOTO_NAMES):
                parts = [part_HWC for part_HWC, whose in photo_parts(split) if whose == label]
                (temporary / folder / name).mkdir(parents=True)
                for i in range(count):
                    crop_HWC = _random_crop(parts[i % len(parts)], size, rng)
                    path = temporary / folder / name / f"{i:05d}.jpg"
                    Image.fromarray(crop_HWC).save(path, quality=95)
    return f"{out}: {train} + {val} images in each of the classes {' and '.join(PHOTO_NAMES)}"


def _random_crop(part_HWC: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    height, width = rng.integers(size, 2 * size, 2, endpoint=True)
    top = rng.integers(0, part_HWC.shape[0] - height, endpoint=True)
    left = rng.integers(0, part_HWC.shape[1] - width, endpoint=True)
    return part_HWC[top : top + height, left : left + width]


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = command_parser("python -m varjax.data.photos", __doc__)
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder to write")
    parser.add_argument("--size", type=int, default=64, help="shorter side of a crop, in pixels")
    parser.add_argument("--train", type=int, default=200, help="training images of each class")
    parser.add_argument("--val", type=int, default=40, help="held-out images of each class")
    flags = parser.parse_args(arguments)
    return run_command("varjax.data.photos", lambda: print(write_photos(**vars(flags))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
