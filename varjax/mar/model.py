"""The MAR transformer: a vector for every token of a grid, from the tokens known so far.

A head (`varjax.mar.heads`) turns such a vector into a token.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from varjax.config import config_tree
from varjax.errors import InputError, check_setting
from varjax.mar.heads import DiffusionHead, Head
from varjax.nn.attention import MAX_HEADS
from varjax.nn.class_embedding import embed_classes
from varjax.nn.compute import ComputeConfig, shard_batch
from varjax.nn.linear import dense
from varjax.nn.stack import stacked_param
from varjax.nn.transformer import ViTBlock, init_vit_blocks, layer_norm, run_vit_blocks
from varjax.trees import PyTree

DECODER = 1 << 16  # folded into the keys of the decoder's dropout
Order = Literal["random", "raster"]
# By name, if not 0: "attention_dropout" of the attention weights, and "dropout" of the layers'
# outputs.
Dropouts = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class MARConfig:
    """Settings of the transformer. Raises InputError for values that are not allowed.

        config = varjax.MARConfig.preset("mar_b")  # a size of the paper
        small = varjax.MARConfig(width=64, encoder_heads=2, decoder_heads=2, latent_map=(4, 4))

    Attributes:
        width: channels of a token in the encoder, and of the class embedding.
        encoder_depth: number of layers over the known tokens.
        decoder_depth: number of layers over all positions.
        encoder_heads: attention heads of the encoder, which divide its width.
        decoder_heads: attention heads of the decoder, which divide its width.
        head: kind of tokens, and how one is drawn from its vector.
        classes: number of classes; the class of that number means "no class" (for guidance).
        latent_map: (h, w), the size of the tokenizer's map of latents.
        buffer_size: number of tokens in front of the sequence that hold the class.
        order: order in which tokens become known: "random", drawn for each image, or "raster".
        causal: whether attention is causal: tokens are then predicted one after another, with a
            key-value cache. If not, any set of tokens is predicted from all known ones (masked
            autoregression).
        embed_init: standard deviation of new embeddings. At the reference's 0.02, positions are
            faint compared with tokens, which are near 1: a short run then learns the classes but
            hardly uses the known tokens.
        decoder_width: channels of a token in the decoder; none for `width`.
    """

    width: int = 768
    encoder_depth: int = 12
    decoder_depth: int = 12
    encoder_heads: int = 12
    decoder_heads: int = 12
    head: Head = DiffusionHead()
    classes: int = 1000
    latent_map: tuple[int, int] = (16, 16)
    buffer_size: int = 64
    order: Order = "random"
    causal: bool = False
    embed_init: float = 0.02
    decoder_width: int | None = None

    def __post_init__(self):
        config_tree.check_types(self)
        heads = "encoder_heads", "decoder_heads"
        for name in ("width", "encoder_depth", "decoder_depth", *heads, "classes", "buffer_size"):
            check_setting(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        check_setting("decoder_width", self.hidden_width, self.hidden_width >= 1, "1 or more")
        for name, width in zip(heads, (self.width, self.hidden_width), strict=True):
            value = getattr(self, name)
            check_setting(name, value, value <= MAX_HEADS, f"at most {MAX_HEADS}")
            check_setting(name, value, not width % value, f"a divisor of width={width}")
        check_setting("embed_init", self.embed_init, self.embed_init > 0, "above 0")
        patch = self.head.patch
        if any(side < 1 or side % patch for side in self.latent_map):
            raise InputError(
                f"latent_map={self.latent_map}: height and width must be multiples of "
                f"head.patch={patch}"
            )

    @classmethod
    def preset(cls, name: str) -> "MARConfig":
        """Returns the config of a released model: mar_b, mar_l or mar_h (256 px)."""
        sizes = {
            "mar_b": (768, 12, 12, DiffusionHead(depth=6, width=1024)),
            "mar_l": (1024, 16, 16, DiffusionHead(depth=8, width=1280)),
            "mar_h": (1280, 20, 16, DiffusionHead(depth=12, width=1536)),
        }
        if name not in sizes:
            raise InputError(f"preset {name!r}: allowed are {', '.join(sizes)}")
        width, depth, heads, head = sizes[name]
        return cls(
            width=width,
            encoder_depth=depth,
            decoder_depth=depth,
            encoder_heads=heads,
            decoder_heads=heads,
            head=head,
        )

    @property
    def hidden_width(self) -> int:
        """C, channels of the decoder, and so of the vectors z."""
        return self.width if self.decoder_width is None else self.decoder_width

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the tokens."""
        h, w = self.latent_map
        return h // self.head.patch, w // self.head.patch

    @property
    def length(self) -> int:
        """L, the number of tokens."""
        return math.prod(self.grid)

    def init(self, key: jax.Array) -> PyTree:
        """Draws untrained parameters, all float32, as the reference does."""
        return MAR(self).init(key, method=MAR.init_all)["params"]

    def patchify(self, latents: jax.Array) -> jax.Array:
        """Cuts latents (B, h, w, channels) into tokens (B, L, Z); codes (B, L) stay as they are."""
        return self.head.patchify(latents)

    def unpatchify(self, tokens: jax.Array) -> jax.Array:
        """Joins tokens (B, L, Z) to latents (B, h, w, channels); codes stay as they are."""
        return self.head.unpatchify(tokens, rows=self.grid[0])


def bind_mar(config: MARConfig, params: PyTree, compute: ComputeConfig) -> Callable[..., Any]:
    """Returns `MAR.apply` on these parameters, which loops of JAX may call.

    z_BLC = bind_mar(config, params, compute)(token_Bn, …, method=MAR.hidden)
    """
    return functools.partial(MAR(config, compute).apply, {"params": params})


class MAR(nn.Module):
    """The encoder over known tokens, the decoder over all positions, and the head's network.

    Tokens are (B, n, Z), or with a categorical head integers (B, n). The residual stream and all
    results are float32, regardless of `compute.dtype`.

    Attributes:
        config: config of the transformer.
        compute: dtype and execution.
    """

    config: MARConfig
    compute: ComputeConfig = ComputeConfig()

    def setup(self):
        c, E, C = self.config, self.config.width, self.config.hidden_width
        self.dtype = self.compute.jax_dtype
        normal, xavier = nn.initializers.normal(c.embed_init), nn.initializers.xavier_uniform()

        def table(name, *shape):
            return self.param(name, normal, shape, jnp.float32)

        def stack(name, block, depth, width):
            draw = functools.partial(init_vit_blocks, block, depth=depth, width=width)
            return stacked_param(self, name, draw, depth)

        self.class_embed = table("class_embed", c.classes, E)
        self.no_class_embed = table("no_class_embed", 1, E)
        self.mask_token = table("mask_token", C)
        self.encoder_pos_embed = table("encoder_pos_embed", c.buffer_size + c.length, E)
        self.decoder_pos_embed = table("decoder_pos_embed", c.buffer_size + c.length, C)
        self.diffusion_pos_embed = table("diffusion_pos_embed", c.length, C)
        self.z_proj: Any = c.head.token_proj(E, normal)
        self.head: Any = c.head.module(self.compute)
        self.z_proj_norm = layer_norm()
        self.encoder_block = ViTBlock(c.encoder_heads, self.compute, parent=None)
        self.encoder_blocks = stack("encoder_blocks", self.encoder_block, c.encoder_depth, E)
        self.encoder_norm = layer_norm()
        self.decoder_embed = dense(C, self.dtype, xavier, None)
        self.decoder_block = ViTBlock(c.decoder_heads, self.compute, parent=None)
        self.decoder_blocks = stack("decoder_blocks", self.decoder_block, c.decoder_depth, C)
        self.decoder_norm = layer_norm()

    def class_vectors(self, label_B: jax.Array) -> jax.Array:
        """Looks up the class embeddings (B, C); the label `config.classes` means "no class".

        label_B: classes (B,), or weights (B, classes + 1) that mix them.
        """
        if label_B.ndim == 2:
            embedding_NC = jnp.concatenate([self.class_embed, self.no_class_embed])
            return shard_batch(embed_classes(label_B, embedding_NC))
        vector_BC = embed_classes(label_B, self.class_embed)
        no_class_B1 = (label_B == self.config.classes)[:, None]
        return shard_batch(jnp.where(no_class_B1, self.no_class_embed, vector_BC))

    def hidden(
        self,
        token_Bn: jax.Array,
        position_Bn: jax.Array,
        known_Bn: jax.Array,
        class_BC: jax.Array,
        dropouts: Dropouts | None = None,
    ) -> jax.Array:
        """Computes a vector for every position from the tokens that are known, in any order.

        Args:
            token_Bn: tokens, (B, n, Z) or (B, n).
            position_Bn: positions of the tokens, 0 … L-1.
            known_Bn: False for padding, which no token attends to.
            class_BC: class vectors, from `class_vectors`.
            dropouts: dropout in training.

        Returns:
            z (B, L, C) float32.
        """
        B, buffer, length = position_Bn.shape[0], self.config.buffer_size, self.config.length
        # The encoder: the buffer, which holds the class, and the known tokens.
        token_BnC = self.embed_tokens(token_Bn, position_Bn)
        x_BlC = jnp.concatenate([self.embed_buffer(class_BC), token_BnC], axis=1)
        x_BlC, _ = run_vit_blocks(
            self.encoder_block,
            self.encoder_blocks,
            x_BlC,
            key_mask_BL=jnp.pad(known_Bn, ((0, 0), (buffer, 0)), constant_values=True),
            **(dropouts or {}),
        )
        x_BlC = self.decoder_embed(self.encoder_norm(x_BlC)).astype(jnp.float32)
        # The decoder: the buffer and all positions, with mask tokens at unknown positions.
        # Padding goes to position L, where it is dropped.
        mask_BLC = jnp.broadcast_to(self.mask_token, (B, length, x_BlC.shape[-1]))
        target_Bn = jnp.where(known_Bn, position_Bn, length)
        put = jax.vmap(lambda x_LC, position_n, x_nC: x_LC.at[position_n].set(x_nC, mode="drop"))
        x_BLC = put(mask_BLC, target_Bn, x_BlC[:, buffer:])
        x_BLC = jnp.concatenate([x_BlC[:, :buffer], x_BLC], axis=1) + self.decoder_pos_embed[None]
        x_BLC, _ = run_vit_blocks(
            self.decoder_block, self.decoder_blocks, x_BLC, **decoder_dropouts(dropouts)
        )
        return self.decoder_norm(x_BLC)[:, buffer:] + self.diffusion_pos_embed[None]

    def embed_buffer(self, class_BC: jax.Array) -> jax.Array:
        """Embeds the class for the encoder, once for each token of the buffer: (B, buffer, C)."""
        buffer = self.config.buffer_size
        x_BlC = jnp.repeat(class_BC[:, None], buffer, axis=1)
        return self.z_proj_norm(x_BlC + self.encoder_pos_embed[None, :buffer])

    def embed_tokens(self, token_Bn: jax.Array, position_Bn: jax.Array) -> jax.Array:
        """Embeds tokens at positions for the encoder, (B, n, C)."""
        pos_BnC = self.encoder_pos_embed[self.config.buffer_size + position_Bn]
        return self.z_proj_norm(self.z_proj(token_Bn) + pos_BnC)

    def init_all(self):
        """Runs everything once, so that `init` makes every parameter."""
        head = self.config.head
        token_Bn = jnp.zeros((1, 1, *head.token_shape), head.token_dtype)
        position_Bn = jnp.zeros((1, 1), jnp.int32)
        class_BC = self.class_vectors(jnp.zeros(1, jnp.int32))
        z_BLC = self.hidden(token_Bn, position_Bn, position_Bn == 0, class_BC)
        return self.head(*head.example_inputs(z_BLC[0, :1]))


def decoder_dropouts(dropouts: Dropouts | None) -> Dropouts:
    """Returns the dropouts of the decoder's layers, with different masks than the encoder's."""
    return {name: dropout.fold_in(DECODER) for name, dropout in (dropouts or {}).items()}
