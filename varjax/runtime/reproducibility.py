"""Digests of what a run's batches depend on besides its settings: NumPy's draws, Pillow's pixels.

A run that is continued by other versions of them may get other batches; the digests tell whether it
does. `varjax.runtime.jax_draws` has the same of JAX, which readers of images do without.
"""

import base64
import functools
import hashlib
import importlib.metadata
import platform

import numpy as np
from PIL import Image

from varjax.storage.image_files import decode_picture, picture_array

PACKAGES = "jax", "jaxlib", "numpy", "pillow"
DIGEST_LENGTH = 16
# Both 20 by 17 pixels: RGB in JPEG with subsampled colors, and gray in PNG.
JPEG = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV01yid4h#wq4h;?x5fBp?C>j_R78o%jB^@X_Gd(;xGdMRuNL)@pL{~*OI8bd-"
    "S6^ahXlFi6ad~iLcwA*?WB=O#Lje&I5*QU2FB%#zV?sDWV`F1uV`F1uV`F1uV`F1uV`F1uV`F1uV`F1uV`F1uV`F1u"
    "V`F1uV`F1uV`F1uV`Klo01*fP5dahe0U`hb5di}c0sq7R7XSeP0RaF20000000000000041qT1b038qj0s;a90RR91"
    "00000000000|X%fA~7;yLI1=67XbhR0RR910000000000000351qT1b03Hzl0s#aA0RR9100000000001OfpAAu$mW"
    "GC}{^01N{G00I#M5dc2`<(Ct}<V50)HNo(?5O|?0tWUTTa+ovM6HHJ#CBf4a2I9o{E>X-"
    "9thpZmC*Ag9Q}}4FrT_zR(Q=wU|Je"
)
PNG = base64.b85decode(
    "iBL{Q4GJ0x0000DNk~Le0000K0000H2mk;80QfJ{VgLXDq)9|URCwA|kV_83APfbK{UAvZLQ&O&_UKiFkn@2qAW1tb"
    "dv<Tk`?I91+fj|!Ve%o)&li^Emg`=K;YOsCF4^4!Ip^GEcR52<RhultaH^`<8b>vSxPLf0)exUI>Iq#}h3SyFfryAm"
    "p=#s;)>^w4;%da6U>MfD5Vx5fOl@1=-"
    "hkf=F|Huqd+!knG2C4#gb)yk;eOM_7%?;4_}6ouzvuFhZ)TBhZ2$lO07*qoM6N<$f&"
)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a run's numbers depend on."""
    found = {"python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def random_numbers_digest() -> str:
    """Returns a digest of what NumPy draws for one seed in all ways that order and augment images.

    NumPy promises equal numbers for as long as nobody finds a better way to draw them.
    """
    rng = np.random.default_rng((0, 1, 2))
    return arrays_digest(
        rng.permutation(100),
        rng.integers(1 << 40, size=100),
        rng.integers(7, size=100),
        rng.random(100),
        rng.uniform(-1, 1, 100),
        rng.standard_normal(100),
    )


@functools.cache
def pixels_digest() -> str:
    """Returns a digest of what Pillow decodes of two small files, resizes and crops."""
    arrays = []
    for name, data in (("JPEG", JPEG), ("PNG", PNG)):
        picture = decode_picture(data, name)
        arrays.append(picture_array(picture, "RGB"))
        for size in ((13, 11), (31, 40)):
            for resampling in (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC):
                resized = picture.resize(size, resampling).crop((1, 2, 12, 10))
                arrays.append(picture_array(resized, "RGB"))
        arrays.append(picture_array(picture.resize((10, 8), Image.Resampling.BOX), "RGB"))
    return arrays_digest(*arrays)


def arrays_digest(*arrays: np.ndarray) -> str:
    """Returns a digest of the bytes of some arrays."""
    whole = hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in arrays))
    return whole.hexdigest()[:DIGEST_LENGTH]
