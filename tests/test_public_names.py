"""Tests that public names are unique, so that a search finds one definition."""

import ast
import collections

from tests.test_layers import FILES

# Functions that each family defines for benchmarks (sampling/programs.py).
CONTRACT = {"sampling_programs", "training_task", "training_loss"}


def test_no_public_class_or_function_is_defined_twice():
    modules = collections.defaultdict(list)
    for module, file in FILES.items():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                modules[node.name].append(module)
    twice = {name: where for name, where in modules.items() if len(where) > 1}
    assert twice.keys() <= CONTRACT | {"main"}, twice
