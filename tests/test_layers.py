"""A module imports only from lower layers or its own folder."""

import ast
import pathlib

import varjax

LAYER = {
    "pyramid": 0,
    "resize": 0,
    "trees": 0,
    "files": 0,
    "tensors": 0,
    "settings": 0,
    "pictures": 0,
    "flops": 0,
    "hardware": 0,
    "nn": 1,
    "training": 1,
    "data": 1,
    "tokenizer": 2,
    "var": 3,
    "convert": 4,
    "plot": 3,
    "demo": 4,
    "benchmark": 4,
    "__init__": 5,
}
PACKAGE = pathlib.Path(varjax.__file__).parent


def imported(file: pathlib.Path):
    """The first name below `varjax` of everything a file imports, also inside of functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("varjax."))


def test_imports_only_go_down():
    files = list(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    for file in files:
        module = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for used in imported(file):
            assert (
                used == module or LAYER[used] < LAYER[module] or (LAYER[used] == LAYER[module] == 0)
            ), f"{file.name} of {module} imports {used}"
