import dataclasses
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

from tests.helpers import fake_data
from tests.helpers.fake_data import FakeImages
from tests.helpers.paths import ROOT
from varjax.data.loader import make_loader
from varjax.data.sources.digits import Digits
from varjax.data.stream import ArraySource
from varjax.data.workers import ReadOptions
from varjax.errors import StorageError

DATA = Digits(shift=1.0, rotate=10.0, zoom=0.1)
WORKERS = ReadOptions(workers=2)


def joined(batches):
    return jax.tree.map(lambda *x: np.concatenate(x), *batches)


def take(loader, count, position=0):
    return list(itertools.islice(loader.train(position), count))


def test_a_batch_depends_only_on_seed_and_number():
    loader = make_loader(DATA, 16, seed=3)
    batches = take(loader, 7)
    resumed = take(make_loader(DATA, 16, seed=3), 2, position=5)
    chex.assert_trees_all_equal(batches[5], resumed[0])
    chex.assert_trees_all_equal(batches[6], resumed[1])
    chex.assert_trees_all_equal(batches[6], loader.train_batch(6))
    assert np.any(batches[5]["label_B"] != make_loader(DATA, 16, seed=4).train_batch(5)["label_B"])


BROKEN = FakeImages(size=1000, broken=(3, 500, 501, 502, 999))


@pytest.mark.parametrize("data", [DATA, BROKEN], ids=["digits", "broken"])
@pytest.mark.parametrize("processes", [2, 8])
def test_processes_together_make_the_same_batches(data, processes):
    whole, share = make_loader(data, 16), 16 // processes
    parts = [make_loader(data, 16, rows=range(i, i + share)) for i in range(0, 16, share)]
    streams = [part.train(60) for part in parts]
    for batch in itertools.islice(whole.train(60), 5):
        chex.assert_trees_all_equal(joined([next(stream) for stream in streams]), batch)
    last = (len(whole.held_out_source) - 1) // 16
    chex.assert_trees_all_equal(
        joined([part.held_out_batch(last) for part in parts]), whole.held_out_batch(last)
    )


def test_every_epoch_has_every_image_once_in_a_new_order():
    loader = make_loader(Digits(), 6)  # does not divide the 1,442 images
    images = np.concatenate([b["image_BHWC"] for b in take(loader, 2 * 1442 // 6 + 1)])
    first, second = images[:1442], images[1442:2884]
    whole = loader.train_source.images_NHWC  # type: ignore[attr-defined]
    ordered = [np.sort([image.tobytes() for image in part]) for part in (whole, first, second)]
    assert all(np.array_equal(ordered[0], part) for part in ordered[1:])
    assert np.any(first != second)


def test_augmentation_varies_from_epoch_to_epoch():
    seen = [
        {image.tobytes() for image in b["image_BHWC"]} for b in take(make_loader(DATA, 1442), 2)
    ]
    assert len(seen[0] & seen[1]) < 10


def test_held_out_images_are_read_once_and_padding_is_marked():
    batches = list(make_loader(DATA, 100).held_out())
    assert [batch["valid_B"].sum() for batch in batches] == [100, 100, 100, 55]
    assert all(batch["image_BHWC"].shape == (100, 8, 8, 1) for batch in batches)
    images = np.concatenate([batch["image_BHWC"][batch["valid_B"]] for batch in batches])
    np.testing.assert_array_equal(images, Digits().source("held_out").images_NHWC)


def test_a_process_reads_only_its_own_rows():
    whole = make_loader(FakeImages(size=100), 16).train_batch(7)
    data, rows = FakeImages(size=100), [1, 4, 5, 12]
    batch = make_loader(data, 16, rows=rows).train_batch(7)
    chex.assert_trees_all_equal(batch, {name: x[rows] for name, x in whole.items()})
    assert len(fake_data.reads_of(data)) == len(rows)


@pytest.mark.parametrize("rows", [range(0), range(4, 7), range(-1, 3), range(4, 0, -1), [2, 2]])
def test_rows_outside_of_the_batch_are_refused(rows):
    with pytest.raises(ValueError, match=r"rows is .* in range\(0, 6\)"):
        make_loader(DATA, 6, rows=rows)


def test_at_most_three_batches_are_in_memory():
    data = FakeImages(size=1000)
    loader = make_loader(data, 50)
    stream = loader.train()
    for number in range(1, 4):
        next(stream)
        while len(fake_data.reads_of(data)) < 50 * (number + 2):
            time.sleep(0.01)
        time.sleep(0.05)  # long enough to read a thousand more
        assert len(fake_data.reads_of(data)) == 50 * (number + 2)
    stream.close()
    next(loader.held_out())
    assert len(fake_data.reads_of(data)) <= 50 * 8


def test_a_broken_image_is_replaced_by_the_next_one_of_its_epoch(capsys):
    whole = np.concatenate([b["image_BHWC"] for b in take(make_loader(FakeImages(1000), 100), 20)])
    order = fake_data.number_of(whole[:1000])
    broken = tuple(order[[0, 400, 401, 999]].tolist())  # the last one is followed by the first
    found = np.concatenate(
        [b["image_BHWC"] for b in take(make_loader(FakeImages(1000, broken), 100), 20)]
    )
    for epoch in (slice(0, 1000), slice(1000, 2000)):
        good_N = ~np.isin(fake_data.number_of(whole[epoch]), broken)
        for place in range(1000):
            there = next(p % 1000 for p in range(place, 2000) if good_N[p % 1000])
            np.testing.assert_array_equal(found[epoch][place], whole[epoch][there])
    said = capsys.readouterr().err
    assert said.count("skipped") == 4
    for number in broken:
        assert f"skipped: image_{number}.jpg cannot be read as an image: it is cut off" in said


def test_broken_held_out_images_are_marked():
    batches = list(make_loader(FakeImages(250, (7, 249)), 100).held_out())
    valid_B = np.concatenate([b["valid_B"] for b in batches])
    assert np.flatnonzero(~valid_B).tolist() == [7, *range(249, 300)]
    numbers = fake_data.number_of(np.concatenate([b["image_BHWC"] for b in batches])[valid_B])
    assert numbers.tolist() == [i for i in range(250) if i not in (7, 249)]


def test_one_percent_of_a_split_may_be_broken_even_within_one_class():
    """Held-out images are read class by class, and all broken ones may be in one class."""
    data = FakeImages(2000, tuple(range(30, 50)))
    take(make_loader(data, 100), 20)
    assert len(list(make_loader(data, 100).held_out())) == 20
    worse = FakeImages(2000, tuple(range(15)))
    with pytest.raises(ValueError, match="15 of the 25 images read so far are broken"):
        list(make_loader(worse, 25).held_out())


@pytest.mark.parametrize(
    ("data", "batches", "message"),
    [
        (FakeImages(1000, tuple(range(0, 1000, 50))), 9, "11 of the .* are broken; allowed is 1%"),
        (FakeImages(500, (1, 2, 3, 4, 5, 6)), 5, "6 of the .*(?s:.*)image_"),
        (FakeImages(20, (13,)), 1, "1 of the 1. images read so far"),
        (FakeImages(10_000, tuple(range(10_000))), 1, "100 images in a row are broken; .*image_"),
        (FakeImages(3, (0, 1, 2)), 1, "3 images in a row are broken"),
    ],
)
def test_more_than_one_percent_of_broken_images_stop_the_run(data, batches, message):
    with pytest.raises(ValueError, match=message):
        take(make_loader(data, 100 if data.size > 20 else 18), batches)
    if data.size > 20:
        take(make_loader(dataclasses.replace(data, broken=data.broken[:5]), 100), 12)


@pytest.fixture(scope="module")
def with_workers():
    return make_loader(dataclasses.replace(BROKEN, reading=WORKERS), 32)


def test_worker_processes_make_the_same_batches(with_workers, capsys):
    found = take(with_workers, 33)
    assert not fake_data.reads_of(with_workers.data)
    assert capsys.readouterr().err.count("skipped") == 5
    for a, b in zip(take(make_loader(BROKEN, 32), 33), found, strict=True):
        chex.assert_trees_all_equal(a, b)
    chex.assert_trees_all_equal(
        make_loader(BROKEN, 32).held_out_batch(31), with_workers.held_out_batch(31)
    )


def test_workers_ignore_signals_to_the_process_group(with_workers):
    with_workers.train_batch(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        for process in multiprocessing.active_children():
            os.kill(process.pid, number)
    with_workers.train_batch(1)


def test_a_killed_worker_raises_an_error_instead_of_a_hang():
    others = set(multiprocessing.active_children())  # the fixture's workers, which other tests need
    loader = make_loader(dataclasses.replace(BROKEN, reading=WORKERS), 32)
    next(loader.train())
    for process in set(multiprocessing.active_children()) - others:
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=r"died \(exit code -9; .* fewer workers"):
        take(loader, 10)


def test_errors_while_reading_reach_the_caller(tmp_path):
    for reading in (ReadOptions(threads=2), ReadOptions(workers=1)):
        with pytest.raises(ZeroDivisionError, match="image 5"):
            take(make_loader(FakeImages(10, bug_at=5, reading=reading), 4), 5)

        with pytest.raises(StorageError) as caught:
            take(make_loader(FakeImages(10, fails_at=5, reading=reading), 4), 5)
        assert str(caught.value) == "image 5 cannot be read now"

    class Local(FakeImages):
        pass

    with pytest.raises(ValueError, match="cannot be sent to worker processes .*Local"):
        make_loader(Local(reading=WORKERS), 4).train_batch(0)
    with pytest.raises(ValueError, match="reading.workers is -1"):
        ReadOptions(workers=-1)


CHILD = """
import os, sys, itertools
from tests.helpers.fake_data import FakeImages
from varjax.data.loader import make_loader
from varjax.data.stream import ArraySource
from varjax.data.workers import ReadOptions
if __name__ == "__main__":
    stream = make_loader(FakeImages(reading=ReadOptions(workers=1)), 8).train()
    next(stream)
    print("ready", flush=True)
    {end}
"""


@pytest.mark.parametrize("end", ["sys.exit(3)", "os.kill(os.getpid(), 9)"])
def test_workers_end_with_the_main_process(tmp_path, end):
    """The process still holds a reference to the stream when it ends."""
    (tmp_path / "child.py").write_text(CHILD.format(end=end))
    begin = time.monotonic()
    process = subprocess.run(
        [sys.executable, "child.py"],
        stdout=subprocess.PIPE,  # workers inherit it, so `run` waits until they have ended
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert process.stdout == b"ready\n" and process.returncode in (3, -9)
    assert time.monotonic() - begin < 60


class Unaugmented(FakeImages):
    """Images that are not augmented, with values up to size - 1."""

    def augment(self, image_HWC, view, rng):
        return image_HWC


@pytest.mark.parametrize(("size", "times"), [(26, 1), (27, 0)])
def test_images_in_less_than_a_tenth_of_the_range_cause_one_warning(size, times, capsys):
    loader = make_loader(Unaugmented(size), 16)
    for _ in range(2):
        take(loader, 8)
    said = capsys.readouterr().err
    assert said.count("the first 64 images only use values from 0 to 25 of 0 … 255") == times


@pytest.mark.parametrize("batch_size", [0, -1, 2**20 + 1, 5_000_000_000])
def test_batch_sizes_out_of_range_are_refused(batch_size):
    with pytest.raises(
        ValueError, match="batch_size is .*, but must be at (least 1|most 1,048,576)"
    ):
        make_loader(FakeImages(4), batch_size)


class SortedImages(FakeImages):
    """50 images of each class, class by class."""

    def source(self, split):
        return ArraySource(np.zeros((500, *self.image_shape), np.uint8), np.arange(500) // 50)


def test_a_limit_on_held_out_images_keeps_classes_balanced():
    def loader(limit, rows=None):
        return dataclasses.replace(make_loader(SortedImages(), 16, 0, rows), held_out_images=limit)

    batches = joined(loader(40).held_out())
    labels = batches["label_B"][batches["valid_B"]]
    np.testing.assert_array_equal(np.bincount(labels), 4)
    assert len(set(labels[:8])) >= 7  # previews show the first images
    spread = loader(0).held_out_spread(8)
    assert spread["valid_B"].tolist() == [True] * 8 + [False] * 8
    assert len(set(spread["label_B"][:8])) >= 7
    for rows in (range(4), range(4, 16)):
        part = loader(0, rows).held_out_spread(8)
        chex.assert_trees_all_equal(part, {name: x[rows] for name, x in spread.items()})
    whole = joined(loader(0).held_out())
    chex.assert_trees_all_equal(whole, joined(loader(1000).held_out()))
    np.testing.assert_array_equal(whole["label_B"][whole["valid_B"]], np.arange(500) // 50)
    parts = [loader(40, range(4)).held_out(), loader(40, range(4, 16)).held_out()]
    for batch, *rows in zip(loader(40).held_out(), *parts, strict=True):
        chex.assert_trees_all_equal(joined(rows), batch)
