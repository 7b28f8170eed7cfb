"""Measures single operations at the shapes of a released VAR, next to PyTorch's times.

varjax benchmark operations --preset=d16 --batch_size=8
varjax benchmark operations --preset=d16 --batch_size=8 --torch

Prints a JSON line for each: a large matrix product; the decoder's convolutions, forward and with
both gradients; attention in sampling and, with its gradients, in training, by each implementation
(d36's only on accelerators); attention with dropout, as in MAR-B's training; top-k and top-p; the
tokenizer's encoder in each precision; and the decoder. With --torch, PyTorch computes the matrix
product, the convolutions and attention of the same shapes as in sampling, if it is installed.
"""

import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp

from varjax.benchmark.measure import MatmulPeak, compute_from_flags, model_parser, print_figures
from varjax.errors import InputError
from varjax.models import benchmark_of
from varjax.nn.attention import Dropout, block_causal_mask, dot_product_attention
from varjax.nn.compute import FUSED_ATTENTION, ComputeConfig, Precision, matmul_precision
from varjax.runtime import flops
from varjax.runtime.hardware import fastest_seconds
from varjax.sampling.filters import filter_top_k_top_p

TOP_K, TOP_P = 900, 0.96  # of the published samples
DROPOUT = 0.1  # of MAR's recipes


def main(arguments: list[str]) -> None:
    """Reads the command line and prints the figures; raises InputError."""
    parser = model_parser("operations", __doc__)
    parser.add_argument("--torch", action="store_true", help="measure PyTorch instead of JAX")
    flags = parser.parse_args(arguments)
    compute = compute_from_flags(flags)
    task: Any = benchmark_of(flags.preset).training_task(flags.preset, compute)
    if not hasattr(task.model, "pyramid"):
        raise InputError(f"preset={flags.preset}: must be the size of a VAR, such as d16")
    setting = {
        "benchmark": "operations",
        "preset": flags.preset,
        "batch_size": flags.batch_size,
        "dtype": str(compute.jax_dtype),
    }
    measure = measure_torch if flags.torch else measure_operations
    measure(task, flags.batch_size, compute, flags.repeats, setting)


def measure_operations(
    task: Any, batch_size: int, compute: ComputeConfig, repeats: int, setting: dict[str, Any]
) -> None:
    """Prints a line for each operation; those that this machine cannot compute say why.

    Args:
        task: task that trains a VAR of the size to measure.
        batch_size: number of images.
        compute: dtype and implementation.
        repeats: number of calls to time; the fastest one counts.
        setting: figures that all lines share.
    """
    peak = MatmulPeak(compute.jax_dtype)
    speed = peak.measure()
    figures = {"milliseconds": 1e3 * 2 * peak.size**3 / speed, "tflops": speed / 1e12}
    print_figures(**setting, part=matrix_product_name(peak.size), **figures)
    for operation in operations(task, batch_size, compute):
        figures: dict[str, Any] = {"part": operation.part} | operation.labels
        try:
            random_arrays = functools.partial(_random_arrays, operation.shapes)
            arrays = jax.jit(random_arrays)(jax.random.key(0))
            begin = time.perf_counter()
            program = jax.jit(operation.function).lower(*arrays).compile()
            figures["compile_seconds"] = time.perf_counter() - begin
            seconds = fastest_seconds(lambda: program(*arrays), repeats)  # noqa: B023
        except Exception as error:  # a kernel that does not exist here, or too little memory
            figures["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print_figures(**setting, **figures)
            continue
        work = flops.count(operation.plain, *arrays)
        figures |= {"milliseconds": 1e3 * seconds, "tflops": work / seconds / 1e12}
        print_figures(**setting, **figures, efficiency=work / seconds / peak.measure())


@dataclasses.dataclass(frozen=True)
class Operation:
    """Describes an operation to measure.

    Attributes:
        part: name, which PyTorch's measurement of the same operation has too.
        function: function to time.
        plain: function whose products count as work: fused kernels hide products, and a product in
            three passes is the work of one.
        shapes: shapes of the arguments.
        labels: figures that tell operations of one name apart.
    """

    part: str
    function: Callable[..., Any]
    plain: Callable[..., Any]
    shapes: tuple[Any, ...]
    labels: dict[str, str] = dataclasses.field(default_factory=dict)


def operations(task: Any, B: int, compute: ComputeConfig) -> Iterator[Operation]:
    """Yields the operations of a VAR and its tokenizer.

    Args:
        task: task that trains a VAR of the size to measure.
        B: number of images.
        compute: dtype, and the platform whose implementations of attention are measured.
    """
    model, tokenizer, dtype = task.model, task.tokenizer, compute.jax_dtype
    for height, channels in convolutions(tokenizer):
        x_BHWC = jax.ShapeDtypeStruct((B, height, height, channels), dtype)
        kernel = jax.ShapeDtypeStruct((3, 3, channels, channels), dtype)
        name = f"convolution {height}x{height}x{channels}"
        for part, function in ((name, _convolve), (f"{name}, gradients", _convolution_gradients)):
            yield Operation(part, function, function, (x_BHWC, kernel))
    heads, D, L = model.heads, model.width // model.heads, model.pyramid.length
    (h, w), accelerator = model.pyramid.finest, compute.target != "cpu"
    q_BlAD, k_BLAD = (jax.ShapeDtypeStruct((2 * B, n, heads, D), dtype) for n in (h * w, L))
    implementations = ["xla", "loop"]
    implementations += ["cudnn"] * (compute.attention_implementation() == "cudnn")
    implementations += ["splash"] * (compute.target == "tpu" and dtype == jnp.bfloat16)
    for implementation in implementations:
        attend, plain = (functools.partial(_attend, name) for name in (implementation, "xla"))
        labels, shapes = {"implementation": implementation}, (q_BlAD, k_BLAD, k_BLAD)
        yield Operation(attention_name(h * w), attend, plain, shapes, labels)
    logits_BlV = jax.ShapeDtypeStruct((B, h * w, model.vocab), jnp.float32)
    filter_logits = functools.partial(filter_top_k_top_p, top_k=TOP_K, top_p=TOP_P)
    part = f"top-k and top-p, {h * w} x {model.vocab}"
    yield Operation(part, filter_logits, filter_logits, (logits_BlV,))
    params = jax.eval_shape(tokenizer.init, jax.random.key(0))
    image_BHWC = jax.ShapeDtypeStruct((B, *tokenizer.image_shape), jnp.uint8)
    for precision in get_args(Precision):
        exact = ComputeConfig("float32", encoder_precision=precision, platform=compute.platform)
        encode = functools.partial(tokenizer.encode, compute=exact)
        shapes = params, image_BHWC
        yield Operation(f"encoder {precision}", encode, tokenizer.encode, shapes)
    latents = jax.eval_shape(tokenizer.encode, params, image_BHWC)
    decode = functools.partial(tokenizer.decode, compute=compute)
    yield Operation("decoder", decode, tokenizer.decode, (params, latents))
    if accelerator:  # where a loop over images and heads takes longest
        implementations.remove("loop")
    yield from _training_attention(model, B, dtype, implementations)
    large = benchmark_of("d36").training_task("d36", compute).model
    if accelerator and model.pyramid.length < large.pyramid.length:
        # A head's attention weights are eleven times as large as d16's.
        yield from _training_attention(large, max(1, B // 4), dtype, implementations)
    yield _attention_with_dropout(B, compute)


def _training_attention(
    model: Any, B: int, dtype: Any, implementations: Sequence[str]
) -> Iterator[Operation]:
    """Yields a layer's attention and its gradients, with the mask by which VAR trains."""
    L, heads = model.pyramid.length, model.heads
    mask_LL = block_causal_mask(model.pyramid.level_L)
    x_BLAD = jax.ShapeDtypeStruct((B, L, heads, model.width // heads), dtype)
    plain = functools.partial(_attention_gradients, "xla", mask_LL, None)
    for implementation in implementations:
        attend = functools.partial(_attention_gradients, implementation, mask_LL, None)
        part, labels = f"attention in training, {L} tokens", {"implementation": implementation}
        yield Operation(part, attend, plain, (x_BLAD,) * 3, labels)


def _attention_with_dropout(B: int, compute: ComputeConfig) -> Operation:
    """Returns attention and its gradients in a layer of MAR-B's decoder."""
    task: Any = benchmark_of("mar_b").training_task("mar_b", compute)
    model, implementation = task.model, compute.attention_implementation()
    heads, tokens = model.decoder_heads, model.length + model.buffer_size
    x_BLAD = jax.ShapeDtypeStruct(
        (B, tokens, heads, model.hidden_width // heads), compute.jax_dtype
    )
    # Fused kernels have no dropout.
    implementation = "xla" if implementation in FUSED_ATTENTION else implementation
    attend, plain = (
        functools.partial(_attention_gradients, name, None, DROPOUT)
        for name in (implementation, "xla")
    )
    part, labels = f"attention with dropout, {tokens} tokens", {"implementation": implementation}
    return Operation(part, attend, plain, (x_BLAD,) * 3, labels)


def matrix_product_name(size: int) -> str:
    """Returns the name of a product of two (size, size) matrices."""
    return f"matrix product {size}x{size}"


def attention_name(queries: int) -> str:
    """Returns the name of attention of the last scale's queries to all keys, as in sampling."""
    return f"attention, {queries} queries"


def convolutions(tokenizer: Any) -> list[tuple[int, int]]:
    """Returns the side and the channels of each level's feature maps, the largest first."""
    H = tokenizer.image_shape[0]
    return [(H // 2**i, tokenizer.width * m) for i, m in enumerate(tokenizer.channel_mult)]


def _convolve(x_BHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    precision = matmul_precision(x_BHWC.dtype)
    return jax.lax.conv_general_dilated(
        x_BHWC,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )


def _convolution_gradients(x_BHWC: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    y_BHWC, gradients = jax.vjp(_convolve, x_BHWC, kernel)
    return gradients(y_BHWC)


def _attend(implementation, q_BlAD, k_BLAD, v_BLAD, mask_lL=None, dropout=None):
    return dot_product_attention(
        q_BlAD,
        k_BLAD,
        v_BLAD,
        mask_lL,
        scale=q_BlAD.shape[-1] ** -0.5,
        implementation=implementation,
        dropout=dropout,
    )


def _attention_gradients(implementation, mask_lL, rate, q_BlAD, k_BLAD, v_BLAD):
    """Attends, and returns the values and the gradients."""
    dropout = (
        None if rate is None else Dropout(jax.random.split(jax.random.key(0), len(q_BlAD)), rate)
    )

    def attend(*arrays):
        return _attend(implementation, *arrays, mask_lL=mask_lL, dropout=dropout)

    y_BlAD, gradients = jax.vjp(attend, q_BlAD, k_BLAD, v_BLAD)
    return y_BlAD, gradients(y_BlAD)


def _random_arrays(shapes: Any, key: jax.Array) -> Any:
    """Draws arrays of these shapes: small numbers, images, and tokens that are 0."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))

    def draw(shape, key):
        if jnp.issubdtype(shape.dtype, jnp.floating):
            return 0.02 * jax.random.normal(key, shape.shape, shape.dtype)
        most = 256 if shape.dtype == jnp.uint8 else 1
        return jax.random.randint(key, shape.shape, 0, most, shape.dtype)

    return tree.unflatten([draw(shape, key) for shape, key in zip(leaves, keys, strict=True)])


def measure_torch(
    task: Any, batch_size: int, compute: ComputeConfig, repeats: int, setting: dict[str, Any]
) -> None:
    """Prints what PyTorch takes for a matrix product, convolutions and attention.

    Takes what `measure_operations` takes. Raises InputError if PyTorch is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise InputError("--torch: PyTorch is not installed; varjax does not need it")
    torch: Any = importlib.import_module("torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, str(compute.jax_dtype))
    model, tokenizer, B = task.model, task.tokenizer, batch_size
    setting |= {"library": f"torch {torch.__version__}", "torch_device": device}

    def random(*shape):
        return torch.randn(shape, device=device, dtype=dtype) * 0.02

    def seconds(function):
        times = []
        for _ in range(1 + repeats):
            begin = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return min(times[1:])

    def report(part, work, taken):
        figures = {"milliseconds": 1e3 * taken, "tflops": work / taken / 1e12}
        print_figures(**setting, part=part, **figures)

    size = 4096 if device == "cpu" else 16384
    a, b = random(size, size), random(size, size)
    report(matrix_product_name(size), 2 * size**3, seconds(lambda: a @ b))
    convolve = functools.partial(torch.nn.functional.conv2d, padding=1)
    for side, channels in convolutions(tokenizer):
        x = random(B, channels, side, side).to(memory_format=torch.channels_last)
        kernel = random(channels, channels, 3, 3).requires_grad_()
        x.requires_grad_()
        work = 2 * B * side**2 * 9 * channels**2
        name = f"convolution {side}x{side}x{channels}"
        with torch.no_grad():
            report(name, work, seconds(lambda: convolve(x, kernel)))  # noqa: B023

        def gradients(x=x, kernel=kernel):  # with the values, as ours
            y = convolve(x, kernel)
            return torch.autograd.grad(y, (x, kernel), y.detach())

        report(f"{name}, gradients", 3 * work, seconds(gradients))
    heads, D = model.heads, model.width // model.heads
    (h, w), L = model.pyramid.finest, model.pyramid.length
    q, k, v = (random(2 * B, heads, n, D) for n in (h * w, L, L))
    work = 4 * 2 * B * heads * h * w * L * D
    with torch.no_grad():
        attend = torch.nn.functional.scaled_dot_product_attention
        report(attention_name(h * w), work, seconds(lambda: attend(q, k, v)))
