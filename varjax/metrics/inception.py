"""FID's Inception-v3 (TensorFlow, 2015-12-05), for inference.

It differs from later versions: it has 1,008 logits, average pools that ignore padding, a max pool
in Mixed_7c, and TensorFlow 1's resize, which is neither half-pixel-centered nor antialiased.
"""

import pathlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from varjax.checkpoints.weights import read_fixed_params
from varjax.errors import InputError
from varjax.nn.conv_norm import ConvNorm
from varjax.nn.resize import bilinear_tf1
from varjax.storage import files
from varjax.storage.buckets import as_path
from varjax.trees import PyTree

IMAGE_SIZE = 299
CLASSES = 1008
FEATURES = 2048  # of the last pool
SPATIAL_CHANNELS = 7  # of the map that sFID uses, 17 · 17 · 7 = 2,023 numbers
CONVERT_HELP = (
    "make them with: varjax convert --inception=FILE --out=DIRECTORY "
    "(docs/evaluation.md says where to get the file)"
)


class Inception(nn.Module):
    """Computes the features of images that metrics use.

    taps = Inception().apply({"params": params}, image_BHWC)
    """

    @nn.compact
    def __call__(self, image_BHWC: jax.Array) -> dict[str, jax.Array]:
        """Computes features of images (B, H, W, 3), 0 … 255 of any dtype.

        Returns:
            Float32 arrays: "pool_BD" (B, 2048), for FID; "spatial_BD" (B, 2023), for sFID, in the
            order h, w, channel; "logits_BV" (B, 1008) without bias, for the Inception Score;
            "biased_logits_BV" with it; and "64_BD", "192_BD", "768_BD", means of earlier maps.
        """
        x_BHWC = bilinear_tf1(image_BHWC.astype(jnp.float32), (IMAGE_SIZE, IMAGE_SIZE))
        x_BHWC = (x_BHWC - 128) / 128
        x_BHWC = ConvNorm(32, (3, 3), 2, name="Conv2d_1a_3x3")(x_BHWC)
        x_BHWC = ConvNorm(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x_BHWC)
        x_BHWC = _max_pool(ConvNorm(64, (3, 3), name="Conv2d_2b_3x3")(x_BHWC))
        taps = {"64_BD": _mean(x_BHWC)}
        x_BHWC = ConvNorm(80, name="Conv2d_3b_1x1")(x_BHWC)
        x_BHWC = ConvNorm(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x_BHWC)
        x_BHWC = _max_pool(x_BHWC)
        taps["192_BD"] = _mean(x_BHWC)
        x_BHWC = MixedA(32, name="Mixed_5b")(x_BHWC)
        x_BHWC = MixedA(64, name="Mixed_5c")(x_BHWC)
        x_BHWC = MixedA(64, name="Mixed_5d")(x_BHWC)
        x_BHWC = MixedB(name="Mixed_6a")(x_BHWC)
        x_BHWC = MixedC(128, name="Mixed_6b")(x_BHWC)
        x_BHWC = MixedC(160, name="Mixed_6c")(x_BHWC)
        x_BHWC = MixedC(160, name="Mixed_6d")(x_BHWC)
        # Its first branch comes first: TensorFlow's "mixed_6/conv".
        taps["spatial_BD"] = x_BHWC[..., :SPATIAL_CHANNELS].reshape(len(x_BHWC), -1)
        x_BHWC = MixedC(192, name="Mixed_6e")(x_BHWC)
        taps["768_BD"] = _mean(x_BHWC)
        x_BHWC = MixedD(name="Mixed_7a")(x_BHWC)
        x_BHWC = MixedE(_average_pool, name="Mixed_7b")(x_BHWC)
        x_BHWC = MixedE(_max_pool_same, name="Mixed_7c")(x_BHWC)
        taps["pool_BD"] = _mean(x_BHWC)
        kernel_DV = self.param("fc_kernel", nn.initializers.lecun_normal(), (FEATURES, CLASSES))
        bias_V = self.param("fc_bias", nn.initializers.zeros, (CLASSES,))
        taps["logits_BV"] = jnp.matmul(taps["pool_BD"], kernel_DV, precision="highest")
        taps["biased_logits_BV"] = taps["logits_BV"] + bias_V[None]
        return taps


class MixedA(nn.Module):
    """Joins four branches: 1×1, 5×5, two 3×3, and an average pool with `pool_width` channels."""

    pool_width: int

    @nn.compact
    def __call__(self, x_BHWC):
        b1 = ConvNorm(64, name="branch1x1")(x_BHWC)
        b5 = ConvNorm(48, name="branch5x5_1")(x_BHWC)
        b5 = ConvNorm(64, (5, 5), name="branch5x5_2")(b5)
        b3 = ConvNorm(64, name="branch3x3dbl_1")(x_BHWC)
        b3 = ConvNorm(96, (3, 3), name="branch3x3dbl_2")(b3)
        b3 = ConvNorm(96, (3, 3), name="branch3x3dbl_3")(b3)
        pool = ConvNorm(self.pool_width, name="branch_pool")(_average_pool(x_BHWC))
        return jnp.concatenate([b1, b5, b3, pool], axis=-1)


class MixedB(nn.Module):
    """Halves the map: 3×3, two 3×3, and a max pool."""

    @nn.compact
    def __call__(self, x_BHWC):
        b3 = ConvNorm(384, (3, 3), 2, name="branch3x3")(x_BHWC)
        b3dbl = ConvNorm(64, name="branch3x3dbl_1")(x_BHWC)
        b3dbl = ConvNorm(96, (3, 3), name="branch3x3dbl_2")(b3dbl)
        b3dbl = ConvNorm(96, (3, 3), 2, name="branch3x3dbl_3")(b3dbl)
        return jnp.concatenate([b3, b3dbl, _max_pool(x_BHWC)], axis=-1)


class MixedC(nn.Module):
    """Joins four branches with 7×7 convolutions as 1×7 and 7×1, with `width` inner channels."""

    width: int

    @nn.compact
    def __call__(self, x_BHWC):
        inner, row, column = self.width, (1, 7), (7, 1)
        b1 = ConvNorm(192, name="branch1x1")(x_BHWC)
        b7 = ConvNorm(inner, name="branch7x7_1")(x_BHWC)
        b7 = ConvNorm(inner, row, name="branch7x7_2")(b7)
        b7 = ConvNorm(192, column, name="branch7x7_3")(b7)
        b7dbl = ConvNorm(inner, name="branch7x7dbl_1")(x_BHWC)
        b7dbl = ConvNorm(inner, column, name="branch7x7dbl_2")(b7dbl)
        b7dbl = ConvNorm(inner, row, name="branch7x7dbl_3")(b7dbl)
        b7dbl = ConvNorm(inner, column, name="branch7x7dbl_4")(b7dbl)
        b7dbl = ConvNorm(192, row, name="branch7x7dbl_5")(b7dbl)
        pool = ConvNorm(192, name="branch_pool")(_average_pool(x_BHWC))
        return jnp.concatenate([b1, b7, b7dbl, pool], axis=-1)


class MixedD(nn.Module):
    """Halves the map: 3×3, 7×7 and 3×3, and a max pool."""

    @nn.compact
    def __call__(self, x_BHWC):
        b3 = ConvNorm(192, name="branch3x3_1")(x_BHWC)
        b3 = ConvNorm(320, (3, 3), 2, name="branch3x3_2")(b3)
        b7 = ConvNorm(192, name="branch7x7x3_1")(x_BHWC)
        b7 = ConvNorm(192, (1, 7), name="branch7x7x3_2")(b7)
        b7 = ConvNorm(192, (7, 1), name="branch7x7x3_3")(b7)
        b7 = ConvNorm(192, (3, 3), 2, name="branch7x7x3_4")(b7)
        return jnp.concatenate([b3, b7, _max_pool(x_BHWC)], axis=-1)


class MixedE(nn.Module):
    """Joins four branches whose 3×3 convolutions fork into 1×3 and 3×1; the last uses `pool`."""

    pool: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x_BHWC):
        row, column = (1, 3), (3, 1)
        b1 = ConvNorm(320, name="branch1x1")(x_BHWC)
        b3 = ConvNorm(384, name="branch3x3_1")(x_BHWC)
        b3a = ConvNorm(384, row, name="branch3x3_2a")(b3)
        b3b = ConvNorm(384, column, name="branch3x3_2b")(b3)
        b3dbl = ConvNorm(448, name="branch3x3dbl_1")(x_BHWC)
        b3dbl = ConvNorm(384, (3, 3), name="branch3x3dbl_2")(b3dbl)
        b3dbl_a = ConvNorm(384, row, name="branch3x3dbl_3a")(b3dbl)
        b3dbl_b = ConvNorm(384, column, name="branch3x3dbl_3b")(b3dbl)
        pool = ConvNorm(192, name="branch_pool")(self.pool(x_BHWC))
        return jnp.concatenate([b1, b3a, b3b, b3dbl_a, b3dbl_b, pool], axis=-1)


def init_inception(key: jax.Array) -> PyTree:
    """Draws random parameters, for their shapes and for tests without the real ones."""
    return Inception().init(key, jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3)))["params"]


def load_inception(location: str | pathlib.Path) -> PyTree:
    """Reads the parameters that `varjax convert --inception=…` wrote.

    Raises:
        InputError: the file is missing or has other parameters; the message says how to make it.
    """
    path = as_path(location) / "inception.safetensors"
    if not files.exists(path):
        raise InputError(f"{location} has no Inception weights; {CONVERT_HELP}")
    return read_fixed_params(path, init_inception, "FID's Inception-v3")


def _mean(x_BHWC):
    return jnp.mean(x_BHWC, axis=(1, 2))


# 3×3 pools are elementwise operations on shifted maps, axis by axis, which is several times faster
# on CPUs than XLA's windows.
def _max_pool(x_BHWC):
    for axis in (1, 2):
        a, b, c = _shifted(x_BHWC, axis, 2)
        x_BHWC = jnp.maximum(jnp.maximum(a, b), c)
    return x_BHWC


def _max_pool_same(x_BHWC):
    for axis in (1, 2):
        a, b, c = _shifted(_padded(x_BHWC, axis, -jnp.inf), axis, 1)
        x_BHWC = jnp.maximum(jnp.maximum(a, b), c)
    return x_BHWC


def _average_pool(x_BHWC):
    """Averages the entries inside the map; padding does not count."""
    for axis in (1, 2):
        a, b, c = _shifted(_padded(x_BHWC, axis, 0), axis, 1)
        count = np.full(x_BHWC.shape[axis], 3, np.float32)
        count[[0, -1]] = 2
        x_BHWC = (a + b + c) / jnp.expand_dims(count, [i for i in range(4) if i != axis])
    return x_BHWC


def _shifted(x_BHWC, axis, stride):
    """Returns the first, second and third entry of every window of three."""
    size = x_BHWC.shape[axis]
    return [
        jax.lax.slice_in_dim(x_BHWC, start, size - 2 + start, stride, axis) for start in range(3)
    ]


def _padded(x_BHWC, axis, value):
    padding = [(0, 0)] * 4
    padding[axis] = (1, 1)
    return jnp.pad(x_BHWC, padding, constant_values=value)
