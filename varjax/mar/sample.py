"""Sampling: tokens set by set in a random order, each set from all tokens known so far.

Editing is the same loop with the image's own tokens known from the start.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varjax.mar.causal import causal_next, causal_start
from varjax.mar.latents import NOT_FINITE, TokenizerConfig
from varjax.mar.model import DiffusionHead, MARConfig, bind_denoiser, bind_mar
from varjax.mar.options import SamplingPlan
from varjax.nn.autoencoder import decoding_bytes
from varjax.nn.compute import ComputeConfig
from varjax.nn.diffusion import reverse_diffusion
from varjax.nn.rng import ImageStream, stream_keys
from varjax.sampling.guidance import guide
from varjax.sampling.sampler import KnownTokens
from varjax.trees import PyTree

# (places (B, m), number of the draw) -> normal noise (B, m, Z)
Noise = Callable[[jax.Array, jax.Array | int], jax.Array]


def draw_orders(config: MARConfig, key_B: jax.Array, keep_BL: jax.Array | None = None) -> jax.Array:
    """Draws the order in which places become known, (B, L) int32.

    Args:
        config: config of the transformer, whose `order` decides.
        key_B: one key per image.
        keep_BL: True at positions that come first; ignored with raster order and causal attention.
    """
    L = config.length
    order_BL = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (len(key_B), L))
    if config.order == "random":
        order_key_B = stream_keys(key_B, ImageStream.ORDER)
        order_BL = jax.vmap(jax.random.permutation)(order_key_B, order_BL)
    elif config.attention == "causal":
        return order_BL
    if keep_BL is None:
        return order_BL
    drawn_BL = ~_take(keep_BL, order_BL)
    return _take(order_BL, jnp.argsort(drawn_BL, axis=1, stable=True))


def draw_noise(config: MARConfig, key_B: jax.Array) -> Noise:
    """Returns a source of normal noise: a function of an image's key, place and draw alone."""
    noise_key_B = stream_keys(key_B, ImageStream.NOISE)
    fold_in = jax.random.fold_in

    def noise(place_Bm, number):
        def of_token(key, place):
            key = fold_in(fold_in(key, place), number)
            return jax.random.normal(key, config.head.token_shape)

        return jax.vmap(jax.vmap(of_token, (None, 0)))(noise_key_B, place_Bm)

    return noise


def sample_mar_tokens(
    config: MARConfig,
    params: PyTree,
    label_B: jax.Array,
    key_B: jax.Array,
    plan: SamplingPlan,
    known: KnownTokens | None = None,
    compute: ComputeConfig = ComputeConfig(),  # noqa: B008  (frozen)
    *,
    order_BL: jax.Array | None = None,
    noise: Noise | None = None,
) -> jax.Array:
    """Samples all tokens of images; meant to be jitted as a whole.

    Args:
        config: config of the transformer.
        params: parameters of the transformer.
        label_B: classes; `config.classes` means "no class".
        key_B: one key per image, see `image_keys`.
        plan: plan from `make_plan`; for an edit, made for at least as many kept tokens as `known`
            has.
        known: tokens to keep; None for whole images.
        compute: number format and execution of the transformer.
        order_BL: positions in the order in which they become known; None to draw it.
        noise: source of the normal noise; None to draw it.

    Returns:
        Tokens by place, (B, L, Z) float32 or (B, L) int32.
    """
    B, L = len(label_B), config.length
    if plan.guided:  # both streams as one batch, the conditional one first
        label_B = jnp.concatenate([label_B, jnp.full_like(label_B, config.classes)])
    if order_BL is None:
        order_BL = draw_orders(config, key_B, None if known is None else known.keep_BL)
    if known is None:
        shape = B, L, *config.head.token_shape
        known = KnownTokens(jnp.zeros(shape, config.head.token_dtype), jnp.zeros((B, L), bool))
    if isinstance(config.head, DiffusionHead):
        draw = functools.partial(_draw_continuous, noise=noise or draw_noise(config, key_B))
    else:
        draw = functools.partial(_draw_categorical, key_B=key_B)
    draw = functools.partial(draw, config, params, plan, compute)
    loop = _causal_loop if config.attention == "causal" else _masked_loop
    return loop(config, params, label_B, order_BL, plan, known, compute, draw)


def _masked_loop(config, params, label_B, order_BL, plan, known, compute, draw):
    """Masked autoregression: several tokens a step, of which all see all known ones."""
    apply = bind_mar(config, params, compute)
    class_BC = apply(label_B, method="class_vectors")
    L, streams = config.length, len(label_B) // len(order_BL)
    kept_B1 = jnp.sum(known.keep_BL, axis=1, keepdims=True)
    # So that a slice of the order may begin anywhere; the places behind the last are never drawn.
    widest = max((bucket.new for bucket in plan.buckets), default=0)
    ahead_BL = jnp.pad(order_BL, ((0, 0), (0, widest)), constant_values=L)

    def step(bucket, token_BL, x):
        number, start, stop = x
        place_Bn = order_BL[:, : bucket.known]
        known_Bn = jnp.arange(bucket.known)[None] < jnp.maximum(start, kept_B1)
        z_BLC = apply(
            *(_repeat(a, streams) for a in (_take(token_BL, place_Bn), place_Bn, known_Bn)),
            class_BC,
            method="hidden",
        )
        place_Bm = jax.lax.dynamic_slice_in_dim(ahead_BL, start, bucket.new, axis=1)
        position_1m = start + jnp.arange(bucket.new)[None]
        wanted_Bm = (position_1m < stop) & (position_1m >= kept_B1)
        z_BmC = _take(z_BLC, _repeat(jnp.minimum(place_Bm, L - 1), streams))
        token_Bm = draw(z_BmC, place_Bm, number)
        target_Bm = jnp.where(wanted_Bm, place_Bm, L)
        put = jax.vmap(lambda all_L, place_m, new_m: all_L.at[place_m].set(new_m, mode="drop"))
        return put(token_BL, target_Bm, token_Bm)

    token_BL = known.token_BL
    for bucket in plan.buckets:
        body = functools.partial(step, bucket)
        places = np.array(plan.schedule.known)
        numbers = np.array(bucket.steps)
        xs = (numbers, places[numbers], places[numbers + 1])
        token_BL, _ = jax.lax.scan(lambda c, x, f=body: (f(c, x), None), token_BL, xs)
    return token_BL


def _causal_loop(config, params, label_B, order_BL, plan, known, compute, draw):
    """Autoregression: one token a step, which sees those before it in the order."""
    apply = bind_mar(config, params, compute)
    streams = len(label_B) // len(order_BL)

    def choose(z_BC, token_BL, place_B, number):
        place_B1 = place_B[:, None]
        token_B1 = draw(z_BC[:, None], place_B1, number)
        keep_B1, kept_B1 = _take(known.keep_BL, place_B1), _take(known.token_BL, place_B1)
        keep_B1 = keep_B1.reshape(keep_B1.shape + (1,) * (token_B1.ndim - 2))
        token_B1 = jnp.where(keep_B1, kept_B1, token_B1)
        return jax.vmap(lambda all_L, place, new: all_L.at[place].set(new))(
            token_BL, place_B, token_B1[:, 0]
        )

    def step(carry, x):
        token_BL, cache = carry
        number, place_B, next_B = x
        last_B = _take(token_BL, place_B[:, None])[:, 0]
        last_B, place_B, following_B = (_repeat(a, streams) for a in (last_B, place_B, next_B))
        z_BC, cache = apply(last_B, place_B, following_B, number, cache, method=causal_next)
        return (choose(z_BC, token_BL, next_B, number + 1), cache), None

    class_BC = apply(label_B, method="class_vectors")
    first_B = order_BL[:, 0]
    z_BC, cache = apply(_repeat(first_B, streams), class_BC, method=causal_start)
    token_BL = choose(z_BC, known.token_BL, first_B, 0)
    numbers = np.arange(config.length - 1)
    xs = (numbers, order_BL[:, :-1].T, order_BL[:, 1:].T)
    (token_BL, _), _ = jax.lax.scan(step, (token_BL, cache), xs)
    return token_BL


def _draw_continuous(config, params, plan, compute, z_BmC, place_Bm, number, *, noise):
    """Draws tokens (B, m, Z) by undoing diffusion; `number` is that of the step."""
    (B, m), options, (Z,) = place_Bm.shape, plan.options, config.head.token_shape
    mlp = bind_denoiser(config.head, params, compute)
    cond_NE = mlp(z_BmC.reshape(-1, config.hidden_width), method="condition")
    scale = _guidance(plan, number)

    def denoise(xt_NZ, t_1):
        if not plan.guided:
            return mlp(xt_NZ, t_1, cond_NE)
        out_N2Z = mlp(jnp.concatenate([xt_NZ, xt_NZ]), t_1, cond_NE)
        noise_NZ, value_NZ = jnp.split(out_N2Z, 2, axis=-1)
        return jnp.concatenate([guide(noise_NZ, scale), value_NZ[: B * m]], axis=-1)

    schedules = plan.noise_schedules
    steps: Any = len(schedules[0].timestep_J)
    coefficients = schedules[0].coefficients()
    if len(set(schedules)) > 1:
        counts = [len(schedule.timestep_J) for schedule in schedules]
        steps = jnp.asarray(counts)[number]
        tables = jax.tree.map(
            lambda *row: np.stack([np.pad(x, (0, max(counts) - len(x))) for x in row]),
            *(schedule.coefficients() for schedule in schedules),
        )
        coefficients = tables.at(number)
    token_NZ = reverse_diffusion(
        denoise,
        coefficients,
        steps,
        lambda j: noise(place_Bm, j).reshape(-1, Z),
        options.temperature,
        options.clip_denoised,
    )
    return token_NZ.reshape(B, m, Z)


def _draw_categorical(config, params, plan, compute, z_BmC, place_Bm, number, *, key_B):
    """Draws codes (B, m) from the softmax of guided logits."""
    logits_BmV = bind_mar(config, params, compute)(z_BmC, method="logits")
    if plan.guided:
        logits_BmV = guide(logits_BmV, _guidance(plan, number))
    noise_key_B = stream_keys(key_B, ImageStream.NOISE)

    def gumbel(key, place):
        return jax.random.gumbel(jax.random.fold_in(key, place), logits_BmV.shape[-1:])

    gumbel_BmV = jax.vmap(jax.vmap(gumbel, (None, 0)))(noise_key_B, place_Bm)
    # The argmax of logits and noise is a draw from the softmax of logits / temperature.
    code_Bm = jnp.argmax(logits_BmV + plan.options.temperature * gumbel_BmV, axis=-1)
    # An argmax hides NaN: a code that is none shows it.
    finite_Bm = jnp.all(jnp.isfinite(logits_BmV), axis=-1)
    return jnp.where(finite_Bm, code_Bm, NOT_FINITE).astype(jnp.int32)


def _guidance(plan, number):
    """The scale of guidance at a step: 1 is none."""
    share = plan.schedule.guidance_share(plan.options.guidance_schedule)
    return 1 + (plan.options.guidance - 1) * jnp.asarray(share)[number]


def _take(x_BL, place_Bn):
    """Rows of (B, L, …) at places, (B, n, …)."""
    return jax.vmap(lambda x_L, place_n: x_L[place_n])(x_BL, place_Bn)


def _repeat(x_B, streams):
    """Repeats a batch for each stream of guidance."""
    return jnp.concatenate([x_B] * streams)


def mar_sampling_bytes(
    tokenizer: TokenizerConfig | None,
    config: MARConfig,
    batch: int,
    compute: ComputeConfig,
    plan: SamplingPlan,
) -> int:
    """Estimates how much memory a device needs, in addition to the weights, to sample a batch.

    It is that of the transformer, of the head or of the decoder, whichever is the most.

    Args:
        tokenizer: config of the tokenizer, if there is one.
        config: config of the transformer.
        batch: number of images on the device.
        compute: number format and execution of the transformer.
        plan: plan of the sampling steps.
    """
    rows, item = batch * (2 if plan.guided else 1), compute.jax_dtype.itemsize
    tokens, C = config.buffer_size + config.length, max(config.width, config.hidden_width)
    new = max(bucket.new for bucket in plan.buckets)
    # Of a token in a layer: residual stream and norm in float32; q, k, v, and twice the MLP's inner
    # width; and the attention matrix with its softmax.
    heads = max(config.encoder_heads, config.decoder_heads)
    of_token = C * (2 * 4 + 11 * item) + heads * tokens * 2 * 4
    if config.attention == "causal":  # both stacks' caches, and what a layer of each reads
        widths = config.width, config.hidden_width
        layers = config.encoder_depth + 1, config.decoder_depth + 1
        channels = sum(n * width for n, width in zip(layers, widths, strict=True))
        cache, new = 2 * channels * rows * tokens * item, 1
        transformer = cache + rows * config.buffer_size * of_token
    else:
        transformer = rows * tokens * of_token
    if isinstance(config.head, DiffusionHead):  # three signals a block; as compiled, 22 more
        head = rows * new * config.head.width * (3 * config.head.depth + 22) * 4
    else:
        head = rows * new * config.head.vocab * 3 * 4
    decoder = 0
    if tokenizer is not None:
        decoder = decoding_bytes(batch, tokenizer.image_shape, tokenizer.width)
    return max(transformer, head, decoder)
