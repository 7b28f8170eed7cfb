"""The notebook's code, cell after cell, on a tiny run; without Jupyter."""

import ast
import json
import pathlib

import numpy as np
from PIL import Image

from tests.helpers import runs

NOTEBOOK = pathlib.Path(__file__).parent.parent / "notebooks" / "colab.ipynb"


def execute(source, names):
    """Runs a cell; the value of the last line, which a notebook shows, or None."""
    *body, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        body, last = [*body, last], None
    exec(compile(ast.Module(body, []), NOTEBOOK.name, "exec"), names)
    return last and eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names)


def test_the_cells_run_in_order_and_show_pictures(capsys):
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    names, shown = {}, []
    for cell in cells:
        source = "".join(cell["source"])
        shown.append(execute(source.replace('"weights/d16"', repr(str(runs.var()))), names))
    assert names["model"].config["var"] == runs.VAR
    assert names["images"].shape == (8, 8, 8, 1)
    sizes = [picture.size for picture in shown if isinstance(picture, Image.Image)]
    assert sizes == [(260, 130), (260, 130), (260, 195), (325, 65), (260, 65)]
    assert not np.allclose(names["variations"][0], names["variations"][1])
    assert "4x4: -" in capsys.readouterr().out
