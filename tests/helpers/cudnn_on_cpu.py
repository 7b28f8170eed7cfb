"""Lets CPUs run JAX's attention by cuDNN, to test how JAX divides it among the devices of a mesh.

Importing this module replaces only the kernels, below JAX's rules for dividing them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.interpreters import mlir

calls: list[tuple[int, ...]] = []  # shapes of the queries of each device, forward and backward


def _attend(q_BlAD, k_BLAD, v_BLAD, bias_B1lL, lengths_B, scale):
    """Computes attention, and the logarithms of the softmax's denominators."""
    logits_BAlL = jnp.einsum("BlAD,BLAD->BAlL", q_BlAD, k_BLAD) * np.float32(scale)
    if bias_B1lL is not None:
        # The kernel reads as many rows as there are queries, however many the bias has.
        logits_BAlL += bias_B1lL.astype(jnp.float32)[: len(q_BlAD)]
    if lengths_B is not None:
        seen_BL = jnp.arange(k_BLAD.shape[1])[None] < lengths_B[: len(q_BlAD), None]
        logits_BAlL = jnp.where(seen_BL[:, None, None], logits_BAlL, -1e30)
    y_BlAD = jnp.einsum("BAlL,BLAD->BlAD", jax.nn.softmax(logits_BAlL), v_BLAD)
    return y_BlAD, jax.nn.logsumexp(logits_BAlL, axis=-1)


def _of_kernel(bias, lengths, variadic_args, mask_type, scale):
    """Returns the attention that the arguments of a kernel ask for, of q, k and v."""
    bias = bias if variadic_args[0] else None
    lengths = lengths if cudnn.has_padding(mask_type) else None
    return lambda q, k, v: _attend(q, k, v, bias, lengths, scale)


def _forward(
    q, k, v, bias, _, lengths, *rest, scale, variadic_args, mask_type, is_training, **others
):
    calls.append(q.shape)
    attend = _of_kernel(bias, lengths, variadic_args, mask_type, scale)
    y, denominators = attend(*(x.astype(jnp.float32) for x in (q, k, v)))
    return [y.astype(q.dtype)] + [denominators] * is_training


def _backward(q, k, v, bias, _, lengths, *rest, scale, variadic_args, mask_type, **others):
    calls.append(q.shape)
    attend = _of_kernel(bias, lengths, variadic_args, mask_type, scale)
    _, gradient = jax.vjp(lambda *x: attend(*x)[0], *(x.astype(jnp.float32) for x in (q, k, v)))
    dy = rest[6]  # after offsets (2), page tables (2), denominators and y
    gradients = [x.astype(q.dtype) for x in gradient(dy.astype(jnp.float32))]
    return gradients + [jnp.zeros_like(bias)] * variadic_args[1]


cudnn.check_cudnn_version = lambda: 91000  # as in JAX's CUDA wheels
cudnn.check_compute_capability = lambda _: True
cudnn.is_cuda_compute_capability_equal = lambda _: False
for primitive, kernel in (
    (cudnn._dot_product_attention_fwd_p, _forward),
    (cudnn._dot_product_attention_bwd_p, _backward),
):
    mlir.register_lowering(primitive, mlir.lower_fun(kernel, multiple_results=True), platform="cpu")
