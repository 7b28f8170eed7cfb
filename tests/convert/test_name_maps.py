import json

import jax
import numpy as np
import pytest

from tests.golden import weights
from tests.helpers import golden_cases as golden
from varjax.checkpoints.weights import abstract_params
from varjax.convert import apply_map
from varjax.convert.name_maps.name_map import count_numbers, tensor_shape
from varjax.tokenizers.vq.model import VQConfig
from varjax.var.model import VARConfig

OFFICIAL = json.loads((weights.HERE / "official_state_dicts.json").read_text())
PARAMETERS = {
    "vae_ch160v4096z32": 108_948_355,
    "var_d16": 310_283_520,
    "var_d20": 600_917_136,
    "var_d24": 1_033_399_360,
    "var_d30": 2_010_020_356,
    "var_d36": 2_353_893_904,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFICIAL)
def test_name_maps_and_buffers_match_the_released_models(name):
    var = name.startswith("var")
    config = VARConfig.preset(name.removeprefix("var_")) if var else VQConfig()
    sizes = [leaf.size for leaf in jax.tree.leaves(abstract_params(config))]
    assert sum(sizes) == PARAMETERS[name]
    buffers = {n: x.shape for n, x in apply_map.official_buffers(config).items()}
    assert not any(map(apply_map.is_weight, buffers))
    expected = {n: tuple(shape) for n, shape in OFFICIAL[name].items()}
    assert apply_map.official_shapes(config) | buffers == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.CASES)
def test_the_round_trip_is_exact(name):
    tokenizer, var = golden.configs(name)
    for part, config, params in (
        ("vae", tokenizer, golden.tokenizer_params(name)),
        ("var", var, golden.var_params(name)),
    ):
        back = apply_map.to_official(config, params)
        official = weights.state_dict(name, part)
        assert back.keys() == official.keys()
        for key, tensor in official.items():
            assert back[key].shape == tensor.shape and np.array_equal(back[key], tensor), key


def test_one_error_lists_every_problem():
    _, config = golden.configs("base")
    tensors = weights.state_dict("base", "var")
    del tensors["head.bias"]
    tensors["extra"] = np.zeros(3)
    tensors["pos_start"] = np.zeros((1, 2, 48))
    tensors["word_embed.bias"] = np.zeros(48, int)
    tensors["lvl_1L"] = np.zeros((1, 30))  # a buffer; not a problem
    with pytest.raises(ValueError) as error:
        apply_map.lazy_leaves(config, tensors)
    text = str(error.value)
    assert "missing: head.bias (64,)" in text and "unexpected: extra (3,)" in text
    assert "misshapen: pos_start is (1, 2, 48), expected (1, 1, 48)" in text
    assert "mistyped: word_embed.bias is int64" in text
    assert "lvl_1L" not in text


def test_implausible_sizes_and_layer_counts_are_refused():
    shapes = {"none": (0, 3), "many": (2**20 + 1, 3), "row": (3,)}
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    for name, problem in {
        "none": "sizes are from 1",
        "many": "to 1048576",
        "row": "must have 2",
    }.items():
        with pytest.raises(ValueError, match=f"{name} has shape .*{problem}"):
            tensor_shape(tensors, name, 2)
    names = [f"blocks.{i}.x" for i in range(257)]
    assert count_numbers(names[:256], r"blocks\.(\d+)\.") == 256
    with pytest.raises(ValueError, match="it has 257 layers"):
        count_numbers(names, r"blocks\.(\d+)\.")


@pytest.mark.parametrize("levels, blocks", [(11, 1), (8, 6)])
def test_tokenizers_with_too_many_levels_or_blocks_are_refused(levels, blocks):
    with pytest.raises(ValueError, match="allowed are 10 levels with 40 blocks together"):
        VQConfig(channel_mult=(1,) * levels, blocks=blocks)


def test_a_long_list_of_problems_is_truncated():
    _, config = golden.configs("base")
    tensors = weights.state_dict("base", "var")
    tensors |= {f"extra.{i}": np.zeros((1,) * 64) for i in range(10**4)}
    with pytest.raises(ValueError, match="… and 9950 more") as error:
        apply_map.lazy_leaves(config, tensors)
    assert len(str(error.value)) < 4000
