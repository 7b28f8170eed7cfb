"""Compiled programs kept on the disk: the second start of a command compiles nothing again.

A training run that continues, and a sampler that is called again, need the programs that they had
before; to compile those of a large model takes minutes. A program that was read from the disk is
the one that was compiled, so results are equal to the bit.

    export VARJAX_CACHE=/fast/disk/varjax         # another place
    JAX_ENABLE_COMPILATION_CACHE=false varjax …   # without
"""

import contextlib
import os

import jax

from varjax.storage.cache_dir import cache_folder

MAX_BYTES = 4 * 10**9  # of all programs; those that were not used for the longest time go first


def use_compilation_cache() -> None:
    """Keeps programs that take a second or more to compile in <cache folder>/xla.

    To be called before the first program. The user's own choice stands: JAX_COMPILATION_CACHE_DIR
    names another folder, and JAX_ENABLE_COMPILATION_CACHE=false turns the cache off. Where the
    folder cannot be written, programs are compiled as ever.
    """
    values = jax.config.values
    if values["jax_compilation_cache_dir"] or not values["jax_enable_compilation_cache"]:
        return
    folder = cache_folder() / "xla"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
