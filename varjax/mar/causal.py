"""Autoregression one token after another, with a key-value cache (the AR rows of MAR's table 1).

The transformer is the same, but its encoder and decoder run over one sequence: the class buffer,
then tokens in their order. Each item attends to itself and to those before it. Its position
embedding in the decoder says which position it predicts, so the last item of the buffer predicts
the first token.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from varjax.mar.masking import put_at, take_at
from varjax.mar.model import MAR, Dropouts, MARConfig, decoder_dropouts
from varjax.nn.stack import KVCache
from varjax.nn.transformer import run_vit_blocks
from varjax.sampling.sampler import KnownTokens

# (step number, tokens by position) -> tokens that the next steps are drawn from
OnStep = Callable[[jax.Array | int, jax.Array], jax.Array]


@flax.struct.dataclass
class CausalCache:
    """Holds keys and values of the encoder's and the decoder's layers, for all items."""

    encoder: KVCache
    decoder: KVCache


def causal_hidden(
    model: MAR,
    token_BL: jax.Array,
    order_BL: jax.Array,
    class_BC: jax.Array,
    dropouts: Dropouts | None = None,
) -> jax.Array:
    """Computes a vector for every token from those before it in an order (teacher forcing).

    Args:
        model: model bound to its parameters.
        token_BL: all tokens by position, (B, L, Z) or (B, L).
        order_BL: positions, in the order in which they become known.
        class_BC: class vectors, from `MAR.class_vectors`.
        dropouts: dropout in training.

    Returns:
        z (B, L, C) float32, by position.
    """
    position_Bn = order_BL[:, :-1]
    token_BnC = model.embed_tokens(take_at(token_BL, position_Bn), position_Bn)
    x_BlC = jnp.concatenate([model.embed_buffer(class_BC), token_BnC], axis=1)
    z_BLC, _ = _run(model, x_BlC, order_BL, dropouts=dropouts)
    return put_at(jnp.zeros_like(z_BLC), order_BL, z_BLC)


def causal_first(
    model: MAR, position_B: jax.Array, class_BC: jax.Array
) -> tuple[jax.Array, CausalCache]:
    """Computes z (B, C) of the first token, at `position_B`, and the cache for those after it."""
    cache = _empty_cache(model.config, position_B.shape[0], model.dtype)
    z_B1C, cache = _run(model, model.embed_buffer(class_BC), position_B[:, None], cache)
    return z_B1C[:, 0], cache


def causal_next(
    model: MAR,
    token_B: jax.Array,
    position_B: jax.Array,
    next_B: jax.Array,
    number: jax.Array,
    cache: CausalCache,
) -> tuple[jax.Array, CausalCache]:
    """Computes z of the next token from the last one and the cache.

    Args:
        model: model bound to its parameters.
        token_B: the last token, (B, Z) or (B,).
        position_B: position of the last token.
        next_B: position of the next token.
        number: index of the last token in the order, from 0.
        cache: keys and values of all earlier items.

    Returns:
        z (B, C) float32 of the next token, and the cache with the last one.
    """
    x_B1C = model.embed_tokens(token_B[:, None], position_B[:, None])
    z_B1C, cache = _run(model, x_B1C, next_B[:, None], cache, model.config.buffer_size + number)
    return z_B1C[:, 0], cache


def sample_causal(
    first: Callable[..., tuple[Any, Any]],
    following: Callable[..., tuple[Any, Any]],
    draw: Callable[..., jax.Array],
    known: KnownTokens,
    order_BL: jax.Array,
    guided: int | None = None,
    unguided_cache: Callable[[Any], Any] = lambda cache: cache,
    on_step: OnStep = lambda number, token_BL: token_BL,
) -> jax.Array:
    """Draws one token per step from all tokens before it in the order.

    Args:
        first: positions (B,) -> z of the first token, a tree of (B, C), and a cache.
        following: (last token, its position, next position, number of the last token, cache) ->
            z and cache for the next token.
        draw: (z, a tree of (B, 1, C), positions (B, 1), step number) -> tokens (B, 1).
        known: tokens to keep; for a whole image, none.
        order_BL: positions in the order in which they are drawn.
        guided: number of steps, from the first, that are computed with guidance; None for all.
        unguided_cache: cache -> cache of the first stream alone, with which the other steps are
            computed.
        on_step: function that is called after each step, with its number and all tokens, and
            returns the tokens.

    Returns:
        Tokens by position, as `known.token_BL`.
    """

    def draw_at(z, token_BL, position_B, number):
        position_B1 = position_B[:, None]
        new_B1 = draw(jax.tree.map(lambda z_BC: z_BC[:, None], z), position_B1, number)
        keep_B1 = take_at(known.keep_BL, position_B1)
        keep_B1 = keep_B1.reshape(keep_B1.shape + (1,) * (new_B1.ndim - 2))
        kept_B1 = take_at(known.token_BL, position_B1)
        token_BL = put_at(token_BL, position_B1, jnp.where(keep_B1, kept_B1, new_B1))
        return on_step(number, token_BL)

    def step(carry, x):
        token_BL, cache = carry
        number, position_B, next_B = x
        last_B = take_at(token_BL, position_B[:, None])[:, 0]
        z, cache = following(last_B, position_B, next_B, number, cache)
        return (draw_at(z, token_BL, next_B, number + 1), cache), None

    z, cache = first(order_BL[:, 0])
    token_BL = draw_at(z, known.token_BL, order_BL[:, 0], 0)
    L = order_BL.shape[1]
    steps = np.arange(L - 1), order_BL[:, :-1].T, order_BL[:, 1:].T
    split = L - 1 if not guided else min(guided, L) - 1  # the first token is drawn already
    first_steps, last_steps = ([x[part] for x in steps] for part in np.s_[:split, split:])
    (token_BL, cache), _ = jax.lax.scan(step, (token_BL, cache), first_steps)
    if split < L - 1:
        (token_BL, _), _ = jax.lax.scan(step, (token_BL, unguided_cache(cache)), last_steps)
    return token_BL


def _run(
    model, x_BlC, target_Bn, cache=None, start: int | jax.Array = 0, dropouts=None
) -> tuple[jax.Array, Any]:
    """Runs encoder and decoder on new items, whose last n predict the positions `target_Bn`.

    start: number of items that the cache holds.
    """
    (B, length, _), targets = x_BlC.shape, target_Bn.shape[1]
    mask_lL, key_mask_BL, encoder, decoder = np.tri(length, dtype=bool), None, None, None
    if cache is not None:
        encoder, decoder = cache.encoder, cache.decoder
        size = encoder.keys_SBLC.shape[2]
        # Several new items are the first ones; a single one attends to all in the cache.
        mask_lL = np.tri(length, size, dtype=bool) if length > 1 else None
        key_mask_BL = jnp.broadcast_to(jnp.arange(size) < start + length, (B, size))
    x_BlC, encoder = run_vit_blocks(
        model.encoder_block,
        model.encoder_blocks,
        x_BlC,
        mask_lL=mask_lL,
        key_mask_BL=key_mask_BL,
        cache=encoder,
        start=start,
        **(dropouts or {}),
    )
    x_BlC = model.decoder_embed(model.encoder_norm(x_BlC)).astype(jnp.float32)
    # Items of the buffer before the last one keep the buffer's position embeddings.
    pos_lC = model.decoder_pos_embed[: length - targets]
    pos_BlC = jnp.broadcast_to(pos_lC[None], (B, *pos_lC.shape))
    target_BnC = model.decoder_pos_embed[model.config.buffer_size + target_Bn]
    x_BlC, decoder = run_vit_blocks(
        model.decoder_block,
        model.decoder_blocks,
        x_BlC + jnp.concatenate([pos_BlC, target_BnC], axis=1),
        mask_lL=mask_lL,
        key_mask_BL=key_mask_BL,
        cache=decoder,
        start=start,
        **decoder_dropouts(dropouts),
    )
    z_BnC = model.decoder_norm(x_BlC[:, length - targets :]) + model.diffusion_pos_embed[target_Bn]
    if encoder is None or decoder is None:
        return z_BnC, None
    return z_BnC, CausalCache(encoder, decoder)


def _empty_cache(config: MARConfig, batch: int, dtype: jnp.dtype) -> CausalCache:
    items = config.buffer_size + config.length - 1  # the last token is never an input
    encoder, decoder = (
        KVCache.allocate(depth, batch, items, width, dtype)
        for depth, width in (
            (config.encoder_depth, config.width),
            (config.decoder_depth, config.hidden_width),
        )
    )
    return CausalCache(encoder, decoder)
