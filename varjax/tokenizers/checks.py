"""What is wrong with settings, said before any long work."""

from varjax.core.errors import InputError
from varjax.tokenizers.vq.model import VQConfig


def check_images(model: VQConfig, image_shape: tuple[int, int, int]) -> None:
    """Raises InputError where a tokenizer does not take images of (H, W, channels)."""
    if tuple(image_shape) != model.image_shape:
        raise InputError(
            f"the data's images are {tuple(image_shape)}, but the tokenizer takes "
            f"{model.image_shape} (height, width, channels); change the data, or the tokenizer's "
            "scales, multipliers or image_channels"
        )


def check_share(name: str, value: float) -> None:
    """Raises InputError where a probability or the decay of an average lies outside of [0, 1]."""
    if not 0 <= value <= 1:
        raise InputError(f"{name}={value}: must lie in [0, 1]")
