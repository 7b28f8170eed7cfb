"""Lists what Python code imports, for tests that restrict imports."""

import ast


def imported_modules(text):
    """Returns the modules that a file's text imports, like "a.b" or ".c", even in functions."""
    modules = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add("." * node.level + (node.module or ""))
    return modules


def imported_packages(text):
    """Returns the top-level packages that a file's text imports; "" for its own package."""
    return {module.partition(".")[0] for module in imported_modules(text)}
