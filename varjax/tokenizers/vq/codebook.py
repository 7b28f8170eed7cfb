"""A code book whose codes are all of use: how it starts, and what happens to codes nobody wants."""

import dataclasses
from collections.abc import Mapping
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from varjax.core import trees
from varjax.core.errors import InputError
from varjax.core.trees import PyTree
from varjax.nn import resize
from varjax.nn.autoencoder import to_model_range
from varjax.tokenizers.vq.codes import draw, kmeans, scale_inputs
from varjax.tokenizers.vq.model import VQConfig, VQTokenizer
from varjax.tokenizers.vq.pyramid import Pyramid
from varjax.training.task import TrainState

PATH = "quantizer/codebook"
VECTORS = 16  # for each code, that k-means looks at
DECAY = 0.98  # of the running mean of how often codes are used
DEAD = 0.1  # of an even share: codes used less are dead
SCALES_KEY = 101  # folded into an image's key; `augment` folds small numbers
CODES_KEY = 2**31 - 1  # folded into a step's key; images fold their numbers


@dataclasses.dataclass(frozen=True)
class Codebook:
    """Remedies against codes and scales that are not used; by default none.

    init: of the codes. "uniform" ±1/V; "normal" of about length 1; "kmeans" of what the scales of
    the first batch have to find codes for, each scale as much (over those of `init_from`, too).
    restart_every: updates after which dead codes, whose use over the last 50 updates or so was less
    than a tenth of an even share, become vectors of the batch that codes are looked for; 0: never.
    scale_dropout: the share of training images that keep a random number of scales only, at least
    `scales_kept` (XQ-GAN drops 0.1 from 3 on). Their losses are those of the scales they keep.
    entropy: weight of a loss that is low where each vector is sure of its code but all vectors
    together use many codes, at each scale. "All" are those of one part, with `accumulate`.

    Raises InputError for what is out of range.
    """

    init: Literal["uniform", "normal", "kmeans"] = "uniform"
    restart_every: int = 0
    scale_dropout: float = 0.0
    scales_kept: int = 3
    entropy: float = 0.0

    def __post_init__(self):
        for name, sensible, allowed in (
            ("restart_every", self.restart_every >= 0, "0 (never) or more updates"),
            ("scale_dropout", 0 <= self.scale_dropout <= 1, "a share of images in [0, 1]"),
            ("scales_kept", self.scales_kept >= 1, "1 or more"),
            ("entropy", self.entropy >= 0, "0 (off) or more"),
        ):
            if not sensible:
                raise InputError(f"codebook.{name}={getattr(self, name)}: must be {allowed}")

    def check(self, pyramid: Pyramid) -> None:
        """Raises InputError where there are too few scales to drop any."""
        if self.scale_dropout and self.scales_kept >= len(pyramid):
            raise InputError(
                f"codebook.scales_kept={self.scales_kept} of {len(pyramid)} scales: nothing is "
                "left for codebook.scale_dropout to drop; keep fewer"
            )

    def kept(self, pyramid: Pyramid, key_B: jax.Array) -> jax.Array | None:
        """The number of scales that each image keeps, (B,); None where all keep all."""
        if not self.scale_dropout:
            return None

        scales = len(pyramid)

        def one(key):
            drop_key, count_key = jax.random.split(jax.random.fold_in(key, SCALES_KEY))
            count = jax.random.randint(count_key, (), self.scales_kept, scales)
            return jnp.where(jax.random.bernoulli(drop_key, self.scale_dropout), count, scales)

        return jax.vmap(one)(key_B)

    def start(self, config: VQConfig, params: PyTree, key: jax.Array) -> PyTree:
        """Parameters whose codes are drawn as `init` says; "kmeans" has to wait for images."""
        if self.init != "normal":
            return params
        codebook_VZ = jax.random.normal(key, (config.vocab, config.code_channels))
        return with_codes(params, codebook_VZ * config.code_channels**-0.5)

    def begin(
        self, pyramid: Pyramid, state: TrainState, read: "Read", key: jax.Array
    ) -> TrainState:
        """The state before an update; before the first one with the codes that k-means finds."""
        if self.init != "kmeans":
            return state
        before_VZ, first = state.params["quantizer"]["codebook"], state.step == 0

        def found():
            draw_key, kmeans_key = jax.random.split(jax.random.fold_in(key, CODES_KEY))
            z_BLZ, vocab = read(state.params, ideal=True), len(before_VZ)
            return kmeans(draw(pyramid, z_BLZ, VECTORS * vocab, draw_key), vocab, kmeans_key)

        codebook_VZ, ema = jax.lax.cond(first, found, lambda: before_VZ), state.ema
        if ema is not None:
            ema = with_codes(ema, jnp.where(first, codebook_VZ, ema["quantizer"]["codebook"]))
        return dataclasses.replace(state, params=with_codes(state.params, codebook_VZ), ema=ema)

    def use(self, config: VQConfig) -> dict[str, jax.Array]:
        """What `tend` has to know of the steps before: at first, every code has its even share."""
        return {"use_V": jnp.full(config.vocab, 1 / config.vocab)} if self.restart_every else {}

    def tend(
        self,
        pyramid: Pyramid,
        state: TrainState,
        use: Mapping[str, jax.Array],
        frequency_KV: jax.Array,
        read: "Read",
        key: jax.Array,
    ) -> tuple[TrainState, dict[str, jax.Array], dict[str, jax.Array]]:
        """(state, use, metrics) after an update, its dead codes replaced where it is time.

        The average of the parameters takes new codes as they are; their moments begin anew.
        """
        if not self.restart_every:
            return state, {}, {}
        vocab = frequency_KV.shape[1]
        use_V = running_use(pyramid, use["use_V"], frequency_KV)
        dead_V = (use_V < DEAD / vocab) & (state.step % self.restart_every == 0)
        before_VZ = state.params["quantizer"]["codebook"]

        def found():
            z_BLZ = read(state.params, ideal=False)
            return draw(pyramid, z_BLZ, vocab, jax.random.fold_in(key, CODES_KEY))

        new_VZ = jax.lax.cond(jnp.any(dead_V), found, lambda: before_VZ)

        def renew(path, x):
            if not path.endswith(PATH):
                return x
            now_VZ = jnp.zeros_like(x) if path.startswith("opt_state") else new_VZ
            return jnp.where(dead_V[:, None], now_VZ, x)

        use_V = jnp.where(dead_V, 1 / vocab, use_V)
        restarted = jnp.sum(dead_V, dtype=jnp.float32)
        return trees.map_with_path(renew, state), {"use_V": use_V}, {"restarted": restarted}


class Read(Protocol):
    """What scales have to find codes for: `read_inputs` of a batch."""

    def __call__(self, params: PyTree, ideal: bool) -> jax.Array: ...


def with_codes(params: PyTree, codebook_VZ: jax.Array) -> PyTree:
    """Parameters, or their gradients, with others at the codes' place."""
    return params | {"quantizer": params["quantizer"] | {"codebook": codebook_VZ}}


def read_inputs(
    config: VQConfig, image_BHWC: jax.Array, parts: int, params: PyTree, ideal: bool
) -> jax.Array:
    """`scale_inputs` of uint8 images, (B, L, Z), worked off in `parts` that change nothing.

    ideal: as if the coarser scales had left nothing but what they cannot resolve; there may be no
    sensible codes yet.
    """
    model, pyramid = VQTokenizer(config).bind({"params": params}), config.pyramid

    def one(image_BHWC):
        f_BhwZ = model.features(to_model_range(image_BHWC))
        if ideal:
            maps = (resize.area(f_BhwZ, shape) for shape in pyramid.shapes)
            f_hats = [resize.bicubic(map_BhwZ, pyramid.finest) for map_BhwZ in maps]
        else:
            f_hats = model.quantizer(f_BhwZ).f_hats
        return jnp.concatenate(scale_inputs(pyramid, f_BhwZ, f_hats), axis=1)

    size = len(image_BHWC)
    split = image_BHWC.reshape(size // parts, parts, *image_BHWC.shape[1:]).swapaxes(0, 1)
    return jax.lax.map(one, split).swapaxes(0, 1).reshape(size, pyramid.length, -1)


def running_use(pyramid: Pyramid, use_V: jax.Array, frequency_KV: jax.Array) -> jax.Array:
    """The running mean of the codes' shares of the tokens, in which each scale counts the same."""
    length_K1 = jnp.array(pyramid.lengths, jnp.float32)[:, None]
    return DECAY * use_V + (1 - DECAY) * jnp.mean(frequency_KV / length_K1, axis=0)
