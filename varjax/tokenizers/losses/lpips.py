"""LPIPS: how different two images look to VGG16 (Zhang et al., arXiv 1801.03924, version 0.1).

Equal to the `lpips` package's `LPIPS(net="vgg")`: distance, layers and gradient.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from varjax.checkpoints.weights import read_fixed_params
from varjax.errors import InputError, check_setting
from varjax.nn.compute import matmul_precision
from varjax.storage import files
from varjax.storage.buckets import as_path
from varjax.trees import PyTree

VGG16 = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)  # a pooling between any two
MIN_SIDE = 2 ** (len(VGG16) - 1)  # pixels; smaller images leave no last map
# The scaling layer of the lpips package: ImageNet's mean and deviation for images in [-1, 1].
LPIPS_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
LPIPS_SCALE = np.array([0.458, 0.448, 0.450], np.float32)
CONVERT_HELP = (
    "make them with: varjax convert --lpips_vgg=vgg16.pth --lpips_heads=vgg.pth "
    "--out=DIRECTORY (docs/convert.md says where those files are), or train without them: "
    "task.perceptual=none"
)


@dataclasses.dataclass(frozen=True)
class LPIPSConfig:
    """Configures LPIPS as a perceptual loss.

    Attributes:
        weights: directory that `varjax convert --lpips_vgg=…` wrote.
        weight: weight of the loss, above 0.
    """

    weights: str = "weights/lpips"
    weight: float = 1.0

    def __post_init__(self):
        allowed = "above 0; task.perceptual=none turns it off"
        check_setting("perceptual.weight", self.weight, self.weight > 0, allowed)


def lpips(params: PyTree, a_BHWC: jax.Array, b_BHWC: jax.Array, dtype=jnp.float32) -> jax.Array:
    """Computes the distances (B,) of images in [-1, 1] with one or three channels, in `dtype`."""
    return jnp.sum(lpips_layers(params, a_BHWC, b_BHWC, dtype), axis=0)


def lpips_layers(params: PyTree, a_BHWC: jax.Array, b_BHWC: jax.Array, dtype=jnp.float32):
    """Computes what each of the layers relu1_2, 2_2, 3_3, 4_3, 5_3 adds to the distance.

    At every position the layer's features are scaled to length 1; their squared differences are
    weighted by channel and averaged over the positions.

    Args:
        params: parameters of LPIPS, from `load_lpips`.
        a_BHWC: images in [-1, 1] with one or three channels.
        b_BHWC: images of the same shape.
        dtype: dtype of the convolutions.

    Returns:
        (5, B) float32.

    Raises:
        InputError: as `check_lpips_images`.
    """
    check_lpips_images(a_BHWC.shape[1:])
    distances = []
    # Two passes, not one of 2 B images: no gradient runs through the original's.
    pairs = zip(_features(params, a_BHWC, dtype), _features(params, b_BHWC, dtype), strict=True)
    for i, (a_BhwC, b_BhwC) in enumerate(pairs):
        squared_BhwC = jnp.square(_unit(a_BhwC) - _unit(b_BhwC))
        distance_Bhw = jnp.einsum(
            "BhwC,C->Bhw", squared_BhwC, params[f"head_{i}"], precision="highest"
        )
        distances.append(jnp.mean(distance_Bhw, axis=(1, 2)))
    return jnp.stack(distances)


def check_lpips_images(image_shape: Sequence[int]) -> None:
    """Raises InputError for images (H, W, channels) that LPIPS cannot compare."""
    H, W, channels = image_shape
    if min(H, W) < MIN_SIDE:
        raise InputError(
            f"images of {H}×{W} are too small for LPIPS, which halves them four times: "
            f"it needs {MIN_SIDE} pixels a side; set task.perceptual=none"
        )
    if channels not in (1, 3):
        raise InputError(
            f"images of {channels} channels: LPIPS takes RGB or gray; set task.perceptual=none"
        )


def load_lpips(location: str | pathlib.Path) -> PyTree:
    """Reads the parameters that `varjax convert --lpips_vgg=…` wrote.

    Raises:
        InputError: there are none (the message says how to make them), or other ones.
    """
    path = as_path(location) / "lpips.safetensors"
    if not files.exists(path):
        raise InputError(f"there are no LPIPS weights in {location}; {CONVERT_HELP}")
    return read_fixed_params(path, init_lpips, "LPIPS on VGG16")


def init_lpips(key: jax.Array, widths: Sequence[Sequence[int]] = VGG16) -> PyTree:
    """Draws parameters, for their shapes and for tests; `widths` are those of the layers."""
    params, inputs = {}, 3
    for i, slice_widths in enumerate(widths):
        for j, width in enumerate(slice_widths):
            kernel_key, head_key = jax.random.split(jax.random.fold_in(key, 10 * i + j))
            scale = (2 / (9 * inputs)) ** 0.5
            kernel = scale * jax.random.normal(kernel_key, (3, 3, inputs, width))
            params[f"conv_{i}_{j}"] = {"kernel": kernel, "bias": jnp.zeros(width)}
            params[f"head_{i}"] = jax.random.uniform(head_key, (width,))
            inputs = width
    return params


def _features(params, image_BHWC, dtype):
    """Returns the last map of each slice."""
    # Three channels also from a gray image.
    x_BHWC = (image_BHWC - LPIPS_SHIFT[None, None, None]) / LPIPS_SCALE[None, None, None]
    x_BHWC = x_BHWC.astype(dtype)
    for i, convolutions in enumerate(map(len, VGG16)):
        if i > 0:
            x_BHWC = _halve(x_BHWC)
        for j in range(convolutions):
            x_BHWC = jax.nn.relu(_conv(x_BHWC, params[f"conv_{i}_{j}"]))
        yield x_BHWC.astype(jnp.float32)


def _unit(x_BhwC):
    squared_Bhw1 = jnp.sum(jnp.square(x_BhwC), axis=-1, keepdims=True)
    # The bound keeps the root's gradient finite where all features are 0; the package's is NaN.
    return x_BhwC / (jnp.sqrt(jnp.maximum(squared_Bhw1, 1e-20)) + 1e-10)


def _conv(x_BhwC, params):
    y_BhwC = jax.lax.conv_general_dilated(
        x_BhwC,
        params["kernel"].astype(x_BhwC.dtype),
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=matmul_precision(x_BhwC.dtype),
    )
    return y_BhwC + params["bias"].astype(x_BhwC.dtype)[None, None, None]


def _halve(x_BhwC):
    """Pools by the maximum of 2×2; an odd last row or column is dropped."""
    return jax.lax.reduce_window(x_BhwC, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
