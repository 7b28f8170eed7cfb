"""MAR's pure functions of the parameters, for jit, vmap, grad, shard_map and training loops."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from varjax.errors import InputError
from varjax.mar.latents import TokenizerConfig, decode_tokens, encode_tokens
from varjax.mar.model import MAR, MARConfig, bind_mar
from varjax.mar.sample import (
    MAROptions,
    MARRule,
    SamplingSetup,
    check_sampling,
    make_setup,
    sample_mar_tokens,
)
from varjax.nn.compute import ComputeConfig
from varjax.sampling.sampler import KnownTokens, replace_options
from varjax.trees import PyTree


@dataclasses.dataclass(frozen=True)
class MARFunctions:
    """MAR's functions of its parameters, `model.params`; JAX may transform each of them.

        key_B = varjax.image_keys(0, range(2))
        images_BHWC = jax.jit(model.pure.sample)(model.params, jnp.array([3, 1]), key_B)

    Arguments are arrays that are not checked: labels (B,) int32 below `classes`, or `classes` for
    "no class", and tokens by position, (B, L, Z) float32 or codes (B, L) int32.

    Attributes:
        tokenizer: config of the tokenizer; None without one, which decoding needs.
        mar: config of the transformer.
        compute: dtype and execution.
        sampling: default sampling options.
        guide: config of the weaker model that guides; None if "no class" does.
    """

    tokenizer: TokenizerConfig | None
    mar: MARConfig
    compute: ComputeConfig = ComputeConfig()
    sampling: MAROptions = MAROptions()
    guide: MARConfig | None = None

    def encode(self, params: PyTree, image_BHWC: jax.Array) -> jax.Array:
        """Encodes images into tokens: the posterior's mean in the transformer's units, or codes."""
        exact = dataclasses.replace(self.compute, encoder_precision="highest")
        batch = {"image_BHWC": image_BHWC}
        tokenizer = self.tokenizer_for_images()
        return encode_tokens(tokenizer, self.mar, params["tokenizer"], batch, compute=exact)

    def decode(self, params: PyTree, token_BL: jax.Array) -> jax.Array:
        """Decodes tokens into images (B, H, W, channels) in [0, 1]."""
        tokenizer = self.tokenizer_for_images()
        return decode_tokens(tokenizer, self.mar, params["tokenizer"], token_BL, self.compute)

    def hidden(
        self,
        params: PyTree,
        token_BL: jax.Array,
        order_BL: jax.Array,
        known_BL: jax.Array,
        label_B: jax.Array,
    ) -> jax.Array:
        """Computes the vectors z of all positions, (B, L, C), from the tokens that are known.

        Args:
            params: parameters of all models, `model.params`.
            token_BL: tokens in the order of `order_BL`; only the known ones are read.
            order_BL: positions, the known ones first, (B, L) int32.
            known_BL: whether each token in this order is known.
            label_B: classes of the images.
        """
        apply = bind_mar(self.mar, params["mar"], self.compute)
        class_BC = apply(label_B, method=MAR.class_vectors)
        return apply(token_BL, order_BL, known_BL, class_BC, method=MAR.hidden)

    def sample(
        self,
        params: PyTree,
        label_B: jax.Array,
        key_B: jax.Array,
        choose: MARRule | None = None,
        **options: Any,
    ) -> jax.Array:
        """Samples images (B, H, W, channels) float32 in [0, 1].

        Args:
            params: parameters of all models, `model.params`.
            label_B: classes, or weights of classes (B, classes + 1) float32.
            key_B: one key per image, from `varjax.image_keys`.
            choose: rule that chooses tokens; see `MARPipeline.sample`.
            options: sampling options to replace, as Python numbers; see `MARPipeline.sample`.
        """
        chosen = check_sampling(self.mar, replace_options(self.sampling, options))
        return self.sampler(chosen, choose)(params, chosen, label_B, key_B)

    def sampler(
        self, options: MAROptions, choose: MARRule | None = None
    ) -> Callable[..., jax.Array]:
        """Makes a function that samples images with options of one kind.

        Its options may be traced. They may differ from `options` in the numbers that need no new
        compilation; see `MAROptions`.

        Returns:
            (params, options, label_B, key_B) -> images (B, H, W, channels).
        """
        return functools.partial(self._sample, make_setup(self.mar, options), choose)

    def editors(self, options: MAROptions) -> dict[int, Callable[..., jax.Array]]:
        """Makes functions that edit images with options of one kind; see `sampler`.

        The more tokens are kept, the fewer steps are computed, so there are several functions.

        Returns:
            {largest number of kept tokens: function}, each (params, options, label_B, key_B,
            token_BL, keep_Bhw) -> images.
        """
        setups: dict[Any, tuple[int, SamplingSetup]] = {}
        for kept in range(self.mar.length + 1):
            keep_BL = np.arange(self.mar.length)[None] < kept
            setup = make_setup(self.mar, options, keep_BL)
            setups[None if self.mar.causal else setup.groups] = kept, setup

        def edit(setup, params, options, label_B, key_B, token_BL, keep_Bhw):
            known = KnownTokens(token_BL, keep_Bhw.reshape(-1, self.mar.length))
            return self._sample(setup, None, params, options, label_B, key_B, known)

        return {kept: functools.partial(edit, setup) for kept, setup in setups.values()}

    def _sample(self, setup, choose, params, options, label_B, key_B, known=None) -> jax.Array:
        token_BL = sample_mar_tokens(
            self.mar,
            params["mar"],
            label_B,
            key_B,
            dataclasses.replace(setup, options=options),
            known,
            self.compute,
            choose=choose,
            guide=None if self.guide is None else (self.guide, params["guide"]),
        )
        return self.decode(params, token_BL)

    def tokenizer_for_images(self) -> TokenizerConfig:
        """Returns the tokenizer's config; raises InputError if there is none."""
        if self.tokenizer is None:
            raise InputError(
                "this model has no tokenizer, so it samples latents only (sample_latents); convert "
                "it again with --kl"
            )
        return self.tokenizer
