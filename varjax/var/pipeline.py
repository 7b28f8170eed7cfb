"""A VAR transformer with its tokenizer: the family's `Sampler`, for commands and notebooks."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varjax import trees
from varjax.nn.autoencoder import to_model_range, to_unit_range
from varjax.nn.compute import ComputeConfig
from varjax.runtime.data_parallel import batch_mesh, data_parallel, replicate
from varjax.sampling.sampler import (
    KnownTokens,
    checked_edit,
    checked_keys,
    checked_labels,
    checked_tokens,
    nan_advice,
    replace_options,
)
from varjax.tokenizers.contract import checked_images
from varjax.tokenizers.vq.model import VQConfig, VQTokenizer
from varjax.trees import PyTree
from varjax.var.memory import var_sampling_bytes
from varjax.var.model import VAR, VARConfig
from varjax.var.sample import (
    VAROptions,
    keep_at_every_scale,
    sample_images,
)

Array = np.ndarray | jax.Array
# What is multiplied in `compute.dtype` only, and so may be held in it.
CAST_KERNELS = (
    r"^var/(blocks/.*|token_proj|shared_adaln|head)/kernel$|"
    r"^tokenizer/(decoder/.*|post_quant_conv)/kernel$"
)
Labels = Sequence[int] | np.ndarray | jax.Array


class VARPipeline:
    """Samples, edits, encodes and decodes; `varjax.load` makes it from weights.

        model = varjax.load("runs/digits")
        images_BHWC = model.sample([3, 1, 4], seed=0, guidance=3.0)
        tokens_BL = model.encode(images_BHWC)

    Images in are uint8 or float in [0, 1], (B, H, W, channels); images out are float32 in [0, 1].
    Each method compiles once per shape: not for a new seed, label or top-k, and for guidance once
    without and once with it. The pure functions underneath are `VQTokenizer`, `VAR` and
    `varjax.var.sample`. Every device holds all parameters, and a batch is shared out among the
    devices.

    Attributes:
        tokenizer: config of the tokenizer.
        var: config of the transformer.
        params: {"tokenizer": …, "var": …}, on the host. The devices hold kernels in
            `compute.dtype`.
        sampling: default options of `sample` and `edit`.
        compute: number format and execution. Images always become tokens in float32, because other
            formats flip some.
        devices: devices that share each batch.
    """

    def __init__(
        self,
        tokenizer: VQConfig,
        var: VARConfig,
        params: PyTree,
        sampling: VAROptions = VAROptions(),  # noqa: B008  (frozen)
        compute: ComputeConfig = ComputeConfig(),  # noqa: B008  (frozen)
        devices: Sequence[Any] | None = None,
    ):
        self.tokenizer, self.var, self.sampling, self.compute = tokenizer, var, sampling, compute
        mesh = batch_mesh(devices)
        self.devices: tuple[Any, ...] = tuple(mesh.devices)
        self.params = jax.device_get(params)  # devices hold but one copy, in `compute.dtype`
        with jax.default_device(self.devices[0]):
            held = trees.cast(CAST_KERNELS, self.params, compute.jax_dtype)
        self._held = replicate(held, mesh)

        def with_tokenizer(method):
            exact = dataclasses.replace(compute, encoder_precision="highest")
            module = VQTokenizer(tokenizer, exact)
            return data_parallel(
                lambda params, _, x: method(module.bind({"params": params["tokenizer"]}), x), mesh
            )

        def sampled(guided, params, options, label_B, key_B, known=None):
            given = label_B, key_B, options, known, compute, guided
            return sample_images(tokenizer, var, params, *given)

        def every_scale(model, tokens_BL):
            return jnp.moveaxis(to_unit_range(model.decode_every_scale(tokens_BL)), 0, 1)

        self._encode = with_tokenizer(lambda m, image_BHWC: m.encode(to_model_range(image_BHWC)))
        self._decode = with_tokenizer(lambda m, tokens_BL: to_unit_range(m.decode(tokens_BL)))
        self._decode_every = with_tokenizer(every_scale)
        self._with_guidance, self._without_guidance = (
            data_parallel(functools.partial(sampled, guided), mesh) for guided in (True, False)
        )
        self._logits = data_parallel(self._teacher_forced, mesh)

    @property
    def config(self) -> dict[str, VQConfig | VARConfig]:
        """{"tokenizer": …, "var": …}, the configs of the two models."""
        return {"tokenizer": self.tokenizer, "var": self.var}

    @property
    def classes(self) -> int:
        """Number of classes; the label of that number means "no class"."""
        return self.var.classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, channels) of an image."""
        return self.tokenizer.image_shape

    @property
    def edit_shape(self) -> tuple[int, int]:
        """(h, w) of the finest token map, on which an edit says what to keep."""
        return self.var.pyramid.finest

    def identity(self) -> dict[str, Any]:
        """Returns all that images depend on besides labels, seed and options, as JSON data."""
        return {"compute": self.compute.identity(), "weights": trees.digest(self.params)[:16]}

    def options(self, **given: Any) -> VAROptions:
        """Returns the model's own `sampling` with what is given, and not None, replaced.

        Raises InputError for an unknown name and for a value out of range.
        """
        return replace_options(self.sampling, given).check()

    def sampling_bytes(self, batch_size: int, options: VAROptions) -> int:
        """Estimates how much memory a device needs to sample a number of images at a time."""
        given = self.tokenizer, self.var, batch_size, self.compute, options.guidance != 1
        return trees.nbytes(self._held) + var_sampling_bytes(*given)

    def advise_on_nan(self, options: VAROptions) -> str:
        """Says what to try where an image that was sampled holds NaN or infinite numbers."""
        return nan_advice(self.params, self.compute.jax_dtype)

    def encode(self, images_BHWC: Array) -> jax.Array:
        """Encodes images into tokens (B, L) int32, the scales concatenated."""
        return self._encode(self._held, None, checked_images(images_BHWC, self.image_shape))

    def decode(self, tokens_BL: Array, every_scale: bool = False) -> jax.Array:
        """Decodes tokens into images, in `compute.dtype`.

        Args:
            tokens_BL: integers below the vocabulary.
            every_scale: whether to decode the image after each scale, not only after the last.

        Returns:
            (B, H, W, channels), or with `every_scale` (K, B, H, W, channels).
        """
        tokens_BL = self._checked_tokens(tokens_BL)
        if every_scale:
            return jnp.moveaxis(self._decode_every(self._held, None, tokens_BL), 1, 0)
        return self._decode(self._held, None, tokens_BL)

    def logits(self, tokens_BL: Array, labels: Labels) -> jax.Array:
        """Predicts every token from all coarser scales (teacher forcing): (B, L, V) float32."""
        tokens_BL = self._checked_tokens(tokens_BL)
        label_B = checked_labels(labels, self.classes, len(tokens_BL))
        return self._logits(self._held, None, tokens_BL, label_B)

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
            options: fields of `VAROptions` that replace those of `sampling`.

        Returns:
            (B, H, W, channels) float32 in [0, 1].

        Raises:
            InputError: labels or options out of range.
        """
        label_B = checked_labels(labels, self.classes)
        key_B = checked_keys(seed, index, len(label_B))
        return self._sample(self.options(**options), label_B, key_B)

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
            options: fields of `VAROptions` that replace those of `sampling`.
        """
        images_BHWC = checked_images(images_BHWC, self.image_shape)
        index_B, keep_Bhw, label_B = checked_edit(
            len(images_BHWC), keep, labels, index, self.edit_shape, self.classes
        )
        chosen, key_B = self.options(**options), checked_keys(seed, index_B, len(index_B))
        tokens_BL = self._encode(self._held, None, images_BHWC)
        tokens_BL = jnp.broadcast_to(tokens_BL, (len(index_B), self.var.pyramid.length))
        known = KnownTokens(tokens_BL, keep_at_every_scale(self.var.pyramid, keep_Bhw))
        return self._sample(chosen, label_B, key_B, known)

    def _sample(self, options, *batch):
        sample = self._with_guidance if options.guidance != 1 else self._without_guidance
        return sample(self._held, options, *batch)

    def _teacher_forced(self, params, _, tokens_BL, label_B):
        tokenizer = VQTokenizer(self.tokenizer).bind({"params": params["tokenizer"]})
        model = VAR(self.var, self.compute).bind({"params": params["var"]})
        return model(tokenizer.teacher_forcing_input(tokens_BL), label_B)

    def _checked_tokens(self, tokens_BL):
        return checked_tokens(tokens_BL, (self.var.pyramid.length,), self.var.vocab)
