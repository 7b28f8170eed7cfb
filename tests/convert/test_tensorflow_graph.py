"""Tests reading TensorFlow graphs that tensorboardX's protobuf classes write."""

import numpy as np
import pytest
from tensorboardX.proto.graph_pb2 import GraphDef

from varjax.convert import tensorflow_graph
from varjax.convert.tensorflow_graph import TensorFlowGraph
from varjax.errors import InputError

NUMBERS = np.arange(300, dtype=np.float32).reshape(2, 150)


@pytest.fixture
def graph():
    """Returns a graph with constants of each kind, and a node with flags."""
    graph = GraphDef()
    for name, dtype in {"content": 1, "list": 1, "one": 1, "scalar": 1, "integers": 3}.items():
        tensor = graph.node.add(name=name, op="Const").attr["value"].tensor
        tensor.dtype = dtype
        for size in () if name == "scalar" else NUMBERS.shape:
            tensor.tensor_shape.dim.add(size=size)
        if name == "content":
            tensor.tensor_content = NUMBERS.tobytes()
        else:
            tensor.float_val.extend(NUMBERS.ravel() if name == "list" else [2.5])
    node = graph.node.add(name="norm", op="BatchNorm", input=["content", "list"])
    node.attr["yes"].b, node.attr["no"].b, node.attr["other"].i = True, False, 3
    return graph


def read(path):
    found = TensorFlowGraph(path)
    return {node.name: found.constant(node) for node in found.nodes() if node.operation == "Const"}


def test_constants_and_flags_are_read(graph, tmp_path):
    path = tmp_path / "graph.pb"
    path.write_bytes(graph.SerializeToString())
    constants = read(path)
    assert list(constants) == ["content", "list", "one", "scalar", "integers"]
    np.testing.assert_array_equal(constants["content"], NUMBERS)
    np.testing.assert_array_equal(constants["list"], NUMBERS)
    np.testing.assert_array_equal(constants["one"], np.full((2, 150), 2.5))
    assert constants["scalar"] == 2.5 and constants["scalar"].shape == ()
    assert constants["integers"] is None
    found = TensorFlowGraph(path)
    (node,) = (node for node in found.nodes() if node.name == "norm")
    assert [found.flag(node, name) for name in ("yes", "no", "other", "none")] == [1, 0, 0, 0]
    path.write_bytes(b"")
    assert read(path) == {}


def test_damaged_and_long_files_are_refused(graph, tmp_path, monkeypatch):
    path = tmp_path / "graph.pb"
    whole = graph.SerializeToString()
    for end in (1, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match="not a TensorFlow graph, or it is cut short"):
            read(path)
    del graph.node[0].attr["value"].tensor.tensor_shape.dim[1]
    path.write_bytes(graph.SerializeToString())
    with pytest.raises(InputError, match="'content' has 300 numbers for .2,."):
        read(path)
    path.write_bytes(whole)
    monkeypatch.setattr(tensorflow_graph, "MAX_FIELDS", 50)
    with pytest.raises(InputError, match="more than 50 fields"):
        read(path)
