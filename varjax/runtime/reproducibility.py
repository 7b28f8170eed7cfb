"""Computes digests of the results of NumPy, Pillow and JAX that a run depends on.

A run that continues with other versions of them may get other batches; the digests show whether it
does. JAX is imported only where it is needed, because processes that read images run without it.
"""

import base64
import functools
import hashlib
import importlib.metadata
import platform
from typing import Any

import numpy as np
from PIL import Image

from varjax.storage.image_files import decode_picture, picture_array

PACKAGES = "jax", "jaxlib", "numpy", "pillow"
JAX_FLAGS = "jax_default_prng_impl", "jax_threefry_partitionable"
DIGEST_LENGTH = 16
# Two images of 20 by 17 pixels: an RGB JPEG with subsampled colors, and a gray PNG.
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
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | packages


def random_numbers_digest() -> str:
    """Returns a digest of NumPy's random numbers for one seed, from all functions that data use.

    A new version of NumPy may draw other numbers.
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
    """Returns a digest of two small files that Pillow decodes, resizes and crops."""
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


def jax_draws() -> dict[str, Any]:
    """Returns a digest of JAX's random numbers, its version, and the flags that change them."""
    import jax

    flags = {name: getattr(jax.config, name) for name in JAX_FLAGS}
    return {"version": jax.__version__, **flags, "random_numbers": _jax_digest(*flags.values())}


@functools.cache
def _jax_digest(implementation: str, partitionable: bool) -> str:
    """Draws under the current flags; `partitionable` is one of them, for the cache."""
    import jax

    numbers = jax.device_get(jax.jit(lambda: _draw_with_jax(implementation))())
    # Devices round the normal distribution differently, but none of these numbers is near a half.
    numbers["normal"] = np.rint(numbers["normal"] * 8).astype(np.int32)
    return arrays_digest(*(numbers[name] for name in sorted(numbers)))


def _draw_with_jax(implementation: str) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    seed = jax.random.key(3, impl=implementation)
    key, other = jax.random.split(seed)
    return {
        "bits": jax.random.bits(jax.random.fold_in(other, 5), (32,), jnp.uint32),
        "keys": jax.random.key_data(jax.random.split(key, 3)),
        "normal": jax.random.normal(seed, (32,), jnp.float32),
        "order": jax.random.permutation(other, 32),
        "uniform": jax.random.uniform(key, (32,), jnp.float32),
    }


def arrays_digest(*arrays: np.ndarray) -> str:
    """Returns a digest of the bytes of some arrays."""
    whole = hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in arrays))
    return whole.hexdigest()[:DIGEST_LENGTH]
