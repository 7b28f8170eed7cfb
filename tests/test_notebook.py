"""Tests the notebook's code, cell by cell, on tiny runs and without Jupyter."""

import ast
import importlib.util
import io
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.helpers import runs
from tests.helpers.paths import ROOT
from varjax.sampling.pictures import ShownFilm

pytestmark = pytest.mark.slow

NOTEBOOK = ROOT / "notebooks" / "colab.ipynb"


def execute(source, names):
    """Runs a cell; returns the value of its last expression, which a notebook shows, or None."""
    *body, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        body, last = [*body, last], None
    exec(compile(ast.Module(body, []), NOTEBOOK.name, "exec"), names)
    return last and eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names)


def code_cells():
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    return ["".join(cell["source"]) for cell in cells]


@pytest.fixture(autouse=True)
def in_the_folder_of_the_notebook(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(NOTEBOOK.parent)


def test_the_cells_run_in_order_and_show_pictures(capsys):
    names, shown = {}, []
    for source in code_cells():
        for name, run in (("var_d16", runs.var()), ("mar_b", runs.mar())):
            source = source.replace(f'"{name}"', repr(str(run)))
        shown.append(execute(source, names))
    assert (names["var"].config["var"], names["mar"].config["mar"]) == (runs.VAR, runs.MAR)
    sizes = [picture.size for picture in shown if isinstance(picture, Image.Image)]
    assert sizes == [(260, 130), (325, 130), (520, 130), (520, 260)]
    (film,) = [picture for picture in shown if isinstance(picture, ShownFilm)]
    frames = Image.open(io.BytesIO(film.webp))
    assert (frames.n_frames, frames.size) == (3, (260, 130))
    assert not np.allclose(names["edited"][0], names["edited"][1])
    assert not np.allclose(*names["rows"])
    out = capsys.readouterr().out
    assert re.search(r"4x4 +\d+\.\d dB   -\d", out) and re.search(r"MAR: [\d.]+ images/s", out)
    assert "computes on" in out and "Runtime → Change runtime type" in out  # tests run on CPUs
    assert pathlib.Path.cwd() == ROOT and names["REPOSITORY"] == str(ROOT)


def test_without_network_the_notebook_uses_the_digits(monkeypatch, tmp_path, capsys):
    """If nothing can be downloaded, the notebook trains the digits, or uses finished runs."""
    commands = []

    def remember(command, check):
        commands.append(command[1:])

    load = next(source for source in code_cells() if "varjax.load(VAR_WEIGHTS)" in source)
    monkeypatch.setenv("VARJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    monkeypatch.setattr(subprocess, "run", remember)
    monkeypatch.chdir(tmp_path)
    pathlib.Path("runs").mkdir()
    pathlib.Path("runs/digits").symlink_to(runs.var())
    pathlib.Path("runs/digits_mar").symlink_to(runs.mar())
    names = {"sys": sys, "subprocess": subprocess}
    execute(load, names)
    assert (names["var"].config["var"], names["mar"].config["mar"]) == (runs.VAR, runs.MAR)
    configs = "digits_tokenizer", "digits", "digits_kl_tokenizer", "digits_mar"
    assert commands == [["-m", "varjax", "train", f"--config={name}"] for name in configs]
    assert "Continuing with small digits instead" in capsys.readouterr().out


def test_without_a_clone_the_notebook_asks_for_a_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssertionError, match="set REPOSITORY"):
        execute(code_cells()[0], {})
