"""Sets up all tests: strict promotion of dtypes and ranks, fast compilation, and fixtures."""

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

# Tests spend their time on compiling programs that run for milliseconds. These flags halve this
# time: XLA optimizes little, generates each program's code in one piece, uses its older fusion
# emitters, and does not split large sums into trees of small ones, which need code each. XLA reads
# the flags when the first array is made, and processes started by tests inherit them. An unknown
# flag kills the process, and newer releases no longer know the last two.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_disable_hlo_passes=tree_reduction_rewriter"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    * (jax.__version_info__ < (0, 11))
)


# By default, Python collects garbage after every 700 new objects. Tracing makes millions of objects
# that are kept, so this would take a tenth of the time.
gc.set_threshold(100_000)

# Tests that a shell starts in the background ignore SIGINT. Processes that tests start and then
# interrupt would inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests use local files, so they need not wait for a network file system.
folders.LISTING_SECONDS, read_errors.READ_PAUSES = 0.0, (0.0,)

MAX_PROGRAM_BYTES = 2 * 1024**3


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # not in the workers of pytest-xdist
        os.environ["VARJAX_TEST_RUNS"] = tempfile.mkdtemp(prefix="varjax_runs_")
        os.environ["VARJAX_CACHE"] = os.environ["VARJAX_TEST_RUNS"] + "/cache"
        os.environ["VARJAX_TEST_PROGRAMS"] = str(_folder_of_programs(config))
    # Many tests compile the same small programs, each from different functions. JAX's cache
    # recognizes programs by their text, whichever process compiled them first. Processes started by
    # tests use VARJAX_CACHE instead, so that their file operations are those of a user's process.
    jax.config.update("jax_compilation_cache_dir", os.environ["VARJAX_TEST_PROGRAMS"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _folder_of_programs(config):
    """Returns the folder of compiled programs, which later sessions reuse."""
    if not hasattr(config, "cache"):  # pytest -p no:cacheprovider
        return pathlib.Path(os.environ["VARJAX_TEST_RUNS"]) / "programs"
    folder = config.cache.mkdir("programs")
    if sum(file.stat().st_size for file in folder.iterdir()) > MAX_PROGRAM_BYTES:
        shutil.rmtree(folder)  # most programs are of code that has changed since
    return folder


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop("VARJAX_TEST_RUNS"))


def pytest_addoption(parser):
    parser.addoption("--shuffle", type=int, metavar="SEED", help="another order of files and tests")


def pytest_collection_modifyitems(config, items):
    """Puts files with slow tests first, or shuffles if --shuffle is given.

    A slow file that starts last would keep one process busy while the others are idle.
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
    """Runs each test in an empty folder, so that files at relative paths do not remain."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Returns (directory, metrics) of a tiny, uninterrupted run, which is trained once."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    metrics = loop.train(tiny.experiment(run_dir, keep_best="eval/loss", preview_every=20))
    return run_dir, metrics
