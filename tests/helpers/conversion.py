"""Provides checks of `varjax convert` that the tests of all official weights share."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from varjax.convert.__main__ import main
from varjax.convert.pth.read import read_checkpoint


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *flags: str) -> str:
    """Runs the command, which must fail and leave no files in `tmp_path`.

    Returns:
        The single message that it printed.
    """
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    assert main([*flags, f"--out={tmp_path / 'refused'}"]) == 1
    out, err = capsys.readouterr()
    assert not out and err.count("varjax convert: ") == 1 and "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before
    return err


def assert_official_files(folder: Path, part: str, expected: Mapping[str, np.ndarray]) -> None:
    """Checks that both files written for PyTorch contain exactly these tensors, bit for bit."""
    for read in (
        read_checkpoint(folder / f"{part}.pth"),
        load_file(folder / f"{part}.safetensors"),
    ):
        assert read.keys() == expected.keys()
        for name, x in expected.items():
            assert (read[name].dtype, read[name].shape) == (x.dtype, x.shape), name
            assert np.array_equal(read[name], x), name
