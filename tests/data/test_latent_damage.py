"""Tests that damage to cached latents is detected when they are read."""

import numpy as np
import pytest

from varjax.data.latent_shards import CHECKSUM_NAME, LatentShard
from varjax.data.latents import CachedLatents, LatentTransform
from varjax.errors import DamagedFileError, InputError
from varjax.storage import files
from varjax.storage.image_files import BrokenImage

N, U = 4, 2
ABOUT = {
    "tokenizer_identity": {},
    "data": {},
    "classes": N,
    "image_shape": [8, 8, 1],
    "seed": 0,
    "latent_spec": {
        "mean_BhwZ": {"shape": [2, 2, 3], "dtype": "float16"},
        "tokens_BL": {"shape": [5], "dtype": "uint16"},
    },
    "images": {"train": N, "held_out": N},
    "augmentations": {"train": U, "held_out": U},
    "shards": {"train": 1, "held_out": 1},
}


def write(root):
    """Writes both splits, with image 2 broken, and returns their paths."""
    files.write_json(root / "latents.json", ABOUT)
    rng = np.random.default_rng(0)
    rows = {
        "mean_BhwZ": rng.standard_normal((N * U, 2, 2, 3)).astype(np.float32),
        "tokens_BL": rng.integers(0, 999, (N * U, 5), np.int32),
        "label_B": np.repeat(np.arange(N), U),
        "valid_B": np.repeat([True, True, False, True], U),
    }
    shards = LatentShard.all(root, ABOUT)
    for shard in shards:
        shard.write(rows)
    return [shard.path for shard in shards]


def read(root, split="train"):
    """Returns all augmentations of all images as training reads them; None for broken images."""
    data = CachedLatents(str(root))
    source, transform, found = data.source(split), LatentTransform(data.latent_spec), []
    for i in range(N):
        for epoch in range(U):
            try:
                example = transform.train(source[i], i, epoch, np.random.default_rng(0))
            except BrokenImage:
                example = None
            found.append(example)
    return found


def same(a, b):
    if a is None or b is None:
        return a is b
    return all(np.array_equal(a[name], b[name]) for name in a.keys() | b.keys())


def test_a_flipped_bit_is_detected_or_changes_nothing(tmp_path):
    path, _ = write(tmp_path)
    expected, content, detected = read(tmp_path), path.read_bytes(), 0
    for bit in range(0, 8 * len(content), 31):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = read(tmp_path)
        except InputError as error:
            assert path.name in str(error)
            detected += 1
            continue
        assert all(map(same, found, expected))
    assert detected > 0.5 * 8 * len(content) / 31


def test_checksums_are_compared_only_for_what_is_read(tmp_path):
    """So a folder of 40 GB need not be read before training starts."""
    path, _ = write(tmp_path)
    expected = read(tmp_path)
    content = bytearray(path.read_bytes())
    tokens = np.frombuffer(content, np.uint8)
    damaged = files.read_tensors(path, check=False)[0]["tokens_NUL"][3, 1].tobytes()
    content[tokens.tobytes().index(damaged)] ^= 1
    path.write_bytes(content)
    data = CachedLatents(str(tmp_path))
    source, transform = data.source("train"), LatentTransform(data.latent_spec)
    rng = np.random.default_rng(0)
    assert same(transform.train(source[3], 3, 0, rng), expected[6])
    with pytest.raises(DamagedFileError, match="train-00000.*is damaged: the checksum of image 3"):
        transform.train(source[3], 3, 1, rng)


def test_a_shard_replaced_by_another_one_is_detected(tmp_path):
    train, held_out = write(tmp_path)
    train.write_bytes(held_out.read_bytes())
    with pytest.raises(DamagedFileError):
        read(tmp_path)


def test_a_file_without_checksums_is_refused(tmp_path):
    train, _ = write(tmp_path)
    arrays = dict(files.read_tensors(train)[0])
    assert arrays.pop(CHECKSUM_NAME).shape == (N, U)
    files.write_tensors(train, {name: np.array(x) for name, x in arrays.items()}, {})
    with pytest.raises(InputError, match=f"{train.name}: checksum_NU is missing, .* make it again"):
        read(tmp_path)
