"""Measures a tokenizer over a whole split of images, on all devices of the process."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varjax.data.loader import Loader
from varjax.errors import InputError
from varjax.nn.autoencoder import to_model_range, to_unit_range
from varjax.runtime.first_call import FirstCall, announce_compilation
from varjax.tokenizers import image_metrics
from varjax.tokenizers.contract import Tokenizer
from varjax.tokenizers.kl.model import KLConfig
from varjax.tokenizers.kl.posterior_metrics import (
    measure_posteriors,
    posterior_lines,
    summarize_posteriors,
)
from varjax.tokenizers.losses.lpips import lpips
from varjax.tokenizers.vq.model import VQConfig
from varjax.tokenizers.vq.token_metrics import measure_tokens, summarize_tokens, token_lines
from varjax.training.sharding import MeshShape, make_mesh, on_mesh, put, put_batch, replicated
from varjax.training.task import Batch
from varjax.trees import PyTree

LEAST_GRADIENT = 1e-12  # below the mean gradient of any image with more than one color
SHARED = {"psnr": "{:.2f} dB", "ssim": "{:.4f}", "l1": "{:.4f}", "lpips": "{:.4f}"}


@dataclasses.dataclass(frozen=True)
class LatentMetrics:
    """Defines what is measured for one kind of tokenizer, in addition to its reconstructions.

    Attributes:
        measure: (config, params, images in [-1, 1], valid_B) -> reconstructions after each scale,
            (K, B, H, W, C) in [-1, 1]; measures of each image, by names that end in their shape,
            such as "rest_KB"; and sums over the batch, by name.
        summary: (config, params, mean of each measure, sums, number of images) -> JSON data.
        lines: report -> its lines of text.
    """

    measure: Callable[
        [Any, PyTree, jax.Array, jax.Array],
        tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]],
    ]
    summary: Callable[[Any, PyTree, Mapping[str, Any], Mapping[str, Any], int], dict[str, Any]]
    lines: Callable[[Mapping[str, Any]], list[str]]


# What is measured for each kind of tokenizer, by the class of its config.
LATENT_METRICS: dict[type, LatentMetrics] = {
    VQConfig: LatentMetrics(measure_tokens, summarize_tokens, token_lines),
    KLConfig: LatentMetrics(measure_posteriors, summarize_posteriors, posterior_lines),
}


def measure_batch(
    config: Tokenizer, params: PyTree, lpips_params: PyTree, batch: Batch
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], jax.Array]:
    """Measures the reconstructions of a batch of images.

    Args:
        config: config of the tokenizer.
        params: parameters of the tokenizer.
        lpips_params: parameters of LPIPS, from `load_lpips`; None to skip LPIPS.
        batch: {"image_BHWC": uint8, "valid_B"}.

    Returns:
        Measures of each image in [0, 1], by names that end in their shape; sums over the batch;
        and the reconstruction after each scale, (K, B, H, W, C) uint8.
    """
    x_BHWC = to_model_range(batch["image_BHWC"])
    measure = LATENT_METRICS[type(config)].measure
    y_KBHWC, measures, added = measure(config, params, x_BHWC, batch["valid_B"])
    y_BHWC = y_KBHWC[-1]
    a_BHWC, b_BHWC = to_unit_range(x_BHWC), to_unit_range(y_BHWC)
    measures |= {
        "psnr_B": image_metrics.psnr(a_BHWC, b_BHWC),
        "l1_B": jnp.mean(jnp.abs(a_BHWC - b_BHWC), axis=(1, 2, 3)),
        "gradient_B": image_metrics.mean_gradient(b_BHWC),
        "gradient_of_original_B": image_metrics.mean_gradient(a_BHWC),
    }
    if min(config.image_shape[:2]) >= image_metrics.SSIM_WINDOW:
        measures["ssim_B"] = image_metrics.ssim(a_BHWC, b_BHWC)
    if lpips_params is not None:
        measures["lpips_B"] = lpips(lpips_params, x_BHWC, y_BHWC)
    return measures, added, jnp.rint(127.5 * (y_KBHWC + 1)).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Holds a held-out image and its reconstructions.

    Attributes:
        number: number of the image in the split.
        psnr: PSNR in dB.
        rows: (1+K, H, W, C) uint8, the image and its reconstruction after each scale.
    """

    number: int
    psnr: float
    rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class SplitMeasures:
    """Holds all that was measured of a split.

    Attributes:
        config: config of the tokenizer.
        params: parameters of the tokenizer.
        by_image: measures by name, whose last axis is over the images that could be read.
        added: sums over images, by name.
        shown: reconstructions that were asked for.
        worst: reconstructions with the lowest PSNR, lowest first.
    """

    config: Tokenizer
    params: PyTree
    by_image: dict[str, np.ndarray]
    added: dict[str, np.ndarray]
    shown: list[Reconstruction]
    worst: list[Reconstruction]

    def summary(self) -> dict[str, Any]:
        """Returns JSON data: means over images, and what the kind of tokenizer adds to them."""
        images = len(self.by_image["psnr_B"])
        mean = {name: x.astype(np.float64).mean(axis=-1) for name, x in self.by_image.items()}
        summarize = LATENT_METRICS[type(self.config)].summary
        return {
            "images": images,
            "tokenizer": type(self.config).__name__,
            **{name: float(mean[f"{name}_B"]) for name in SHARED if f"{name}_B" in mean},
            "sharpness": float(
                mean["gradient_B"] / max(mean["gradient_of_original_B"], LEAST_GRADIENT)
            ),
            **summarize(self.config, self.params, mean, self.added, images),
            "worst": [{"image": x.number, "psnr": x.psnr} for x in self.worst],
        }


def measure_split(
    config: Tokenizer,
    params: PyTree,
    loader: Loader,
    lpips_params: PyTree = None,
    show: Collection[int] = (),
    worst: int = 8,
    progress: Callable[[Iterable], Iterable] = iter,
    each: Callable[[np.ndarray, np.ndarray, np.ndarray], None] | None = None,
) -> SplitMeasures:
    """Measures all held-out images. Batch size and devices change the result by rounding only.

    Args:
        config: config of the tokenizer.
        params: parameters of the tokenizer.
        loader: loader of the images.
        lpips_params: parameters of LPIPS, from `load_lpips`; None to skip LPIPS.
        show: numbers of images whose reconstructions are kept.
        worst: number of the worst reconstructions that are kept.
        progress: function that wraps the batches to show progress.
        each: function called with each batch's images and reconstructions, both (n, H, W, C) uint8,
            and labels (n,).

    Raises:
        InputError: there are no images, or a reconstruction is NaN.
    """
    mesh = make_mesh(MeshShape())
    weights = params, lpips_params
    weights = put(weights, jax.tree.map(lambda _: replicated(mesh), weights))
    jitted = jax.jit(on_mesh(functools.partial(measure_batch, config), mesh))
    step = FirstCall(jitted, lambda: announce_compilation("the tokenizer"))
    parts, totals = [], {}
    shown, lowest = [], []
    for batch_number, batch in enumerate(progress(loader.held_out())):
        label_B = batch["label_B"]
        batch = {name: batch[name] for name in ("image_BHWC", "valid_B")}
        results = step(*weights, put_batch(batch, mesh, loader.batch_size))
        measures, added, rebuilt_KBHWC = (*jax.device_get(results[:2]), results[2])
        totals = {name: x + totals.get(name, np.float64(0)) for name, x in added.items()}
        rows = np.flatnonzero(batch["valid_B"])
        parts.append({name: x[..., rows] for name, x in measures.items()})
        _check_finite(parts[-1], rows + batch_number * loader.batch_size)
        if each is not None and rows.size:
            rebuilt_nHWC = np.asarray(rebuilt_KBHWC[-1])[rows]
            each(batch["image_BHWC"][rows], rebuilt_nHWC, label_B[rows])
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
    return SplitMeasures(config, params, by_image, totals, shown, lowest)


def _check_finite(measures: Mapping[str, np.ndarray], number_N: np.ndarray) -> None:
    """Raises InputError where an image's measures, whose last axis are images, are not finite."""
    if not len(number_N):
        return
    finite = {
        name.rpartition("_")[0]: np.isfinite(x).reshape(-1, len(number_N)).all(axis=0)
        for name, x in measures.items()
    }
    if not (good_N := np.all(list(finite.values()), axis=0)).all():
        names = ", ".join(name for name, good in finite.items() if not good.all())
        raise InputError(
            f"held-out image {number_N[~good_N][0]} (from 0), and {(~good_N).sum()} of the "
            f"{len(good_N)} images of its batch: {names} are not finite, so the tokenizer computes "
            "NaN; use an earlier checkpoint of it"
        )


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """Formats what `SplitMeasures.summary` returned as lines of text."""
    lines = [
        f"{name:<18}" + form.format(report[name])
        for name, form in (SHARED | {"sharpness": "{:.3f}"}).items()
        if name in report
    ]
    kinds = {config.__name__: metrics for config, metrics in LATENT_METRICS.items()}
    return lines + kinds[report["tokenizer"]].lines(report)
