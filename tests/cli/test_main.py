"""Tests the command `varjax`, and the metadata and dependencies of its package."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import varjax
from tests.helpers.imports import imported_packages
from tests.helpers.paths import ROOT
from varjax.cli.main import COMMANDS, main

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "orbax": "orbax-checkpoint",
}


def names(requirements):
    """Returns the names of required packages, with underscores as in imports."""
    return {re.split(r"[\[<>=~!;]", line)[0].strip().replace("-", "_") for line in requirements}


def test_declared_dependencies_are_those_imported():
    extras = PROJECT["optional-dependencies"]
    optional = [extras[name] for name in ("demo", "digits", "hub", "plot", "tfds")]
    declared = names(sum(optional, PROJECT["dependencies"]))
    declared -= {"filelock"}  # JAX imports it for its cache
    files = [file for name in ("varjax", "configs") for file in (ROOT / name).rglob("*.py")]
    used = set().union(*(imported_packages(file.read_text()) for file in files))
    used -= sys.stdlib_module_names | {"", "varjax"}
    used -= {"exported_model"}  # next to run.py, in an exported folder
    used = {IMPORTED_AS.get(name, name).replace("-", "_") for name in used}
    assert used == declared


def test_requirements_and_constraints_cover_all_dependencies():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = {line.partition("#")[0].strip() for line in lines}
    assert set(PROJECT["dependencies"]) <= listed
    constrained = names((ROOT / "constraints.txt").read_text().splitlines())
    assert names(PROJECT["dependencies"]) <= constrained


def locked(file):
    """Returns the versions in a lock file by package, and checks that each has a hash."""
    entries = re.split(r"\n(?=\S)", file.read_text())
    assert all("--hash=sha256:" in entry for entry in entries)
    pins = [entry.split()[0].partition("==") for entry in entries]
    return {name.replace("-", "_").lower(): version for name, _, version in pins}


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_lock_files_pin_all_dependencies_to_tested_versions(python):
    versions = locked(ROOT / f"requirements/lock-{python}.txt")
    extras = PROJECT["optional-dependencies"]
    optional = [extras[name] for name in ("dev", "demo", "digits", "plot", "tfds")]
    needed = names(sum(optional, PROJECT["dependencies"])) - {"varjax"}  # dev includes other extras
    assert {name.lower() for name in needed} <= versions.keys() and len(versions) > 100
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        pin, _, marker = line.partition("; python_version ")
        sign, _, bound = marker.partition(" ")
        if line.startswith("#") or (marker and (sign == "<") == (python >= bound.strip('"'))):
            continue
        name, _, version = pin.partition("==")
        assert versions[name.replace("-", "_").lower()] == version, name
    assert locked(ROOT / "requirements/lock-build.txt").items() <= versions.items()


def test_ci_actions_are_pinned_to_commits():
    for file in (ROOT / ".github/workflows").iterdir():
        used = re.findall(r"uses: (\S+)", file.read_text())
        assert used and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) for action in used)


def test_help_has_a_line_for_each_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, (_, about) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(about)}$", out, re.MULTILINE)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"varjax {varjax.__version__}\n"


def test_windows_users_are_pointed_to_wsl():
    code = "import sys; sys.platform = 'win32'; import varjax"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: varjax does not run on Windows")
    assert "WSL" in done.stderr


@pytest.mark.parametrize("command", [["--help"], ["plot", "--help"], ["runs", "PATH"]])
def test_non_ascii_characters_are_escaped_for_an_ascii_terminal(tmp_path, command):
    run = tmp_path / "läufe"
    run.mkdir()
    (run / "data.json").write_text("{}")
    (run / "config.json").write_text('{"batch_size": 1}')
    command = [str(tmp_path) if word == "PATH" else word for word in command]
    done = subprocess.run(
        [sys.executable, "-m", "varjax", *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        encoding="ascii",
    )
    assert done.returncode == 0, done.stderr
    assert command[0] != "runs" or "l\\xe4ufe" in done.stdout
    assert command[0] == "plot" or "\\" in done.stdout


def test_an_unknown_command_prints_the_available_ones(capsys):
    assert main(["paint"]) == 2
    error = capsys.readouterr().err
    assert "no command 'paint'" in error and "sample" in error
    assert main([]) == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_command_has_usage_and_an_example(name, capsys):
    try:
        assert main([name, "--help"]) == 0
    except SystemExit as end:
        assert end.code == 0
    out = capsys.readouterr().out
    assert f"varjax {name}" in out
    assert re.search(
        rf"^(varjax {name}|python (train|sample)\.py|python -m) ?.+", out, re.MULTILINE
    )


def test_light_commands_do_not_import_jax():
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


def test_the_console_script_is_declared():
    assert PROJECT["scripts"] == {"varjax": "varjax.cli.main:main"}
    assert (pathlib.Path(varjax.__file__).parent / "py.typed").is_file()
