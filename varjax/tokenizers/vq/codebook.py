"""Remedies for an unhealthy codebook: k-means, restarts, scale dropout, and an entropy loss."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from varjax import trees
from varjax.errors import InputError, check_setting
from varjax.nn import resize
from varjax.nn.autoencoder import to_model_range
from varjax.nn.rng import ImageStream, StepStream, stream_key
from varjax.tokenizers.vq.model import VQConfig, VQTokenizer
from varjax.tokenizers.vq.pyramid import Pyramid
from varjax.tokenizers.vq.quantizer import unit_vectors
from varjax.training.task import TrainState
from varjax.trees import PyTree

CODEBOOK_PATH = "quantizer/codebook"  # where parameters, average and moments keep it
KMEANS_ITERATIONS = 10
KMEANS_VECTORS = 16  # number of vectors per code
KMEANS_PIECE = 2**14  # vectors whose distances to all codes are in memory at a time
KMEANS_NOISE = 0.01  # relative to the vectors' size, so that no two codes are equal
USAGE_DECAY = 0.98  # decay of the moving average of how often codes are used
DEAD_CODE_FRACTION = 0.1  # of the mean usage of a code, 1/V: codes used less are dead
ENTROPY_SHARPNESS = 10.0  # soft choices fall by a factor of e for each tenth of the mean distance


@dataclasses.dataclass(frozen=True)
class CodebookConfig:
    """Configures remedies against codes and scales that are not used; by default none.

        CodebookConfig(init="kmeans", restart_every=50)

    Raises InputError for a value out of range.

    Attributes:
        init: how codes are initialized. "uniform" in ±1/V; "normal" with length about 1; "kmeans"
            on the quantizer's inputs in the first batch, all scales weighted equally (replaces the
            codes of `init_from`).
        restart_every: updates between restarts of dead codes, whose usage over about the last 50
            updates is below a tenth of the mean; 0 for never.
        scale_dropout: fraction of training images that keep only a random number of their scales.
        scales_kept: smallest number of scales that these images keep (XQ-GAN: 3, with a dropout of
            0.1).
        entropy: weight of `entropy_loss`, which is computed separately for each microbatch.
    """

    init: Literal["uniform", "normal", "kmeans"] = "uniform"
    restart_every: int = 0
    scale_dropout: float = 0.0
    scales_kept: int = 3
    entropy: float = 0.0

    def __post_init__(self):
        for name, valid, allowed in (
            ("restart_every", self.restart_every >= 0, "0 (never) or more updates"),
            ("scale_dropout", 0 <= self.scale_dropout <= 1, "a fraction of images in [0, 1]"),
            ("scales_kept", self.scales_kept >= 1, "1 or more"),
            ("entropy", self.entropy >= 0, "0 (off) or more"),
        ):
            check_setting(f"codebook.{name}", getattr(self, name), valid, allowed)

    def check(self, pyramid: Pyramid) -> None:
        """Raises InputError where there are too few scales to drop any."""
        if self.scale_dropout and self.scales_kept >= len(pyramid):
            raise InputError(
                f"codebook.scales_kept={self.scales_kept} of {len(pyramid)} scales: nothing is "
                "left for codebook.scale_dropout to drop; keep fewer"
            )


class InputsFn(Protocol):
    """Computes the quantizer's inputs of a batch: `quantizer_inputs` without its data."""

    def __call__(self, params: PyTree, ideal: bool) -> jax.Array: ...


def quantizer_inputs(
    config: VQConfig, image_BHWC: jax.Array, microbatches: int, params: PyTree, ideal: bool
) -> jax.Array:
    """Computes the vectors that codes are chosen for, at every scale.

    Args:
        config: config of the tokenizer.
        image_BHWC: uint8 images to encode.
        microbatches: number of equal parts that are processed one by one, to save memory.
        params: parameters of the tokenizer.
        ideal: whether the coarser scales count as perfect up to their resolution, for a codebook
            that is not trained yet.

    Returns:
        (B, L, Z) float32.
    """
    model, pyramid = VQTokenizer(config).bind({"params": params}), config.pyramid

    def microbatch_inputs(image_BHWC):
        f_BhwZ = model.features(to_model_range(image_BHWC))
        if ideal:
            maps = (resize.area(f_BhwZ, shape) for shape in pyramid.shapes)
            f_hats = [resize.bicubic(map_BhwZ, pyramid.finest) for map_BhwZ in maps]
        else:
            f_hats = model.quantizer(f_BhwZ).f_hats
        return jnp.concatenate(scale_residuals(pyramid, f_BhwZ, f_hats), axis=1)

    B = len(image_BHWC)
    split = image_BHWC.reshape(B // microbatches, microbatches, *image_BHWC.shape[1:])
    inputs = jax.lax.map(microbatch_inputs, split.swapaxes(0, 1))
    return inputs.swapaxes(0, 1).reshape(B, pyramid.length, -1)


def scale_residuals(
    pyramid: Pyramid, f_BhwZ: jax.Array, f_hats: Sequence[jax.Array]
) -> list[jax.Array]:
    """Computes each scale's residual: features less the coarser scales, downsampled.

    Args:
        pyramid: the sizes of the scales.
        f_BhwZ: features of the images.
        f_hats: K maps (B, h, w, Z), as in `Quantized`.

    Returns:
        K arrays (B, l, Z), the vectors that codes are chosen for.
    """
    residuals, residual_BhwZ = [], f_BhwZ
    for shape, f_hat_BhwZ in zip(pyramid.shapes, f_hats, strict=True):
        z_BhwZ = resize.area(residual_BhwZ, shape)
        residuals.append(z_BhwZ.reshape(len(z_BhwZ), -1, z_BhwZ.shape[-1]))
        residual_BhwZ = f_BhwZ - jax.lax.stop_gradient(f_hat_BhwZ)
    return residuals


def sample_scale_dropout(
    config: CodebookConfig, pyramid: Pyramid, key_B: jax.Array
) -> jax.Array | None:
    """Samples the number of scales that each image keeps, (B,) int32; None where all keep all."""
    if not config.scale_dropout:
        return None
    scales = len(pyramid)

    def kept_scales(key):
        drop_key, count_key = jax.random.split(stream_key(key, ImageStream.SCALE_DROPOUT))
        count = jax.random.randint(count_key, (), config.scales_kept, scales)
        return jnp.where(jax.random.bernoulli(drop_key, config.scale_dropout), count, scales)

    return jax.vmap(kept_scales)(key_B)


def init_codebook(
    config: CodebookConfig, tokenizer: VQConfig, params: PyTree, key: jax.Array
) -> PyTree:
    """Initializes the codes as `config.init` says; k-means happens later, in the first step."""
    if config.init != "normal":
        return params
    codebook_VZ = jax.random.normal(key, (tokenizer.vocab, tokenizer.code_channels))
    return replace_codebook(params, codebook_VZ * tokenizer.code_channels**-0.5)


def kmeans_init(
    config: CodebookConfig,
    pyramid: Pyramid,
    state: TrainState,
    inputs_fn: InputsFn,
    key: jax.Array,
) -> TrainState:
    """Replaces the codes by k-means centers before the first update, if `config.init` says so.

    Args:
        config: settings of the codebook, whose `init` decides.
        pyramid: the sizes of the scales, which are weighted equally.
        state: train state before an update.
        inputs_fn: function that returns the quantizer's inputs.
        key: the step's random key.

    Returns:
        The state, its parameters and their average with new codes.
    """
    if config.init != "kmeans":
        return state
    before_VZ, is_first = state.params["quantizer"]["codebook"], state.step == 0

    def centers():
        sample_key, kmeans_key = jax.random.split(stream_key(key, StepStream.CODEBOOK))
        z_BLZ, vocab = inputs_fn(state.params, ideal=True), len(before_VZ)
        z_NZ = sample_inputs(pyramid, z_BLZ, KMEANS_VECTORS * vocab, sample_key)
        return kmeans(z_NZ, vocab, kmeans_key)

    codebook_VZ, ema = jax.lax.cond(is_first, centers, lambda: before_VZ), state.ema
    if ema is not None:
        ema = replace_codebook(ema, jnp.where(is_first, codebook_VZ, ema["quantizer"]["codebook"]))
    return dataclasses.replace(state, params=replace_codebook(state.params, codebook_VZ), ema=ema)


def kmeans(z_NZ: jax.Array, vocab: int, key: jax.Array) -> jax.Array:
    """Finds (V, Z) centers by Lloyd's algorithm, from random ones of the vectors z_NZ."""
    order_key, noise_key = jax.random.split(key)
    order_N = jax.random.permutation(order_key, len(z_NZ))
    start_VZ = _add_noise(z_NZ[order_N[jnp.arange(vocab) % len(z_NZ)]], noise_key)
    # All distances at once would take 16 V² numbers: 17 GB for 16,384 codes.
    N, Z = z_NZ.shape
    M = min(N, KMEANS_PIECE)
    z_PMZ = jnp.pad(z_NZ, ((0, -N % M), (0, 0))).reshape(-1, M, Z)
    real_PM = (jnp.arange(N + -N % M) < N).reshape(-1, M)

    def iterate(codes_VZ, _):
        norm_1V = jnp.sum(jnp.square(codes_VZ), axis=-1)[None]

        def add_piece(sums, piece):
            (sum_VZ, count_V1), (z_MZ, real_M) = sums, piece
            dot_MV = jnp.einsum("MZ,VZ->MV", z_MZ, codes_VZ, precision="highest")
            nearest_M = jnp.argmin(norm_1V - 2 * dot_MV, axis=-1)
            nearest_MV = jax.nn.one_hot(jnp.where(real_M, nearest_M, vocab), vocab)
            sum_VZ += jnp.einsum("MV,MZ->VZ", nearest_MV, z_MZ, precision="highest")
            return (sum_VZ, count_V1 + jnp.sum(nearest_MV, axis=0)[:, None]), None

        zeros = jnp.zeros_like(codes_VZ), jnp.zeros((vocab, 1))
        (sum_VZ, count_V1), _ = jax.lax.scan(add_piece, zeros, (z_PMZ, real_PM))
        return jnp.where(count_V1 > 0, sum_VZ / jnp.maximum(count_V1, 1), codes_VZ), None

    return jax.lax.scan(iterate, start_VZ, None, KMEANS_ITERATIONS)[0]


def sample_inputs(pyramid: Pyramid, z_BLZ: jax.Array, count: int, key: jax.Array) -> jax.Array:
    """Samples (count, Z) of the quantizer's inputs (B, L, Z), as many of each scale, with noise."""
    image_key, scale_key, position_key, noise_key = jax.random.split(key, 4)
    image = jax.random.randint(image_key, (count,), 0, len(z_BLZ))
    scale = jax.random.randint(scale_key, (count,), 0, len(pyramid))
    length = jnp.array(pyramid.lengths)[scale]
    offset = jnp.floor(jax.random.uniform(position_key, (count,)) * length.astype(jnp.float32))
    start = jnp.array([scale_slice.start for scale_slice in pyramid.slices])[scale]
    position = start + jnp.minimum(offset.astype(jnp.int32), length - 1)
    return _add_noise(z_BLZ[image, position], noise_key)


def init_usage(config: CodebookConfig, vocab: int) -> jax.Array | None:
    """Returns the usage (V,) before the first update, equal for all; None without restarts."""
    return jnp.full(vocab, 1 / vocab, jnp.float32) if config.restart_every else None


def average_usage(pyramid: Pyramid, usage_V: jax.Array, frequency_KV: jax.Array) -> jax.Array:
    """Updates the moving average of the codes' usage, in which all scales have equal weight.

    Args:
        pyramid: the sizes of the scales.
        usage_V: the average before this batch.
        frequency_KV: how often each scale used each code in an image, a mean over the batch.
    """
    length_K1 = jnp.array(pyramid.lengths, jnp.float32)[:, None]
    return USAGE_DECAY * usage_V + (1 - USAGE_DECAY) * jnp.mean(frequency_KV / length_K1, axis=0)


def restart_dead_codes(
    config: CodebookConfig,
    pyramid: Pyramid,
    state: TrainState,
    usage_V: jax.Array,
    frequency_KV: jax.Array,
    inputs_fn: InputsFn,
    key: jax.Array,
) -> tuple[TrainState, jax.Array, dict[str, jax.Array]]:
    """Replaces codes that are hardly used by random inputs of the quantizer, at intervals.

    Like random restarts in Jukebox (Dhariwal et al. 2020, arXiv 2005.00341). The parameters'
    average takes new codes as they are; their moments become zero.

    Args:
        config: settings of the codebook, with `restart_every` above 0.
        pyramid: the sizes of the scales.
        state: train state after an update.
        usage_V: moving average of the fraction of tokens that use each code.
        frequency_KV: how often each scale used each code in an image of this batch.
        inputs_fn: function that returns the quantizer's inputs.
        key: the step's random key.

    Returns:
        The state, the usage after this batch, and {"restarted": number of codes replaced}.
    """
    vocab = frequency_KV.shape[1]
    usage_V = average_usage(pyramid, usage_V, frequency_KV)
    is_dead_V = (usage_V < DEAD_CODE_FRACTION / vocab) & (state.step % config.restart_every == 0)
    before_VZ = state.params["quantizer"]["codebook"]

    def replacements():
        z_BLZ = inputs_fn(state.params, ideal=False)
        return sample_inputs(pyramid, z_BLZ, vocab, stream_key(key, StepStream.CODEBOOK))

    new_VZ = jax.lax.cond(jnp.any(is_dead_V), replacements, lambda: before_VZ)

    def replaced(path, x):
        if not path.endswith(CODEBOOK_PATH):
            return x
        now_VZ = jnp.zeros_like(x) if path.startswith("opt_state") else new_VZ
        return jnp.where(is_dead_V[:, None], now_VZ, x)

    usage_V = jnp.where(is_dead_V, 1 / vocab, usage_V)
    restarted = jnp.sum(is_dead_V, dtype=jnp.float32)
    return trees.map_with_path(replaced, state), usage_V, {"restarted": restarted}


def entropy_loss(codebook_VZ: jax.Array, inputs: Sequence[jax.Array], cosine: bool) -> jax.Array:
    """Computes E[H(p)] - H(E[p]), p being a vector's soft choice of codes (V,); a mean over scales.

    Low if each vector clearly prefers one code, but all vectors together use many.

    Args:
        codebook_VZ: vectors of the codes.
        inputs: K arrays (B, l, Z) of vectors to choose codes for.
        cosine: whether vectors and codes are normalized to length 1 before they are compared.
    """
    losses = []
    for z_BlZ in inputs:
        z_NZ, codes_VZ = z_BlZ.reshape(-1, z_BlZ.shape[-1]), codebook_VZ
        if cosine:
            z_NZ, codes_VZ = unit_vectors(z_NZ), unit_vectors(codes_VZ)
        dot_NV = jnp.einsum("NZ,VZ->NV", z_NZ, codes_VZ, precision="highest")
        squares_NV = jnp.sum(z_NZ**2, axis=-1)[:, None] + jnp.sum(codes_VZ**2, axis=-1)[None]
        distance_NV = squares_NV - 2 * dot_NV
        mean_distance = jax.lax.stop_gradient(jnp.mean(distance_NV)) + 1e-12
        log_p_NV = jax.nn.log_softmax(-ENTROPY_SHARPNESS * distance_NV / mean_distance)
        mean_entropy = -jnp.mean(jnp.sum(jnp.exp(log_p_NV) * log_p_NV, axis=-1))
        mean_p_V = jnp.mean(jnp.exp(log_p_NV), axis=0)
        losses.append(mean_entropy + jnp.sum(mean_p_V * jnp.log(mean_p_V + 1e-12)))
    return jnp.mean(jnp.stack(losses))


def replace_codebook(params: PyTree, codebook_VZ: jax.Array) -> PyTree:
    """Returns parameters, or their gradients, with another codebook."""
    return params | {"quantizer": params["quantizer"] | {"codebook": codebook_VZ}}


def _add_noise(z_NZ, key):
    size = jnp.sqrt(jnp.mean(jnp.square(z_NZ)))
    return z_NZ + KMEANS_NOISE * size * jax.random.normal(key, z_NZ.shape)
