"""Tests that optional packages may be missing, and that errors name the extra to install."""

import ast
import subprocess
import sys
import tomllib

import numpy as np
import pytest

from tests.helpers import runs
from tests.helpers.paths import ROOT
from tests.test_layers import FILES
from varjax.analysis.pyplot import load_pyplot
from varjax.cli import prepare
from varjax.data.sources import TFDS, Digits
from varjax.data.sources.photos import photographs
from varjax.errors import InputError
from varjax.metrics.classifier import load_classifier
from varjax.storage import image_io

EXTRAS = {
    "sklearn": "digits", "matplotlib": "plot", "tensorflow_datasets": "tfds", "array_record": "tfds"
}  # fmt: skip
BROUGHT = "pyarrow", "joblib", "psutil", "requests"  # dependencies of these packages only


def test_pyproject_has_the_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core, extras = project["dependencies"], project["optional-dependencies"]
    names = {"sklearn": "scikit-learn", "tensorflow_datasets": "tensorflow-datasets"}
    for module, extra in EXTRAS.items():
        package = names.get(module, module)
        assert not any(text.startswith(package) for text in core)
        assert any(text.startswith(package) for text in extras[extra])
    needed = sorted({*EXTRAS.values(), "demo"})  # varjax/demo imports Gradio
    assert f"varjax[{','.join(needed)}]" in extras["dev"]


def test_optional_packages_are_not_imported_at_module_level():
    for name, file in FILES.items():
        for node in ast.parse(file.read_text()).body:
            words = (
                ast.unparse(node).split() if isinstance(node, ast.Import | ast.ImportFrom) else []
            )
            assert not words or words[1].partition(".")[0] not in EXTRAS, name


@pytest.fixture
def missing(monkeypatch):
    """Returns a function that makes a package and its submodules unavailable."""

    def forget(package):
        below = [name for name in sys.modules if name.startswith(f"{package}.")]
        for name in (package, *below):
            monkeypatch.setitem(sys.modules, name, None)

    return forget


@pytest.mark.parametrize(
    ("package", "action"),
    [
        ("sklearn", lambda folder: Digits().source("train")),
        ("sklearn", lambda folder: photographs.__wrapped__()),
        ("sklearn", lambda folder: load_classifier("digits")),
        ("matplotlib", lambda folder: load_pyplot()),
        ("tensorflow_datasets", lambda folder: TFDS(str(folder)).class_names),
        ("tensorflow_datasets", lambda folder: prepare.prepare(str(folder), str(folder / "out"))),
    ],
)
def test_a_missing_package_error_names_its_extra(package, action, missing, tmp_path):
    missing(package)
    with pytest.raises(InputError) as caught:
        action(tmp_path)
    pip = {"sklearn": "scikit-learn", "tensorflow_datasets": "tensorflow-datasets"}
    assert f"needs {pip.get(package, package)} (" in str(caught.value)
    assert f'or pip install ".[{EXTRAS[package]}]"' in str(caught.value)
    assert not list(tmp_path.iterdir())


WITHOUT = """
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
for name in {modules}:
    importlib.import_module(name)
from varjax.cli.main import main
weights, image, out = sys.argv[1:]
assert main(["sample", f"--weights={{weights}}", "--labels=3", f"--out={{out}}/a.png"]) == 0
assert main(["edit", f"--weights={{weights}}", f"--image={{image}}", "--box=0,0,0.5,1", "--count=1",
             f"--out={{out}}/b.png"]) == 0
assert main(["convert", "--to_torch", f"--weights={{weights}}", f"--out={{out}}/torch"]) == 0
assert main(["info", f"{{out}}/a.png"]) == 0
"""


@pytest.mark.slow
def test_sampling_editing_and_converting_need_no_extras(tmp_path):
    image_io.write_png(tmp_path / "image.png", np.zeros((8, 8, 1), np.uint8))
    modules = [name for name in FILES if name != "varjax.__main__"]
    script = WITHOUT.format(refused={*EXTRAS, *BROUGHT}, modules=modules)
    arguments = [str(runs.untrained_var()), str(tmp_path / "image.png"), str(tmp_path)]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, cwd=ROOT, timeout=280)
    assert (tmp_path / "a.png").exists() and (tmp_path / "b.png").exists()
