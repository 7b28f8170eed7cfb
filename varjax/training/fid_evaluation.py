"""Evaluates FID and Inception Score during training, on all devices, with fixed seeds."""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from varjax.config.numbers import seed_number, whole_number
from varjax.errors import InputError
from varjax.metrics import fid
from varjax.metrics.features import FeatureExtractor, feature_network, feature_sizes
from varjax.metrics.image_sets import DatasetImages
from varjax.metrics.references import (
    Reference,
    default_cache,
    read_reference,
    reference_of_images,
)
from varjax.runtime.distributed import on_first_process
from varjax.runtime.first_call import FirstCall
from varjax.runtime.messages import say
from varjax.training.sharding import (
    check_batch_size,
    on_mesh,
    put,
    put_batch,
    replicated,
    rows_of_process,
)
from varjax.training.task import Task, TrainState, evaluated_parameters
from varjax.trees import PyTree

HELD_OUT = "held_out"  # a reference: the run's own images
FID_METRICS = "fid", "inception_score", "label_accuracy"


@dataclasses.dataclass(frozen=True)
class FIDConfig:
    """Configures the FID of samples that are drawn during training.

    Attributes:
        every: steps between two evaluations; 0 for never. The last of the run's steps is evaluated,
            too, but not an earlier one at which patience ends the run.
        images: number of samples, as many of each class, give or take one. Published values use
            50,000; fewer samples give a larger FID.
        reference: what samples are compared with: an .npz of statistics (ADM's) or of images, a
            folder of images of the samples' size, or "held_out" for the run's held-out images.
        inception: directory that `varjax convert --inception=FILE` wrote.
        features: kind of features: "inception"; "pixels" for tiny images, which need no weights; or
            the directory of a classifier, which also checks whether samples show their classes.
        seed: random seed of the samples.
        batch_size: images at a time, over all devices; 0 for the run's microbatch.
    """

    every: int = 0
    images: int = 10_000
    reference: str = HELD_OUT
    inception: str = ""
    features: str = "inception"
    seed: int = 0
    batch_size: int = 0

    def check(self) -> None:
        """Raises InputError for a number out of range."""
        for name, lowest in (("every", 0), ("images", 2), ("batch_size", 0)):
            whole_number(f"fid.{name}", getattr(self, name), lowest)
        seed_number("fid.seed", self.seed)


class FIDEvaluator:
    """Samples images from a task's parameters and compares them with a reference.

        evaluator = FIDEvaluator(config, task, data, frozen, mesh, 64, run_dir, on_latents=False)
        evaluator.read_reference()
        metrics = evaluator.metrics(state)  # {"eval/fid": …, "eval_ema/inception_score": …}

    Args:
        config: settings of the measurement.
        task: task whose `sampler` draws the images.
        data: dataset of the run.
        frozen: pretrained weights of the task, on the mesh.
        mesh: mesh of all devices.
        batch_size: batch size of training, whose microbatch is the number of images drawn at a time
            unless the config sets another number.
        run_dir: directory of the run, which keeps the statistics of its held-out images.
        on_latents: whether the run's data are latents, which cannot be a reference.
        compiling: function of a computation's name that makes a context for its first use.

    Raises:
        InputError: before anything is drawn, for invalid settings.
    """

    def __init__(
        self,
        config: FIDConfig,
        task: Task,
        data: Any,
        frozen: PyTree,
        mesh: Mesh,
        batch_size: int,
        run_dir: pathlib.Path,
        on_latents: bool,
        compiling: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ):
        draw = task.sampler()
        if draw is None:
            raise InputError(
                "fid.every is set, but a tokenizer draws no images; set it to 0 and use "
                "varjax evaluate-tokenizer --inception=DIR"
            )
        if config.images < data.classes:
            raise InputError(
                f"fid.images={config.images}: must be at least {data.classes}, the number of "
                "classes, because each class gets as many samples"
            )
        if config.reference == HELD_OUT and on_latents:
            raise InputError(
                "fid.reference is held_out, but this run's data are latents; give an .npz or a "
                "folder of images"
            )
        self._config, self._classes = config, data.classes
        self._frozen, self._mesh = frozen, mesh
        self._batch_size = config.batch_size or batch_size // task.accumulate
        check_batch_size(mesh, self._batch_size)
        network = feature_network(config.features, config.inception)
        sizes = feature_sizes(network, data.image_shape)
        self._metrics = ["fid"] + ["inception_score"] * ("logits_NV" in sizes)
        self._metrics += ["label_accuracy"] * (network.classes == data.classes)
        everywhere = replicated(mesh)
        self._network_params = put(
            network.params, jax.tree.map(lambda _: everywhere, network.params)
        )

        def features(params, frozen, network_params, batch):
            key = jax.random.key(config.seed)
            key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index_B"])
            images_BHWC = draw(params, frozen, batch["label_B"], key_B)
            finite_B1 = jnp.all(jnp.isfinite(images_BHWC), axis=(1, 2, 3))[:, None]
            images_BHWC = jnp.rint(jnp.clip(images_BHWC, 0, 1) * 255).astype(jnp.uint8)
            images_BHWC = jnp.broadcast_to(images_BHWC, (*images_BHWC.shape[:-1], 3))
            outputs = network.apply(network_params, images_BHWC)
            return {
                name: jnp.where(finite_B1, x, jnp.nan)
                for name, x in outputs.items()
                if name in ("pool_BD", "logits_BV")
            }

        drawn = jax.jit(on_mesh(features, mesh), out_shardings=everywhere)
        self._features = FirstCall(drawn, lambda: compiling("the sampler for FID"))
        self._data, self._network, self._sizes = data, network, sizes
        self._cache = run_dir / "fid_reference"
        self._reference: Reference | None = None

    def read_reference(self) -> None:
        """Reads the reference, or computes its statistics, which takes time; needed by `metrics`.

        Held-out images are read once in any case, to see whether they have changed.

        Raises InputError for a reference that does not exist, or belongs to other features.
        """

        def read() -> None:
            extract, config = FeatureExtractor(self._network), self._config
            if config.reference == HELD_OUT:
                images = DatasetImages(self._data, HELD_OUT)
                self._reference = reference_of_images(images, images.digest, extract, self._cache)
            else:
                self._reference = read_reference(
                    config.reference, extract, default_cache(), self._sizes
                )

        on_first_process(read)

    def metrics(
        self, state: TrainState, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Draws the images and measures them, always from the same seeds.

        Args:
            state: train state, whose parameters and average are measured.
            stop: function asked before each batch; once it returns True, the evaluation ends.

        Returns:
            "eval/fid", "eval/inception_score", with a classifier "eval/label_accuracy", and the
            same for "eval_ema"; NaN if a sample is NaN; None if it was stopped.
        """
        results: dict[str, float] = {}
        for kind, params in evaluated_parameters(state).items():
            parts: list[dict[str, np.ndarray]] = []
            for start in range(0, self._config.images, self._batch_size):
                if stop():
                    return None
                parts.append(jax.device_get(self._batch_features(params, start)))
            joined = {
                name: np.concatenate([part[name] for part in parts])[: self._config.images]
                for name in parts[0]
            }
            metrics = on_first_process(lambda kind=kind, joined=joined: self._measure(kind, joined))
            results |= {f"{kind}/{name}": value for name, value in metrics.items()}
        return results

    def metric_names(self, state: TrainState) -> list[str]:
        """Returns the names of the metrics; `state` may be shapes."""
        return [f"{kind}/{name}" for kind in evaluated_parameters(state) for name in self._metrics]

    def _batch_features(self, params: PyTree, start: int) -> dict[str, jax.Array]:
        index_B = start + rows_of_process(self._mesh, self._batch_size)
        batch = {"index_B": index_B, "label_B": (index_B % self._classes).astype(np.int32)}
        placed = put_batch(batch, self._mesh, self._batch_size)
        return self._features(params, self._frozen, self._network_params, placed)

    def _measure(self, kind: str, features: dict[str, np.ndarray]) -> dict[str, float]:
        assert self._reference is not None
        bad = int((~np.isfinite(features["pool_BD"]).all(axis=1)).sum())
        if bad:  # this may happen early in training, and later steps repair it
            say(f"{kind}/fid is NaN: {bad} of {len(features['pool_BD'])} samples are NaN")
            return dict.fromkeys(self._metrics, math.nan)
        moments = fid.Moments.of(features["pool_BD"])
        metrics = {"fid": fid.frechet_distance(moments, self._reference.moments["pool_ND"])}
        if "inception_score" in self._metrics:
            metrics["inception_score"], _ = fid.inception_score(features["logits_BV"])
        if "label_accuracy" in self._metrics:
            label_N = np.arange(self._config.images) % self._classes  # as drawn
            right_N = features["logits_BV"].argmax(axis=1) == label_N
            metrics["label_accuracy"] = float(right_N.mean())
        return metrics
