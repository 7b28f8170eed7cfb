import json

import numpy as np
import pytest

from tests.golden import weights
from varjax.nn.attention import block_causal_mask
from varjax.tokenizers.vq.pyramid import SCALES_256, SCALES_512, SCALES_1024, Pyramid


@pytest.mark.parametrize(
    "scales, length", [(SCALES_256, 680), (SCALES_512, 2240), (SCALES_1024, 9451)]
)
def test_official_scale_lists_have_their_published_number_of_tokens(scales, length):
    assert Pyramid(scales).length == length


def test_phi_index_matches_reference_even_where_rounding_decides():
    cases = json.loads((weights.HERE / "phi_index.json").read_text())
    for name, expected in cases.items():
        scales, num_phi = (int(part.split("=")[1]) for part in name.split())
        assert list(Pyramid(tuple(range(1, scales + 1))).phi_index(num_phi)) == expected, name


def test_slices_levels_and_mask_are_consistent():
    pyramid = Pyramid((1, (1, 2), (2, 3)))
    assert pyramid.lengths == (1, 2, 6) and pyramid.finest == (2, 3)
    for k, scale in enumerate(pyramid.slices):
        assert np.all(pyramid.level_L[scale] == k)
    mask_LL = block_causal_mask(pyramid.level_L)
    for i, j in np.ndindex(9, 9):
        assert mask_LL[i, j] == (pyramid.level_L[j] <= pyramid.level_L[i])


@pytest.mark.parametrize(
    "scales", [(), (0, 1), (2, 1), ((2, 3), (3, 2)), (1,) * 65, (257,), (1, 2**40)]
)
def test_invalid_scales_are_refused(scales):
    with pytest.raises(ValueError, match="scales"):
        Pyramid(scales)
