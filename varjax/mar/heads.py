"""The two heads: what a token is, the loss of a token given its vector z, and how it is drawn.

Both have the same methods, so no other code asks which one a model has. A head's network is a
function of z that returns a denoiser (DiffusionHead) or the logits of all codes (CategoricalHead).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from varjax.errors import InputError, check_setting
from varjax.mar.denoiser import DenoisingMLP
from varjax.mar.denoising_schedule import DenoisingSteps
from varjax.nn.compute import ComputeConfig
from varjax.nn.diffusion import TRAINING_STEPS, diffusion_loss, reverse_diffusion
from varjax.nn.linear import OutputHead, dense
from varjax.nn.rng import ImageStream, stream_keys
from varjax.sampling.guidance import apply_guidance
from varjax.sampling.pipeline import checked_tokens
from varjax.trees import PyTree

NOT_FINITE = -1  # replaces a code whose logits contain NaN

Network = Callable[..., Any]  # a function of z, with the head's parameters
Streams = list[jax.Array]  # (B, m, C) each: the conditional z, and with guidance the unconditional


class DiffusionNoise(NamedTuple):
    """Holds the noise of a training step.

    Attributes:
        timestep_BLU: timesteps of each token, U draws per token.
        noise_BLUZ: normal noise at these timesteps.
    """

    timestep_BLU: jax.Array
    noise_BLUZ: jax.Array


class DrawSettings(NamedTuple):
    """Says how the tokens of a sampling step are drawn.

    Attributes:
        step: index of the step.
        guidance: scale of classifier-free guidance.
        guided_timesteps: the first timestep with guidance, and the first one after those with it;
            None for all.
        temperature: factor on the noise.
        denoising: denoising steps of a continuous token.
        clip_denoised: largest |x_0| that a denoising step may aim at; 0 for no limit.
    """

    step: jax.Array | int
    guidance: jax.Array | float
    guided_timesteps: tuple[jax.Array | int, jax.Array | int] | None
    temperature: jax.Array | float
    denoising: DenoisingSteps
    clip_denoised: jax.Array | float


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
        """(Z,), the shape of a token."""
        return (self.channels * self.patch**2,)

    @property
    def token_dtype(self) -> Any:
        return jnp.float32

    @property
    def latent_sizes(self) -> dict[str, int]:
        """Sizes that the tokenizer must also have, by name."""
        return {"channels": self.channels}

    def latent_shape(self, latent_map: tuple[int, int]) -> tuple[int, ...]:
        """Returns (h, w, channels), the shape of an image's latents."""
        return *latent_map, self.channels

    def patchify(self, latents: jax.Array) -> jax.Array:
        """Cuts latents (B, h, w, channels) into tokens (B, L, Z)."""
        p = self.patch
        return einops.rearrange(latents, "B (h p) (w q) c -> B (h w) (c p q)", p=p, q=p)

    def unpatchify(self, token_BLZ: jax.Array, rows: int) -> jax.Array:
        """Joins tokens, in a grid of `rows` rows, to latents (B, h, w, channels)."""
        p = self.patch
        return einops.rearrange(token_BLZ, "B (h w) (c p q) -> B (h p) (w q) c", h=rows, p=p, q=p)

    def checked_tokens(self, latents: Any, latent_map: tuple[int, int]) -> jax.Array:
        """Cuts a user's latents into tokens; raises InputError for another shape."""
        shape, needed = np.shape(latents), self.latent_shape(latent_map)
        if shape[1:] != needed or not shape[0]:
            raise InputError(f"latents have shape {shape}; needed is (B, *{needed})")
        return self.patchify(jnp.asarray(latents).astype(jnp.float32))

    def token_proj(self, width: int, embed_init: nn.initializers.Initializer) -> nn.Module:
        """Makes the layer that embeds tokens for the encoder, in float32."""
        return dense(width, jnp.float32, nn.initializers.xavier_uniform(), None)

    def module(self, compute: ComputeConfig) -> DenoisingMLP:
        """Makes the head's network, whose parameters are the transformer's `params["head"]`."""
        return DenoisingMLP(self.token_shape[0], self.depth, self.width, compute)

    def example_inputs(self, z_NC: jax.Array) -> tuple[jax.Array, ...]:
        """Returns arguments of the head's module, for initializing it."""
        return (
            jnp.zeros((z_NC.shape[0], *self.token_shape)),
            jnp.zeros(z_NC.shape[0], jnp.int32),
            z_NC,
        )

    def network(self, params: PyTree, compute: ComputeConfig) -> Network:
        """Returns (z_NC, repeats=1) -> denoiser of N tokens, or of `repeats` for each z.

        params: parameters of the transformer.
        """
        apply = functools.partial(self.module(compute).apply, {"params": params["head"]})

        def denoiser(z_NC, repeats=1):
            cond_NE: Any = apply(z_NC, method=DenoisingMLP.condition)
            cond_NE = jnp.repeat(cond_NE, repeats, axis=0)
            return lambda xt_NZ, t_N: apply(xt_NZ, t_N, cond_NE, method=DenoisingMLP.denoise)

        return denoiser

    def training_noise(self, key_B: jax.Array, length: int, repeats: int) -> DiffusionNoise:
        """Draws `repeats` timesteps for each token, and the noise at them, by each image's key."""
        shape = length, repeats
        timesteps = jax.vmap(lambda key: jax.random.randint(key, shape, 0, TRAINING_STEPS))
        noise = jax.vmap(lambda key: jax.random.normal(key, (*shape, *self.token_shape)))
        return DiffusionNoise(
            timesteps(stream_keys(key_B, ImageStream.TIMESTEP)),
            noise(stream_keys(key_B, ImageStream.DIFFUSION_NOISE)),
        )

    def loss(
        self,
        network: Network,
        z_BLC: jax.Array,
        token_BLZ: jax.Array,
        noise: DiffusionNoise | None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the diffusion loss of each token (MAR, eq. 2) and a term for the variance.

        Returns:
            The loss (B, L, U), and its parts by name: "mse" and "vlb".
        """
        assert noise is not None
        B, L, U, Z = noise.noise_BLUZ.shape
        mse_N, vlb_N = diffusion_loss(
            network(z_BLC.reshape(B * L, -1), repeats=U),
            jnp.repeat(token_BLZ.reshape(B * L, Z), U, axis=0),
            noise.timestep_BLU.reshape(-1),
            noise.noise_BLUZ.reshape(-1, Z),
        )
        mse_BLU, vlb_BLU = mse_N.reshape(B, L, U), vlb_N.reshape(B, L, U)
        return mse_BLU + vlb_BLU, {"mse": mse_BLU, "vlb": vlb_BLU}

    def sampling_noise(self, key_B: jax.Array, position_Bm: jax.Array, j: Any) -> jax.Array:
        """Draws the normal noise of denoising step j, (B, m, Z)."""

        def draw(key, position):
            key = jax.random.fold_in(jax.random.fold_in(key, position), j)
            return jax.random.normal(key, self.token_shape)

        return jax.vmap(jax.vmap(draw, (None, 0)))(key_B, position_Bm)

    def draw(
        self,
        networks: Sequence[Network],
        z: Streams,
        noise: Callable[[Any], jax.Array],
        settings: DrawSettings,
    ) -> jax.Array:
        """Draws tokens by removing noise step by step.

        Args:
            networks: z_NC -> denoiser, from `network`; one for all streams, or one for each.
            z: vectors of the tokens; two streams with guidance.
            noise: j -> normal noise (B, m, Z), as `reverse_diffusion` uses it.
            settings: settings of the step.

        Returns:
            (B, m, Z) float32.
        """
        B, m, _ = z[0].shape
        (Z,) = self.token_shape
        streams = [z_BmC.reshape(B * m, -1) for z_BmC in z]
        denoisers = _apply(networks, streams)

        def guided_denoise(xt_NZ, t_1):
            parts = jnp.split(jnp.concatenate([xt_NZ, xt_NZ]), len(denoisers))
            outs = [denoise(part, t_1) for denoise, part in zip(denoisers, parts, strict=True)]
            noise_NZ, value_NZ = jnp.split(jnp.concatenate(outs), 2, axis=-1)
            noise_NZ = apply_guidance(noise_NZ, settings.guidance)
            return jnp.concatenate([noise_NZ, value_NZ[: B * m]], axis=-1)

        denoise = denoisers[0] if len(z) == 1 else guided_denoise
        if len(z) == 2 and settings.guided_timesteps is not None:
            first, stop = settings.guided_timesteps
            unguided_denoise = networks[0](streams[0])

            def denoise(xt_NZ, t_1):
                on = (t_1[0] >= first) & (t_1[0] < stop)
                return jax.lax.cond(on, guided_denoise, unguided_denoise, xt_NZ, t_1)

        token_NZ = reverse_diffusion(
            denoise,
            settings.denoising.coefficients,
            settings.denoising.count,
            lambda j: noise(j).reshape(-1, Z),
            settings.temperature,
            settings.clip_denoised,
        )
        return token_NZ.reshape(B, m, Z)

    def bytes_per_token(self) -> int:
        """Estimates the memory of drawing one token: modulation of each block; as compiled."""
        return self.width * (3 * self.depth + 22) * 4

    def advise_on_nan(self, clip_denoised: float) -> str:
        """Suggests what may help if sampled tokens are not finite; "" for no advice."""
        return (
            ""
            if clip_denoised
            else ("--clip_denoised=3, which bounds denoised tokens (docs/mar.md)")
        )


@dataclasses.dataclass(frozen=True)
class CategoricalHead:
    """Tokens that are codes of a VQ tokenizer with one scale, each drawn from a softmax.

    Raises InputError for a vocabulary below 1. Methods are those of `DiffusionHead`.

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
        """(), because a token is one integer."""
        return ()

    @property
    def token_dtype(self) -> Any:
        return jnp.int32

    @property
    def latent_sizes(self) -> dict[str, int]:
        """Sizes that the tokenizer must also have, by name."""
        return {"vocab": self.vocab}

    def latent_shape(self, latent_map: tuple[int, int]) -> tuple[int, ...]:
        """Returns (L,), the shape of an image's codes."""
        h, w = latent_map
        return (h * w,)

    def patchify(self, latents: jax.Array) -> jax.Array:
        """Returns codes (B, L) as they are."""
        return latents

    def unpatchify(self, token_BL: jax.Array, rows: int) -> jax.Array:
        """Returns codes (B, L) as they are."""
        return token_BL

    def checked_tokens(self, latents: Any, latent_map: tuple[int, int]) -> jax.Array:
        """Returns a user's codes as int32; raises InputError for another shape or other numbers."""
        return checked_tokens(latents, self.latent_shape(latent_map), self.vocab)

    def token_proj(self, width: int, embed_init: nn.initializers.Initializer) -> nn.Module:
        """Makes the table of embeddings of the codes, in float32."""
        return nn.Embed(self.vocab, width, embedding_init=embed_init, dtype=jnp.float32)

    def module(self, compute: ComputeConfig) -> OutputHead:
        """Makes the head's network, whose parameters are the transformer's `params["head"]`."""
        return OutputHead(self.vocab, compute.jax_dtype, nn.initializers.xavier_uniform())

    def example_inputs(self, z_NC: jax.Array) -> tuple[jax.Array, ...]:
        """Returns arguments of the head's module, for initializing it."""
        return (z_NC,)

    def network(self, params: PyTree, compute: ComputeConfig) -> Network:
        """Returns z_BmC -> logits (B, m, V) float32, from the transformer's parameters."""
        return functools.partial(self.module(compute).apply, {"params": params["head"]})

    def training_noise(self, key_B: jax.Array, length: int, repeats: int) -> None:
        """Returns None, because the loss is not random."""

    def loss(
        self,
        network: Network,
        z_BLC: jax.Array,
        token_BL: jax.Array,
        noise: DiffusionNoise | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the cross-entropy of each token.

        Returns:
            The loss (B, L, 1), and "accuracy", 1 where the most likely code is right.
        """
        logits_BLV = network(z_BLC)
        loss_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, token_BL)
        correct_BL = (jnp.argmax(logits_BLV, axis=-1) == token_BL).astype(jnp.float32)
        return loss_BL[..., None], {"accuracy": correct_BL[..., None]}

    def sampling_noise(self, key_B: jax.Array, position_Bm: jax.Array, j: Any) -> jax.Array:
        """Draws Gumbel noise (B, m, V), the same for all j."""

        def draw(key, position):
            return jax.random.gumbel(jax.random.fold_in(key, position), (self.vocab,))

        return jax.vmap(jax.vmap(draw, (None, 0)))(key_B, position_Bm)

    def draw(
        self,
        networks: Sequence[Network],
        z: Streams,
        noise: Callable[[Any], jax.Array],
        settings: DrawSettings,
    ) -> jax.Array:
        """Draws codes (B, m) from the softmax of guided logits / temperature."""
        logits_BmV = jnp.concatenate(_apply(networks, z))
        if len(z) == 2:
            logits_BmV = apply_guidance(logits_BmV, settings.guidance)
        # The argmax of logits and Gumbel noise is a draw from the softmax.
        code_Bm = jnp.argmax(logits_BmV + settings.temperature * noise(0), axis=-1)
        # An argmax hides NaN, so an impossible code marks it.
        finite_Bm = jnp.all(jnp.isfinite(logits_BmV), axis=-1)
        return jnp.where(finite_Bm, code_Bm, NOT_FINITE).astype(jnp.int32)

    def bytes_per_token(self) -> int:
        """Estimates the memory of drawing one token: logits, noise and their sum."""
        return self.vocab * 3 * 4

    def advise_on_nan(self, clip_denoised: float) -> str:
        """Returns "", since no option helps when logits are not finite."""
        return ""


Head = DiffusionHead | CategoricalHead


def _apply(networks: Sequence[Network], z: Streams) -> list[Any]:
    """Applies a single network to all streams as one batch, or each network to its stream."""
    z = [jnp.concatenate(z)] if len(networks) == 1 else z
    return [network(z_NC) for network, z_NC in zip(networks, z, strict=True)]
