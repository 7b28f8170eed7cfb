"""How a model is computed, apart from what it is: none of these choices changes its weights."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

Attention = Literal["auto", "xla", "loop", "cudnn"]
Remat = Literal["none", "block", "dots"]
BATCH_AXES = ("data", "fsdp")  # the mesh axes that share out a batch: training/sharding.py


@dataclasses.dataclass(frozen=True)
class Compute:
    """Number format and execution of a transformer; changes how, not what it computes.

    Attributes:
        dtype: format of matrix products and of the residual stream. "auto" is bfloat16 on an
            accelerator and float32 on a CPU. Softmax, norms, logits and parameters are always
            float32.
        attention: "xla" runs anywhere; "cudnn" is the fused kernel (NVIDIA, bfloat16); "loop" goes
            over images and heads, which suits a CPU. "auto" is "loop" on a CPU, unless it plays
            several devices: a loop over images cannot be spread; and "xla" elsewhere.
        remat: what the backward pass recomputes: "none", all of a "block", or all but matrix
            products ("dots").
        unroll: unroll the layers instead of scanning them: slower to compile, faster for tiny
            models.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Attention = "auto"
    remat: Remat = "none"
    unroll: bool = False

    @property
    def jax_dtype(self) -> jnp.dtype:
        """The number format, with "auto" decided for this machine."""
        if self.dtype == "auto":
            return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
        return jnp.dtype(self.dtype)

    @property
    def attention_implementation(self) -> Attention:
        """The implementation of attention, with "auto" decided for this machine."""
        if self.attention == "auto":
            return "loop" if is_single_cpu_device() else "xla"
        return self.attention


def matmul_precision(dtype) -> str | None:
    """Returns the `precision` of products: else GPUs use TF32 for float32, TPUs bfloat16."""
    return "highest" if jnp.dtype(dtype) == jnp.float32 else None


def checkpoint_layer(layer: Callable[..., Any], compute: Compute) -> Callable[..., Any]:
    """Wraps a layer so that its backward pass recomputes what `compute.remat` says."""
    if compute.remat == "none":
        return layer
    saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(layer, policy=saved if compute.remat == "dots" else None)


def shard_batch(x: jax.Array) -> jax.Array:
    """Shards the leading axis of x as the batch is, where a mesh is set and divides it.

    Left alone, XLA may follow the weights and split the width of the activations instead, so that
    every device computes the whole batch. The gradient of x is held to the same.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in mesh.auto_axes if name in BATCH_AXES)
    if x.shape[0] % math.prod(mesh.shape[name] for name in axes):
        return x
    return jax.lax.with_sharding_constraint(x, P(axes)) if axes else x


def is_single_cpu_device() -> bool:
    """Tells whether a loop over a batch pays: on a CPU, and not where devices share it out."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1
