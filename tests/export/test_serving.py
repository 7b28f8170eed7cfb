"""Tests that the server in docs/serving.md draws varjax's images, if FastAPI is installed."""

import concurrent.futures
import io
import re
import sys

import numpy as np
import pytest
from PIL import Image

import varjax
from tests.helpers import runs
from tests.helpers.imports import imported_modules
from tests.helpers.paths import ROOT
from varjax.export.folder import export_model
from varjax.storage.image_files import to_uint8

PAGE = (ROOT / "docs" / "serving.md").read_text()
(SERVER,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_server_is_short_and_does_not_import_varjax():
    assert len([line for line in SERVER.splitlines() if line.strip()]) <= 40
    allowed = {"fastapi", "exported_model", "run"} | sys.stdlib_module_names
    assert imported_modules(SERVER) <= allowed


@pytest.mark.slow
def test_every_request_gets_its_image_and_bad_ones_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("fastapi", reason="FastAPI is not installed")
    client = pytest.importorskip("fastapi.testclient", reason="httpx is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    weights, sizes = runs.untrained_var(), (1, 8)
    export_model(weights, "exported", ("sample",), sizes, platforms=("cpu",))
    server = {"__name__": "server"}
    for name in ("run", "exported_model"):  # restored after the test
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    exec(SERVER, server)
    count = 40
    with (
        client.TestClient(server["app"]) as http,
        concurrent.futures.ThreadPoolExecutor(16) as threads,
    ):
        addresses = [f"/image?label={i % 10}&number={i}" for i in range(count)]
        answers = [*threads.map(http.get, addresses)]
        bad = ["?label=10", "?label=-1", "?label=x", "?number=1", f"?label=1&number={2**32}"]
        assert [http.get(f"/image{query}").status_code for query in bad] == [422] * len(bad)
    number_N = np.arange(count)
    images_NHWC = to_uint8(np.asarray(varjax.load(weights).sample(number_N % 10, index=number_N)))
    for answer, image_HWC in zip(answers, images_NHWC, strict=True):
        with Image.open(io.BytesIO(answer.content)) as picture:
            difference = np.asarray(picture)[..., None].astype(int) - image_HWC
        assert np.abs(difference).max() <= 1  # rounding may differ with the batch
