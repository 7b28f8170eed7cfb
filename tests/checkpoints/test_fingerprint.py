import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varjax.checkpoints import fingerprint
from varjax.checkpoints.fingerprint import dtype_and_shape, fingerprints

RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, 6, 8)).astype(np.float32)
ARRAYS = {
    "float32": X,
    "bfloat16": jnp.asarray(X, jnp.bfloat16),
    "int32": RNG.integers(-9, 9, (5, 3), np.int32),
    "uint8": RNG.integers(0, 256, 11, np.uint8),
    "float8_e4m3fn": jnp.asarray(X[0], jnp.float8_e4m3fn),
    "bool": np.array([True, False, True]),
    "number": np.float32(3),
    "none": np.zeros((0, 4), np.float32),
}


def of(x):
    return fingerprints({"x": jnp.asarray(x)})["x"]


@pytest.fixture(params=["devices", "numpy"])
def either(request, monkeypatch):
    monkeypatch.setattr(fingerprint, "MIN_DEVICE_BYTES", 0 if request.param == "devices" else 2**40)


def test_devices_and_numpy_give_the_same_fingerprints(monkeypatch):
    arrays = {name: jnp.asarray(x) for name, x in ARRAYS.items()}
    by_numpy = fingerprints(arrays)
    monkeypatch.setattr(fingerprint, "MIN_DEVICE_BYTES", 0)
    assert fingerprints(arrays) == by_numpy
    # If this changed, every existing checkpoint would look damaged.
    assert of(np.arange(6, dtype=np.int32)) == "int32[6] e154d13c7c6dfc64"


def test_local_arrays_do_not_wait_for_other_processes(monkeypatch):
    """The first of several processes reads a tokenizer's weights while the others wait for it."""
    expected = of(X)
    monkeypatch.setattr(fingerprint, "gather_json", lambda parts: pytest.fail("waits for others"))
    assert of(X) == expected


@pytest.mark.parametrize("name", ARRAYS)
def test_each_bit_of_each_element_counts(name):
    x = np.array(ARRAYS[name])
    expected, bits = of(x), x.reshape(-1).view(np.uint8)
    for i in range(0, 8 * bits.size, 1 if bits.size < 50 else 41):
        flipped = bits.copy()
        flipped[i // 8] ^= 1 << i % 8
        if name == "bool" and i % 8:
            continue
        assert of(flipped.view(x.dtype).reshape(x.shape)) != expected


def test_fingerprints_depend_on_order_shape_and_dtype(either):
    assert of(X) == of(X.copy())
    others = [X[::-1], X[:, ::-1], X[:, :, ::-1], X.swapaxes(1, 2), X.reshape(6, 4, 8), X[:2]]
    others += [X.view(np.int32), np.zeros_like(X)]
    texts = {of(x) for x in (X, *others)}
    assert len(texts) == 1 + len(others)
    # Two flipped signs, which cancel in any sum of odd multiples of the bits.
    signs = X.copy()
    signs[0, 0, 0], signs[3, 5, 7] = -signs[0, 0, 0], -signs[3, 5, 7]
    assert of(signs) != of(X)


def spread(parts_of_axes, copies=1):
    """Imitates an array over several processes, each axis cut into parts, with copies of each."""
    cuts = []
    for length, parts in zip(X.shape, parts_of_axes, strict=True):
        step = length // parts
        whole = [slice(None)]
        cuts.append([slice(i, i + step) for i in range(0, length, step)] if parts > 1 else whole)
    shards = [
        types.SimpleNamespace(index=index, data=jnp.asarray(X[index]))
        for index in itertools.product(*cuts)
    ]
    about = {"shape": X.shape, "ndim": X.ndim, "dtype": X.dtype}
    about |= {"addressable_shards": copies * shards, "is_fully_addressable": False}
    return types.SimpleNamespace(**about)


@pytest.mark.parametrize("parts", [(1, 1, 1), (2, 1, 4), (4, 3, 2), (1, 6, 1)])
def test_fingerprints_do_not_depend_on_the_mesh(parts, either):
    assert fingerprints({"x": spread(parts)})["x"] == of(X)
    assert fingerprints({"x": spread(parts, copies=2)})["x"] == of(X)


def test_each_part_is_added_once_and_copies_must_be_equal(monkeypatch):
    x = spread((2, 1, 1))
    first, second = ({key: [int(n) for n in p]} for key, p in fingerprint._shard_sums(x).items())

    def gathered(*everyone):
        gather = lambda mine: [{"x": parts} for parts in everyone]  # noqa: E731
        monkeypatch.setattr(fingerprint, "gather_json", gather)
        return fingerprints({"x": x})["x"]

    for everyone in ([first, second], [first | second, second], [second, first, first]):
        assert gathered(*everyone) == OF_X
    ((start, (a, b)),) = second.items()
    assert gathered(first | second, {start: [a, b ^ 1]}) == ""


def test_only_written_copies_count_if_copies_differ():
    """Replicas may differ by rounding if a program is not deterministic; Orbax writes the first."""
    x = spread((2, 1, 1))
    others = [
        types.SimpleNamespace(index=shard.index, data=shard.data + 1, replica_id=1)
        for shard in x.addressable_shards
    ]
    for shard in x.addressable_shards:
        shard.replica_id = 0
    x.addressable_shards = [*others, *x.addressable_shards]
    assert fingerprints({"x": x}, written=True)["x"] == OF_X
    assert fingerprints({"x": x})["x"] != OF_X


OF_X = of(X)


def test_arrays_and_shape_structs_have_the_same_description():
    assert (
        dtype_and_shape(X)
        == dtype_and_shape(jax.ShapeDtypeStruct(X.shape, X.dtype))
        == "float32[4,6,8]"
    )
    assert fingerprints({}) == {}
