import jax
import numpy as np
import pytest
from PIL import Image

from varjax.runtime import reproducibility
from varjax.runtime.reproducibility import jax_draws, pixels_digest


def test_digests_are_stable():
    # With a release that changes it, runs cannot continue exactly.
    assert reproducibility.random_numbers_digest() == "0b98856e58ffbb5c"
    assert pixels_digest() == pixels_digest.__wrapped__()  # differs between releases of Pillow


def test_jax_flags_change_the_draws():
    found = {jax_draws()["random_numbers"]}
    for implementation in ("rbg", "unsafe_rbg"):
        with jax.default_prng_impl(implementation):
            assert jax_draws()["jax_default_prng_impl"] == implementation
            found.add(jax_draws()["random_numbers"])
    with jax.threefry_partitionable(not jax.config.jax_threefry_partitionable):
        found.add(jax_draws()["random_numbers"])
    assert len(found) == 4


def test_rounding_on_other_devices_does_not_change_the_draws():
    drawn = np.asarray(reproducibility._draw_with_jax("threefry2x32")["normal"]) * 8
    assert np.abs(drawn - np.floor(drawn) - 0.5).min() > 0.01  # thousands of rounding errors


@pytest.mark.parametrize("change", ["decoder", "resizing"])
def test_another_decoder_or_resizing_changes_the_pixels(monkeypatch, change):
    before = pixels_digest()
    if change == "resizing":
        whole = Image.Image.resize
        swap = {Image.Resampling.LANCZOS: Image.Resampling.HAMMING}
        monkeypatch.setattr(
            Image.Image, "resize", lambda self, size, kind: whole(self, size, swap.get(kind, kind))
        )
    else:
        whole = reproducibility.decode_picture
        monkeypatch.setattr(
            reproducibility, "decode_picture", lambda *a: whole(*a).point(lambda x: min(x + 1, 255))
        )
    assert pixels_digest.__wrapped__() != before
