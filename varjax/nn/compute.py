"""Settings for how a model is computed; none of them changes its weights."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend import backend
from jax.sharding import PartitionSpec as P

from varjax.config import config_tree
from varjax.errors import InputError

AttentionImpl = Literal["auto", "xla", "grouped", "loop", "cudnn", "splash"]
FUSED_ATTENTION = ("cudnn", "splash")  # kernels, which have no dropout
Remat = Literal["none", "block", "dots"]
Precision = Literal["highest", "bfloat16_3x", "tf32_3x", "tf32", "bfloat16"]
MANTISSA_BITS = {"bfloat16": 7, "tf32": 10}
# What a machine does by itself, by XLA's names; TPUs multiply bfloat16, NVIDIA's GPUs TF32.
NATIVE = {
    ("tpu", "bfloat16_3x"): "high",
    ("tpu", "bfloat16"): "default",
    ("gpu", "tf32"): "default",
}
Platform = Literal["auto", "cpu", "gpu", "tpu"]
ENCODER_PRECISIONS: dict[str, Precision] = {"tpu": "bfloat16_3x", "gpu": "tf32_3x"}
BATCH_AXES = ("data", "fsdp")  # the mesh axes that shard a batch: training/sharding.py
TENSOR_AXIS = "tensor"  # the one that shards heads


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """Configures the dtype and execution of a model: how it computes, not what.

    Raises InputError for a value that is not allowed.

        model = varjax.load("runs/digits", compute=varjax.ComputeConfig(dtype="bfloat16"))

    Attributes:
        dtype: dtype of matmuls and, in VAR's training, of the residual stream.
            "auto" is bfloat16 on an accelerator and float32 on a CPU. Softmax, norms, logits,
            parameters in training, and MAR's residual streams are always float32.
        attention_impl: implementation of attention. "xla" runs anywhere; "grouped" is "xla", but
            with a key-value cache it processes images in groups whose logits fit into a TPU's fast
            memory; "cudnn" is the fused kernel, for 64 queries or more (NVIDIA, bfloat16); "splash"
            is JAX's fused kernel for TPUs, in training in bfloat16 (never measured, so "auto" does
            not choose it; docs/benchmarks.md has estimates); "loop" loops over images and heads,
            which suits a CPU. "auto" is "loop" on a CPU with one device (a loop over images cannot
            be spread over several); "cudnn" on NVIDIA (Ampere or later) in bfloat16; "grouped" on
            TPUs with a key-value cache; and "xla" elsewhere.
        remat: what the backward pass recomputes: "none", all of a "block", or all but matmuls
            ("dots"). "dots" is faster than "none" even for large models, because a scan over layers
            copies what it stores.
        unroll: whether to unroll the layers instead of scanning them. Unrolling is slower to
            compile, but avoids the copies that a scan makes for the backward pass
            (docs/benchmarks.md), and makes tiny models faster.
        encoder_precision: precision of the matmuls in a frozen tokenizer's encoder, whose numbers
            are float32; see `float32_convolution`. "auto" is "bfloat16_3x" on TPUs, "tf32_3x" on
            GPUs, and "highest" on a CPU. Pipelines, caches and `varjax evaluate-tokenizer` always
            use "highest".
        platform: platform to compile for: "cpu" (a single device), "gpu" (NVIDIA, Ampere or later)
            or "tpu"; "auto" for this machine's.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention_impl: AttentionImpl = "auto"
    remat: Remat = "none"
    unroll: bool = False
    encoder_precision: Literal["auto", Precision] = "auto"
    platform: Platform = "auto"

    def __post_init__(self):
        config_tree.check_types(self)

    @property
    def target(self) -> str:
        """The platform, with "auto" decided for this machine."""
        return jax.default_backend() if self.platform == "auto" else self.platform

    @property
    def jax_dtype(self) -> jnp.dtype:
        """The dtype, with "auto" decided for the platform."""
        if self.dtype == "auto":
            return jnp.dtype("float32" if self.target == "cpu" else "bfloat16")
        return jnp.dtype(self.dtype)

    def attention_implementation(self, cached: bool = False) -> AttentionImpl:
        """Returns the implementation of attention, with "auto" decided for the platform.

        cached: whether earlier keys come from a cache, so that there is no gradient.

        Raises InputError for a fused kernel that the platform does not have.
        """
        if self.attention_impl == "grouped" and not cached:
            return "xla"
        if self.attention_impl == "splash":
            if self.target != "tpu":
                raise InputError(
                    f"attention_impl=splash: this kernel is for TPUs, not for {self.target}; "
                    "choose auto"
                )
            return "grouped" if cached else "splash"
        # In formats other than bfloat16, attention is not fused, on any machine.
        fused = self.attention_impl == "cudnn" and self.jax_dtype == jnp.bfloat16
        if fused and not self._has_cudnn:
            raise InputError(
                "attention_impl=cudnn: this kernel is for NVIDIA's GPUs, Ampere or later, not for "
                f"this {self.target}; choose auto"
            )
        if self.attention_impl != "auto":
            return self.attention_impl
        if self.loops_over_images:
            return "loop"
        if self.target == "tpu" and cached:
            return "grouped"
        return "cudnn" if self._has_cudnn and self.jax_dtype == jnp.bfloat16 else "xla"

    @property
    def _has_cudnn(self) -> bool:
        return self.target == "gpu" and (self.platform == "gpu" or _has_fused_attention())

    @property
    def loops_over_images(self) -> bool:
        """Whether a loop over a batch pays: on a CPU, and not where devices shard it."""
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
            "attention_impl": self.attention_impl,
            "remat": self.remat,
            "unroll": self.unroll,
        }


# What a tokenizer is evaluated with, and what pipelines and caches encode images with.
EXACT = ComputeConfig(dtype="float32", encoder_precision="highest")


def without_repeated_work(compute: ComputeConfig) -> ComputeConfig:
    """Returns settings with which each product of a model occurs once, for counting FLOP.

    Fused kernels hide products; what is recomputed, or multiplied in three passes, is not part of
    the model's work.
    """
    return dataclasses.replace(
        compute, remat="none", attention_impl="xla", encoder_precision="highest"
    )


def matmul_precision(dtype) -> str | None:
    """Returns the `precision` of products: else GPUs use TF32 for float32, TPUs bfloat16."""
    return "highest" if jnp.dtype(dtype) == jnp.float32 else None


def _has_fused_attention() -> bool:
    """Returns whether the GPU here is NVIDIA's, of Ampere or later: older ones have no kernel."""
    if "rocm" in backend.get_backend().platform_version:
        return False
    return float(jax.local_devices()[0].compute_capability) >= 8.0


def checkpoint_layer(layer: Callable[..., Any], compute: ComputeConfig) -> Callable[..., Any]:
    """Wraps a layer so that its backward pass recomputes what `compute.remat` says."""
    if compute.remat == "none":
        return layer
    saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(layer, policy=saved if compute.remat == "dots" else None)


def shard_batch(x: jax.Array) -> jax.Array:
    """Shards the leading axis of x like the batch, if the current mesh divides it.

    Left alone, XLA may follow the weights and split the width of the activations instead, so that
    every device computes the whole batch. The gradient of x is sharded alike.
    """
    axes = batch_axes()
    if not axes or x.shape[0] % batch_devices():
        return x
    return jax.lax.with_sharding_constraint(x, P(axes))


def split_batch(x: jax.Array, pieces: int) -> jax.Array:
    """Cuts a batch (B, …) into (pieces, B/pieces, …).

    A piece takes rows at equal distances, so that each device of a mesh keeps the rows it has.
    """
    return x.reshape(len(x) // pieces, pieces, *x.shape[1:]).swapaxes(0, 1)


def batch_devices() -> int:
    """Returns how many devices of the current mesh shard a batch; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in batch_axes())


def batch_axes() -> tuple[str, ...]:
    """Returns the axes of the current mesh along which XLA shards the batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in mesh.auto_axes if name in BATCH_AXES)


def head_axis() -> str | None:
    """Returns the axis of the current mesh along which XLA shards heads; None without one."""
    return TENSOR_AXIS if TENSOR_AXIS in jax.sharding.get_abstract_mesh().auto_axes else None


def divides_attention(q_BlAD: jax.Array) -> bool:
    """Returns whether the devices of the current mesh divide the images and heads of queries."""
    axis = head_axis()
    heads = jax.sharding.get_abstract_mesh().shape[axis] if axis else 1
    return not q_BlAD.shape[0] % batch_devices() and not q_BlAD.shape[2] % heads


def on_each_device(
    attend: Callable[..., jax.Array],
    q_BlAD: jax.Array,
    k_BLAD: jax.Array,
    v_BLAD: jax.Array,
    key_mask_BL: jax.Array | None = None,
) -> jax.Array:
    """Calls a kernel on each device of the current mesh, for the images and heads of this device.

    XLA cannot divide a kernel among devices. JAX's rules for dividing cuDNN's ask for queries, keys
    and values that are sharded alike, but split only the queries by head if the output is.

    Args:
        attend: called with the other arguments, without those that are None.
        q_BlAD: queries, whose images and heads the devices divide (`divides_attention`).
        k_BLAD: keys of L tokens.
        v_BLAD: values of L tokens.
        key_mask_BL: keys that may be attended to; None for all.

    Returns:
        What `attend` returns, of all images and heads: (B, l, A, D).
    """
    arrays = [q_BlAD, k_BLAD, v_BLAD] + [key_mask_BL] * (key_mask_BL is not None)
    if axes := batch_axes():
        part = P(axes, None, head_axis())
        specs = (part, part, part, P(axes))[: len(arrays)]
        attend = jax.shard_map(attend, in_specs=specs, out_specs=part, check_vma=False)
    return attend(*arrays)


@dataclasses.dataclass(frozen=True)
class ConvFormat:
    """How convolutions compute.

    Attributes:
        dtype: dtype of inputs and outputs.
        precision: precision of the products if `dtype` is float32; see `float32_convolution`.
        platform: platform to compile for; see `float32_convolution`. "cpu" also upsamples in the
            way that suits a CPU: nn/upsampling.py.
    """

    dtype: Any = jnp.float32
    precision: Precision = "highest"
    platform: str = "cpu"

    @property
    def convolution(self) -> Callable[..., jax.Array] | None:
        """The convolution for `nn.Conv`; None for its default."""
        if jnp.dtype(self.dtype) != jnp.float32:
            return None
        return float32_convolution(self.precision, self.platform)


def float32_convolution(precision: Precision, platform: str) -> Callable[..., jax.Array]:
    """Returns `jax.lax.conv_general_dilated` of float32 numbers with products of a precision.

    Args:
        precision: "highest" is float32; "bfloat16" and "tf32" round both operands; with "_3x",
            three products of rounded numbers replace one and leave out only the product of the
            rounding errors.
        platform: "cpu", "gpu" or "tpu". If the machine does not support the precision, operands are
            rounded first: the results are equal, but no faster.
    """

    def convolution(lhs: jax.Array, rhs: jax.Array, *args: Any, **options: Any) -> jax.Array:
        def product(a: jax.Array, b: jax.Array, by: str) -> jax.Array:
            return jax.lax.conv_general_dilated(a, b, *args, **(options | {"precision": by}))

        if precision == "highest":
            return product(lhs, rhs, "highest")
        if (platform, precision) in NATIVE:
            return product(lhs, rhs, NATIVE[platform, precision])
        short, three, _ = precision.partition("_3x")
        # Operands that are rounded already lose nothing in the machine's own short format.
        by = NATIVE.get((platform, short), "highest")
        lhs_high, rhs_high = (_rounded(x, short) for x in (lhs, rhs))
        y = product(lhs_high, rhs_high, by)
        if three:
            lhs_low, rhs_low = _rounded(lhs - lhs_high, short), _rounded(rhs - rhs_high, short)
            y = y + (product(lhs_low, rhs_high, by) + product(lhs_high, rhs_low, by))
        return y

    return convolution


def _rounded(x: jax.Array, short: str) -> jax.Array:
    """Rounds float32 numbers to a shorter format; they stay float32."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=MANTISSA_BITS[short])
