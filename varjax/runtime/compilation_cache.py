"""Caches compiled programs on disk, so that the next start of a command need not compile them.

Compiling the programs of a large model takes minutes. A program from the disk is identical to the
one that was compiled, so results are bit-identical.

    export VARJAX_CACHE=/fast/disk/varjax         # use another folder
    JAX_ENABLE_COMPILATION_CACHE=false varjax …   # turn it off
"""

import contextlib
import os

import jax

from varjax.storage.cache_dir import cache_folder

MAX_BYTES = 4 * 10**9  # of all programs; the least recently used are removed first


def use_compilation_cache() -> None:
    """Keeps programs that take a second or more to compile in <cache folder>/xla.

    Call this before the first program is compiled. The user's own settings have priority:
    JAX_COMPILATION_CACHE_DIR and JAX_ENABLE_COMPILATION_CACHE=false. If the folder cannot be
    written, programs are compiled as usual, and so they are for several processes on CPUs.
    """
    values = jax.config.values
    if values["jax_compilation_cache_dir"] or not values["jax_enable_compilation_cache"]:
        return
    if _several_cpu_processes():
        return
    folder = cache_folder() / "xla"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)


def _several_cpu_processes() -> bool:
    """Returns whether this is one of several processes that compute on CPUs.

    There, JAX looks for a program under another key in each process, but only process 0 writes one.
    So process 0 would start at once, wait 30 s for the others, which compile, and then give up.
    """
    if not jax.distributed.is_initialized():  # the rest would start the devices too early
        return False
    return jax.process_count() > 1 and jax.default_backend() == "cpu"
