"""What a tokenizer keeps of images: measured over a whole split, on all devices of the process."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from varjax.core.errors import InputError
from varjax.core.trees import PyTree
from varjax.nn.autoencoder import to_model_range
from varjax.tokenizers import image_metrics
from varjax.tokenizers.losses.lpips import lpips
from varjax.tokenizers.vq.model import VQConfig, VQTokenizer, encode_images
from varjax.tokenizers.vq.usage import count_codes, perplexity
from varjax.training.prefetch import put_batch
from varjax.training.sharding import MeshShape, make_mesh, on_mesh, put, replicated
from varjax.training.task import Batch

Arrays = dict[str, np.ndarray]
TINY = 1e-12


class Loader(Protocol):
    """Held-out batches {"image_BHWC": uint8, "valid_B"}; valid_B is False for what is no image."""

    @property
    def batch_size(self) -> int: ...

    def held_out(self) -> Iterable[Mapping[str, np.ndarray]]: ...


def measure(config: VQConfig, params: PyTree, lpips_params: PyTree, batch: Batch) -> PyTree:
    """(measures of each image, counts of codes (K, V), uint8 images rebuilt (K, B, H, W, C)).

    Values of images span 1. Names end in the shape: psnr_KB and rest_KB are those after each scale;
    rest_KB is the mean square of what the features still miss, power_B that of the features.
    """
    model = VQTokenizer(config).bind({"params": params})
    x_BHWC = to_model_range(batch["image_BHWC"])
    f_BhwZ = encode_images(config, params, x_BHWC)
    quantized = model.quantizer(f_BhwZ)
    f_hat_KBhwZ = jnp.stack(quantized.f_hats)
    # Scale by scale: all of them at once would need K times the memory.
    y_KBHWC = jax.lax.map(model.decode_features, f_hat_KBhwZ)
    coarse_BhwZ = encode_images(config, params, x_BHWC, jnp.bfloat16)
    same_BL = model.quantizer(coarse_BhwZ).tokens_BL == quantized.tokens_BL
    y_BHWC, zero_one = y_KBHWC[-1], lambda image: (image + 1) / 2
    a_BHWC, b_BHWC = zero_one(x_BHWC), zero_one(y_BHWC)
    found = {
        "psnr_B": image_metrics.psnr(a_BHWC, b_BHWC),
        "l1_B": jnp.mean(jnp.abs(a_BHWC - b_BHWC), axis=(1, 2, 3)),
        "gradient_B": image_metrics.gradient(b_BHWC),
        "gradient_of_original_B": image_metrics.gradient(a_BHWC),
        "psnr_KB": jax.vmap(lambda y: image_metrics.psnr(a_BHWC, zero_one(y)))(y_KBHWC),
        "rest_KB": jnp.mean(jnp.square(f_hat_KBhwZ - f_BhwZ[None]), axis=(2, 3, 4)),
        "power_B": jnp.mean(jnp.square(f_BhwZ), axis=(1, 2, 3)),
        "same_B": jnp.mean(same_BL.astype(jnp.float32), axis=1),
    }
    if min(config.image_shape[:2]) >= image_metrics.WINDOW:
        found["ssim_B"] = image_metrics.ssim(a_BHWC, b_BHWC)
    if lpips_params is not None:
        found["lpips_B"] = lpips(lpips_params, x_BHWC, y_BHWC)
    counts_KV = count_codes(config.pyramid, config.vocab, quantized.tokens_BL, batch["valid_B"])
    rebuilt_KBHWC = jnp.rint(127.5 * (y_KBHWC + 1)).astype(jnp.uint8)
    return found, counts_KV, rebuilt_KBHWC


@dataclasses.dataclass(frozen=True)
class Picture:
    """A held-out image by its number, its PSNR, and (1+K, H, W, C) uint8: the image itself, and
    what is rebuilt from its first 1 … K scales."""

    number: int
    psnr: float
    rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class Split:
    """All that was measured. by_image: what `measure` finds, the last axis over the images that
    could be read. shown: the pictures asked for. worst: lowest PSNR first."""

    config: VQConfig
    by_image: Arrays
    counts_KV: np.ndarray
    shown: list[Picture]
    worst: list[Picture]

    def summary(self) -> dict[str, Any]:
        """JSON data: means over images, and lists over scales."""
        pyramid, images = self.config.pyramid, len(self.by_image["psnr_B"])
        mean = {name: x.astype(np.float64).mean(axis=-1) for name, x in self.by_image.items()}
        names = [name for name in ("psnr", "ssim", "l1", "lpips") if f"{name}_B" in mean]
        used_K = np.sum(self.counts_KV > 0, axis=1)
        could_K = np.minimum(self.config.vocab, images * np.array(pyramid.lengths))
        return {
            "images": images,
            **{name: float(mean[f"{name}_B"]) for name in names},
            "sharpness": float(mean["gradient_B"] / max(mean["gradient_of_original_B"], TINY)),
            "same_in_bfloat16": float(mean["same_B"]),
            "scales": [list(shape) for shape in pyramid.shapes],
            "scale_psnr": mean["psnr_KB"].tolist(),
            "scale_rest": (mean["rest_KB"] / max(mean["power_B"], TINY)).tolist(),
            "scale_perplexity": perplexity(self.counts_KV / images, np).tolist(),
            "scale_codes": used_K.tolist(),
            "scale_usage": (used_K / could_K).tolist(),
            "worst": [{"image": x.number, "psnr": x.psnr} for x in self.worst],
        }


def measure_split(
    config: VQConfig,
    params: PyTree,
    loader: Loader,
    lpips_params: PyTree = None,
    show: Collection[int] = (),
    worst: int = 8,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Split:
    """Measures all held-out images; batch size and devices change nothing but rounding.

    show: numbers of images to keep the pictures of. progress: what the batches are drawn through.
    Raises InputError where there is no image at all.
    """
    mesh = make_mesh(MeshShape())
    weights = params, lpips_params
    weights = put(weights, jax.tree.map(lambda _: replicated(mesh), weights))
    step = jax.jit(on_mesh(functools.partial(measure, config), mesh))
    parts, counts_KV = [], np.zeros((len(config.pyramid), config.vocab))
    shown, lowest = [], []
    for batch_number, batch in enumerate(progress(loader.held_out())):
        batch = {name: batch[name] for name in ("image_BHWC", "valid_B")}
        results = step(*weights, put_batch(batch, mesh, loader.batch_size))
        found, counts, rebuilt_KBHWC = (*jax.device_get(results[:2]), results[2])
        counts_KV += counts
        rows = np.flatnonzero(batch["valid_B"])
        parts.append({name: x[..., rows] for name, x in found.items()})
        for row in rows.tolist():
            number, psnr = batch_number * loader.batch_size + row, float(found["psnr_B"][row])
            low = worst and (len(lowest) < worst or psnr < lowest[-1].psnr)
            if not low and number not in show:
                continue
            rebuilt = np.asarray(rebuilt_KBHWC[:, row])
            images = np.concatenate([batch["image_BHWC"][row][None], rebuilt])
            picture = Picture(number, psnr, images)
            shown += [picture] * (number in show)
            lowest = sorted([*lowest, picture], key=lambda x: (x.psnr, x.number))[:worst]
    if not any(part["psnr_B"].size for part in parts):
        raise InputError("there is no image to measure in the held-out split")
    by_image = {k: np.concatenate([part[k] for part in parts], axis=-1) for k in parts[0]}
    return Split(config, by_image, counts_KV, shown, lowest)
