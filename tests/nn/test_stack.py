import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax.errors import ScopeParamShapeError

from varjax.errors import InputError
from varjax.nn.compute import ComputeConfig
from varjax.nn.stack import init_stack, run_stack, stacked_param

drawn = []  # grows whenever the initialization of the layers is traced


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x_BlC, cache):
        return x_BlC + nn.Dense(x_BlC.shape[-1], name="dense")(x_BlC), cache


class Stack(nn.Module):
    depth: int
    width: int = 4

    def setup(self):
        self.layers = stacked_param(self, "layers", self._init_layers, self.depth)

    def __call__(self, x_BlC):
        return run_stack(Layer(parent=None), self.layers, x_BlC, ComputeConfig())[0]

    def _init_layers(self, key):
        drawn.append(self.depth)
        x_BlC = jnp.zeros((1, 1, self.width))
        return init_stack(lambda key: Layer(parent=None).init(key, x_BlC, None), key, self.depth)


X_BLC = jnp.ones((2, 3, 4))


def test_applying_a_stack_does_not_trace_its_initialization():
    variables = jax.eval_shape(Stack(3).init, jax.random.key(0), X_BLC)
    assert variables["params"]["layers"]["dense"]["kernel"].shape == (3, 4, 4)
    drawn.clear()
    assert jax.eval_shape(Stack(3).apply, variables, X_BLC).shape == (2, 3, 4)
    assert not drawn


def test_parameters_of_another_depth_or_width_are_refused():
    variables = jax.eval_shape(Stack(3).init, jax.random.key(0), X_BLC)
    with pytest.raises(InputError, match="layers: the parameters have 3 layers, but .* has 2"):
        jax.eval_shape(Stack(2).apply, variables, X_BLC)
    with pytest.raises(ScopeParamShapeError):
        jax.eval_shape(Stack(3).apply, variables, X_BLC[..., :2])
