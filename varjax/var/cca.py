"""Condition contrastive alignment (CCA): fine-tuning for samples that need no guidance.

Chen et al. 2024, arXiv 2410.09347; the authors' code is github.com/thu-ml/CCA. A pretrained model
learns to tell an image's own label from another image's, relative to a frozen copy of itself.
"""

import dataclasses

import jax
import jax.numpy as jnp

from varjax.checkpoints.weights import RANDOM, open_for_setting, read_generator
from varjax.config import config_tree
from varjax.errors import InputError, check_setting
from varjax.storage.untrusted import differences
from varjax.trees import PyTree
from varjax.var.model import VARConfig
from varjax.var.sample import VAROptions


@dataclasses.dataclass(frozen=True)
class CCAConfig:
    """Configures condition contrastive alignment. Raises InputError for a value out of range.

        cca = CCAConfig(reference="weights/d16", negative_weight=50.0)

    Attributes:
        reference: run or converted directory of the frozen copy, the same that `init_from` names;
            or "random" for an untrained one, for tests of speed and memory.
        negative_weight: weight λ of the loss of images with another image's label.
        beta: factor β on the log-ratios of probabilities of whole images.
    """

    reference: str
    negative_weight: float
    beta: float = 0.02

    def __post_init__(self):
        check_setting("negative_weight", self.negative_weight, self.negative_weight > 0, "above 0")
        check_setting("beta", self.beta, self.beta > 0, "above 0")


def cca_loss(log_ratio_B2: jax.Array, matches_B: jax.Array, config: CCAConfig) -> jax.Array:
    """Computes the mean loss of a batch, as the authors' code does.

    -log σ(β·own) - λ·log σ(-β·other), over max(λ, 1). An other label that matches is no negative
    example: its term is -log σ(β·other). Without class dropout, the authors' code makes no such
    exception.

    Args:
        log_ratio_B2: log p(image | label) of the trained model minus that of the reference, given
            the image's own label, then given the other label.
        matches_B: whether the other label describes the image as well as its own: both are
            equal, or both are dropped.
        config: β and λ.
    """
    own_B, other_B = config.beta * log_ratio_B2.T
    weight_B = jnp.where(matches_B, 1.0, config.negative_weight)
    other_B = jnp.where(matches_B, other_B, -other_B)
    loss_B = -jax.nn.log_sigmoid(own_B) - weight_B * jax.nn.log_sigmoid(other_B)
    return jnp.mean(loss_B) / max(config.negative_weight, 1.0)


def read_reference_params(location: str, model: VARConfig) -> PyTree:
    """Reads the parameters of the frozen copy; draws fresh ones for "random".

    Args:
        location: run, whose average is read if it has one, or converted directory.
        model: config of the model to train.

    Raises:
        InputError: there is no model, or it differs from `model` (with all differences).
    """
    if location == RANDOM:
        return jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    weights = open_for_setting("task.cca.reference", location)
    config, params, _ = read_generator(weights, "var", "VARTask", VARConfig, VAROptions)
    config = dataclasses.replace(config, gate_init=model.gate_init)  # matters to `init` alone
    there, expected = config_tree.to_dict(config), config_tree.to_dict(model)
    if lines := differences(there, expected, "there", "in this run"):
        raise InputError(
            f"cca.reference={location} holds a different model than this run trains:\n  "
            + "\n  ".join(lines)
        )
    return params
