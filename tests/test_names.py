import functools
import json

import jax
import numpy as np
import pytest

from tests import golden_cases as golden
from tests.golden import weights
from varjax.convert import names
from varjax.tokenizer.model import TokenizerConfig, init_tokenizer
from varjax.var.model import VARConfig, init_var

OFFICIAL = json.loads((weights.HERE / "official_state_dicts.json").read_text())
PARAMETERS = {
    "vae_ch160v4096z32": 108_948_355,
    "var_d16": 310_283_520,
    "var_d20": 600_917_136,
    "var_d24": 1_033_399_360,
    "var_d30": 2_010_020_356,
    "var_d36": 2_353_893_904,
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_tables_name_every_tensor_of_the_released_models(name):
    if name.startswith("var"):
        config = VARConfig.preset(name.removeprefix("var_"))
        table, init = names.var_table(config), init_var
    else:
        config = TokenizerConfig()
        table, init = names.tokenizer_table(config), init_tokenizer
    abstract = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == PARAMETERS[name]
    expected = {
        n: tuple(shape)
        for n, shape in OFFICIAL[name].items()
        if n.split(".")[-1] not in names.BUFFERS
    }
    assert names.official_shapes(table, abstract) == expected


@pytest.mark.parametrize("name", golden.CASES)
def test_there_and_back_is_exact(name):
    tokenizer, var = golden.configs(name)
    for part, table, params in (
        ("vae", names.tokenizer_table(tokenizer), golden.tokenizer_params(name)),
        ("var", names.var_table(var), golden.var_params(name)),
    ):
        back = dict(names.to_official(table, params))
        official = weights.state_dict(name, part)
        assert back.keys() == official.keys()
        for key, tensor in official.items():
            assert np.array_equal(back[key], tensor), key


def test_one_error_lists_every_problem():
    _, config = golden.configs("base")
    abstract = jax.eval_shape(functools.partial(init_var, config), jax.random.key(0))
    tensors = weights.state_dict("base", "var")
    del tensors["head.bias"]
    tensors["extra"] = np.zeros(3)
    tensors["pos_start"] = np.zeros((1, 2, 48))
    tensors["lvl_1L"] = np.zeros((1, 30))  # a buffer, which is no problem
    with pytest.raises(ValueError) as error:
        names.from_official(names.var_table(config), abstract, tensors)
    text = str(error.value)
    assert "missing: head.bias (64,)" in text and "unexpected: extra (3,)" in text
    assert "misshapen: pos_start is (1, 2, 48), needed is (1, 1, 48)" in text
    assert "lvl_1L" not in text
