"""Draws images with the exported model in this folder, and writes them as one PNG.

    python run.py --labels=207,980 --seed=0 --out=samples.png

It needs jax, numpy and safetensors. In Python, `exported_model.py` also edits and decodes.
"""

import argparse
import pathlib
import struct
import sys
import zlib

import numpy as np


def main():
    """Reads the command line, samples and writes; returns the exit code."""
    from exported_model import ExportedModel  # pyright: ignore[reportMissingImports]

    parser = argparse.ArgumentParser(description="Draws images of given classes.")
    parser.add_argument("--labels", required=True, help="numbers or names of classes: 207,980")
    parser.add_argument("--count", type=int, default=1, help="number of images of each class (1)")
    parser.add_argument("--out", default="samples.png", help="picture to write (%(default)s)")
    try:
        model = ExportedModel()
        for name, about in model.about["options"].items():
            kind = int if about["whole"] else float
            parser.add_argument(f"--{name}", type=kind, default=about["value"], help=about["help"])
        flags = vars(parser.parse_args())
        labels, count, out = (flags.pop(name) for name in ("labels", "count", "out"))
        if count < 1:
            raise ValueError(f"count={count}: must be 1 or more")
        if not out.lower().endswith(".png"):
            raise ValueError(f"out={out}: must end in .png; exported_model.py returns arrays")
        if not pathlib.Path(out).absolute().parent.is_dir():
            raise ValueError(f"out={out}: the folder does not exist; create it, or change --out")
        if pathlib.Path(out).is_dir():
            raise ValueError(f"out={out}: is a folder; give the name of a new file")
        images_NHWC = model.sample([x for x in labels.split(",") for _ in range(count)], **flags)
        columns = count if count > 1 else len(images_NHWC)
        pathlib.Path(out).write_bytes(grid_png(images_NHWC, columns))
    except (ValueError, OSError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    print(f"{out}: {len(images_NHWC)} images")
    return 0


def grid_png(images_NHWC, columns=1):
    """Returns the bytes of a PNG, 8-bit gray, RGB or RGBA, with images in rows of `columns`."""
    if not np.isfinite(images_NHWC).all():
        raise ValueError("the images contain NaN or infinity; try weaker guidance")
    pixels = np.rint(np.clip(images_NHWC, 0, 1) * 255).astype(np.uint8)
    N, H, W, channels = pixels.shape
    rows = pixels.reshape(N // columns, columns, H, W, channels).swapaxes(1, 2)
    lines = rows.reshape(N // columns * H, columns * W * channels)
    kind = {1: 0, 3: 2, 4: 6}[channels]
    header = struct.pack(">2I5B", columns * W, len(lines), 8, kind, 0, 0, 0)
    data = zlib.compress(np.pad(lines, ((0, 0), (1, 0))).tobytes())  # 0: each line is unfiltered
    png = b"\x89PNG\r\n\x1a\n"
    for name, part in (b"IHDR", header), (b"IDAT", data), (b"IEND", b""):
        checksum = zlib.crc32(name + part)
        png += struct.pack(">I", len(part)) + name + part + struct.pack(">I", checksum)
    return png


if __name__ == "__main__":
    sys.exit(main())
