"""MAR's transformer and diffusion loss against the reference, and refused settings."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import weights
from tests.mar import golden
from varjax import trees
from varjax.checkpoints.weights import abstract_params
from varjax.convert import apply_map
from varjax.errors import InputError
from varjax.mar.heads import CategoricalHead, DiffusionHead
from varjax.mar.model import MAR, MARConfig
from varjax.nn.compute import ComputeConfig
from varjax.nn.diffusion import diffusion_loss

SHAPES = json.loads((weights.HERE / "official_mar_state_dicts.json").read_text())
COUNTS = {"mar_b": 207_924_768, "mar_l": 478_326_304, "mar_h": 942_403_104}
FILES = {"mar_b": "mar_base", "mar_l": "mar_large", "mar_h": "mar_huge"}


def known_tokens(case):
    token_BLZ = case.config.patchify(case.latents_BhwZ)
    return np.take_along_axis(token_BLZ, case.position_Bn[..., None], axis=1)


@pytest.mark.parametrize("preset", COUNTS)
def test_parameter_shapes_match_reference(preset):
    config = MARConfig.preset(preset)
    params = abstract_params(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == COUNTS[preset]
    official = {name: tuple(shape) for name, shape in SHAPES[FILES[preset]].items()}
    assert apply_map.official_shapes(config) == official


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.CASES)
def test_tokens_and_hidden_match_reference(name):
    case = golden.case(name)
    token_BLZ = case.config.patchify(case.latents_BhwZ)
    np.testing.assert_array_equal(token_BLZ, case.out["tokens"])
    np.testing.assert_array_equal(case.config.unpatchify(token_BLZ), case.latents_BhwZ)

    @jax.jit
    def hidden(params, token_BnZ):
        apply = functools.partial(MAR(case.config).apply, {"params": params})
        z_BLC, captured = apply(
            token_BnZ,
            case.position_Bn,
            np.ones(case.position_Bn.shape, bool),
            apply(case.label_B, method=MAR.class_vectors),
            method=MAR.hidden,
            capture_intermediates=lambda module, _: module.name == "encoder_norm",
        )
        return z_BLC, captured["intermediates"]["encoder_norm"]["__call__"][0]

    z_BLC, x_BlC = hidden(case.params, known_tokens(case))
    # The reference keeps known tokens in the order of their positions.
    buffer, row = case.config.buffer_size, np.argsort(case.position_Bn, axis=1)[..., None]
    by_position_BlC = np.take_along_axis(np.asarray(x_BlC)[:, buffer:], row, axis=1)
    assert_close(x_BlC[:, :buffer], case.out["encoder_output"][:, :buffer])
    assert_close(by_position_BlC, case.out["encoder_output"][:, buffer:])
    assert_close(z_BLC, case.out["decoder_output"])


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["xla", "loop"])
def test_padding_has_no_effect_and_no_gradient(attention):
    case = golden.case("mar_base")
    token_BnZ = known_tokens(case)
    padded_BnZ = np.pad(token_BnZ, ((0, 0), (0, 3), (0, 0)), constant_values=7.0)
    # Padding names a position that is known, and two that are not (an order begins with those).
    parts = case.position_Bn, case.position_Bn[:, :1], case.out["orders"][:, :2]
    position_Bn = np.concatenate(parts, axis=1, dtype=np.int32)
    known_Bn = np.arange(position_Bn.shape[1]) < case.known
    known_Bn = np.broadcast_to(known_Bn, position_Bn.shape)

    @jax.jit
    def hidden_and_gradient(params, token_BnZ):
        mar = MAR(case.config, ComputeConfig(attention_impl=attention)).bind({"params": params})
        class_BC = mar.class_vectors(jnp.asarray(case.label_B))
        z_BLC, vjp = jax.vjp(lambda x: mar.hidden(x, position_Bn, known_Bn, class_BC), token_BnZ)
        return z_BLC, vjp(jnp.ones_like(z_BLC))[0]

    z_BLC, grad_BnZ = hidden_and_gradient(case.params, padded_BnZ)
    assert_close(z_BLC, case.out["decoder_output"])
    assert not grad_BnZ[:, case.known :].any() and grad_BnZ[:, : case.known].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.CASES)
def test_diffusion_loss_matches_reference(name):
    case = golden.case(name)
    z_NC = jnp.asarray(case.out["decoder_output"].reshape(-1, case.config.width))
    x0_NZ = jnp.asarray(case.out["tokens"].reshape(len(z_NC), -1))
    t_N, noise_NZ = (jnp.asarray(case.out[f"loss.{name}"]) for name in ("t", "noise"))

    @jax.jit
    def losses(params):
        denoise = case.config.head.network(params, ComputeConfig())(z_NC)
        return diffusion_loss(denoise, x0_NZ, t_N.astype(jnp.int32), noise_NZ)

    mse_N, bound_N = losses(case.params)
    assert_close(mse_N, case.out["loss.mse"])
    assert_close(bound_N, case.out["loss.vb"])
    masked_N = case.out["mask"].reshape(-1)
    mean = jnp.sum((mse_N + bound_N) * masked_N) / masked_N.sum()
    assert_close(mean, case.out["loss.masked_mean"])


@pytest.mark.slow
def test_initial_parameters_match_reference():
    config = MARConfig(
        width=96, encoder_depth=2, decoder_depth=2, encoder_heads=3, decoder_heads=3,
        head=DiffusionHead(width=64, depth=3), classes=50, latent_map=(8, 8),
    )  # fmt: skip
    params = trees.paths(jax.jit(config.init)(jax.random.key(0)))
    std = {path: float(np.std(x)) for path, x in params.items()}
    for path in ("class_embed", "encoder_pos_embed", "diffusion_pos_embed", "mask_token"):
        assert std[path] == pytest.approx(0.02, rel=0.3)
    fused = (2 / (96 + 3 * 96)) ** 0.5  # q, k and v as one matrix
    for name in "qkv":
        assert std[f"encoder_blocks/attn/{name}/kernel"] == pytest.approx(fused, rel=0.05)
    xavier = (2 / (96 + 4 * 96)) ** 0.5
    assert std["decoder_blocks/mlp/up/kernel"] == pytest.approx(xavier, rel=0.05)
    assert std["head/time_embed/up/kernel"] == pytest.approx(0.02, rel=0.05)
    for path in ("head/out/kernel", "head/adaln/kernel", "head/blocks/adaln/kernel"):
        assert std[path] == 0
    assert std["head/blocks/up/kernel"] == pytest.approx((2 / (64 + 64)) ** 0.5, rel=0.05)
    assert not any(x.any() for path, x in params.items() if path.endswith("bias"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(encoder_heads=5), "encoder_heads=5: must be a divisor of width=768"),
        (dict(decoder_width=40), "decoder_heads=12: must be a divisor of width=40"),
        (dict(decoder_width=0), "decoder_width=0: must be 1 or more"),
        (dict(buffer_size=0), "buffer_size=0: must be 1 or more"),
        (dict(latent_map=(16, 15), head=DiffusionHead(patch=2)), "multiples of head.patch=2"),
        (dict(order="Random"), "order must be one of .'random', 'raster'., not 'Random'"),
        (dict(head=lambda: CategoricalHead(0)), "head.vocab=0: must be 1 or more"),
    ],
)
def test_invalid_settings_are_refused(change, says):
    with pytest.raises(InputError, match=says):
        MARConfig(**{k: v() if callable(v) else v for k, v in change.items()})


def assert_close(ours, official):
    """Checks values to within 1e-4 of the largest one."""
    scale = np.abs(official).max()
    np.testing.assert_allclose(np.asarray(ours) / scale, official / scale, atol=1e-4, rtol=0)
