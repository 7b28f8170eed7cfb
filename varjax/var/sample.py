"""Sampling: K scales, each predicted at once, from labels and keys to tokens and images."""

import flax.struct
import jax
import jax.numpy as jnp

from varjax.nn.compute import Compute
from varjax.nn.transformer import Cache
from varjax.tokenizer.model import TokenizerConfig, decode_images, make_quantizer
from varjax.var.model import VAR, VARConfig


@flax.struct.dataclass
class Options:
    """How tokens are chosen. Numbers may change without a new compilation; `smooth` may not.

    cfg: guidance at the last scale, growing linearly from 0 at the first; 0 turns it off.
    top_k, top_p: keep only the likeliest codes; 0 turns either off; top_k = 1 is greedy.
    smooth: mix codes softly instead of drawing one. Pleasing, but not for benchmarks.
    """

    cfg: float = 1.5
    top_k: int = 900
    top_p: float = 0.96
    smooth: bool = flax.struct.field(pytree_node=False, default=False)

    def check(self) -> "Options":
        """Itself; raises ValueError for a value out of range."""
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ValueError(f"top_k={self.top_k}: must be a whole number, 0 (off) or more")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must lie in [0, 1]; 0 turns it off")
        if not 0 <= self.cfg < float("inf"):
            raise ValueError(f"cfg={self.cfg}: must be a finite number, 0 (off) or more")
        return self


@flax.struct.dataclass
class Known:
    """Tokens that sampling must keep: where keep_BL is True, tokens_BL stand (editing)."""

    tokens_BL: jax.Array
    keep_BL: jax.Array


def sample(
    tokenizer: TokenizerConfig,
    var: VARConfig,
    params,
    label_B: jax.Array,
    key_B: jax.Array,
    options: Options,
    known: Known | None = None,
    compute: Compute = Compute(),  # noqa: B008  (frozen)
) -> tuple[jax.Array, jax.Array]:
    """Tokens (B, L) and features f_hat (B, h, w, Z), for labels (B,) and one key per image.

    params: {"tokenizer": …, "var": …}. With `smooth`, f_hat is made of mixed codes and a token is
    the likeliest of its mixture.
    """
    pyramid = var.pyramid
    model = VAR(var, compute).bind({"params": params["var"]})
    quantizer = make_quantizer(tokenizer).bind({"params": params["tokenizer"]["quantizer"]})
    # Both streams of guidance as one batch. The second must run at the first scale, too, where
    # guidance is 0: it fills its cache.
    cond = model.condition(jnp.concatenate([label_B, jnp.full_like(label_B, var.classes)]))
    tokens, cache, input_2BlZ = [], Cache(), None
    f_hat_BhwZ = quantizer.empty(label_B.shape[0])
    for k, scale in enumerate(pyramid.slices):
        logits_2BlV, cache = model.predict(input_2BlZ, cond, k, cache)
        logits_BlV = guide(logits_2BlV, options.cfg * pyramid.progress(k))
        logits_BlV = keep_likeliest(logits_BlV, options.top_k, options.top_p)
        key_B_k = jax.vmap(jax.random.fold_in, (0, None))(key_B, k)
        if options.smooth:
            weights_BlV = soft_weights(logits_BlV, gumbel(key_B_k, logits_BlV), pyramid.progress(k))
            tokens_Bl = jnp.argmax(weights_BlV, axis=-1)
            codes_BlZ = quantizer.mix(weights_BlV)
        else:
            tokens_Bl = jnp.argmax(logits_BlV + gumbel(key_B_k, logits_BlV), axis=-1)
            codes_BlZ = quantizer.look_up(tokens_Bl)
        if known is not None:
            keep_Bl, known_Bl = known.keep_BL[:, scale], known.tokens_BL[:, scale]
            tokens_Bl = jnp.where(keep_Bl, known_Bl, tokens_Bl)
            codes_BlZ = jnp.where(keep_Bl[..., None], quantizer.look_up(known_Bl), codes_BlZ)
        tokens.append(tokens_Bl.astype(jnp.int32))
        f_hat_BhwZ = quantizer.add_scale(f_hat_BhwZ, codes_BlZ, k)
        if k + 1 < len(pyramid):
            input_BlZ = quantizer.next_input(f_hat_BhwZ, k)
            input_2BlZ = jnp.concatenate([input_BlZ, input_BlZ])
    return jnp.concatenate(tokens, axis=1), f_hat_BhwZ


def sample_images(
    tokenizer: TokenizerConfig,
    var: VARConfig,
    params,
    label_B: jax.Array,
    key_B: jax.Array,
    options: Options,
    known: Known | None = None,
    compute: Compute = Compute(),  # noqa: B008  (frozen)
) -> jax.Array:
    """`sample`, decoded in `compute.dtype`: images (B, H, W, channels) in [0, 1].

    Meant to be jitted as a whole.
    """
    _, f_hat_BhwZ = sample(tokenizer, var, params, label_B, key_B, options, known, compute)
    image_BHWC = decode_images(tokenizer, params["tokenizer"], f_hat_BhwZ, compute.jax_dtype)
    return (image_BHWC + 1) / 2


def image_keys(seed: int | jax.Array, index_B: jax.typing.ArrayLike) -> jax.Array:
    """One key per image, from the seed and the image's own number, not its place in a batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), index_B)


def guide(logits_2BlV: jax.Array, t: float | jax.Array) -> jax.Array:
    """Classifier-free guidance: (1+t)·conditional - t·unconditional, (2B, l, V) -> (B, l, V)."""
    conditional_BlV, unconditional_BlV = jnp.split(logits_2BlV, 2)
    return (1 + t) * conditional_BlV - t * unconditional_BlV


def keep_likeliest(
    logits_BlV: jax.Array, top_k: int | jax.Array, top_p: float | jax.Array
) -> jax.Array:
    """Logits with -inf outside of top-k (ties with the k-th stay) and then of top-p.

    top-p drops the least likely codes that together hold at most 1-p, of equal ones the first; the
    best always stays.
    """
    V = logits_BlV.shape[-1]
    top_k = jnp.where((top_k == 0) | (top_k > V), V, top_k)
    # One ascending sort gives both limits, each as a threshold on the unsorted logits.
    sorted_BlV = jnp.sort(logits_BlV, axis=-1)
    kth_Bl1 = jnp.take(sorted_BlV, jnp.array([V]) - top_k, axis=-1)
    kept_BlV = jnp.where(sorted_BlV < kth_Bl1, -jnp.inf, sorted_BlV)
    mass_BlV = jnp.cumsum(jax.nn.softmax(kept_BlV), axis=-1)
    dropped_BlV = (mass_BlV <= 1 - top_p) & (jnp.arange(V) < V - 1)[None, None] & (top_p > 0)
    drop_Bl1 = jnp.sum(dropped_BlV, axis=-1, keepdims=True)
    pth_Bl1 = jnp.take_along_axis(sorted_BlV, drop_Bl1, axis=-1)
    equal_BlV = logits_BlV == pth_Bl1
    drop_equal_Bl1 = drop_Bl1 - jnp.sum(logits_BlV < pth_Bl1, axis=-1, keepdims=True)
    kept_BlV = (logits_BlV > pth_Bl1) | (
        equal_BlV & (jnp.cumsum(equal_BlV, axis=-1) > drop_equal_Bl1)
    )
    return jnp.where(kept_BlV & (logits_BlV >= kth_Bl1), logits_BlV, -jnp.inf)


def soft_weights(logits_BlV: jax.Array, gumbel_BlV: jax.Array, progress: float) -> jax.Array:
    """The mixture over codes of `smooth`, sharper the finer the scale (progress 0 … 1)."""
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    return jax.nn.softmax((logits_BlV * (1 + progress) + gumbel_BlV) / temperature)


def gumbel(key_B: jax.Array, like_BlV: jax.Array) -> jax.Array:
    """Gumbel noise (B, l, V), each image's by its own key; logits plus it, argmax, is a draw."""
    return jax.vmap(lambda key: jax.random.gumbel(key, like_BlV.shape[1:]))(key_B)
