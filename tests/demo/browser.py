"""Serves the page and opens it in Debian's Chromium, for tests."""

import base64
import contextlib
import io
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.helpers.paths import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
START_SECONDS = 120


def require_browser():
    """Skips tests where there is no browser."""
    pytest.importorskip("gradio", reason='needs Gradio: pip install ".[demo]"')
    pytest.importorskip("playwright", reason="needs Playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")


@contextlib.contextmanager
def served(folder, *flags):
    """Serves a page, and yields its address and the log file of the server's work."""
    log, output = folder / "log", folder / "output"
    log.touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [str(log), *flags, f"--port={port}"]
    with open(output, "w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.demo_server", *arguments],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(lambda: "open http" in output.read_text() or server.poll() is not None)
        assert server.poll() is None, output.read_text()
        yield f"http://127.0.0.1:{port}/", log
        assert server.poll() is None, output.read_text()
        assert "Traceback" not in output.read_text(), output.read_text()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)


@contextlib.contextmanager
def opened_browser():
    """Yields a Chromium that resolves no host names, so it can reach only this machine."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
        )
        yield browser
        browser.close()


def wait_for(condition, seconds=START_SECONDS):
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def shown_images(page, selector):
    """Returns the pixels of the images within an element."""
    urls = page.eval_on_selector_all(f"{selector} img", "all => all.map(x => x.src)")
    return [decoded(url) for url in urls]


def decoded(url):
    data = base64.b64decode(url.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)))
