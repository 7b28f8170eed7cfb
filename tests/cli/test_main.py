"""The command `varjax`, and what its package declares."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import varjax
from tests.helpers.paths import ROOT
from varjax.cli.main import COMMANDS, main

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "orbax": "orbax-checkpoint",
}


def names(requirements):
    """The packages' names as imports spell them."""
    return {re.split(r"[\[<>=~!;]", line)[0].strip().replace("-", "_") for line in requirements}


def imports(file):
    """The top-level packages that a file imports, inside of functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0]


def test_everything_imported_is_declared():
    declared = names(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["hub"])
    declared -= {"filelock"}  # imported by JAX, for its cache
    used = {name for folder in ("varjax", "configs") for file in (ROOT / folder).rglob("*.py")
            for name in imports(file)} - sys.stdlib_module_names - {"varjax"}  # fmt: skip
    used = {IMPORTED_AS.get(name, name).replace("-", "_") for name in used}
    assert used == declared


def test_requirements_list_all_that_runs_with_the_same_versions():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = {line.partition("#")[0].strip() for line in lines}
    assert set(PROJECT["dependencies"]) <= listed
    constrained = names((ROOT / "constraints.txt").read_text().splitlines())
    assert names(PROJECT["dependencies"]) <= constrained


def test_help_has_a_line_for_each_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, (_, about) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(about)}$", out, re.MULTILINE)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"varjax {varjax.__version__}\n"


def test_an_unknown_command_is_told_which_there_are(capsys):
    assert main(["paint"]) == 2
    error = capsys.readouterr().err
    assert "no command 'paint'" in error and "sample" in error
    assert main([]) == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_help_with_usage_and_an_example(name, capsys):
    try:
        assert main([name, "--help"]) == 0
    except SystemExit as end:
        assert end.code == 0
    out = capsys.readouterr().out
    assert f"varjax {name}" in out
    assert re.search(
        rf"^(varjax {name}|python (train|sample)\.py|python -m) ?.+", out, re.MULTILINE
    )


def test_light_commands_do_without_jax():
    code = """
import sys
from varjax.cli.main import main
for command in (["--help"], ["prepare", "--help"], ["plot", "--help"]):
    try:
        main(command)
    except SystemExit:
        pass
assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_the_console_script_is_this_main():
    assert PROJECT["scripts"] == {"varjax": "varjax.cli.main:main"}
    assert (pathlib.Path(varjax.__file__).parent / "py.typed").is_file()
