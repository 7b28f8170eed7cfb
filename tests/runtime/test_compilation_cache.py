import os
import subprocess
import sys

import jax
import pytest

import varjax
from tests.helpers import runs
from tests.helpers.paths import ROOT
from varjax.runtime.compilation_cache import use_compilation_cache

PROGRAM = """
import jax
from varjax.runtime.compilation_cache import use_compilation_cache
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
use_compilation_cache()
jax.jit(lambda x: x + 1)(1.0)
print(jax.config.jax_compilation_cache_dir, jax.config.jax_compilation_cache_max_size)
"""


def run(**environment):
    settings = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | environment
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=settings, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_programs_are_cached_where_the_user_chooses(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    folder, most = run(VARJAX_CACHE=str(here))
    assert folder == str(here / "xla") and int(most) == 4 * 10**9
    assert list((here / "xla").glob("*-cache"))
    folder, _ = run(VARJAX_CACHE=str(here / "2"), JAX_COMPILATION_CACHE_DIR=str(there))
    assert folder == str(there) and not (here / "2").exists()
    folder, _ = run(VARJAX_CACHE=str(here / "3"), JAX_ENABLE_COMPILATION_CACHE="false")
    assert folder == "None" and not (here / "3").exists()
    (tmp_path / "file").touch()
    folder, _ = run(VARJAX_CACHE=str(tmp_path / "file"))
    assert folder == "None"


@pytest.fixture
def no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VARJAX_CACHE", str(tmp_path))
    names = "jax_compilation_cache_dir", "jax_compilation_cache_max_size"
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_loading_a_model_turns_the_cache_on(tmp_path, no_folder):
    varjax.load(runs.untrained_var())
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "xla")


def test_several_cpu_processes_do_not_use_the_cache(tmp_path, no_folder, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    use_compilation_cache()
    assert jax.config.values["jax_compilation_cache_dir"] is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    use_compilation_cache()
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "xla")
