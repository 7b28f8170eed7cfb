"""Tests that the one-file examples match the library, on the same parameters and noise."""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples import nano_mar, nano_var
from tests.helpers.imports import imported_packages
from tests.helpers.paths import ROOT
from varjax.mar.heads import DiffusionHead, DiffusionNoise
from varjax.mar.losses import LossDraws, token_losses
from varjax.mar.masking import UnmaskingSchedule
from varjax.mar.model import MARConfig
from varjax.mar.sample import MAROptions, make_setup, sample_mar_tokens
from varjax.nn import resize
from varjax.nn.attention import block_causal_mask
from varjax.nn.diffusion import NoiseSchedule, reverse_diffusion
from varjax.tokenizers.vq.model import VQConfig
from varjax.tokenizers.vq.pyramid import Pyramid
from varjax.tokenizers.vq.quantizer import Quantizer, quantizer_loss
from varjax.var.model import VAR, VARConfig
from varjax.var.network import VARModels
from varjax.var.sample import VAROptions, sample_tokens

EXAMPLES = ["nano_var", "nano_mar"]
ALLOWED = {"jax", "flax", "optax", "numpy", "matplotlib", "PIL", "sklearn"}
PYRAMID = Pyramid(nano_var.SCALES)
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


@pytest.fixture(autouse=True)
def small_examples(monkeypatch):
    """Shrinks both networks, and allows JAX's usual dtype promotion, which the examples need."""
    for module, width, heads in ((nano_var, "C", "A"), (nano_mar, "C", "A")):
        monkeypatch.setattr(module, width, 16)
        monkeypatch.setattr(module, heads, 2)
        monkeypatch.setattr(module, "DEPTH", 2)
        module.sample.clear_cache()
    monkeypatch.setattr(nano_mar, "E", 24)
    monkeypatch.setattr(nano_var, "V", 32)
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_short_and_self_contained(name):
    """Examples import neither varjax nor unfamiliar packages, and they are short."""
    text = (ROOT / "examples" / f"{name}.py").read_text()
    assert imported_packages(text) - set(sys.stdlib_module_names) <= ALLOWED
    assert len(text.splitlines()) <= 350


def random_params(init, *inputs, scale=0.3):
    """Draws all parameters, because many are 0 before training and would hide differences."""
    shapes = jax.eval_shape(init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, scale, x.shape), x.dtype), shapes)


def stacked(params, name, depth):
    """Stacks the layers name_0, name_1 … along a leading axis, as in the library."""
    layers = [params[f"{name}_{i}"] for i in range(depth)]
    return jax.tree.map(lambda *x: np.stack(x), *layers)


def split_qkv(dense):
    """Splits a (…, 3 C) linear layer into q, k and v."""
    parts = {name: np.split(x, 3, axis=-1) for name, x in dense.items()}
    return {q: {name: x[i] for name, x in parts.items()} for i, q in enumerate("qkv")}


def noisy(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# VAR


@functools.cache
def tokenizer_params():
    image_1HW1 = jnp.zeros((1, 8, 8, 1))
    return random_params(nano_var.Tokenizer().init, image_1HW1, scale=0.1)["params"]


def library_quantizer():
    params = tokenizer_params()
    phi = stacked(params, "phi", nano_var.K)
    return {
        "codebook": params["codebook"],
        "phi_kernel": phi["kernel"],
        "phi_bias": phi["bias"],
    }


def bound_quantizer():
    module = Quantizer(PYRAMID, nano_var.V, nano_var.Z, num_phi=0, phi_ratio=0.5, cosine=False)
    return module.bind({"params": library_quantizer()})


@pytest.mark.parametrize("side", nano_var.SCALES)
def test_resizing_matches_library(side):
    f_BhwZ = noisy(2, 4, 4, nano_var.Z)
    expected = resize.area(f_BhwZ, (side, side))
    close(nano_var.downsample(f_BhwZ, side).reshape(expected.shape), expected)
    small_BhwZ = f_BhwZ[:, :side, :side]
    actual = nano_var.resize(small_BhwZ, nano_var.cubic_matrix(side, 4))
    close(actual, resize.bicubic(small_BhwZ, (4, 4)))


def test_quantizer_matches_library():
    """Compares tokens and f_hat of all scales, and the transformer's teacher-forcing input."""

    @jax.jit
    def example(image_BHW1):
        tokenizer = nano_var.Tokenizer().bind({"params": tokenizer_params()})
        f_BhwZ = tokenizer.encode(image_BHW1)
        return f_BhwZ, tokenizer.quantize(f_BhwZ), nano_var.teacher_forcing(params, image_BHW1)

    @jax.jit
    def library(f_BhwZ):
        quantizer = bound_quantizer()
        quantized = quantizer(f_BhwZ)
        return quantized, quantizer.teacher_forcing_input(quantized.f_hats)

    params = tokenizer_params()
    f_BhwZ, (token_BL, f_hats), (target_BL, input_BlZ) = example(np.tanh(noisy(32, 8, 8, 1)))
    expected, expected_BlZ = library(f_BhwZ)
    np.testing.assert_array_equal(token_BL, expected.tokens_BL)
    np.testing.assert_array_equal(target_BL, expected.tokens_BL)
    assert len(np.unique(token_BL)) > 10
    for actual, f_hat_BhwZ in zip(f_hats, expected.f_hats, strict=True):
        close(actual, f_hat_BhwZ)
    close(input_BlZ, expected_BlZ)


@pytest.mark.slow
def test_tokenizer_loss_matches_library():
    """Also compares the gradient, which passes straight through from decoder to encoder."""
    image_BHW1 = np.tanh(noisy(4, 8, 8, 1))

    def expected_loss(params):
        tokenizer = nano_var.Tokenizer().bind({"params": params})
        f_BhwZ = tokenizer.encode(image_BHW1)
        f_hats = tokenizer.quantize(f_BhwZ)[1]
        straight_BhwZ = f_BhwZ + jax.lax.stop_gradient(f_hats[-1] - f_BhwZ)
        error_BHW1 = tokenizer.decode(straight_BhwZ) - image_BHW1
        image_loss = jnp.mean(jnp.square(error_BHW1)) + 0.2 * jnp.mean(jnp.abs(error_BHW1))
        return image_loss + jnp.mean(quantizer_loss(f_BhwZ, f_hats, 0.25))

    @jax.jit
    def both(params):
        example_loss = functools.partial(
            nano_var.tokenizer_loss, batch={"image": image_BHW1}, key=None
        )
        return [jax.value_and_grad(loss)(params) for loss in (example_loss, expected_loss)]

    (actual, grads), (expected, expected_grads) = both(tokenizer_params())
    close(actual, expected)
    jax.tree.map(close, grads, expected_grads)
    assert all(np.any(grad) for grad in jax.tree.leaves(grads))


def test_mask_matches_library():
    np.testing.assert_array_equal(nano_var.MASK_LL, block_causal_mask(PYRAMID.level_L))


def var_params():
    """Returns random parameters of the example, and the same ones in the library's layout."""
    inputs = jnp.zeros((1, nano_var.L - 1, nano_var.Z)), jnp.zeros(1, int)
    params = random_params(nano_var.VAR().init, *inputs)["params"]
    block = stacked(params, "block", nano_var.DEPTH)
    attn = block["attn"]
    bias_SC = np.zeros((nano_var.DEPTH, nano_var.C), np.float32)  # the example has none for q and v
    qkv = split_qkv(attn["qkv"])
    library = {
        "class_embed": params["class_embed"]["embedding"],
        "pos_start": np.zeros((1, nano_var.C), np.float32),
        "pos_embed": params["pos_embed"],
        "level_embed": params["level_embed"],
        "token_proj": params["token_embed"],
        "blocks": {
            "adaln": {"linear": block["adaln"]},
            "attn": {
                "q": qkv["q"] | {"bias": bias_SC},
                "k": qkv["k"],
                "v": qkv["v"] | {"bias": bias_SC},
                "proj": attn["proj"],
                "log_scale": attn["log_scale"],
            },
            "mlp": {"up": block["up"], "down": block["down"]},
        },
        "head_adaln": params["head_adaln"],
        "head": params["head"],
    }
    return params, library


def var_config():
    return VARConfig(
        depth=nano_var.DEPTH,
        width=nano_var.C,
        heads=nano_var.A,
        classes=10,
        scales=nano_var.SCALES,
        vocab=nano_var.V,
        code_channels=nano_var.Z,
    )


@pytest.mark.slow
def test_var_loss_matches_library():
    """Expects the mean cross-entropy of the library's logits, with some labels dropped."""
    params, library = var_params()
    B, key = 16, jax.random.key(0)
    input_BlZ, label_B = noisy(B, nano_var.L - 1, nano_var.Z), np.arange(B) % 10
    token_BL = np.random.default_rng(1).integers(0, nano_var.V, (B, nano_var.L))
    batch = {"label": label_B, "input": input_BlZ, "token": token_BL}
    dropped_B = np.array(jax.random.bernoulli(key, 0.1, (B,)))
    assert 0 < dropped_B.sum() < B

    @jax.jit
    def both(params, library):
        loss = nano_var.var_loss(params, batch, key)
        kept_B = np.where(dropped_B, 10, label_B)
        logits_BLV = VAR(var_config()).apply({"params": library}, input_BlZ, kept_B)
        losses_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, token_BL)
        first_two = nano_var.VAR().apply({"params": params}, input_BlZ[:, :4], kept_B)
        return loss, jnp.mean(losses_BL), first_two, logits_BLV

    actual, expected, first_two_BlV, logits_BLV = both(params, library)
    close(actual, expected)
    # The first scales have the same logits without the later ones, as sampling requires.
    close(first_two_BlV, logits_BLV[:, :5], atol=1e-4)


@pytest.mark.slow
def test_var_sampling_matches_library():
    params, library = var_params()
    label_B, key_B = jnp.array([3, 1, 4]), jax.random.split(jax.random.key(5), 3)
    token_BL, f_hats = nano_var.sample(params, tokenizer_params(), label_B, key_B, 2.5)
    tokenizer = VQConfig(
        scales=nano_var.SCALES,
        image_channels=1,
        width=8,
        channel_mult=(1, 2),
        groups=8,
        vocab=nano_var.V,
        code_channels=nano_var.Z,
        num_phi=0,
    )
    both = {"tokenizer": {"quantizer": library_quantizer()}, "var": library}
    draw = jax.jit(functools.partial(sample_tokens, VARModels(tokenizer, var_config())))
    options = VAROptions(guidance=2.5, top_k=0, top_p=0.0)
    expected_BL, expected_f_hats = draw(both, label_B, key_B, options)
    np.testing.assert_array_equal(token_BL, expected_BL)
    close(f_hats[-1], expected_f_hats[-1])


# MAR


def mar_config():
    head = DiffusionHead(channels=1, patch=2, depth=nano_mar.MLP_DEPTH, width=nano_mar.E)
    return MARConfig(
        width=nano_mar.C,
        encoder_depth=nano_mar.DEPTH,
        decoder_depth=nano_mar.DEPTH,
        encoder_heads=nano_mar.A,
        decoder_heads=nano_mar.A,
        head=head,
        classes=10,
        latent_map=(8, 8),
        buffer_size=nano_mar.BUFFER,
    )


def mar_params():
    """Returns random parameters of the example, and the same ones in the library's layout."""
    params = random_params(nano_mar.init_params)
    mar, denoiser = params["mar"], params["denoiser"]

    def blocks(name):
        block = stacked(mar, name, nano_mar.DEPTH)
        return {
            "norm1": block["norm1"],
            "attn": split_qkv(block["qkv"]) | {"proj": block["proj"]},
            "norm2": block["norm2"],
            "mlp": {"up": block["up"], "down": block["down"]},
        }

    names = "adaln", "norm", "up", "down"
    out = denoiser["out"]
    head = {
        "time_embed": {"up": denoiser["time_up"], "down": denoiser["time_down"]},
        "cond_embed": denoiser["cond_embed"],
        "input_proj": denoiser["input_proj"],
        "blocks": {name: stacked(denoiser, name, nano_mar.MLP_DEPTH) for name in names},
        "adaln": denoiser["adaln"],
        # The library also predicts the variance; -1 selects the lower bound, as in the example.
        "out": {
            "kernel": np.pad(out["kernel"], ((0, 0), (0, nano_mar.Z))),
            "bias": np.pad(out["bias"], (0, nano_mar.Z), constant_values=-1),
        },
    }
    same = "z_proj", "z_proj_norm", "encoder_norm", "decoder_embed", "decoder_norm"
    tables = "encoder_pos_embed", "decoder_pos_embed", "diffusion_pos_embed"
    library = {name: mar[name] for name in same} | {name: mar[name][0] for name in tables}
    return params, library | {
        "class_embed": mar["class_embed"]["embedding"][:10],
        "no_class_embed": mar["class_embed"]["embedding"][10:],
        "mask_token": mar["mask_token"][0, 0],
        "encoder_blocks": blocks("encoder"),
        "decoder_blocks": blocks("decoder"),
        "head": head,
    }


def test_noise_schedule_matches_library():
    close(nano_mar.ALPHA_BAR_T, NoiseSchedule().alpha_bar_J, rtol=1e-12, atol=0)
    np.testing.assert_array_equal(nano_mar.TIMESTEP_J, NoiseSchedule(nano_mar.J).timestep_J)


def test_unmasking_schedule_matches_library():
    schedule = UnmaskingSchedule(nano_mar.L, nano_mar.STEPS)
    assert tuple(nano_mar.KNOWN) == schedule.known


def test_patches_match_library():
    image_BHW = noisy(3, 8, 8)
    token_BLZ = nano_mar.patchify(image_BHW)
    np.testing.assert_array_equal(token_BLZ, mar_config().patchify(image_BHW[..., None]))
    np.testing.assert_array_equal(nano_mar.unpatchify(token_BLZ), image_BHW)


@pytest.mark.slow
def test_diffusion_loss_matches_library():
    params, library = mar_params()
    B, L, U, Z = 4, nano_mar.L, 2, nano_mar.Z
    token_BLZ, label_B, known_B = noisy(B, L, Z), np.array([0, 9, 10, 3]), np.array([0, 3, 9, 15])
    order_BL = np.argsort(noisy(B, L, seed=1), axis=1)
    t_BLU = np.random.default_rng(2).integers(0, 1000, (B, L, U)).astype(np.int32)
    noise = DiffusionNoise(t_BLU, noisy(B, L, U, Z, seed=3))
    draws = LossDraws(order_BL, known_B, noise)
    expected = jax.jit(functools.partial(token_losses, mar_config(), max_known=15))(
        library, token_BLZ, label_B, draws
    )
    known_BL = np.argsort(order_BL, axis=1) < known_B[:, None]
    np.testing.assert_array_equal(~known_BL, expected.masked_BL)
    loss_BLU = jax.jit(nano_mar.diffusion_loss)(
        params, token_BLZ, label_B, known_BL, t_BLU, noise.noise_BLUZ
    )
    close(loss_BLU, expected.metrics_BLU["mse"], rtol=1e-4)


def test_mar_loss_masks_known_tokens_and_drops_labels():
    """Uses a fake loss that is huge for known tokens, so the mean shows if it includes any."""
    seen = {}

    def fake_loss(params, token_BLZ, label_B, known_BL, t_BLU, noise_BLUZ):
        seen.update(known_BL=known_BL, label_B=label_B, t_BLU=t_BLU, noise_BLUZ=noise_BLUZ)
        return jnp.where(known_BL[..., None], 1e6, 3.0) * jnp.ones(t_BLU.shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nano_mar, "diffusion_loss", fake_loss)
        batch = {"token": noisy(500, nano_mar.L, nano_mar.Z), "label": jnp.zeros(500, int)}
        assert nano_mar.mar_loss({}, batch, jax.random.key(0)) == 3
    count_B = seen["known_BL"].sum(axis=1)
    assert count_B.min() == 0 and 9 <= count_B.max() <= 14  # a mask ratio from 0.1 to 1
    assert 0.15 < count_B.mean() / nano_mar.L < 0.25  # mean of a half-normal: 0.2
    assert len(np.unique(seen["known_BL"], axis=0)) > 300
    assert set(np.unique(seen["label_B"])) == {0, 10} and 30 < np.sum(seen["label_B"] == 10) < 75
    assert 0 <= seen["t_BLU"].min() < 5 and 995 <= seen["t_BLU"].max() <= 999
    assert abs(seen["noise_BLUZ"].std() - 1) < 0.02


def test_masked_tokens_do_not_reach_z():
    params, _ = mar_params()
    known_1L = jnp.arange(nano_mar.L)[None] % 3 == 0

    @jax.jit
    @jax.grad
    def gradient(token_1LZ):
        z = nano_mar.MAR().apply({"params": params["mar"]}, token_1LZ, known_1L, jnp.zeros(1, int))
        return jnp.sum(jnp.sin(z))

    grad_1LZ = gradient(noisy(1, nano_mar.L, nano_mar.Z))
    assert np.all(grad_1LZ[~known_1L] == 0) and np.all(np.any(grad_1LZ[known_1L], axis=-1))


def test_reverse_diffusion_matches_library():
    noise_JNZ = noisy(nano_mar.J, 5, nano_mar.Z)

    def predict(xt_NZ, t):
        return jnp.sin(3 * xt_NZ) + t / 1000

    def library_denoiser(xt_NZ, t_1):
        predicted_NZ = predict(xt_NZ, t_1[0])
        return jnp.concatenate([predicted_NZ, jnp.full(predicted_NZ.shape, -1.0)], axis=1)

    expected = reverse_diffusion(
        library_denoiser,
        NoiseSchedule(nano_mar.J).coefficients(),
        nano_mar.J,
        lambda j: noise_JNZ[jnp.where(j == nano_mar.J, 0, j)],
        clip_denoised=1.0,
    )
    close(jax.jit(functools.partial(nano_mar.reverse_diffusion, predict))(noise_JNZ), expected)


def test_reverse_diffusion_recovers_a_gaussian():
    """With a Gaussian's exact noise prediction, samples have its mean and standard deviation.

    The lower bound on the variance makes the standard deviation slightly too small.
    """
    mean, std = 0.1, 0.25

    def exact(xt_NZ, t):
        alpha_bar = jnp.asarray(nano_mar.ALPHA_BAR_T, jnp.float32)[t]
        variance = alpha_bar * std**2 + 1 - alpha_bar
        return jnp.sqrt(1 - alpha_bar) * (xt_NZ - jnp.sqrt(alpha_bar) * mean) / variance

    noise_JNZ = noisy(nano_mar.J, 4000, nano_mar.Z, seed=1)
    x_NZ = jax.jit(functools.partial(nano_mar.reverse_diffusion, exact))(noise_JNZ)
    assert abs(x_NZ.mean() - mean) < 0.01
    assert 0.92 < x_NZ.std() / std < 1.01


def sample_in_few_steps(monkeypatch):
    """Reduces compilation to three steps, which draw different numbers of tokens."""
    monkeypatch.setattr(nano_mar, "STEPS", 3)
    monkeypatch.setattr(nano_mar, "KNOWN", UnmaskingSchedule(nano_mar.L, 3).known)
    monkeypatch.setattr(nano_mar, "J", 10)
    monkeypatch.setattr(nano_mar, "TIMESTEP_J", NoiseSchedule(10).timestep_J)


@pytest.mark.slow
def test_mar_sampling_matches_library(monkeypatch):
    params, library = mar_params()
    sample_in_few_steps(monkeypatch)
    B, L, J, Z = 3, nano_mar.L, nano_mar.J, nano_mar.Z
    label_B = jnp.array([3, 1, 4])
    order_BL = np.argsort(noisy(B, L), axis=1)
    noise_JBLZ = noisy(J, B, L, Z, seed=4)
    steps = nano_mar.sample(params, label_B, order_BL, noise_JBLZ, 2.0)

    def same_noise(position_Bm, j):
        noise_BLZ = noise_JBLZ[jnp.where(j == J, 0, j)]
        return jnp.take_along_axis(noise_BLZ, jnp.minimum(position_Bm, L - 1)[..., None], axis=1)

    config = mar_config()
    options = MAROptions(
        guidance=2.0,
        guidance_schedule="constant",
        temperature=1.0,
        steps=nano_mar.STEPS,
        diffusion_steps=str(J),
        clip_denoised=1.0,
    )
    setup = make_setup(config, options.check())
    expected = jax.jit(
        lambda params, order_BL: sample_mar_tokens(
            config, params, label_B, None, setup, order_BL=order_BL, noise=same_noise
        )
    )(library, order_BL)
    close(steps[-1], expected, rtol=1e-3, atol=1e-3)
    rank_BL = np.argsort(order_BL, axis=1)
    for step, token_BLZ in enumerate(steps):  # drawn tokens never change
        known_BL = rank_BL < nano_mar.KNOWN[step + 1]
        np.testing.assert_array_equal(token_BLZ[known_BL], steps[-1][known_BL])
        assert not np.any(token_BLZ[~known_BL])


# Both


@functools.cache
def digits_of(module):
    return module.digits()


def test_augmentation_changes_images_slightly():
    train, held_out = digits_of(nano_var)
    assert train["image"].shape == (14380, 8, 8, 1) and held_out["image"].shape == (359, 8, 8, 1)
    other, _ = digits_of(nano_mar)
    np.testing.assert_array_equal(other["image"], train["image"][..., 0])
    copies_UNC, image_NC = train["image"].reshape(10, 1438, 64), held_out["image"].reshape(-1, 64)
    for x in copies_UNC, image_NC:
        assert x.min() == -1 and x.max() == 1
    # Shifts average to zero; half a pixel would change the mean image by up to 0.6.
    difference_C = copies_UNC.mean(axis=(0, 1)) - image_NC.mean(axis=0)
    assert np.abs(difference_C).max() < 0.15
    between_copies = np.linalg.norm(copies_UNC[0] - copies_UNC[1], axis=1).mean()
    between_images = np.linalg.norm(copies_UNC[0] - copies_UNC[1, ::-1], axis=1).mean()
    assert 0.2 < between_copies / between_images < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("module", [nano_var, nano_mar])
def test_a_short_run_learns_and_writes_its_figures(module, monkeypatch, tmp_path, capsys):
    """Runs each example's `main` on fewer images and for fewer steps.

    An untrained model of 32 codes has a loss of at least log 32, and predicting zero noise has a
    loss of 1, the variance of noise. An image of the mean gray has a PSNR of 8.5 dB.
    """
    fit, data_sets = module.fit, digits_of(module)

    def short_fit(loss_fn, params, data, steps, lr):
        return fit(loss_fn, params, data, 40, lr, batch_size=16)

    def few_digits():
        return [{name: x_N[:200] for name, x_N in data.items()} for data in data_sets]

    sample_in_few_steps(monkeypatch)
    monkeypatch.setattr(module, "DEPTH", 1)
    monkeypatch.setattr(module, "fit", short_fit)
    monkeypatch.setattr(module, "digits", few_digits)
    monkeypatch.setattr(module, "FOLDER", tmp_path / "pictures")
    module.main()
    printed = capsys.readouterr().out
    (loss,) = re.findall(r"held out: loss ([\d.]+)", printed)
    assert float(loss) < {nano_var: 0.95 * np.log(32), nano_mar: 0.9}[module], printed
    assert all(float(psnr) > 9 for psnr in re.findall(r"PSNR ([\d.]+)", printed)), printed
    name = module.__name__.split(".")[-1]
    page = (ROOT / "docs" / "how_it_works.md").read_text()
    written = {f"{name}_{path.name}" for path in (tmp_path / "pictures").iterdir()}
    assert written == set(re.findall(rf"\(({name}_\w+\.png)\)", page))
