"""A folder of real images without any download: crops of scikit-learn's two photographs.

python -m varjax.data.photos --out=DIR [--size=64] [--train=200] [--val=40]

Two classes, china and flower, in train/ and val/; the crops of val/ are from the right quarter of
each photograph, which those of train/ do not touch. To try things out: two photographs teach a
model nothing.
"""

import argparse
import pathlib
import sys

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from varjax.core import files
from varjax.core.errors import InputError


def write_photos(out: str, size: int = 64, train: int = 200, val: int = 40) -> str:
    """Writes `train` and `val` JPEGs of each class, `size` or up to twice as high and wide.

    Always the same ones. Returns a line that says what was written. Raises InputError where `out`
    exists, and for a size that does not fit into a quarter of a photograph.
    """
    photos = load_sample_images()
    width = photos.images[0].shape[1]
    if not 8 <= size <= width // 8:
        raise InputError(f"size is {size}; give 8 to {width // 8} pixels")
    if pathlib.Path(out).exists():
        raise InputError(f"{out} exists already; delete it or choose another out")
    rng = np.random.default_rng(0)
    with files.atomic_path(out) as temporary:
        for name, photo_HWC in zip(photos.filenames, photos.images, strict=True):
            name, edge = pathlib.Path(name).stem, 3 * width // 4
            for split, count, part_HWC in (
                ("train", train, photo_HWC[:, :edge]),
                ("val", val, photo_HWC[:, edge:]),
            ):
                folder = temporary / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    crop_HWC = _crop(part_HWC, size, rng)
                    Image.fromarray(crop_HWC).save(folder / f"{i:05d}.jpg", quality=95)
    return f"{out}: {train} + {val} images in each of the classes china and flower"


def _crop(photo_HWC: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    height, width = rng.integers(size, 2 * size, 2, endpoint=True)
    top = rng.integers(0, photo_HWC.shape[0] - height, endpoint=True)
    left = rng.integers(0, photo_HWC.shape[1] - width, endpoint=True)
    return photo_HWC[top : top + height, left : left + width]


def main(arguments: list[str]) -> int:
    """Exit code 0, or 1 with a message."""
    parser = argparse.ArgumentParser(
        "python -m varjax.data.photos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--size", type=int, default=64, help="the shortest side of a crop, pixels")
    parser.add_argument("--train", type=int, default=200, help="training images of each class")
    parser.add_argument("--val", type=int, default=40, help="held-out images of each class")
    try:
        print(write_photos(**vars(parser.parse_args(arguments))))
    except (ValueError, OSError) as error:
        print(f"varjax.data.photos: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
