"""A MAR transformer with its tokenizer: the family's `Sampler`, for commands and notebooks."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varjax import trees
from varjax.errors import InputError
from varjax.mar.heads import CategoricalHead, DiffusionHead
from varjax.mar.latents import (
    TokenizerConfig,
    check_latents_fit,
    decode_tokens,
    encode_tokens,
)
from varjax.mar.masking import take_at
from varjax.mar.memory import mar_sampling_bytes
from varjax.mar.model import MAR, MARConfig, bind_mar
from varjax.mar.sample import MAROptions, check_sampling, make_setup, sample_mar_tokens
from varjax.nn.compute import ComputeConfig
from varjax.runtime.data_parallel import batch_mesh, data_parallel, replicate
from varjax.sampling.sampler import (
    KnownTokens,
    checked_edit,
    checked_keys,
    checked_labels,
    checked_mask,
    nan_advice,
    replace_options,
)
from varjax.tokenizers.contract import checked_images
from varjax.trees import PyTree

Array = np.ndarray | jax.Array
Labels = Sequence[int] | np.ndarray | jax.Array


# What is multiplied in `compute.dtype` only, and so is held in it.
CAST_KERNELS = (
    r"^mar/(encoder_blocks|decoder_blocks|decoder_embed)/(.*/)?kernel$|"
    r"^mar/head/(?!(input_proj|out)/)(.*/)?kernel$|"
    r"^tokenizer/(decoder/.*|post_quant_conv)/kernel$"
)


class MARPipeline:
    """Samples, edits, encodes and decodes; `varjax.load` makes it from weights.

        model = varjax.load("runs/digits_mar")
        images_BHWC = model.sample([3, 1, 4], seed=0, guidance=1.5)
        latents_BhwZ = model.encode(images_BHWC)

    Images in are uint8 or float in [0, 1], (B, H, W, channels); images out are float32 in [0, 1].
    Latents are in the transformer's units, with a standard deviation of about 1: (B, h, w, Z), or
    codes (B, L) with a categorical head. Each method compiles once per shape and kind of options.
    Every device holds all parameters, and a batch is shared out among the devices.

    Attributes:
        tokenizer: config of the tokenizer; None without one, and then methods that take or return
            images are not available.
        mar: config of the transformer.
        params: parameters, {"tokenizer": …, "mar": …}.
        sampling: default options of `sample` and `edit`.
        compute: number format and execution. Images always become latents in float32.
        devices: devices that share each batch.
    """

    def __init__(
        self,
        tokenizer: TokenizerConfig | None,
        mar: MARConfig,
        params: PyTree,
        sampling: MAROptions = MAROptions(),  # noqa: B008  (frozen)
        compute: ComputeConfig = ComputeConfig(),  # noqa: B008  (frozen)
        devices: Sequence[Any] | None = None,
    ):
        if tokenizer is not None:
            check_latents_fit(tokenizer, mar)
        self.tokenizer, self.mar, self.sampling, self.compute = tokenizer, mar, sampling, compute
        mesh = batch_mesh(devices)
        self.devices: tuple[Any, ...] = tuple(mesh.devices)
        self.params = jax.device_get(params)  # devices hold but one copy, in `compute.dtype`
        with jax.default_device(self.devices[0]):
            held = trees.cast(CAST_KERNELS, self.params, compute.jax_dtype)
        self._held = replicate(held, mesh)
        exact = dataclasses.replace(compute, encoder_precision="highest")

        def sampled_tokens(params, setup, label_B, key_B, known=None):
            return sample_mar_tokens(mar, params["mar"], label_B, key_B, setup, known, compute)

        def sampled(params, setup, label_B, key_B, known=None):
            tokens = sampled_tokens(params, setup, label_B, key_B, known)
            return decode_tokens(self._needed_tokenizer, mar, params["tokenizer"], tokens, compute)

        def encoded(params, _, image_BHWC):
            given = params["tokenizer"], {"image_BHWC": image_BHWC}
            return encode_tokens(self._needed_tokenizer, mar, *given, compute=exact)

        def decoded(params, _, token_BL):
            return decode_tokens(
                self._needed_tokenizer, mar, params["tokenizer"], token_BL, compute
            )

        def hidden(params, _, token_BL, order_BL, known_BL, label_B):
            apply = bind_mar(mar, params["mar"], compute)
            class_BC = apply(label_B, method=MAR.class_vectors)
            return apply(token_BL, order_BL, known_BL, class_BC, method=MAR.hidden)

        def denoised(params, _, xt_NZ, t_N, z_NC):
            return mar.head.network(params["mar"], compute)(z_NC)(xt_NZ, t_N)

        def logits(params, _, z_BLC):
            return mar.head.network(params["mar"], compute)(z_BLC)

        self._tokens, self._sample = (data_parallel(f, mesh) for f in (sampled_tokens, sampled))
        self._encode = data_parallel(encoded, mesh)
        self._decode = data_parallel(decoded, mesh)
        self._hidden, self._logits = data_parallel(hidden, mesh), data_parallel(logits, mesh)
        self._denoise = data_parallel(denoised, mesh)

    @property
    def config(self) -> dict[str, TokenizerConfig | MARConfig | None]:
        """{"tokenizer": …, "mar": …}, the configs of the two models."""
        return {"tokenizer": self.tokenizer, "mar": self.mar}

    @property
    def classes(self) -> int:
        """Number of classes; the label of that number means "no class"."""
        return self.mar.classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, channels) of an image."""
        return self._needed_tokenizer.image_shape

    @property
    def edit_shape(self) -> tuple[int, int]:
        """(h, w) of the token map, on which an edit says what to keep."""
        return self.mar.grid

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(h, w, Z) of an image's latents, or (L,) of its codes."""
        return self.mar.head.latent_shape(self.mar.latent_map)

    def identity(self) -> dict[str, Any]:
        """Returns all that images depend on besides labels, seed and options, as JSON data."""
        return {"compute": self.compute.identity(), "weights": trees.digest(self.params)[:16]}

    def options(self, **given: Any) -> MAROptions:
        """Returns the model's own `sampling` with what is given, and not None, replaced.

        Raises InputError for an unknown name and for a value out of range.
        """
        return check_sampling(self.mar, replace_options(self.sampling, given))

    def sampling_bytes(self, batch_size: int, options: MAROptions) -> int:
        """Estimates how much memory a device needs to sample a number of images at a time."""
        given = self.tokenizer, self.mar, batch_size, self.compute
        beside = mar_sampling_bytes(*given, make_setup(self.mar, options))
        return trees.nbytes(self._held) + beside

    def advise_on_nan(self, options: MAROptions) -> str:
        """Says what to try where an image that was sampled holds NaN or infinite numbers."""
        advice = self.mar.head.advise_on_nan(options.clip_denoised)
        return nan_advice(self.params, self.compute.jax_dtype, advice)

    def encode(self, images_BHWC: Array) -> jax.Array:
        """Encodes images into latents: the posterior's mean in the transformer's units, or codes.

        Returns:
            (B, h, w, Z) float32 or (B, L) int32.
        """
        images_BHWC = checked_images(images_BHWC, self.image_shape)
        return self.mar.unpatchify(self._encode(self._held, None, images_BHWC))

    def decode(self, latents: Array) -> jax.Array:
        """Decodes latents as `encode` gives them into images (B, H, W, channels)."""
        _ = self._needed_tokenizer
        return self._decode(self._held, None, self._checked_tokens(latents))

    def hidden(self, latents: Array, known: Array, labels: Labels | None = None) -> jax.Array:
        """Computes the vectors z of all positions from the tokens that are known.

        Args:
            latents: (B, h, w, Z), or codes (B, L); only the known ones are read.
            known: (h, w) or (B, h, w) bool on the map of `edit_shape`.
            labels: (B,) classes; None for no class.

        Returns:
            (B, L, C) float32, C the decoder's width.

        Raises:
            InputError: a wrong shape, or a model with causal attention, which knows tokens in an
                order and not in any set.
        """
        if self.mar.causal:
            raise InputError("hidden: this model's attention is causal; it has no vector of a set")
        token_BL = self._checked_tokens(latents)
        B = len(token_BL)
        known_BL = checked_mask(known, B, self.edit_shape, "known").reshape(B, self.mar.length)
        labels = np.full(B, self.classes) if labels is None else labels
        label_B = checked_labels(labels, self.classes, B)
        order_BL = np.argsort(~known_BL, axis=1, kind="stable").astype(np.int32)
        token_BL, known_BL = take_at(token_BL, order_BL), take_at(known_BL, order_BL)
        return self._hidden(self._held, None, token_BL, order_BL, known_BL, label_B)

    def denoise(self, xt_NZ: Array, t_N: Array, z_NC: Array) -> jax.Array:
        """Predicts the noise in noisy tokens (MAR, eq. 2).

        Args:
            xt_NZ: noisy tokens, in the transformer's units.
            t_N: timesteps of the tokens, integers 0 … 999.
            z_NC: vectors of the tokens, from `hidden`.

        Returns:
            (N, 2 Z): the noise, and a value that interpolates between the smallest and the largest
            log variance of a step.

        Raises:
            InputError: a wrong shape, or a model whose tokens are codes.
        """
        if not isinstance(self.mar.head, DiffusionHead):
            raise InputError("denoise: this model's tokens are codes; it has `logits` instead")
        Z, C = self.mar.head.token_shape[0], self.mar.hidden_width
        shapes = tuple(np.shape(x) for x in (xt_NZ, t_N, z_NC))
        N = shapes[1][0] if len(shapes[1]) == 1 else "N"
        if shapes != ((N, Z), (N,), (N, C)):
            raise InputError(
                f"x_t, t and z have shapes {shapes}; needed are (N, {Z}), (N,), (N, {C})"
            )
        arrays = (
            jnp.asarray(x, d) for x, d in ((xt_NZ, "float32"), (t_N, "int32"), (z_NC, "float32"))
        )
        return self._denoise(self._held, None, *arrays)

    def logits(self, z_BLC: Array) -> jax.Array:
        """Computes the logits of all codes (B, L, V) from vectors by `hidden`.

        Raises InputError for a model whose tokens are continuous.
        """
        if not isinstance(self.mar.head, CategoricalHead):
            raise InputError("logits: this model's tokens are continuous; it has `denoise` instead")
        return self._logits(self._held, None, jnp.asarray(z_BLC))

    def sample(
        self,
        labels: Labels,
        seed: int = 0,
        *,
        index: Sequence[int] | np.ndarray | None = None,
        **options: Any,
    ) -> jax.Array:
        """Samples one image for each label.

        Image i is a function of (seed, index[i], labels[i], options) alone, whatever else is in the
        batch.

        Args:
            labels: (B,) classes; `classes` means "no class".
            seed: random seed; each gives other images.
            index: (B,) numbers of the images; None for 0 … B-1.
            options: fields of `MAROptions` that replace those of `sampling`.

        Returns:
            (B, H, W, channels) float32 in [0, 1].

        Raises:
            InputError: labels or options out of range.
        """
        _ = self._needed_tokenizer
        return self._sample(self._held, *self._request(labels, seed, index, options))

    def sample_latents(
        self,
        labels: Labels,
        seed: int = 0,
        *,
        index: Sequence[int] | np.ndarray | None = None,
        **options: Any,
    ) -> jax.Array:
        """Samples latents (B, h, w, Z) or codes (B, L), those of `sample`, with its arguments."""
        tokens = self._tokens(self._held, *self._request(labels, seed, index, options))
        return self.mar.unpatchify(tokens)

    def edit(
        self,
        images_BHWC: Array,
        keep: np.ndarray,
        labels: Labels | None = None,
        seed: int = 0,
        *,
        index: Sequence[int] | np.ndarray | None = None,
        **options: Any,
    ) -> jax.Array:
        """Redraws everything outside of `keep`, without further training; else like `sample`.

        Args:
            images_BHWC: one image for each of `index`, or one for all of them.
            keep: (h, w) or (B, h, w) bool on the map of `edit_shape`; True keeps the tokens there.
            labels: (B,) classes; None for no class.
            seed: random seed; each gives other images.
            index: (B,) numbers of the results; None for one result per image.
            options: fields of `MAROptions` that replace those of `sampling`.
        """
        latents = self.encode(images_BHWC)
        return self.decode(self.edit_latents(latents, keep, labels, seed, index=index, **options))

    def edit_latents(
        self,
        latents: Array,
        keep: np.ndarray,
        labels: Labels | None = None,
        seed: int = 0,
        *,
        index: Sequence[int] | np.ndarray | None = None,
        **options: Any,
    ) -> jax.Array:
        """Redraws latents outside of `keep`; those inside stay equal to the bit.

        latents: by `encode`, one for each of `index`, or one for all of them; the rest as `edit`.
        """
        token_BL = self._checked_tokens(latents)
        index_B, keep_Bhw, label_B = checked_edit(
            len(token_BL), keep, labels, index, self.edit_shape, self.classes
        )
        B = len(index_B)
        key_B = checked_keys(seed, index_B, B)
        keep_BL = keep_Bhw.reshape(B, self.mar.length)
        setup = make_setup(self.mar, self.options(**options), keep_BL)
        known = KnownTokens(
            jnp.broadcast_to(token_BL, (B, *token_BL.shape[1:])), jnp.asarray(keep_BL)
        )
        tokens = self._tokens(self._held, setup, label_B, key_B, known)
        return self.mar.unpatchify(tokens)

    @property
    def _needed_tokenizer(self) -> TokenizerConfig:
        if self.tokenizer is None:
            raise InputError(
                "this model has no tokenizer, so it samples latents only (sample_latents); convert "
                "it again with --kl as well"
            )
        return self.tokenizer

    def _request(self, labels, seed, index, options):
        """Returns the arguments of the compiled samplers: (setup, label_B, key_B)."""
        label_B = checked_labels(labels, self.classes)
        key_B = checked_keys(seed, index, len(label_B))
        return make_setup(self.mar, self.options(**options)), label_B, key_B

    def _checked_tokens(self, latents):
        return self.mar.head.checked_tokens(latents, self.mar.latent_map)
