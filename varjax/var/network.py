"""The networks that `sample_scales` takes, one VAR or several that work together, and their memory.

Each is a function (input, scale, cache) -> (logits, cache), so networks are joined by functions:
`guided_by` combines two at every scale, `collaborative_decoding` hands over from one to the next.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varjax.config.numbers import whole_number
from varjax.nn.autoencoder import decoding_bytes
from varjax.nn.class_embedding import no_class
from varjax.nn.compute import ComputeConfig
from varjax.nn.transformer import cache_bytes, layer_bytes
from varjax.sampling.guidance import apply_guidance
from varjax.tokenizers.vq.model import VQConfig
from varjax.trees import PyTree
from varjax.var.model import VAR, VARConfig

# (input (B, l, Z), scale k, cache) -> (logits (B, l, V), cache). Without a cache, the input holds
# all scales from the second to k; it is None at k = 0.
PredictScale = Callable[[jax.Array | None, int, Any], tuple[jax.Array, Any]]
GuidanceScales = Sequence[float] | np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class Refiner:
    """Describes the small model of collaborative decoding; see `collaborative_decoding`.

    Raises InputError for a number of scales out of range.

    Attributes:
        config: config of its transformer.
        draft_scales: number of scales that the large model drafts, 1 … K-1.
    """

    config: VARConfig
    draft_scales: int

    def __post_init__(self):
        check_draft_scales(self.config, self.draft_scales)


def check_draft_scales(config: VARConfig, draft_scales: int) -> None:
    """Raises InputError if both models would not have scales to draw."""
    whole_number("draft_scales", draft_scales, 1, len(config.pyramid) - 1)


@dataclasses.dataclass(frozen=True)
class VARModels:
    """Describes the models that draw an image together, and how they are computed.

        models = VARModels(tokenizer, var, refiner=Refiner(small, draft_scales=8))

    Attributes:
        tokenizer: config of the tokenizer.
        var: config of the transformer.
        compute: dtype and execution of all models.
        guide: config of the weaker model for autoguidance; None to guide by "no class".
        refiner: small model that draws the fine scales; None if `var` draws all of them.
    """

    tokenizer: VQConfig
    var: VARConfig
    compute: ComputeConfig = ComputeConfig()
    guide: VARConfig | None = None
    refiner: Refiner | None = None


def sampling_network(
    models: VARModels,
    params: PyTree,
    label_B: jax.Array,
    guidance_K: GuidanceScales,
    guided: int | None = None,
) -> PredictScale:
    """Binds a model, and those that help it, to its classes.

    Args:
        models: the transformer and those that help it.
        params: {"var": …}, and "guide" and "refiner" if there are any.
        label_B: classes; `var.classes` means "no class".
        guidance_K: guidance scale of each scale.
        guided: number of scales, from the first, that are computed with guidance; None for all.
    """
    var, compute, guide, refiner = models.var, models.compute, models.guide, models.refiner
    K = len(var.pyramid)
    guided = K if guided is None else guided
    by_no_class = guidance_K if guide is None else None
    if refiner is None:
        network = bind_network(var, params["var"], label_B, by_no_class, compute, guided)
    else:
        N = refiner.draft_scales
        drafter = bind_network(
            var, params["var"], label_B, by_no_class, compute, min(guided, N), scales=N
        )
        streams = guided if guided > N else 0  # none of its own scales has guidance
        small = bind_network(
            refiner.config, params["refiner"], label_B, by_no_class, compute, streams
        )
        network = collaborative_decoding(drafter, small, N)
    if guide is None:
        return network
    weak = bind_network(guide, params["guide"], label_B, None, compute)
    return guided_by(network, weak, guidance_K, guided)


def bind_network(
    var: VARConfig,
    params: PyTree,
    label_B: jax.Array,
    guidance_K: GuidanceScales | None,
    compute: ComputeConfig,
    guided: int | None = None,
    scales: int | None = None,
) -> PredictScale:
    """Binds a VAR transformer to its classes: the network that `sample_scales` takes.

    Args:
        var: config of the transformer.
        params: parameters of the transformer.
        label_B: classes; `var.classes` means "no class".
        guidance_K: guidance scale of each scale; None for no guidance.
        compute: dtype and execution.
        guided: number of scales, from the first, that are computed with guidance; None for all.
        scales: number of scales, from the first, that the cache has room for; None for all.
    """
    model, B, pyramid = VAR(var, compute).bind({"params": params}), label_B.shape[0], var.pyramid
    scale_K: Any = () if guidance_K is None else guidance_K
    two_streams = len(scale_K) if guided is None or guidance_K is None else guided
    length = pyramid.slices[(scales or len(pyramid)) - 1].stop
    if two_streams:
        # Both streams of guidance as one batch. The second must also run at scales where guidance
        # is 1, to fill its cache for later ones.
        label_B = jnp.concatenate([label_B, no_class(label_B, var.classes)])
    cond = model.condition(label_B)

    def predict(input_BlZ, k, cache):
        first = k
        if cache is None:
            stop = pyramid.slices[two_streams - 1].stop if two_streams else length
            cache, first = model.empty_cache(label_B.shape[0], stop), 0
        if k >= two_streams:
            if k == two_streams > 0:
                cache = cache.resized(B, length)
            return model.predict(input_BlZ, cond.first(B), k, cache, first)
        if input_BlZ is not None:
            input_BlZ = jnp.concatenate([input_BlZ, input_BlZ])
        logits_2BlV, cache = model.predict(input_BlZ, cond, k, cache, first)
        return apply_guidance(logits_2BlV, scale_K[k]), cache

    return predict


def guided_by(
    network: PredictScale,
    guide_network: PredictScale,
    guidance_K: GuidanceScales,
    guided: int | None = None,
) -> PredictScale:
    """Guides a network by a weaker one on the same tokens (autoguidance, arXiv 2406.02507).

    Args:
        network: the network to guide.
        guide_network: network that takes the place of "no class"; it has a cache for itself.
        guidance_K: guidance scale of each scale.
        guided: number of scales, from the first, that are computed with guidance; None for all.
    """

    def predict(input_BlZ, k, caches):
        cache, guide_cache = (None, None) if caches is None else caches
        logits_BlV, cache = network(input_BlZ, k, cache)
        if guided is not None and k >= guided:
            return logits_BlV, (cache, None)
        weak_BlV, guide_cache = guide_network(input_BlZ, k, guide_cache)
        both_2BlV = jnp.concatenate([logits_BlV, weak_BlV])
        return apply_guidance(both_2BlV, guidance_K[k]), (cache, guide_cache)

    return predict


def collaborative_decoding(
    drafter: PredictScale, refiner: PredictScale, draft_scales: int
) -> PredictScale:
    """Hands over from a large network to a small one (CoDe, Chen et al. 2024, arXiv 2411.17787).

        network = collaborative_decoding(large, small, draft_scales=8)
        token_BL, f_hats = sample_scales(network, choose, quantizer, batch)

    Only the inputs of the drafted scales are handed over. The refiner processes them, with the
    input of its own first scale, in one block-causal pass, which fills its cache. The drafter's
    cache is then dropped.

    Args:
        drafter: network that predicts scales 0 … `draft_scales` - 1.
        refiner: network that predicts the others.
        draft_scales: number of scales to draft, 1 … K-1.
    """

    def predict(input_BlZ, k, state):
        if k > draft_scales:
            return refiner(input_BlZ, k, state)
        inputs, cache = ((), None) if state is None else state
        inputs = inputs if input_BlZ is None else (*inputs, input_BlZ)
        if k == draft_scales:
            return refiner(jnp.concatenate(inputs, axis=1), k, None)
        logits_BlV, cache = drafter(input_BlZ, k, cache)
        return logits_BlV, (inputs, cache)

    return predict


def var_sampling_bytes(models: VARModels, batch: int, guided: int | None = None) -> int:
    """Estimates how much memory a device needs, in addition to the weights, to sample a batch.

    This is the maximum over all scales and the decoder.

    Args:
        models: the transformer, those that help it, and the tokenizer.
        batch: number of images on the device.
        guided: number of scales, from the first, with a second stream for guidance; None for all.
    """
    var, guide, refiner = models.var, models.guide, models.refiner
    tokenizer, compute = models.tokenizer, models.compute
    item, pyramid = compute.jax_dtype.itemsize, var.pyramid
    stops = [scale.stop for scale in pyramid.slices]
    guided = len(pyramid) if guided is None else guided

    def cache(model: VARConfig, rows: int, length: int) -> int:
        return cache_bytes(model.depth, model.width, rows, length, item)

    def layer(model: VARConfig, rows: int, tokens: int, length: int) -> int:
        sizes = model.width, model.heads, rows, tokens, length
        return layer_bytes(*sizes, compute, cached=True)

    def scale(model: VARConfig, first: int, end: int, k: int) -> int:
        """Needs of scale k of a model that draws the scales `first` to `end`."""
        tokens = stops[k] if k == first else pyramid.lengths[k]  # the first pass fills the cache
        two = first < guided and k < guided
        rows = 2 * batch if two and guide is None else batch
        length = stops[min(guided, end) - 1] if two and guide is None else stops[end - 1]
        held, at_once = cache(model, rows, length), layer(model, rows, tokens, stops[k])
        if two and guide is not None:
            held += cache(guide, batch, stops[-1])
            at_once = max(at_once, layer(guide, batch, pyramid.lengths[k], stops[k]))
        elif k == guided > first:  # the rows that are kept are copied
            at_once = max(at_once, cache(model, 2 * batch, stops[k - 1]))
        # For guided logits, also the filters, the noise, and a mixture of codes.
        streams = 2 if two else 1
        return held + at_once + (streams + 3) * batch * pyramid.lengths[k] * var.vocab * 4

    N, K = refiner.draft_scales if refiner else len(pyramid), len(pyramid)
    needs = [scale(var, 0, N, k) for k in range(N)]
    needs += [scale(refiner.config, N, K, k) for k in range(N, K) if refiner]
    return max(*needs, decoding_bytes(batch, tokenizer.image_shape, tokenizer.width))
