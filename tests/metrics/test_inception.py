"""Tests FID's Inception against official features, and its conversion from each file format."""

import jax
import numpy as np
import pytest
from tensorboardX.proto.graph_pb2 import GraphDef

from tests.golden import weights
from tests.helpers import inception
from varjax import trees
from varjax.convert import convert_inception
from varjax.convert.inception import IGNORED, TF_STEM, inception_table, read_graph, tensorflow_name
from varjax.convert.pth.write import write_pth
from varjax.errors import InputError
from varjax.metrics.features import FeatureExtractor, inception_network
from varjax.metrics.inception import Inception, load_inception
from varjax.nn.resize import bilinear_tf1
from varjax.storage import files

TAPS = {
    "64": "64_BD",
    "192": "192_BD",
    "768": "768_BD",
    "2048": "pool_BD",
    "logits_unbiased": "logits_BV",
    "logits": "biased_logits_BV",
    "spatial": "spatial_BD",
}
SHAPES = {"a": (2, 3, 64, 64), "b": (2, 3, 256, 256), "c": (1, 3, 299, 299)}


def golden_images() -> dict[str, np.ndarray]:
    rng = np.random.RandomState(11)
    images = {name: rng.randint(0, 256, shape) for name, shape in SHAPES.items()}
    return {name: x.astype(np.uint8).transpose(0, 2, 3, 1) for name, x in images.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a", "b"])
def test_every_tap_matches_the_official_network(name):
    params = load_inception(inception.converted())
    taps = jax.jit(Inception().apply)({"params": params}, golden_images()[name])
    outputs = weights.outputs("inception")
    for official, ours in TAPS.items():
        expected = outputs[f"{name}.{official}"]
        np.testing.assert_allclose(taps[ours], expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_a_299_pixel_image_is_not_resized_and_padding_has_no_effect():
    extract = FeatureExtractor(inception_network(inception.converted()), jax.devices()[:1])
    features, outputs = extract(golden_images()["c"]), weights.outputs("inception")
    assert {name: x.shape for name, x in features.items()} == {
        "pool_ND": (1, 2048),
        "spatial_ND": (1, 2023),
        "logits_NV": (1, 1008),
    }
    expected = outputs["c.2048"]
    np.testing.assert_allclose(features["pool_ND"], expected, atol=1e-4 * expected.max())


def test_the_resize_matches_tensorflow():
    x_BhwC = np.array([0.0, 3.0, 6.0], np.float32).reshape(1, 1, 3, 1)
    y_BHWC = bilinear_tf1(np.repeat(x_BhwC, 3, axis=1), (3, 6))
    # Output i is at input i / 2, without half-pixel centers; past the edge, the last input repeats.
    np.testing.assert_allclose(y_BHWC[0, 0, :, 0], [0, 1.5, 3, 4.5, 6, 6], rtol=1e-6)


def graph(tensors, scaled=False) -> GraphDef:
    """Makes TensorFlow's graph of constants, with the norms that say whether they scale."""
    graph = GraphDef()

    def constant(name, array):
        node = graph.node.add(name=name, op="Const")
        tensor = node.attr["value"].tensor
        tensor.dtype = 1
        for size in array.shape:
            tensor.tensor_shape.dim.add(size=size)
        if array.size > 1 and (array == array.flat[0]).all():
            tensor.float_val.append(array.flat[0])  # one number for all, as TensorFlow writes it
        else:
            tensor.tensor_content = array.astype("<f4").tobytes()

    kinds = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean"}
    for name, array in tensors.items():
        module, _, kind = name.rpartition(".")
        if name == "fc.weight":
            constant("softmax/weights", array.T)
        elif name == "fc.bias":
            constant("softmax/biases", array)
        elif module.endswith(".conv"):
            constant(f"{tensorflow_name(module[:-5])}/conv2d_params", array.transpose(2, 3, 1, 0))
        else:
            norm = f"{tensorflow_name(module[:-3])}/batchnorm"
            constant(f"{norm}/{kinds.get(kind, 'moving_variance')}", array)
            if kind == "weight":
                node = graph.node.add(name=norm, op="BatchNormWithGlobalNormalization")
                node.attr["scale_after_normalization"].b = scaled
    return graph


def test_a_tensorflow_graph_gives_the_same_tensors(tmp_path):
    expected = inception.tensors()
    expected["Conv2d_1a_3x3.bn.bias"][:] = 0.25
    file = tmp_path / "classify_image_graph_def.pb"
    file.write_bytes(graph(expected, scaled=True).SerializeToString())
    found = read_graph(file)
    assert found.keys() == expected.keys()
    for name, x in found.items():
        np.testing.assert_array_equal(x, expected[name], err_msg=name)
    file.write_bytes(graph(expected, scaled=False).SerializeToString())
    found = read_graph(file)
    assert all((x == 1).all() for name, x in found.items() if name.endswith("bn.weight"))


def test_convolutions_have_the_names_of_tensorflow():
    for ours, theirs in {
        "Mixed_5b.branch5x5_2": "mixed/tower/conv_1",
        "Mixed_6a.branch3x3": "mixed_3/conv",
        "Mixed_6a.branch3x3dbl_3": "mixed_3/tower/conv_2",
        "Mixed_6d.branch1x1": "mixed_6/conv",  # the features of sFID
        "Mixed_6e.branch7x7dbl_5": "mixed_7/tower_1/conv_4",
        "Mixed_7a.branch7x7x3_4": "mixed_8/tower_1/conv_3",
        "Mixed_7c.branch3x3_2a": "mixed_10/tower/mixed/conv",
        "Mixed_7c.branch3x3dbl_3b": "mixed_10/tower_1/mixed/conv_1",
        "Mixed_7c.branch_pool": "mixed_10/tower_2/conv",
    }.items():
        assert tensorflow_name(ours) == theirs
    names = [link.official for link in inception_table() if link.official.endswith("conv.weight")]
    theirs = {tensorflow_name(name.removesuffix(".conv.weight")) for name in names}
    assert len(theirs) == len(names) == 94 and set(TF_STEM.values()) < theirs


def test_files_without_inception_are_refused(tmp_path):
    other = tmp_path / "other.pth"
    write_pth(other, {"features.0.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(InputError, match="not FID's Inception-v3: it has no Mixed_7c"):
        convert_inception(tmp_path / "out", other)
    text = tmp_path / "text.pb"
    text.write_text("this is no graph")
    with pytest.raises(InputError, match="not a TensorFlow graph, or it is cut short"):
        convert_inception(tmp_path / "out", text)
    text.write_bytes(b"")
    with pytest.raises(InputError, match="472 of its 472 constants are missing"):
        convert_inception(tmp_path / "out", text)
    with pytest.raises(InputError, match="does not exist"):
        convert_inception(tmp_path / "out", tmp_path / "absent.pb")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="no Inception weights; .*--inception=FILE"):
        load_inception(tmp_path)
    files.write_tensors(tmp_path / "inception.safetensors", {"fc_bias": np.zeros(3)}, {})
    with pytest.raises(InputError, match="is not FID's Inception-v3"):
        load_inception(tmp_path)


def test_tensors_outside_the_network_are_ignored():
    assert IGNORED.match("Mixed_5b.branch1x1.bn.num_batches_tracked")
    assert IGNORED.match("AuxLogits.conv0.conv.weight") and not IGNORED.match("fc.weight")


def test_converted_weights_equal_those_in_the_file():
    params, tensors = trees.paths(load_inception(inception.converted())), inception.tensors()
    for link in inception_table():
        ours = link.to_official([np.asarray(params[path]) for path in link.ours])
        np.testing.assert_array_equal(ours, tensors[link.official].reshape(ours.shape))
