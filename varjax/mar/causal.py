"""Autoregression one token after another, with a key-value cache (the rows "AR" of MAR's table 1).

The transformer is the same, its encoder and decoder one after the other over one sequence: the
class buffer, then tokens in their order. Each position sees itself and those before it, and is told
at the decoder's entrance which place it predicts; so the last of the buffer predicts the first
token.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from varjax.mar.model import DECODER, MAR
from varjax.nn.attention import Dropout
from varjax.nn.stack import KVCache
from varjax.nn.vit import run_vit_blocks


@flax.struct.dataclass
class CausalCache:
    """Holds keys and values of both stacks of layers, for all positions."""

    encoder: KVCache
    decoder: KVCache


def causal_hidden(
    model: MAR,
    token_BL: jax.Array,
    order_BL: jax.Array,
    class_BC: jax.Array,
    attention_dropout: Dropout | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Computes a vector for every token from those before it in an order (teacher forcing).

    Args:
        model: model bound to its parameters.
        token_BL: all tokens by position, (B, L, Z) or (B, L).
        order_BL: positions, in the order in which they become known.
        class_BC: class vectors, from `MAR.class_vectors`.
        attention_dropout: dropout of the attention weights, in training.
        dropout: dropout of the layers' results, in training.

    Returns:
        z (B, L, C) float32, by place.
    """
    token_Bn = jax.vmap(lambda token_L, order_L: token_L[order_L[:-1]])(token_BL, order_BL)
    x_BlC = model.encoder_input(token_Bn, order_BL[:, :-1], class_BC)
    z_BLC, _ = _run(model, x_BlC, order_BL, None, 0, attention_dropout, dropout)
    by_place = jax.vmap(lambda z_LC, order_L: jnp.zeros_like(z_LC).at[order_L].set(z_LC))
    return by_place(z_BLC, order_BL)


def causal_start(
    model: MAR, place_B: jax.Array, class_BC: jax.Array
) -> tuple[jax.Array, CausalCache]:
    """Computes z (B, C) of the first token, at `place_B`, and the cache for those after it."""
    x_BlC = model.encoder_input(None, None, class_BC)
    z_B1C, cache = _run(model, x_BlC, place_B[:, None], _empty_cache(model, len(place_B)), 0)
    return z_B1C[:, 0], cache


def causal_next(
    model: MAR,
    token_B: jax.Array,
    place_B: jax.Array,
    next_B: jax.Array,
    number: jax.Array,
    cache: CausalCache,
) -> tuple[jax.Array, CausalCache]:
    """Computes z of the next token from the last one and the cache.

    Args:
        model: model bound to its parameters.
        token_B: the last token, (B, Z) or (B,).
        place_B: position of the last token.
        next_B: position of the next token.
        number: index of the last token in the order, from 0.
        cache: keys and values of all earlier tokens.

    Returns:
        z (B, C) float32 of the next token, and the cache with the last one.
    """
    x_B1C = model.embed_tokens(token_B[:, None], place_B[:, None])
    z_B1C, cache = _run(model, x_B1C, next_B[:, None], cache, model.config.buffer_size + number)
    return z_B1C[:, 0], cache


def _run(
    model, x_BlC, target_Bn, cache, seen, attention_dropout=None, dropout=None
) -> tuple[jax.Array, Any]:
    """Runs both stacks; the last n positions predict the places `target_Bn`.

    seen: positions that the cache holds.
    """
    (B, length, _), targets = x_BlC.shape, target_Bn.shape[1]
    mask_lL, key_mask_BL = np.tri(length, dtype=bool), None
    if cache is not None:
        size = cache.encoder.keys_SBLC.shape[2]
        # Several new tokens are the first ones; a single one sees all that there are.
        mask_lL = np.tri(length, size, dtype=bool) if length > 1 else None
        key_mask_BL = jnp.broadcast_to(jnp.arange(size) < seen + length, (B, size))

    def run(block, blocks, x_BlC, cache, attention_dropout, dropout):
        return run_vit_blocks(
            block,
            blocks,
            x_BlC,
            mask_lL=mask_lL,
            key_mask_BL=key_mask_BL,
            cache=cache,
            start=seen,
            attention_dropout=attention_dropout,
            dropout=dropout,
        )

    caches = (None, None) if cache is None else (cache.encoder, cache.decoder)
    encoder: Any
    decoder: Any
    x_BlC, encoder = run(
        model.encoder_block, model.encoder_blocks, x_BlC, caches[0], attention_dropout, dropout
    )
    x_BlC = model.decoder_embed(model.encoder_norm(x_BlC)).astype(jnp.float32)
    pos_LC = model.decoder_pos_embed
    own_BlC = jnp.broadcast_to(
        pos_LC[None, : length - targets], (B, length - targets, x_BlC.shape[-1])
    )
    pos_BlC = jnp.concatenate([own_BlC, pos_LC[model.config.buffer_size + target_Bn]], axis=1)
    further = [None if d is None else d.fold_in(DECODER) for d in (attention_dropout, dropout)]
    x_BlC, decoder = run(
        model.decoder_block, model.decoder_blocks, x_BlC + pos_BlC, caches[1], *further
    )
    z_BnC = model.decoder_norm(x_BlC[:, length - targets :]) + model.diffusion_pos_embed[target_Bn]
    return z_BnC, None if cache is None else CausalCache(encoder, decoder)


def _empty_cache(model: MAR, batch: int) -> CausalCache:
    c = model.config
    positions = c.buffer_size + c.length - 1  # nothing follows the last token

    encoder, decoder = (
        KVCache.allocate(depth, batch, positions, width, model.dtype)
        for depth, width in ((c.encoder_depth, c.width), (c.decoder_depth, c.hidden_width))
    )
    return CausalCache(encoder, decoder)
