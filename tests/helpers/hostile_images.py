"""Makes small image files that demand much memory, or make their reader run a program."""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
0 0 8 8 rectfill
showpage
%%EOF
"""


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    """Returns the content of an image file."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int = 8, rows: int = 8, extra: bytes = b"") -> bytes:
    """Returns a gray PNG that claims a size but contains only its first `rows` rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    data = zlib.compress(bytes(-(-width * bits // 8) + 1) * rows, 9)
    parts = chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def text_chunk(size: int) -> bytes:
    """Returns a compressed PNG text chunk that unpacks to `size` bytes."""
    data = b"x\0\0" + zlib.compress(bytes(size), 9)
    return (
        struct.pack(">I", len(data))
        + b"zTXt"
        + data
        + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    )


def tiff(tags: dict[int, int], data: bytes) -> bytes:
    """Returns a gray TIFF of one strip or tile, 8 by 8 pixels of 8 bits unless `tags` differ."""
    whole = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 277: 1} | tags
    place, length = (324, 325) if 322 in whole else (273, 279)
    whole |= {place: 8, length: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, x) for tag, x in sorted(whole.items()))
    offset = 8 + len(data) + len(data) % 2
    head = b"II*\0" + struct.pack("<I", offset) + data.ljust(offset - 8, b"\0")
    return head + struct.pack("<H", len(whole)) + entries + bytes(4)


def images() -> Iterator[tuple[str, bytes]]:
    """Yields hostile images, named by their fault; none of them is usable."""
    plain = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    yield "postscript", POSTSCRIPT
    yield (
        "postscript_in_binary",
        struct.pack("<IIIIIIIH", 0xC6D3D0C5, 32, 200, *[0] * 5) + POSTSCRIPT,
    )
    yield "one_bit", png(13_300, 13_300, bits=1, rows=13_300)
    yield "one_bit_and_cut", png(13_300, 13_300, bits=1)
    yield "below_pillow_s_limit", png(9_400, 9_400, rows=9_400)
    yield "far_too_large", png(2**20, 2**20)
    yield "thin_and_high", png(1, 8_000, rows=8_000)
    yield "thinner", png(1, 30_000, rows=30_000)
    yield "thin_and_wide", png(30_000, 2)
    yield "long_text", png(8, 8, extra=text_chunk(10**8))
    yield "tiff_tile", tiff({322: 60_000, 323: 60_000, 259: 8}, zlib.compress(bytes(64)))
    yield "tiff_strip", tiff({256: 60_000, 257: 60_000, 259: 8}, zlib.compress(bytes(64)))
    gif = bytearray(encoded(plain.convert("P"), "gif"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    yield "gif_screen", bytes(gif)
    jp2 = bytearray(encoded(plain, "jpeg2000"))
    size = jp2.index(b"\xff\x4f\xff\x51") + 8
    jp2[size : size + 8] = jp2[size + 16 : size + 24] = struct.pack(">II", 30_000, 30_000)
    yield "jp2_codestream", bytes(jp2)
    for kind in ("png", "jpeg", "webp", "gif", "tiff", "bmp", "jpeg2000"):
        whole = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), kind)
        yield f"cut.{kind}", whole[: len(whole) // 3]
    yield "empty", b""
