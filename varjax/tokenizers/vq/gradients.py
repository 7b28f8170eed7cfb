"""From a batch to gradients: through the tokenizer, its losses and its discriminator."""

import functools
from typing import TYPE_CHECKING

import flax.struct
import jax
import jax.numpy as jnp

from varjax.core.trees import PyTree
from varjax.nn.autoencoder import to_model_range
from varjax.tokenizers.losses.gan import Anchors, Opponent, balance
from varjax.tokenizers.losses.gan_gradients import judge
from varjax.tokenizers.vq.codebook import with_codes
from varjax.tokenizers.vq.codes import entropy_loss, scale_inputs
from varjax.tokenizers.vq.model import VQTokenizer
from varjax.tokenizers.vq.quantizer import quantizer_loss
from varjax.tokenizers.vq.usage import count_codes
from varjax.training.task import Batch
from varjax.training.train_step import Metrics, mean_over_microbatches

if TYPE_CHECKING:
    from varjax.tokenizers.vq.task import VQTask


@flax.struct.dataclass
class Learned:
    """What images teach, all means over them.

    grads, opponent_grads: of the losses by the tokenizer's and by the discriminator's parameters.
    said: the discriminator's mean logits. at_last: of the reconstruction loss and of the
    adversarial one, the gradients at the decoder's last kernel. frequency_KV: how often each scale
    uses each code. Without an adversary the three that speak of it are None.
    """

    grads: PyTree
    metrics: Metrics
    frequency_KV: jax.Array
    opponent_grads: PyTree = None
    said: Anchors | None = None
    at_last: tuple[jax.Array, jax.Array] | None = None


def learn(
    task: "VQTask",
    params: PyTree,
    opponent: Opponent | None,
    frozen: PyTree,
    batch: Batch,
    share: jax.Array,
) -> Learned:
    """What the task's losses say of a batch {"image_BHWC": uint8, "key_B"}.

    share: how much of the adversary's weight counts. The result does not depend on
    `task.accumulate`: with more than one part the adaptive weight, which is no mean over the parts
    but a quotient of two, is found in a first pass over them.
    """
    from_part = functools.partial(_from_part, task, params, opponent, frozen, share)
    ratio = None
    if task.adversary is not None and task.adversary.adaptive and task.accumulate > 1:
        first_pass = mean_over_microbatches(
            lambda part: from_part(1.0, part).at_last, batch, task.accumulate
        )
        ratio = balance(*first_pass)
    return mean_over_microbatches(functools.partial(from_part, ratio), batch, task.accumulate)


def _from_part(task, params, opponent, frozen, share, ratio, batch) -> Learned:
    x_BHWC = to_model_range(batch["image_BHWC"])
    model = VQTokenizer(task.model, task.jax_dtype, task.jax_dtype)
    pyramid, kept_B = task.model.pyramid, task.codebook.kept(task.model.pyramid, batch["key_B"])

    def forward(params):
        seen: PyTree
        (y_BHWC, f_BhwZ, quantized), seen = model.apply(
            {"params": params}, x_BHWC, kept_B, mutable=["intermediates"]
        )
        (last_BHWC,) = seen["intermediates"]["decoder"]["last"]
        return (y_BHWC, f_BhwZ, quantized.f_hats), (quantized.tokens_BL, last_BHWC)

    def pixels(y_BHWC):
        losses = task.reconstruction_losses(frozen, x_BHWC, y_BHWC, task.jax_dtype)
        means = {name: jnp.mean(loss_B) for name, loss_B in losses.items()}
        return means["loss"], means

    def codes(f_BhwZ, f_hats, codebook_VZ):
        losses = {"quantizer": jnp.mean(quantizer_loss(f_BhwZ, f_hats, task.beta, kept_B))}
        total = losses["quantizer"]
        if task.codebook.entropy:
            inputs = scale_inputs(pyramid, f_BhwZ, f_hats)
            losses["entropy"] = entropy_loss(codebook_VZ, inputs, task.model.cosine_codes)
            total = total + task.codebook.entropy * losses["entropy"]
        return total, losses

    # The image's gradients are taken loss by loss: nothing is computed twice for the balance.
    (y_BHWC, f_BhwZ, f_hats), back, (tokens_BL, last_BHWC) = jax.vjp(forward, params, has_aux=True)
    by_image_BHWC, metrics = jax.grad(pixels, has_aux=True)(y_BHWC)
    (*by_codes, by_codebook_VZ), of_codes = jax.grad(codes, (0, 1, 2), has_aux=True)(
        f_BhwZ, f_hats, params["quantizer"]["codebook"]
    )
    metrics |= of_codes
    metrics["loss"] = metrics["loss"] + metrics["quantizer"]
    about_opponent = {}
    if opponent is not None:
        adversary = task.adversary
        verdict = judge(adversary, opponent, x_BHWC, y_BHWC, batch["key_B"], task.jax_dtype)
        at_last = tuple(
            gradient_at_last(last_BHWC, by_BHWC) for by_BHWC in (by_image_BHWC, verdict.toward)
        )
        if ratio is None:
            ratio = balance(*at_last) if adversary.adaptive else 1.0
        weight = share * adversary.weight * ratio
        by_image_BHWC = by_image_BHWC + weight * verdict.toward
        metrics |= verdict.metrics | {"adversarial_weight": weight}
        about_opponent = {
            "opponent_grads": verdict.grads,
            "said": verdict.said,
            "at_last": at_last,
        }
    (grads,) = back((by_image_BHWC, *by_codes))
    ones_B = jnp.ones(len(x_BHWC))
    if task.codebook.entropy:
        grads = with_codes(grads, grads["quantizer"]["codebook"] + by_codebook_VZ)
    counts_KV = count_codes(pyramid, task.model.vocab, tokens_BL, ones_B)
    return Learned(grads, metrics, counts_KV / len(x_BHWC), **about_opponent)


def gradient_at_last(last_BHWC: jax.Array, by_image_BHWC: jax.Array) -> jax.Array:
    """A loss's gradient by the decoder's last kernel (3, 3, C, channels), from that by the image.

    last_BHWC: what the last convolution reads.
    """

    def convolve(kernel):
        return jax.lax.conv_general_dilated(
            last_BHWC.astype(jnp.float32),
            kernel,
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )

    shape = (3, 3, last_BHWC.shape[-1], by_image_BHWC.shape[-1])
    kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.linear_transpose(convolve, kernel)(by_image_BHWC)[0]
