"""A small convolutional network that classifies small images, trained by `varjax train-classifier`.

Its penultimate layer serves as features for FID and related metrics where images are too small for
Inception.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from varjax.errors import check_setting
from varjax.trees import PyTree

SMALLEST, LARGEST = 8, 256  # pixels of a side
LAST_SIDE = 8  # largest side of the last map
FIRST_WIDTH, LAST_WIDTH = 32, 128  # channels of the first map, and most of any map
FEATURES = 128  # units of the penultimate layer
DROPOUT = 0.3, 0.4  # fractions dropped in training: of the last map, and of the features
STEM_KERNEL, KERNEL = 5, 3


@dataclasses.dataclass(frozen=True)
class ConvNetConfig:
    """Describes a network of strided convolutions and two dense layers.

        ConvNetConfig.for_images((28, 28), classes=10)

    Attributes:
        image_size: (height, width) of the images, in pixels.
        classes: number of classes that it distinguishes.
        widths: channels of each map; every convolution halves the side.
        features: units of the penultimate layer.
    """

    image_size: tuple[int, int]
    classes: int
    widths: tuple[int, ...]
    features: int = FEATURES

    def __post_init__(self):
        sides = len(self.image_size) == 2 and all(
            SMALLEST <= side <= LARGEST for side in self.image_size
        )
        allowed = f"two numbers from {SMALLEST} to {LARGEST}"
        check_setting("image_size", self.image_size, sides, allowed)
        check_setting("classes", self.classes, self.classes >= 2, "2 or more")
        valid = 1 <= len(self.widths) <= 8 and all(1 <= width <= 1024 for width in self.widths)
        check_setting("widths", self.widths, valid, "1 to 8 numbers from 1 to 1024")
        check_setting("features", self.features, 1 <= self.features <= 4096, "from 1 to 4096")

    @classmethod
    def for_images(cls, image_size: tuple[int, int], classes: int) -> "ConvNetConfig":
        """Chooses the number of maps by the size: the last one has at most 8 by 8 positions."""
        side, widths = (max(image_size) + 1) // 2, [FIRST_WIDTH]
        while side > LAST_SIDE:
            side = (side + 1) // 2
            widths.append(min(2 * widths[-1], LAST_WIDTH))
        return cls(image_size, classes, tuple(widths))

    def init(self, key: jax.Array) -> PyTree:
        """Draws untrained parameters."""
        return ConvNet(self).init(key, jnp.zeros((1, *self.image_size, 3), jnp.uint8))["params"]

    def outputs(
        self, params: PyTree, image_BHWC: jax.Array, dropout_key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Computes {"pool_BD": features, "logits_BV"} of RGB images (B, H, W, 3), uint8.

        Args:
            params: parameters of the network.
            image_BHWC: images, 0 … 255.
            dropout_key: random key of the dropout in training; None for none.
        """
        outputs = ConvNet(self).apply({"params": params}, image_BHWC, dropout_key)
        assert isinstance(outputs, dict)
        return outputs


class ConvNet(nn.Module):
    """Computes features and logits of images.

    outputs = ConvNet(config).apply({"params": params}, image_BHWC)
    """

    config: ConvNetConfig

    @nn.compact
    def __call__(
        self, image_BHWC: jax.Array, dropout_key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Computes {"pool_BD", "logits_BV"}, float32; see `ConvNetConfig.outputs`."""
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        drop = [nn.Dropout(fraction, deterministic=dropout_key is None) for fraction in DROPOUT]
        # Full precision: TF32 or bfloat16 would change features from device to device.
        x_BHWC = image_BHWC.astype(jnp.float32) / 255 - 0.5
        for i, width in enumerate(self.config.widths):
            kernel = KERNEL if i else STEM_KERNEL
            convolution = nn.Conv(width, (kernel, kernel), 2, precision="highest", name=f"conv{i}")
            x_BHWC = nn.relu(convolution(x_BHWC))
        flat_BD = drop[0](x_BHWC.reshape(len(x_BHWC), -1), rng=keys[0])
        pool_BD = nn.relu(nn.Dense(self.config.features, precision="highest", name="pool")(flat_BD))
        head = nn.Dense(self.config.classes, precision="highest", name="head")
        return {"pool_BD": pool_BD, "logits_BV": head(drop[1](pool_BD, rng=keys[1]))}
