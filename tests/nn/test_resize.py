import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import weights
from varjax.nn import resize
from varjax.tokenizers.vq.pyramid import Pyramid
from varjax.var.kept_scales import keep_at_every_scale

FUNCTIONS = weights.outputs("functions")


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n.startswith(("area", "bicubic"))])
def test_resize_matrices_match_pytorch(name):
    kind, size, out = name.split(".")
    matrix = {"area": resize.area_matrix, "bicubic": resize.bicubic_matrix}[kind]
    np.testing.assert_allclose(matrix(int(size), int(out)), FUNCTIONS[name], atol=1e-6)


def test_height_and_width_are_resized_separately():
    x_BhwC = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6, 3)), jnp.float32)
    expected = np.einsum(
        "Hh,bhwc,Ww->bHWc", resize.area_matrix(4, 3), x_BhwC, resize.area_matrix(6, 2)
    )
    np.testing.assert_allclose(resize.area(x_BhwC, (3, 2)), expected, atol=1e-6)


@pytest.mark.parametrize("side", [4, 6, 13])
def test_edit_masks_match_reference(side):
    keep_Bhw = FUNCTIONS["edit_mask.16.16"][None]
    keep_BL = keep_at_every_scale(Pyramid((1, side, 16)), keep_Bhw)
    assert keep_BL[0, 0]
    expected = FUNCTIONS[f"edit_mask.16.{side}"].ravel()
    assert np.array_equal(keep_BL[0, 1 : 1 + side * side], expected)
