"""A tokenizer and a transformer together, for notebooks and scripts."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from varjax.nn.compute import Compute
from varjax.tokenizer.model import Tokenizer, TokenizerConfig
from varjax.tokenizer.task import to_model
from varjax.var.edit import keep_at_every_scale
from varjax.var.model import VAR, VARConfig
from varjax.var.sample import Known, Options, image_keys, sample_images

Images = np.ndarray | jax.Array
Labels = Sequence[int] | np.ndarray | jax.Array


class Pipeline:
    """Images in are uint8 or float [0, 1], (B, H, W, channels); images out are float32 [0, 1].

    Each method compiles once per shape: not for a new seed, label, guidance or top-k. The pure
    functions underneath are `Tokenizer`, `VAR` and `varjax.var.sample`; their weights are `params`,
    {"tokenizer": …, "var": …}.
    """

    def __init__(
        self,
        tokenizer: TokenizerConfig,
        var: VARConfig,
        params,
        sampling: Options = Options(),  # noqa: B008  (frozen)
        compute: Compute = Compute(),  # noqa: B008  (frozen)
    ):
        self.tokenizer, self.var, self.sampling, self.compute = tokenizer, var, sampling, compute
        self.params = jax.device_put(params)

        def jitted(method):
            bind = Tokenizer(tokenizer).bind
            return jax.jit(lambda params, x: method(bind({"params": params}), x))

        self._encode = jitted(Tokenizer.encode)
        self._decode = jitted(lambda m, x: (m.decode(x) + 1) / 2)
        self._decode_every = jitted(lambda m, x: (m.decode_every_scale(x) + 1) / 2)
        self._sample = jax.jit(functools.partial(sample_images, tokenizer, var, compute=compute))
        self._logits = jax.jit(self._teacher_forced)

    def encode(self, images_BHWC: Images) -> jax.Array:
        """Images -> tokens (B, L) int32, the scales concatenated."""
        return self._encode(self.params["tokenizer"], self._check_images(images_BHWC))

    def decode(self, tokens_BL: Images, every_scale: bool = False) -> jax.Array:
        """Tokens -> images (B, H, W, channels), or (K, B, H, W, channels): after each scale."""
        decode = self._decode_every if every_scale else self._decode
        return decode(self.params["tokenizer"], self._check_tokens(tokens_BL))

    def logits(self, tokens_BL: Images, labels: Labels) -> jax.Array:
        """What the transformer expects at every place, given all coarser scales: (B, L, V)."""
        tokens_BL = self._check_tokens(tokens_BL)
        return self._logits(self.params, tokens_BL, self._check_labels(labels, len(tokens_BL)))

    def sample(
        self,
        labels: Labels,
        seed: int = 0,
        cfg: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        smooth: bool | None = None,
        index: Sequence[int] | np.ndarray | None = None,
    ) -> jax.Array:
        """One new image per label; None stands for the model's own `sampling`.

        Image i is a function of the seed, its `index` (its place, unless given), its label and
        the options, whatever else is in the batch. Raises ValueError for labels or options out of
        range; the label `classes` means "no class".
        """
        label_B = self._check_labels(labels)
        index_B = np.arange(len(label_B)) if index is None else np.asarray(index)
        options = self.options(cfg, top_k, top_p, smooth)
        return self._sample(self.params, label_B, image_keys(seed, index_B), options)

    def edit(
        self,
        images_BHWC: Images,
        keep: np.ndarray,
        labels: Labels | None = None,
        seed: int = 0,
        cfg: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        smooth: bool | None = None,
    ) -> jax.Array:
        """The images with everything outside of `keep` drawn anew; labels None is "no class".

        keep: (h, w) or (B, h, w) bool over the finest token map. Kept tokens stay as they are.
        """
        tokens_BL = self.encode(images_BHWC)
        B, finest = len(tokens_BL), self.var.pyramid.finest
        keep = np.asarray(keep)
        if keep.shape not in (finest, (B, *finest)):
            raise ValueError(f"keep has shape {keep.shape}; allowed are {finest}, {(B, *finest)}")
        keep_Bhw = np.broadcast_to(keep.astype(bool), (B, *finest))
        known = Known(tokens_BL, keep_at_every_scale(self.var.pyramid, keep_Bhw))
        labels = np.full(B, self.var.classes) if labels is None else labels
        options = self.options(cfg, top_k, top_p, smooth)
        keys_B = image_keys(seed, np.arange(B))
        return self._sample(self.params, self._check_labels(labels, B), keys_B, options, known)

    def options(self, cfg=None, top_k=None, top_p=None, smooth=None) -> Options:
        """The model's own `sampling` with what is not None replaced; ValueError if out of range."""
        given = {"cfg": cfg, "top_k": top_k, "top_p": top_p, "smooth": smooth}
        chosen = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(self.sampling, **chosen).check()

    def _teacher_forced(self, params, tokens_BL, label_B):
        tokenizer = Tokenizer(self.tokenizer).bind({"params": params["tokenizer"]})
        model = VAR(self.var, self.compute).bind({"params": params["var"]})
        return model(tokenizer.teacher_input(tokens_BL), label_B)

    def _check_images(self, images_BHWC):
        images_BHWC, wanted = jnp.asarray(images_BHWC), self.tokenizer.image_shape
        if images_BHWC.ndim != 4 or images_BHWC.shape[1:] != wanted:
            raise ValueError(f"images have shape {images_BHWC.shape}; needed is (B, *{wanted})")
        if images_BHWC.dtype == jnp.uint8:
            return to_model(images_BHWC)
        if not jnp.issubdtype(images_BHWC.dtype, jnp.floating):
            raise ValueError(f"images are {images_BHWC.dtype}; give uint8 or float in [0, 1]")
        return images_BHWC.astype(jnp.float32) * 2 - 1

    def _check_tokens(self, tokens_BL):
        tokens_BL = np.asarray(tokens_BL)
        length, vocab = self.var.pyramid.length, self.var.vocab
        if tokens_BL.ndim != 2 or tokens_BL.shape[1] != length:
            raise ValueError(f"tokens have shape {tokens_BL.shape}; needed is (B, {length})")
        if tokens_BL.size and not 0 <= tokens_BL.min() <= tokens_BL.max() < vocab:
            raise ValueError(f"tokens lie outside of 0 … {vocab - 1}")
        return jnp.asarray(tokens_BL, jnp.int32)

    def _check_labels(self, labels, batch=None):
        label_B = np.atleast_1d(np.asarray(labels))
        if label_B.ndim != 1 or (batch is not None and len(label_B) != batch):
            raise ValueError(f"labels have shape {label_B.shape}; needed is ({batch or 'B'},)")
        if bad := [x for x in label_B.tolist() if x != int(x) or not 0 <= x <= self.var.classes]:
            raise ValueError(
                f"labels {bad[:5]}: allowed are 0 … {self.var.classes - 1},"
                f" and {self.var.classes} for no class"
            )
        return jnp.asarray(label_B, jnp.int32)
