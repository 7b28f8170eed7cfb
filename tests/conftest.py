"""Strictness for all tests (no silent promotion of dtypes or ranks), and flags that save time."""

import gc
import os
import pathlib
import random
import shutil
import signal
import tempfile

import jax
import pytest

from tests.helpers import tiny
from varjax.storage import folders, read_errors
from varjax.training import loop

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests spend their time on compiling programs that run for milliseconds, so XLA optimizes little,
# generates the code of a program in one piece, fuses by its older emitters, and leaves large sums
# as they are instead of making trees of small ones, each with code of its own: half of the time. It
# reads the flags when the first array is made, and the processes that tests start inherit them. A
# flag that it does not know kills it, and newer releases no longer know the last two.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_disable_hlo_passes=tree_reduction_rewriter"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    * (jax.__version_info__ < (0, 11))
)


# Python looks for garbage after every 700 new objects, but tracing makes millions of objects that
# stay: with that setting, the search takes a tenth of the time.
gc.set_threshold(100_000)

# Tests that a shell starts in the background ignore Ctrl-C, and so would the processes that they
# start in order to interrupt them.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test's files are behind a network, which would have to be waited for.
folders.LISTING_SECONDS, read_errors.READ_PAUSES = 0.0, (0.0,)

MAX_PROGRAM_BYTES = 2 * 1024**3


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # of one process, or of the one that starts the others
        os.environ["VARJAX_TEST_RUNS"] = tempfile.mkdtemp(prefix="varjax_runs_")
        os.environ["VARJAX_CACHE"] = os.environ["VARJAX_TEST_RUNS"] + "/cache"
        os.environ["VARJAX_TEST_PROGRAMS"] = str(_folder_of_programs(config))
    # Many tests compile the same small programs, each through functions that it makes itself. JAX
    # knows them again by their text, whichever process compiled them first; processes that tests
    # start have the cache of a user instead, so that their file operations are a user's, too.
    jax.config.update("jax_compilation_cache_dir", os.environ["VARJAX_TEST_PROGRAMS"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _folder_of_programs(config):
    """Returns the folder of compiled programs, which the next sessions find there too."""
    if not hasattr(config, "cache"):  # pytest -p no:cacheprovider
        return pathlib.Path(os.environ["VARJAX_TEST_RUNS"]) / "programs"
    folder = config.cache.mkdir("programs")
    if sum(file.stat().st_size for file in folder.iterdir()) > MAX_PROGRAM_BYTES:
        shutil.rmtree(folder)  # most are programs of code that has changed since
    return folder


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop("VARJAX_TEST_RUNS"))


def pytest_addoption(parser):
    parser.addoption("--shuffle", type=int, metavar="SEED", help="another order of files and tests")


def pytest_collection_modifyitems(config, items):
    """Puts files with slow tests first, or shuffles if --shuffle is given.

    Last, a long file would keep one process busy while the others have nothing left to do.
    """
    if (seed := config.getoption("shuffle")) is not None:
        rng = random.Random(seed)
        files = {item.path: rng.random() for item in items}
        items.sort(key=lambda item: (files[item.path], rng.random()))
    else:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Runs each test in an empty folder, so that files with relative names do not remain."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Returns (directory, metrics) of a tiny, uninterrupted run, made once."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    metrics = loop.train(tiny.experiment(run_dir, keep_best="eval/loss", preview_every=20))
    return run_dir, metrics
