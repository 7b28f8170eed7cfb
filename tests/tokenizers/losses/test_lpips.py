import functools
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.golden import weights
from varjax import trees
from varjax.convert.__main__ import main
from varjax.convert.pth.write import write_pth
from varjax.tokenizers.losses.lpips import (
    LPIPSConfig,
    check_lpips_images,
    init_lpips,
    load_lpips,
    lpips,
    lpips_layers,
)

GOLDEN = weights.outputs("lpips")
SMALL = tuple((4,) * convolutions for convolutions in (2, 2, 3, 3, 3))


@functools.cache
def tensors():
    """Returns (VGG, heads) by their names in torchvision and lpips. Do not modify them."""
    named = weights.state_dict("lpips", "lpips")
    vgg = {n: x for n, x in named.items() if n.startswith("features")}
    vgg["classifier.0.weight"] = np.zeros((2, 2), np.float32)
    return vgg, {n: np.abs(x) for n, x in named.items() if n.startswith("lin")}


def command(vgg, heads, out):
    return main([f"--lpips_vgg={vgg}", f"--lpips_heads={heads}", f"--out={out}"])


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Returns the converted directory, and the two files that it was made from."""
    folder = tmp_path_factory.mktemp("lpips")
    vgg, heads = tensors()
    write_pth(folder / "vgg16.pth", vgg)
    save_file(heads, folder / "vgg.safetensors")
    assert command(folder / "vgg16.pth", folder / "vgg.safetensors", folder / "out") == 0
    return folder / "out", folder / "vgg16.pth", folder / "vgg.safetensors"


@pytest.mark.slow
def test_distance_layers_and_gradient_match_the_lpips_package(converted):
    random = np.random.RandomState(7)
    a = np.tanh(random.standard_normal((3, 3, 64, 64)))
    b = np.clip(a + 0.3 * random.standard_normal(a.shape), -1, 1)
    a_BHWC, b_BHWC = (np.float32(x).transpose(0, 2, 3, 1) for x in (a, b))

    @jax.jit
    def run(params, a_BHWC, b_BHWC):
        def total(b_BHWC):
            layers_5B = lpips_layers(params, a_BHWC, b_BHWC)
            return jnp.sum(layers_5B), layers_5B

        return jax.grad(total, has_aux=True)(b_BHWC)

    grad_BHWC, layers_5B = run(load_lpips(converted[0]), a_BHWC, b_BHWC)
    np.testing.assert_allclose(layers_5B, GOLDEN["per_layer"], rtol=1e-4)
    np.testing.assert_allclose(layers_5B.sum(axis=0), GOLDEN["distance"], rtol=1e-5)
    norm = np.sqrt(np.sum(np.square(grad_BHWC)))
    np.testing.assert_allclose(norm, GOLDEN["grad_wrt_second_norm"], rtol=1e-5)
    corner = np.asarray(grad_BHWC).transpose(0, 3, 1, 2)[:, :, :8, :8]
    np.testing.assert_allclose(corner, GOLDEN["grad_wrt_second_corner"], atol=1e-8)


@jax.jit
def small(params, a_BHWC, b_BHWC):
    return jax.value_and_grad(lambda b_BHWC: jnp.sum(lpips(params, a_BHWC, b_BHWC)))(b_BHWC)


def small_params(scale):
    """Draws parameters of a network so narrow that it compiles quickly."""
    shapes = jax.eval_shape(functools.partial(init_lpips, widths=SMALL), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.float32(scale * rng.standard_normal(x.shape)), shapes)


def test_equal_images_with_zero_features_have_zero_distance_and_gradient():
    image_BHWC = np.zeros((2, 16, 20, 3), np.float32)
    value, grad_BHWC = small(small_params(0.0), image_BHWC, image_BHWC)
    assert value == 0 and np.all(grad_BHWC == 0)


def test_gray_images_count_as_three_equal_channels():
    a_BHWC, b_BHWC = np.random.default_rng(1).uniform(-1, 1, (2, 2, 16, 20, 1)).astype(np.float32)
    params = small_params(0.2)
    thrice = (np.repeat(x_BHWC, 3, axis=-1) for x_BHWC in (a_BHWC, b_BHWC))
    (one, grad_BHWC), (three, grads_BHWC) = small(params, a_BHWC, b_BHWC), small(params, *thrice)
    np.testing.assert_allclose(one, three, rtol=1e-6)
    np.testing.assert_allclose(grad_BHWC[..., 0], grads_BHWC.sum(axis=-1), atol=1e-6)


@pytest.mark.parametrize(
    "shape, message", [((15, 64, 3), "15×64 are too small"), ((64, 64, 2), "2 c")]
)
def test_unsupported_image_shapes_are_refused(shape, message):
    with pytest.raises(ValueError, match=f"{message}.*task.perceptual=none"):
        check_lpips_images(shape)


def test_converted_weights_match_and_name_their_sources(converted):
    out, *sources = converted
    config = json.loads((out / "config.json").read_text())
    assert config["sources"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources
    }
    vgg, heads = tensors()
    params = load_lpips(out)
    np.testing.assert_array_equal(
        params["conv_4_2"]["kernel"], vgg["features.28.weight"].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(params["head_3"], heads["lin3.model.1.weight"][0, :, 0, 0])
    assert command(*sources, out) == 0  # the same output may be written again


def test_wrong_files_are_named_and_nothing_is_written(converted, tmp_path, capsys):
    out, vgg, heads = converted
    assert command(heads, vgg, tmp_path / "x") == 1
    assert "vgg.safetensors: this is not torchvision's vgg16" in capsys.readouterr().err
    assert main([f"--lpips_vgg={vgg}", f"--out={tmp_path / 'x'}"]) == 1
    assert "belong together" in capsys.readouterr().err
    wrong = dict(tensors()[1])
    del wrong["lin4.model.1.weight"]
    wrong["lin5.model.1.weight"] = np.zeros((1, 512, 1, 1), np.float32)
    save_file(wrong, tmp_path / "wrong.safetensors")
    assert command(vgg, tmp_path / "wrong.safetensors", tmp_path / "x") == 1
    said = capsys.readouterr().err
    assert "missing: lin4.model.1.weight (1, 512, 1, 1)" in said and "unexpected: lin5" in said
    negative = {n: -x for n, x in tensors()[1].items()}
    save_file(negative, tmp_path / "wrong.safetensors")
    assert command(vgg, tmp_path / "wrong.safetensors", tmp_path / "x") == 1
    assert "lin0.model.1.weight" in (said := capsys.readouterr().err) and "negative" in said
    assert not (tmp_path / "x").exists()


def test_missing_or_wrong_weights_are_refused_with_advice(tmp_path):
    with pytest.raises(
        ValueError, match="no LPIPS weights in nowhere; make them with: varjax convert"
    ):
        load_lpips("nowhere")
    save_file(trees.paths(small_params(1.0)), tmp_path / "lpips.safetensors")
    with pytest.raises(ValueError, match="(?s)is not LPIPS on VGG16.*misshapen:  conv_0_0/bias"):
        load_lpips(tmp_path)
    with pytest.raises(ValueError, match="perceptual.weight=0"):
        LPIPSConfig(weight=0.0)
