"""How a model is computed, apart from what it is: none of these choices changes its weights."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend import backend
from jax.sharding import PartitionSpec as P

from varjax.nn.precision import Precision

Attention = Literal["auto", "xla", "grouped", "loop", "cudnn"]
Remat = Literal["none", "block", "dots"]
Platform = Literal["auto", "cpu", "gpu", "tpu"]
ENCODER_PRECISIONS: dict[str, Precision] = {"tpu": "bfloat16_3x", "gpu": "tf32_3x"}
BATCH_AXES = ("data", "fsdp")  # the mesh axes that share out a batch: training/sharding.py


@dataclasses.dataclass(frozen=True)
class Compute:
    """Number format and execution of a model; changes how, not what it computes.

    Attributes:
        dtype: format of matrix products and of the residual stream. "auto" is bfloat16 on an
            accelerator and float32 on a CPU. Softmax, norms, logits and parameters are always
            float32.
        attention: "xla" runs anywhere; "grouped" is "xla" for so few images at a time that their
            logits stay in a TPU's fast memory; "cudnn" is the fused kernel, for 64 queries or more
            (NVIDIA, bfloat16); "loop" goes over images and heads, which suits a CPU. "auto" is
            "loop" on a CPU, unless it plays several devices: a loop over images cannot be spread;
            "cudnn" on NVIDIA in bfloat16; "grouped" on TPUs where there is a key-value cache; and
            "xla" elsewhere.
        remat: what the backward pass recomputes: "none", all of a "block", or all but matrix
            products ("dots").
        unroll: unroll the layers instead of scanning them: slower to compile, faster for tiny
            models.
        encoder_precision: products of a frozen tokenizer's encoder, whose numbers are float32; see
            `nn/precision.py`. "auto" is "bfloat16_3x" on TPUs, "tf32_3x" on GPUs, and "highest" on
            a CPU. Pipelines and evaluation use "highest" whatever it says.
        platform: what programs are compiled for: "cpu" (a single device), "gpu" (NVIDIA) or "tpu";
            "auto" is the machine that this is.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Attention = "auto"
    remat: Remat = "none"
    unroll: bool = False
    encoder_precision: Literal["auto", Precision] = "auto"
    platform: Platform = "auto"

    @property
    def target(self) -> str:
        """The platform, with "auto" decided for this machine."""
        return jax.default_backend() if self.platform == "auto" else self.platform

    @property
    def jax_dtype(self) -> jnp.dtype:
        """The number format, with "auto" decided for the platform."""
        if self.dtype == "auto":
            return jnp.dtype("float32" if self.target == "cpu" else "bfloat16")
        return jnp.dtype(self.dtype)

    def attention_implementation(self, cached: bool = False) -> Attention:
        """Returns the implementation of attention, with "auto" decided for the platform.

        cached: whether earlier keys come from a cache, so that there is no gradient.
        """
        if self.attention != "auto":
            return self.attention
        if self.loops_over_images:
            return "loop"
        if self.target == "tpu" and cached:
            return "grouped"
        nvidia = self.target == "gpu" and (self.platform == "gpu" or not _is_rocm())
        return "cudnn" if nvidia and self.jax_dtype == jnp.bfloat16 else "xla"

    @property
    def loops_over_images(self) -> bool:
        """Whether a loop over a batch pays: on a CPU, and not where devices share it out."""
        return self.target == "cpu" and (self.platform == "cpu" or jax.device_count() == 1)

    @property
    def frozen_encoder(self) -> Precision:
        """The precision of a frozen tokenizer's encoder, with "auto" decided for the platform."""
        if self.encoder_precision != "auto":
            return self.encoder_precision
        return ENCODER_PRECISIONS.get(self.target, "highest")

    def identity(self) -> dict[str, Any]:
        """Returns what sampled images depend on, as JSON data."""
        return {
            "dtype": str(self.jax_dtype),
            "attention": self.attention,
            "remat": self.remat,
            "unroll": self.unroll,
        }


# What a tokenizer is evaluated with, and what pipelines and caches encode images with.
EXACT = Compute(dtype="float32", encoder_precision="highest")


def matmul_precision(dtype) -> str | None:
    """Returns the `precision` of products: else GPUs use TF32 for float32, TPUs bfloat16."""
    return "highest" if jnp.dtype(dtype) == jnp.float32 else None


def _is_rocm() -> bool:
    """Tells AMD's GPUs from NVIDIA's, which JAX calls by one name."""
    return "rocm" in backend.get_backend().platform_version


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
    axes = _batch_axes()
    if not axes or x.shape[0] % batch_devices():
        return x
    return jax.lax.with_sharding_constraint(x, P(axes))


def batch_devices() -> int:
    """Returns how many devices share out a batch, by the mesh that is set; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in _batch_axes())


def _batch_axes() -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in mesh.auto_axes if name in BATCH_AXES)
