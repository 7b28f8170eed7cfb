"""A tokenizer and a transformer together, for notebooks and scripts."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varjax.core import config_tree, trees
from varjax.core.errors import InputError
from varjax.nn.compute import Compute
from varjax.sampling.data_parallel import batch_mesh, put_everywhere, shared_out
from varjax.sampling.options import replace_options
from varjax.tokenizers.vq.model import Tokenizer, TokenizerConfig
from varjax.tokenizers.vq.task import to_model
from varjax.var.edit import keep_at_every_scale
from varjax.var.model import VAR, VARConfig
from varjax.var.sample import Known, Options, image_keys, sample_images

Images = np.ndarray | jax.Array
Labels = Sequence[int] | np.ndarray | jax.Array


class Pipeline:
    """Images in are uint8 or float [0, 1], (B, H, W, channels); images out are float32 [0, 1].

    Each method compiles once per shape: not for a new seed, label, guidance or top-k. The pure
    functions underneath are `Tokenizer`, `VAR` and `varjax.var.sample`; their weights are `params`,
    {"tokenizer": …, "var": …}. Every device holds them all; a batch that the devices divide is
    shared out among them, any other is computed by each.
    """

    def __init__(
        self,
        tokenizer: TokenizerConfig,
        var: VARConfig,
        params,
        sampling: Options = Options(),  # noqa: B008  (frozen)
        compute: Compute = Compute(),  # noqa: B008  (frozen)
        devices: Sequence[Any] | None = None,
    ):
        self.tokenizer, self.var, self.sampling, self.compute = tokenizer, var, sampling, compute
        mesh = batch_mesh(devices)
        self.devices: tuple[Any, ...] = tuple(mesh.devices)
        self.params = put_everywhere(params, mesh)

        def of_tokenizer(method):
            bind = Tokenizer(tokenizer).bind
            return shared_out(
                lambda params, _, x: method(bind({"params": params["tokenizer"]}), x), mesh
            )

        def sampled(params, options, label_B, key_B, known=None):
            return sample_images(
                tokenizer, var, params, label_B, key_B, options, known, compute=compute
            )

        def every_scale(model, tokens_BL):
            return jnp.moveaxis((model.decode_every_scale(tokens_BL) + 1) / 2, 0, 1)

        self._encode = of_tokenizer(Tokenizer.encode)
        self._decode = of_tokenizer(lambda m, tokens_BL: (m.decode(tokens_BL) + 1) / 2)
        self._decode_every = of_tokenizer(every_scale)
        self._sample = shared_out(sampled, mesh)
        self._logits = shared_out(self._teacher_forced, mesh)

    @property
    def config(self) -> dict[str, TokenizerConfig | VARConfig]:
        """What the two models are: {"tokenizer": …, "var": …}."""
        return {"tokenizer": self.tokenizer, "var": self.var}

    @property
    def classes(self) -> int:
        """The number of classes; the label of that number means "no class"."""
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
        """What images depend on besides labels, seed and options: number format and weights."""
        compute = config_tree.to_dict(self.compute) | {"dtype": str(self.compute.jax_dtype)}
        return {"compute": compute, "weights": trees.digest(self.params)[:16]}

    def encode(self, images_BHWC: Images) -> jax.Array:
        """Images -> tokens (B, L) int32, the scales concatenated."""
        return self._encode(self.params, None, self._check_images(images_BHWC))

    def decode(self, tokens_BL: Images, every_scale: bool = False) -> jax.Array:
        """Tokens -> images (B, H, W, channels), or (K, B, H, W, channels): after each scale."""
        tokens_BL = self._check_tokens(tokens_BL)
        if every_scale:
            return jnp.moveaxis(self._decode_every(self.params, None, tokens_BL), 1, 0)
        return self._decode(self.params, None, tokens_BL)

    def logits(self, tokens_BL: Images, labels: Labels) -> jax.Array:
        """What the transformer expects at every place, given all coarser scales: (B, L, V)."""
        tokens_BL = self._check_tokens(tokens_BL)
        label_B = self._check_labels(labels, len(tokens_BL))
        return self._logits(self.params, None, tokens_BL, label_B)

    def sample(
        self,
        labels: Labels,
        seed: int = 0,
        *,
        index: Sequence[int] | np.ndarray | None = None,
        **options: Any,
    ) -> jax.Array:
        """One new image per label; options are fields of `Options`, by default `sampling`'s.

        Image i is a function of the seed, its `index` (its place, unless given), its label and
        the options, whatever else is in the batch. Raises InputError for labels or options out of
        range; the label `classes` means "no class".
        """
        label_B = self._check_labels(labels)
        index_B = np.arange(len(label_B)) if index is None else np.asarray(index)
        chosen = self.options(**options)
        return self._sample(self.params, chosen, label_B, image_keys(seed, index_B))

    def edit(
        self,
        images_BHWC: Images,
        keep: np.ndarray,
        labels: Labels | None = None,
        seed: int = 0,
        *,
        index: Sequence[int] | np.ndarray | None = None,
        **options: Any,
    ) -> jax.Array:
        """The images with everything outside of `keep` drawn anew; labels None is "no class".

        keep: (h, w) or (B, h, w) bool over the finest token map. Kept tokens stay as they are. One
        image and several of `index` give as many variations of it. For the rest see `sample`.
        """
        images_BHWC = self._check_images(images_BHWC)
        index_B = np.arange(len(images_BHWC)) if index is None else np.asarray(index)
        B, finest = len(index_B), self.var.pyramid.finest
        if len(images_BHWC) not in (1, B):
            raise InputError(
                f"{len(images_BHWC)} images and {B} of index; give one image, or one per index"
            )
        keep = np.asarray(keep)
        if keep.shape not in (finest, (B, *finest)):
            raise InputError(f"keep has shape {keep.shape}; allowed are {finest}, {(B, *finest)}")
        keep_Bhw = np.broadcast_to(keep.astype(bool), (B, *finest))
        label_B = self._check_labels(np.full(B, self.var.classes) if labels is None else labels, B)
        chosen = self.options(**options)
        tokens_BL = self._encode(self.params, None, images_BHWC)
        tokens_BL = jnp.broadcast_to(tokens_BL, (B, self.var.pyramid.length))
        known = Known(tokens_BL, keep_at_every_scale(self.var.pyramid, keep_Bhw))
        return self._sample(self.params, chosen, label_B, image_keys(seed, index_B), known)

    def options(self, **given: Any) -> Options:
        """Returns the model's own `sampling` with what is given, and not None, replaced.

        Raises InputError for an unknown name and for a value out of range.
        """
        return replace_options(self.sampling, given).check()

    def _teacher_forced(self, params, _, tokens_BL, label_B):
        tokenizer = Tokenizer(self.tokenizer).bind({"params": params["tokenizer"]})
        model = VAR(self.var, self.compute).bind({"params": params["var"]})
        return model(tokenizer.teacher_input(tokens_BL), label_B)

    def _check_images(self, images_BHWC):
        images_BHWC, wanted = jnp.asarray(images_BHWC), self.tokenizer.image_shape
        if images_BHWC.ndim != 4 or images_BHWC.shape[1:] != wanted:
            raise InputError(f"images have shape {images_BHWC.shape}; needed is (B, *{wanted})")
        if images_BHWC.dtype == jnp.uint8:
            return to_model(images_BHWC)
        if not jnp.issubdtype(images_BHWC.dtype, jnp.floating):
            raise InputError(f"images are {images_BHWC.dtype}; give uint8 or float in [0, 1]")
        return images_BHWC.astype(jnp.float32) * 2 - 1

    def _check_tokens(self, tokens_BL):
        tokens_BL = np.asarray(tokens_BL)
        length, vocab = self.var.pyramid.length, self.var.vocab
        if tokens_BL.ndim != 2 or tokens_BL.shape[1] != length:
            raise InputError(f"tokens have shape {tokens_BL.shape}; needed is (B, {length})")
        if tokens_BL.size and not 0 <= tokens_BL.min() <= tokens_BL.max() < vocab:
            raise InputError(f"tokens lie outside of 0 … {vocab - 1}")
        return jnp.asarray(tokens_BL, jnp.int32)

    def _check_labels(self, labels, batch=None):
        label_B = np.atleast_1d(np.asarray(labels))
        if label_B.ndim != 1 or (batch is not None and len(label_B) != batch):
            raise InputError(f"labels have shape {label_B.shape}; needed is ({batch or 'B'},)")
        if bad := [x for x in label_B.tolist() if x != int(x) or not 0 <= x <= self.var.classes]:
            raise InputError(
                f"labels {bad[:5]}: allowed are 0 … {self.var.classes - 1},"
                f" and {self.var.classes} for no class"
            )
        return jnp.asarray(label_B, jnp.int32)
