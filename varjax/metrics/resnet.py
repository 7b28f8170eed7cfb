"""torchvision's ResNet-50, 101 and 152, which classify ImageNet, for inference.

He et al. 2015, Deep Residual Learning for Image Recognition (arXiv 1512.03385), with the stride on
the 3×3 convolutions, as torchvision has it. Its weights V1 and V2 differ in the resize that they
were evaluated with.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from varjax.errors import check_setting
from varjax.nn.conv_norm import ConvNorm
from varjax.nn.resize import antialiased_bilinear
from varjax.trees import PyTree

CROP = 224  # pixels of the square that the network sees
WIDTH = 64  # channels of the stem, and inside the first layer's blocks
EXPANSION = 4  # channels of a block's result, divided by those inside the block
BATCH_NORM_EPSILON = 1e-5
MAX_BLOCKS = 64  # of a layer; ResNet-152 has 36
# ImageNet's mean and standard deviation of RGB in [0, 1], as torchvision has them.
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Describes a ResNet of bottleneck blocks; the defaults are ResNet-101 with V1 weights.

        ResNetConfig(layers=(3, 4, 6, 3), resize=232)  # ResNet-50 with V2 weights

    Attributes:
        layers: number of blocks in each of the four layers.
        classes: number of classes that it distinguishes.
        resize: pixels of an image's shorter side before the center crop.
    """

    layers: tuple[int, ...] = (3, 4, 23, 3)
    classes: int = 1000
    resize: int = 256

    def __post_init__(self):
        valid = len(self.layers) == 4 and all(1 <= n <= MAX_BLOCKS for n in self.layers)
        check_setting("layers", self.layers, valid, f"four numbers from 1 to {MAX_BLOCKS}")
        check_setting("classes", self.classes, self.classes >= 1, "1 or more")
        check_setting("resize", self.resize, CROP <= self.resize <= 1024, f"from {CROP} to 1024")

    def init(self, key: jax.Array) -> PyTree:
        """Draws untrained parameters."""
        return ResNet(self).init(key, jnp.zeros((1, CROP, CROP, 3)))["params"]

    @property
    def image_size(self) -> None:
        """The only (height, width) of images that it takes: None, because any will do."""
        return None

    def outputs(self, params: PyTree, image_BHWC: jax.Array) -> dict[str, jax.Array]:
        """Computes {"pool_BD": features, "logits_BV"} of RGB images (B, H, W, 3), uint8."""
        outputs = ResNet(self).apply({"params": params}, normalized_images(self, image_BHWC))
        assert isinstance(outputs, dict)
        return outputs


class ResNet(nn.Module):
    """Computes features and logits of normalized images.

    outputs = ResNet(config).apply({"params": params}, normalized_images(config, image_BHWC))
    """

    config: ResNetConfig

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> dict[str, jax.Array]:
        """Computes {"pool_BD", "logits_BV"}, float32, of normalized RGB images (B, H, W, 3).

        The features are the means of the last map, before the dense layer.
        """
        x_BHWC = _convolution(WIDTH, 7, 2, name="stem")(x_BHWC)
        padding = ((0, 0), (1, 1), (1, 1), (0, 0))
        x_BHWC = jax.lax.reduce_window(
            x_BHWC, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding
        )
        for i, blocks in enumerate(self.config.layers):
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                name = f"layer{i + 1}_{j}"
                x_BHWC = Bottleneck(WIDTH << i, stride, project=j == 0, name=name)(x_BHWC)
        dense = nn.Dense(self.config.classes, precision="highest", name="head")
        pool_BD = jnp.mean(x_BHWC, axis=(1, 2))
        return {"pool_BD": pool_BD, "logits_BV": dense(pool_BD)}


class Bottleneck(nn.Module):
    """Adds to a map what 1×1, 3×3 and 1×1 convolutions make of it.

    Attributes:
        width: channels of the 3×3 convolution.
        stride: stride of the 3×3 convolution.
        project: whether a convolution adapts the input's shape to the sum's.
    """

    width: int
    stride: int
    project: bool

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        out = EXPANSION * self.width
        y_BHWC = _convolution(self.width, 1, name="conv1")(x_BHWC)
        y_BHWC = _convolution(self.width, 3, self.stride, name="conv2")(y_BHWC)
        y_BHWC = _convolution(out, 1, relu=False, name="conv3")(y_BHWC)
        if self.project:
            x_BHWC = _convolution(out, 1, self.stride, relu=False, name="projection")(x_BHWC)
        return nn.relu(x_BHWC + y_BHWC)


def normalized_images(config: ResNetConfig, image_BHWC: jax.Array) -> jax.Array:
    """Resizes, crops and normalizes images as torchvision does for evaluation.

    The shorter side is resized to `config.resize`, bilinearly with antialiasing; then the center is
    cut out. torchvision rounds resized images to uint8; this does not.

    Args:
        config: config of the network.
        image_BHWC: RGB images (B, H, W, 3), 0 … 255.

    Returns:
        (B, 224, 224, 3) float32.
    """
    H, W = image_BHWC.shape[1:3]
    shorter = min(H, W)
    resized = config.resize * H // shorter, config.resize * W // shorter
    x_BHWC = antialiased_bilinear(image_BHWC.astype(jnp.float32) / 255, resized)
    top, left = (round((side - CROP) / 2) for side in resized)  # half to even, as torchvision
    x_BHWC = x_BHWC[:, top : top + CROP, left : left + CROP]
    return (x_BHWC - IMAGENET_MEAN[None, None, None]) / IMAGENET_STD[None, None, None]


def _convolution(width, kernel, stride=1, relu=True, *, name):
    """A convolution that PyTorch pads by half of its kernel on each side."""
    padding = [(kernel // 2, kernel // 2)] * 2
    return ConvNorm(
        width, (kernel, kernel), stride, padding, BATCH_NORM_EPSILON, relu=relu, name=name
    )
