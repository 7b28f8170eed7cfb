"""Tests ResNets against torchvision: logits, conversion, and preprocessing of images."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.golden import weights
from varjax.checkpoints.weights import abstract_params, open_weights
from varjax.convert import apply_map, convert
from varjax.convert.name_maps import resnet as name_map
from varjax.convert.pth.read import read_checkpoint
from varjax.convert.pth.write import write_pth
from varjax.errors import InputError
from varjax.metrics import features
from varjax.metrics.classifier import load_classifier
from varjax.metrics.resnet import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ResNet,
    ResNetConfig,
    normalized_images,
)
from varjax.weight_files import convert_to_torch

SMALL = "resnet_small"


@pytest.fixture(scope="module")
def tensors():
    tensors = weights.state_dict(SMALL, "resnet")
    for name in tensors:
        if name.endswith("bn3.weight"):  # as the golden case's `note` says
            tensors[name] *= np.float32(0.2)
    return tensors


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    file = tmp_path_factory.mktemp("resnet") / "resnet.pth"
    norms = [name.removesuffix("running_var") for name in tensors if name.endswith("running_var")]
    counters = {f"{norm}num_batches_tracked": np.array(7) for norm in norms}
    write_pth(file, tensors | counters)
    return file


@pytest.fixture(scope="module")
def converted(file):
    convert(file.with_suffix(""), {"resize": 232}, resnet=file)
    return file.with_suffix("")


@pytest.fixture(scope="module")
def network(converted):
    """Returns the config, and a compiled function from normalized images to logits."""
    config, params = open_weights(converted).read_converted("classifier", ResNetConfig)
    outputs = jax.jit(lambda x_BHWC: ResNet(config).apply({"params": params}, x_BHWC))
    return config, lambda x_BHWC: outputs(x_BHWC)["logits_BV"]


@pytest.mark.slow
def test_logits_and_probabilities_match_torchvision(network):
    config, logits = network
    assert config == ResNetConfig(layers=(1, 2, 1, 1), classes=40, resize=232)
    x_BCHW = np.random.RandomState(6).standard_normal((2, 3, 224, 224)).astype(np.float32)
    logits_BV, expected = logits(x_BCHW.transpose(0, 2, 3, 1)), weights.outputs(SMALL)
    np.testing.assert_allclose(logits_BV, expected["logits"], atol=1e-4)
    np.testing.assert_allclose(jax.nn.softmax(logits_BV), expected["probabilities"], atol=1e-5)


def test_conversion_is_exact_in_both_directions(converted, tensors):
    config, params = open_weights(converted).read_converted("classifier", ResNetConfig)
    official = apply_map.to_official(config, params)
    assert official.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(np.asarray(official[name]), tensor, err_msg=name)
    buffers = apply_map.official_buffers(config)
    assert all(name.endswith(".num_batches_tracked") for name in buffers)
    assert len(buffers) == sum(name.endswith("running_var") for name in tensors)


def test_a_classifier_is_written_in_torchvision_s_format(converted, tensors, tmp_path):
    convert_to_torch(converted, tmp_path / "out")
    written = read_checkpoint(tmp_path / "out" / "classifier.pth")
    assert {name for name in written if not name.endswith("tracked")} == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(np.asarray(written[name]), tensor, err_msg=name)


def test_shapes_match_torchvision():
    config = ResNetConfig(layers=(3, 4, 6, 3))  # ResNet-50
    shapes = apply_map.official_shapes(config)
    statistics = sum(np.prod(x) for name, x in shapes.items() if "running" in name)
    assert sum(np.prod(x) for x in shapes.values()) - statistics == 25_557_032
    assert shapes["conv1.weight"] == (64, 3, 7, 7) and shapes["fc.weight"] == (1000, 2048)
    assert shapes["layer3.5.bn2.running_var"] == (256,)
    assert shapes["layer1.0.downsample.0.weight"] == (256, 64, 1, 1)


@pytest.mark.parametrize("size, resize", [((256, 256), 256), ((256, 256), 232), ((64, 96), 256)])
def test_preprocessing_matches_torchvision(size, resize):
    image_HWC = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    shorter = min(size)
    picture = Image.fromarray(image_HWC)
    if shorter != resize:
        width, height = (resize * side // shorter for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = ((side - 224) // 2 for side in picture.size)
    cropped = np.asarray(picture.crop((left, top, left + 224, top + 224))) / 255
    expected = (cropped - IMAGENET_MEAN) / IMAGENET_STD
    found = normalized_images(ResNetConfig(resize=resize), jnp.asarray(image_HWC[None]))[0]
    # PIL rounds to whole levels after each axis.
    atol = 1.5 / 255 / IMAGENET_STD.min() if shorter != resize else 1e-5
    np.testing.assert_allclose(found, expected, atol=atol)
    assert np.abs(found - expected).mean() < atol / 3


@pytest.mark.slow
def test_a_converted_directory_loads_as_a_classifier(converted, network, monkeypatch):
    monkeypatch.setattr(features, "CPU_BLOCK", 2)
    classifier, (config, logits) = load_classifier(converted), network
    assert classifier.classes == 40 and classifier.identity["resize"] == 232
    images_NHWC = np.random.default_rng(0).integers(0, 256, (2, 232, 232, 1), np.uint8)
    label_N = np.array([3, 39])
    found_N = classifier.probabilities(images_NHWC, label_N)
    x_BHWC = normalized_images(config, jnp.asarray(np.repeat(images_NHWC, 3, axis=-1)))
    expected_NV = jax.nn.softmax(logits(x_BHWC))
    np.testing.assert_allclose(found_N, expected_NV[np.arange(2), label_N], rtol=1e-4)
    one = classifier.probabilities(images_NHWC[1:], label_N[1:])
    np.testing.assert_array_equal(one, found_N[1:])  # independent of other images in the batch


def test_the_resize_comes_from_the_file_hash_or_a_flag(file, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="give --resize: 256 for V1 weights, 232 for V2"):
        convert(tmp_path / "a", resnet=file)
    assert not (tmp_path / "a").exists()
    digits = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(name_map.KNOWN_FILES, digits, 232)
    assert convert(tmp_path / "a", resnet=file)["classifier"].resize == 232
    assert set(name_map.KNOWN_FILES.values()) == {232, 256}


def test_other_networks_are_refused(tensors, tmp_path):
    options = name_map.ResNetConvertOptions(256)
    basic = {name: x for name, x in tensors.items() if "conv3" not in name}
    with pytest.raises(InputError, match="ResNet-18 or 34; give ResNet-50"):
        name_map.infer_resnet(basic, options)
    grouped = tensors | {"layer1.0.conv2.weight": np.zeros((128, 4, 3, 3))}
    with pytest.raises(InputError, match="ResNeXt or a wide ResNet: .* 128 by 4"):
        name_map.infer_resnet(grouped, options)
    for resize in (100, 2000):
        with pytest.raises(InputError, match=f"resize={resize}: must be from 224 to 1024"):
            name_map.infer_resnet(tensors, name_map.ResNetConvertOptions(resize))
    with pytest.raises(InputError, match="is not a directory of weights; make one with"):
        load_classifier(tmp_path)
    assert abstract_params(ResNetConfig((1, 1, 1, 1)))["head"]["kernel"].shape == (2048, 1000)


def test_a_directory_of_other_weights_is_refused_as_a_classifier(tmp_path):
    (tmp_path / "config.json").write_text('{"sources": {}, "tokenizer": {}}')
    with pytest.raises(InputError, match="holds no classifier; make one with"):
        load_classifier(tmp_path)
