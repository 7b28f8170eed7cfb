"""Measures a VQ tokenizer over a whole split of images, on all devices of the process."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from varjax.core.errors import InputError
from varjax.core.trees import PyTree
from varjax.nn.autoencoder import to_model_range, to_unit_range
from varjax.tokenizers import image_metrics
from varjax.tokenizers.losses.lpips import lpips
from varjax.tokenizers.vq.model import VQConfig, VQTokenizer, encode_images
from varjax.tokenizers.vq.quantizer import code_counts, code_perplexity
from varjax.training.prefetch import put_batch
from varjax.training.sharding import MeshShape, make_mesh, on_mesh, put, replicated
from varjax.training.task import Batch

EPSILON = 1e-12  # below any real mean square


class HeldOutLoader(Protocol):
    """Gives held-out batches {"image_BHWC": uint8, "valid_B"}; valid_B is False for padding."""

    @property
    def batch_size(self) -> int: ...

    def held_out(self) -> Iterable[Mapping[str, np.ndarray]]: ...


def measure_batch(
    config: VQConfig, params: PyTree, lpips_params: PyTree, batch: Batch
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Measures the reconstructions of a batch of images.

    Args:
        config: the tokenizer.
        params: its parameters.
        lpips_params: as `load_lpips` gives them; None to do without LPIPS.
        batch: {"image_BHWC": uint8, "valid_B"}.

    Returns:
        Measures of each image, whose values span 1, by names that end in their shape: psnr_KB and
        rest_KB after each scale, rest_KB being the mean square of the features' residual and
        power_B that of the features; counts of codes (K, V), of valid images; and the
        reconstruction after each scale, (K, B, H, W, C) uint8.
    """
    model = VQTokenizer(config).bind({"params": params})
    x_BHWC = to_model_range(batch["image_BHWC"])
    f_BhwZ = encode_images(config, params, x_BHWC)
    quantized = model.quantizer(f_BhwZ)
    f_hat_KBhwZ = jnp.stack(quantized.f_hats)
    # Scale by scale: all of them at once would need K times the memory.
    y_KBHWC = jax.lax.map(model.decode_features, f_hat_KBhwZ)
    bfloat16_BhwZ = encode_images(config, params, x_BHWC, jnp.bfloat16)
    same_BL = model.quantizer(bfloat16_BhwZ).tokens_BL == quantized.tokens_BL
    y_BHWC = y_KBHWC[-1]
    a_BHWC, b_BHWC = to_unit_range(x_BHWC), to_unit_range(y_BHWC)
    measures = {
        "psnr_B": image_metrics.psnr(a_BHWC, b_BHWC),
        "l1_B": jnp.mean(jnp.abs(a_BHWC - b_BHWC), axis=(1, 2, 3)),
        "gradient_B": image_metrics.mean_gradient(b_BHWC),
        "gradient_of_original_B": image_metrics.mean_gradient(a_BHWC),
        "psnr_KB": jax.vmap(lambda y: image_metrics.psnr(a_BHWC, to_unit_range(y)))(y_KBHWC),
        "rest_KB": jnp.mean(jnp.square(f_hat_KBhwZ - f_BhwZ[None]), axis=(2, 3, 4)),
        "power_B": jnp.mean(jnp.square(f_BhwZ), axis=(1, 2, 3)),
        "same_B": jnp.mean(same_BL.astype(jnp.float32), axis=1),
    }
    if min(config.image_shape[:2]) >= image_metrics.SSIM_WINDOW:
        measures["ssim_B"] = image_metrics.ssim(a_BHWC, b_BHWC)
    if lpips_params is not None:
        measures["lpips_B"] = lpips(lpips_params, x_BHWC, y_BHWC)
    counts_KV = code_counts(config.pyramid, config.vocab, quantized.tokens_BL, batch["valid_B"])
    rebuilt_KBHWC = jnp.rint(127.5 * (y_KBHWC + 1)).astype(jnp.uint8)
    return measures, counts_KV, rebuilt_KBHWC


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Holds a held-out image and its reconstructions.

    Attributes:
        number: of the image in the split.
        psnr: in dB.
        rows: (1+K, H, W, C) uint8, the image and its reconstruction after each scale.
    """

    number: int
    psnr: float
    rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class SplitMeasures:
    """Holds all that was measured of a split.

    Attributes:
        config: the tokenizer.
        by_image: what `measure_batch` measures, the last axis over the images that could be read.
        counts_KV: how often each scale used each code.
        shown: the reconstructions asked for.
        worst: those of the lowest PSNR, lowest first.
    """

    config: VQConfig
    by_image: dict[str, np.ndarray]
    counts_KV: np.ndarray
    shown: list[Reconstruction]
    worst: list[Reconstruction]

    def summary(self) -> dict[str, Any]:
        """Returns JSON data: means over images, and lists over scales."""
        pyramid, images = self.config.pyramid, len(self.by_image["psnr_B"])
        mean = {name: x.astype(np.float64).mean(axis=-1) for name, x in self.by_image.items()}
        names = [name for name in ("psnr", "ssim", "l1", "lpips") if f"{name}_B" in mean]
        used_K = np.sum(self.counts_KV > 0, axis=1)
        could_K = np.minimum(self.config.vocab, images * np.array(pyramid.lengths))
        return {
            "images": images,
            **{name: float(mean[f"{name}_B"]) for name in names},
            "sharpness": float(mean["gradient_B"] / max(mean["gradient_of_original_B"], EPSILON)),
            "same_in_bfloat16": float(mean["same_B"]),
            "scales": [list(shape) for shape in pyramid.shapes],
            "scale_psnr": mean["psnr_KB"].tolist(),
            "scale_rest": (mean["rest_KB"] / max(mean["power_B"], EPSILON)).tolist(),
            "scale_perplexity": code_perplexity(self.counts_KV / images, np).tolist(),
            "scale_codes": used_K.tolist(),
            "scale_usage": (used_K / could_K).tolist(),
            "worst": [{"image": x.number, "psnr": x.psnr} for x in self.worst],
        }


def measure_split(
    config: VQConfig,
    params: PyTree,
    loader: HeldOutLoader,
    lpips_params: PyTree = None,
    show: Collection[int] = (),
    worst: int = 8,
    progress: Callable[[Iterable], Iterable] = iter,
) -> SplitMeasures:
    """Measures all held-out images; batch size and devices change nothing but rounding.

    Args:
        config: the tokenizer.
        params: its parameters.
        loader: gives the images.
        lpips_params: as `load_lpips` gives them; None to do without LPIPS.
        show: numbers of images whose reconstructions are kept.
        worst: number of the worst reconstructions that are kept.
        progress: wraps the batches, to show how far it is.

    Raises:
        InputError: there is no image at all.
    """
    mesh = make_mesh(MeshShape())
    weights = params, lpips_params
    weights = put(weights, jax.tree.map(lambda _: replicated(mesh), weights))
    step = jax.jit(on_mesh(functools.partial(measure_batch, config), mesh))
    parts, counts_KV = [], np.zeros((len(config.pyramid), config.vocab))
    shown, lowest = [], []
    for batch_number, batch in enumerate(progress(loader.held_out())):
        batch = {name: batch[name] for name in ("image_BHWC", "valid_B")}
        results = step(*weights, put_batch(batch, mesh, loader.batch_size))
        measures, counts, rebuilt_KBHWC = (*jax.device_get(results[:2]), results[2])
        counts_KV += counts
        rows = np.flatnonzero(batch["valid_B"])
        parts.append({name: x[..., rows] for name, x in measures.items()})
        for row in rows.tolist():
            number, psnr = batch_number * loader.batch_size + row, float(measures["psnr_B"][row])
            low = worst and (len(lowest) < worst or psnr < lowest[-1].psnr)
            if not low and number not in show:
                continue
            rebuilt = np.asarray(rebuilt_KBHWC[:, row])
            images = np.concatenate([batch["image_BHWC"][row][None], rebuilt])
            reconstruction = Reconstruction(number, psnr, images)
            shown += [reconstruction] * (number in show)
            lowest = sorted([*lowest, reconstruction], key=lambda x: (x.psnr, x.number))[:worst]
    if not any(part["psnr_B"].size for part in parts):
        raise InputError("there is no image to measure in the held-out split")
    by_image = {k: np.concatenate([part[k] for part in parts], axis=-1) for k in parts[0]}
    return SplitMeasures(config, by_image, counts_KV, shown, lowest)
