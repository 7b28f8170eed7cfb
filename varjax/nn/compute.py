"""How a model is computed, apart from what it is: none of these choices changes its weights."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

Attention = Literal["auto", "xla", "loop", "cudnn"]
Remat = Literal["none", "block", "dots"]
BATCH_AXES = ("data", "fsdp")  # the mesh axes that share out a batch: training/sharding.py


@dataclasses.dataclass(frozen=True)
class Compute:
    """Number format and execution of a transformer.

    dtype: format of matrix products and of the residual stream. "auto" is bfloat16 on an
        accelerator and float32 on a CPU. Softmax, norms, logits and parameters are always float32.
    attention: "xla" runs anywhere; "cudnn" is the fused kernel (NVIDIA, bfloat16); "loop" goes
        over images and heads, which suits a CPU. "auto" is "loop" on a CPU, unless it plays several
        devices: a loop over images cannot be spread; and "xla" elsewhere.
    remat: what the backward pass recomputes: "none", all of a "block", or all but matrix products
        ("dots").
    unroll: unroll the layers instead of scanning them: slower to compile, faster for tiny models.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Attention = "auto"
    remat: Remat = "none"
    unroll: bool = False

    @property
    def jax_dtype(self) -> jnp.dtype:
        """The format that "auto" stands for on this machine."""
        if self.dtype == "auto":
            return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
        return jnp.dtype(self.dtype)

    @property
    def attention_here(self) -> Attention:
        """The implementation that "auto" stands for on this machine."""
        if self.attention == "auto":
            return "loop" if alone_on_a_cpu() else "xla"
        return self.attention


def precision_of(dtype) -> str | None:
    """float32 means float32: without this, GPUs use TF32 and TPUs bfloat16, and tokens flip."""
    return "highest" if jnp.dtype(dtype) == jnp.float32 else None


def spread_rows(x: jax.Array) -> jax.Array:
    """x, its leading axis shared out as the batch is, where a mesh is set and divides it; else x.

    Left alone, XLA may follow the weights and split the width of the activations instead, so that
    every device computes the whole batch. The gradient of x is held to the same.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in mesh.auto_axes if name in BATCH_AXES)
    if x.shape[0] % math.prod(mesh.shape[name] for name in axes):
        return x
    return jax.lax.with_sharding_constraint(x, P(axes)) if axes else x


def alone_on_a_cpu() -> bool:
    """Where going over a batch one by one is fastest: a loop cannot be spread over devices."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1
