"""Tests that modules import only from lower layers or their own folder, without cycles."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

import varjax
from tests.helpers.paths import ROOT

LAYER = {
    "errors": 0,
    "trees": 1,
    "storage": 2,
    "config": 3,
    "runtime": 3,
    "checkpoints": 4,
    "nn": 4,
    "data": 4,
    "metrics": 5,
    "training": 6,
    "tokenizers": 7,
    "sampling": 7,
    "mar": 8,
    "var": 8,
    "convert": 9,
    "models": 10,
    "analysis": 10,
    "export": 11,
    "weight_files": 11,
    "benchmark": 11,
    "evaluation": 11,
    "cli": 11,
    "demo": 12,
    "api": 12,
    "__init__": 13,
    "__main__": 13,  # of the package, or of a folder that is a command
}
FOUNDATIONS = {"errors", "trees", "storage", "config", "runtime", "checkpoints"}
PACKAGE = pathlib.Path(varjax.__file__).parent
FILES = {
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
    for file in PACKAGE.rglob("*.py")
}


def layer(name: str) -> int:
    return LAYER["__main__" if name.endswith(".__main__") else (name.split(".") + ["__init__"])[1]]


def imported(file: pathlib.Path) -> set[str]:
    """Returns the varjax modules that a file imports, also in functions or by import_module."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            names += imported_by_name(node.args[0])
    modules = {name if name in FILES else name.rpartition(".")[0] for name in names}
    return {name for name in modules if name.startswith("varjax.")}


def imported_by_name(argument: ast.expr) -> list[str]:
    """Returns the modules that a literal or f-string argument of `import_module` may name."""
    if isinstance(argument, ast.Constant):
        return [str(argument.value)]
    if not isinstance(argument, ast.JoinedStr):
        return []  # from a table of commands
    parts = [re.escape(p.value) if isinstance(p, ast.Constant) else ".+" for p in argument.values]
    return [name for name in FILES if re.fullmatch("".join(parts), name)]


def test_imports_by_name_are_found(tmp_path):
    file = tmp_path / "file.py"
    file.write_text(
        "def f():\n    import_module('varjax.trees')\n    importlib.import_module(f'varjax.m{x}s')"
    )
    assert imported(file) == {"varjax.trees", "varjax.models"} | {
        name for name in FILES if re.fullmatch("varjax[.]m.+s", name)
    }


def test_every_folder_has_a_layer():
    assert {name.split(".")[1] for name in FILES if "." in name} == LAYER.keys() - {"__init__"}


def test_contributing_lists_the_same_layers():
    section = (ROOT / "CONTRIBUTING.md").read_text().split("\n## Layers\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", section, re.M)
    names = [(name, int(layer)) for layer, cell in rows for name in re.findall(r"`(\w+)/?`", cell)]
    assert sorted(names) == sorted(LAYER.items())


def test_imports_only_go_down():
    assert len(FILES) > 80
    for name, file in FILES.items():
        for used in imported(file):
            same_folder = name.split(".")[1:2] == used.split(".")[1:2]
            assert same_folder or layer(used) < layer(name), f"{name} imports {used}"


def test_imports_have_no_cycles():
    graph = {name: imported(file) - {name} for name, file in FILES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


@pytest.mark.parametrize("family", ["var", "mar"])
def test_only_the_family_table_api_and_name_map_import_a_family(family):
    """docs/add_a_family.md lists these modules; all others must not depend on a family."""
    own = f"varjax.{family}."
    users = {name for name, file in FILES.items() if any(m.startswith(own) for m in imported(file))}
    others = {name for name in users if not name.startswith(own)}
    assert others == {"varjax.models", "varjax.api", f"varjax.convert.name_maps.{family}"}


def imported_by(statement: str) -> set[str]:
    """Returns the varjax modules above the foundations that a statement imports."""
    script = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    used = {name for name in done.stdout.split() if name.startswith("varjax.")}
    assert used, done.stderr
    files = {name for name in used if FILES[name].name != "__init__.py"}
    return {name for name in files if name.split(".")[1] not in FOUNDATIONS}


def test_inference_imports_no_training():
    files = imported_by("import varjax; varjax.load")
    assert {"varjax.var.pipeline", "varjax.mar.pipeline"} <= files
    assert not {name for name in files if name.split(".")[1] in ("training", "data", "convert")}


def test_inference_imports_few_modules():
    """Checks VAR; another family or tokenizer adds a few modules."""
    files = imported_by("import varjax.checkpoints.weights, varjax.var.pipeline")
    assert len(files | {"varjax.models"}) <= 24, sorted(files)
