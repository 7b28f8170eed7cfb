"""The MAR transformer: a vector for every token of a grid, from the tokens known so far.

A head turns such a vector into a token: by diffusion where tokens are continuous (MAR, section 3),
by a softmax where they are codes of a VQ tokenizer.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from varjax.errors import InputError, check_setting
from varjax.mar.denoiser import DenoisingMLP
from varjax.nn.attention import MAX_HEADS, Dropout
from varjax.nn.compute import ComputeConfig, shard_batch
from varjax.nn.linear import OutputHead, dense
from varjax.nn.vit import ViTBlock, init_vit_blocks, layer_norm, run_vit_blocks
from varjax.trees import PyTree

DECODER = 1 << 16  # folded into dropout's keys, so that its layers draw other masks
Order = Literal["random", "raster"]
Attention = Literal["bidirectional", "causal"]


@dataclasses.dataclass(frozen=True)
class DiffusionHead:
    """Continuous tokens, each drawn by a denoising MLP. Raises InputError for a size below 1.

    Attributes:
        channels: channels of the tokenizer's latents.
        patch: side of the square of latents that is one token.
        depth: number of residual blocks of the MLP.
        width: channels of the residual blocks.
    """

    channels: int = 16
    patch: int = 1
    depth: int = 6
    width: int = 1024

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check_setting(f"head.{field.name}", value, value >= 1, "1 or more")

    @property
    def token_shape(self) -> tuple[int, ...]:
        """(Z,), of a token's numbers."""
        return (self.channels * self.patch**2,)

    @property
    def token_dtype(self) -> Any:
        return jnp.float32


@dataclasses.dataclass(frozen=True)
class CategoricalHead:
    """Tokens that are codes of a VQ tokenizer of one scale, each drawn from a softmax.

    Raises InputError for a vocabulary below 1.

    Attributes:
        vocab: number of codes.
        patch: always 1, since each code is a token.
    """

    vocab: int
    patch: Literal[1] = 1

    def __post_init__(self):
        check_setting("head.vocab", self.vocab, self.vocab >= 1, "1 or more")

    @property
    def token_shape(self) -> tuple[int, ...]:
        """(), for a token is one integer."""
        return ()

    @property
    def token_dtype(self) -> Any:
        return jnp.int32


@dataclasses.dataclass(frozen=True)
class MARConfig:
    """Settings of the transformer. Raises InputError where sizes do not fit one another.

    Attributes:
        width: channels of a token in the encoder, and of the class embedding.
        encoder_depth: number of layers over the known tokens.
        decoder_depth: number of layers over all positions.
        encoder_heads: attention heads of the encoder, which divide its width.
        decoder_heads: attention heads of the decoder, which divide its width.
        head: kind of tokens, and how one is drawn from its vector.
        classes: number of classes; the class of that number means "no class" (for guidance).
        latent_map: (h, w), the size of the tokenizer's map of latents.
        buffer_size: number of tokens in front that hold the class.
        order: order in which tokens become known: "random", drawn for each image, or "raster".
        attention: direction of attention. "bidirectional" predicts any set of tokens from all known
            ones (masked autoregression); "causal" predicts one token after another, with a
            key-value cache.
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
    head: DiffusionHead | CategoricalHead = DiffusionHead()
    classes: int = 1000
    latent_map: tuple[int, int] = (16, 16)
    buffer_size: int = 64
    order: Order = "random"
    attention: Attention = "bidirectional"
    embed_init: float = 0.02
    decoder_width: int | None = None

    def __post_init__(self):
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
        """Returns a released model's: mar_b, mar_l or mar_h (256 px)."""
        sizes = {
            "mar_b": (768, 12, 12, DiffusionHead(depth=6, width=1024)),
            "mar_l": (1024, 16, 16, DiffusionHead(depth=8, width=1280)),
            "mar_h": (1280, 20, 16, DiffusionHead(depth=12, width=1536)),
        }
        if name not in sizes:
            raise InputError(f"preset {name!r}: allowed are {', '.join(sizes)}")
        width, depth, heads, head = sizes[name]
        return cls(width, depth, depth, heads, heads, head)

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
        return MAR(self).init(key, method="init_all")["params"]

    def patchify(self, latents: jax.Array) -> jax.Array:
        """Cuts latents (B, h, w, channels) into tokens (B, L, Z); codes (B, L) stay as they are."""
        if isinstance(self.head, CategoricalHead):
            return latents
        p = self.head.patch
        return einops.rearrange(latents, "B (h p) (w q) c -> B (h w) (c p q)", p=p, q=p)

    def unpatchify(self, tokens: jax.Array) -> jax.Array:
        """Joins tokens (B, L, Z) to latents (B, h, w, channels); codes stay as they are."""
        if isinstance(self.head, CategoricalHead):
            return tokens
        (h, _), p = self.grid, self.head.patch
        return einops.rearrange(tokens, "B (h w) (c p q) -> B (h p) (w q) c", h=h, p=p, q=p)


def make_denoiser(head: DiffusionHead, compute: ComputeConfig) -> DenoisingMLP:
    """Returns the head's network alone, whose parameters are the transformer's `params["head"]`."""
    return DenoisingMLP(head.token_shape[0], head.depth, head.width, compute)


def bind_mar(config: MARConfig, params: PyTree, compute: ComputeConfig) -> Callable[..., Any]:
    """Returns `MAR.apply` on these parameters, which loops of JAX may call.

    hidden = bind_mar(config, params, compute)(token_Bn, …, method="hidden")
    """
    return functools.partial(MAR(config, compute).apply, {"params": params})


def bind_denoiser(
    head: DiffusionHead, params: PyTree, compute: ComputeConfig
) -> Callable[..., Any]:
    """Returns `DenoisingMLP.apply` on the parameters of a transformer."""
    return functools.partial(make_denoiser(head, compute).apply, {"params": params["head"]})


class MAR(nn.Module):
    """The encoder over known tokens, the decoder over all places, and the head's network.

    Tokens are (B, n, Z), or with a categorical head integers (B, n). The residual stream and what
    it gives are float32 whatever `compute.dtype` says.

    Attributes:
        config: config of the transformer.
        compute: number format and execution.
    """

    config: MARConfig
    compute: ComputeConfig = ComputeConfig()

    def setup(self):
        c, E, C = self.config, self.config.width, self.config.hidden_width
        self.dtype = self.compute.jax_dtype
        normal, xavier = nn.initializers.normal(c.embed_init), nn.initializers.xavier_uniform()
        places = c.buffer_size + c.length

        def table(name, *shape):
            return self.param(name, normal, shape, jnp.float32)

        self.class_embed = table("class_embed", c.classes, E)
        self.no_class_embed = table("no_class_embed", 1, E)  # stands for "no class"
        self.mask_token = table("mask_token", C)
        self.encoder_pos_embed = table("encoder_pos_embed", places, E)
        self.decoder_pos_embed = table("decoder_pos_embed", places, C)
        self.diffusion_pos_embed = table("diffusion_pos_embed", c.length, C)
        self.head: Any
        if isinstance(c.head, DiffusionHead):
            self.z_proj = dense(E, jnp.float32, xavier, None)
            self.head = make_denoiser(c.head, self.compute)
        else:
            self.z_proj = nn.Embed(c.head.vocab, E, embedding_init=normal, dtype=jnp.float32)
            self.head = OutputHead(c.head.vocab, self.dtype, xavier)
        self.z_proj_norm = layer_norm()
        self.encoder_block = ViTBlock(c.encoder_heads, self.compute, parent=None)
        self.encoder_blocks = self.param("encoder_blocks", self._init_encoder_blocks)
        self.encoder_norm = layer_norm()
        self.decoder_embed = dense(C, self.dtype, xavier, None)
        self.decoder_block = ViTBlock(c.decoder_heads, self.compute, parent=None)
        self.decoder_blocks = self.param("decoder_blocks", self._init_decoder_blocks)
        self.decoder_norm = layer_norm()

    def class_vectors(self, label_B: jax.Array) -> jax.Array:
        """Looks up (B, C) of classes; `config.classes` means "no class"."""
        vector_BC = jnp.take(self.class_embed, label_B, axis=0, mode="clip")
        no_class_B1 = (label_B == self.config.classes)[:, None]
        return shard_batch(jnp.where(no_class_B1, self.no_class_embed, vector_BC))

    def hidden(
        self,
        token_Bn: jax.Array,
        place_Bn: jax.Array,
        known_Bn: jax.Array,
        class_BC: jax.Array,
        attention_dropout: Dropout | None = None,
        dropout: Dropout | None = None,
    ) -> jax.Array:
        """Computes a vector for every place from the tokens that are known, in any order.

        Args:
            token_Bn: tokens, (B, n, Z) or (B, n).
            place_Bn: positions of the tokens, 0 … L-1.
            known_Bn: False for padding, which no token attends to.
            class_BC: class vectors, from `class_vectors`.
            attention_dropout: dropout of the attention weights, in training.
            dropout: dropout of the layers' results, in training.

        Returns:
            z (B, L, C) float32.
        """
        x_BlC = self.encode(token_Bn, place_Bn, known_Bn, class_BC, attention_dropout, dropout)
        return self.decode(x_BlC, place_Bn, known_Bn, attention_dropout, dropout)

    def encode(
        self, token_Bn, place_Bn, known_Bn, class_BC, attention_dropout=None, dropout=None
    ) -> jax.Array:
        """Runs the encoder, as in `hidden`: (B, buffer + n, C) float32, the buffer first."""
        x_BlC = self.encoder_input(token_Bn, place_Bn, class_BC)
        x_BlC, _ = run_vit_blocks(
            self.encoder_block,
            self.encoder_blocks,
            x_BlC,
            key_mask_BL=self._with_buffer(known_Bn),
            attention_dropout=attention_dropout,
            dropout=dropout,
        )
        return self.encoder_norm(x_BlC)

    def decode(self, x_BlC, place_Bn, known_Bn, attention_dropout=None, dropout=None) -> jax.Array:
        """Runs the decoder on what `encode` gave, with mask tokens at all other places."""
        B, buffer, length = len(place_Bn), self.config.buffer_size, self.config.length
        x_BlC = self.decoder_embed(x_BlC).astype(jnp.float32)
        mask_BLC = jnp.broadcast_to(self.mask_token, (B, length, x_BlC.shape[-1]))
        # Padding goes to a place behind the last one, where it is dropped.
        target_Bn = jnp.where(known_Bn, place_Bn, length)
        put = jax.vmap(lambda all_LC, place_n, x_nC: all_LC.at[place_n].set(x_nC, mode="drop"))
        x_BLC = put(mask_BLC, target_Bn, x_BlC[:, buffer:])
        x_BLC = jnp.concatenate([x_BlC[:, :buffer], x_BLC], axis=1)
        x_BLC = x_BLC + self.decoder_pos_embed[None]
        x_BLC, _ = run_vit_blocks(
            self.decoder_block,
            self.decoder_blocks,
            x_BLC,
            attention_dropout=None
            if attention_dropout is None
            else attention_dropout.fold_in(DECODER),
            dropout=None if dropout is None else dropout.fold_in(DECODER),
        )
        return self.decoder_norm(x_BLC)[:, buffer:] + self.diffusion_pos_embed[None]

    def denoise(self, xt_NZ: jax.Array, t_N: jax.Array, z_NC: jax.Array) -> jax.Array:
        """Predicts noise and variance's values (N, 2 Z) of noisy tokens; see `DenoisingMLP`."""
        return self.head(xt_NZ, t_N, self.head.condition(z_NC))

    def logits(self, z_BlC: jax.Array) -> jax.Array:
        """Computes the logits of all codes from z, by the categorical head."""
        return self.head(z_BlC)

    def init_all(self):
        """Runs everything once, so that `init` makes every parameter."""
        c = self.config
        token_Bn = jnp.zeros((1, 1, *c.head.token_shape), c.head.token_dtype)
        place_Bn = jnp.zeros((1, 1), jnp.int32)
        class_BC = self.class_vectors(jnp.zeros(1, jnp.int32))
        z_BLC = self.hidden(token_Bn, place_Bn, place_Bn == 0, class_BC)
        if isinstance(c.head, DiffusionHead):
            return self.denoise(token_Bn[0], place_Bn[0], z_BLC[0, :1])
        return self.logits(z_BLC)

    def encoder_input(
        self, token_Bn: jax.Array | None, place_Bn: jax.Array | None, class_BC: jax.Array
    ) -> jax.Array:
        """Embeds the class buffer and, behind it, tokens at places: (B, buffer + n, C)."""
        buffer = self.config.buffer_size
        x_BlC = (
            jnp.repeat(class_BC[:, None], buffer, axis=1) + self.encoder_pos_embed[None, :buffer]
        )
        x_BlC = self.z_proj_norm(x_BlC)
        if token_Bn is None or place_Bn is None:
            return x_BlC
        return jnp.concatenate([x_BlC, self.embed_tokens(token_Bn, place_Bn)], axis=1)

    def embed_tokens(self, token_Bn: jax.Array, place_Bn: jax.Array) -> jax.Array:
        """Embeds tokens at places for the encoder, (B, n, C)."""
        x_BnC = self.z_proj(token_Bn) + self.encoder_pos_embed[self.config.buffer_size + place_Bn]
        return self.z_proj_norm(x_BnC)

    def _init_encoder_blocks(self, key):
        return init_vit_blocks(
            self.encoder_block, key, self.config.encoder_depth, self.config.width
        )

    def _init_decoder_blocks(self, key):
        return init_vit_blocks(
            self.decoder_block, key, self.config.decoder_depth, self.config.hidden_width
        )

    def _with_buffer(self, known_Bn):
        buffer_Bl = jnp.ones((len(known_Bn), self.config.buffer_size), bool)
        return jnp.concatenate([buffer_Bl, known_Bn], axis=1)
