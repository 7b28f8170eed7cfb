"""Tests the page in a real browser: drawing, links, cancelling, and no outside requests."""

import io
import socket
import urllib.parse
import urllib.request
import zipfile

import numpy as np
import pytest
from PIL import Image

import varjax
from tests.demo import browser
from tests.helpers import runs
from tests.helpers.demo_server import slow_file
from varjax.storage import image_io

pytestmark = pytest.mark.slow
DRAWN = "#download:visible"


@pytest.fixture(scope="module")
def weights():
    return str(runs.untrained_var())


@pytest.fixture(scope="module")
def chromium():
    browser.require_browser()
    with browser.opened_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def server(weights, chromium, tmp_path_factory):
    also = f"--also={runs.mar()}"
    with browser.served(tmp_path_factory.mktemp("demo"), f"--weights={weights}", also) as served:
        yield served


@pytest.fixture
def open_page(server, chromium):
    """Returns a function that opens a link; checks the page's requests and errors at the end."""
    address, log = server
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))

    def opened(query=""):
        page.goto(address + query)
        page.wait_for_selector("#draw")
        return page

    yield opened
    assert requests and not [x for x in requests if not x.startswith((address, "data:", "blob:"))]
    assert not errors
    assert "elsewhere" not in log.read_text()
    page.close()


def expected(weights, *arguments, **options):
    images_BHWC = varjax.load(weights).sample(*arguments, **options)
    return image_io.to_uint8(np.asarray(images_BHWC))[..., 0]


def test_a_link_draws_images_bit_identical_to_python(open_page, weights):
    page = open_page("?labels=3,none&count=1&seed=7&guidance=2.0&top_p=0.5")
    page.wait_for_selector(DRAWN, timeout=180_000)
    given = {"guidance": 2.0, "top_p": 0.5}
    assert np.array_equal(
        browser.shown_images(page, "#pictures"), expected(weights, [3, 10], 7, **given)
    )
    query = page.url.partition("?")[2]
    assert query == "labels=3,none&count=1&seed=7&guidance=2.0&top_p=0.5"
    before = browser.shown_images(page, "#pictures")
    page.reload()
    page.wait_for_selector(DRAWN, timeout=180_000)
    assert np.array_equal(browser.shown_images(page, "#pictures"), before)


def test_a_drawing_has_steps_and_files(open_page, weights):
    page = open_page()
    page.locator("#seed input").fill("9")
    page.click("#draw")
    page.wait_for_selector(DRAWN, timeout=180_000)
    finished = browser.shown_images(page, "#pictures")
    labels = np.repeat([0, 3, 6, 9], 2)
    images_SBHWC = varjax.load(weights).sample(labels, 9, every_step=True)
    images_SBHW = image_io.to_uint8(np.asarray(images_SBHWC))[..., 0]
    assert np.array_equal(finished, images_SBHW[-1])
    with page.expect_download() as download:
        page.click("#download")
    with zipfile.ZipFile(download.value.path()) as archive:
        files = [Image.open(io.BytesIO(archive.read(name))) for name in archive.namelist()]
    assert np.array_equal([np.asarray(file) for file in files], finished)
    assert files[0].info["Command"].startswith("varjax sample")
    first = page.locator("#step input[type=number]")
    first.fill("1")
    first.press("Enter")
    page.wait_for_function("!document.querySelector('#pictures a')")
    assert np.array_equal(browser.shown_images(page, "#pictures"), images_SBHW[0])


def test_the_second_model_draws_too(open_page):
    page = open_page("?model=1&labels=3,none&count=1&seed=7")
    page.wait_for_selector(DRAWN, timeout=180_000)
    images = browser.shown_images(page, "#pictures")
    assert np.array_equal(images, expected(str(runs.mar()), [3, 10], 7))


def test_compare_draws_both_models_with_one_seed(open_page, weights):
    page = open_page()
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-count input[type=number]").fill("1")
    page.click("#compare-draw")
    page.wait_for_selector("text=after % of the scales or steps", timeout=180_000)
    for side, location in (("#left", weights), ("#right", str(runs.mar()))):
        images = browser.shown_images(page, side)
        assert np.array_equal(images, expected(location, [0, 3], 0))


def test_painted_parts_of_a_drawn_picture_are_redrawn(open_page):
    page = open_page("?labels=3,none&count=1&seed=7")
    page.wait_for_selector(DRAWN, timeout=180_000)
    drawn = browser.shown_images(page, "#pictures")[0]
    page.get_by_role("tab", name="Edit").click()
    page.click("#edit")
    page.wait_for_selector("text=there is no picture yet", timeout=20_000)
    page.click("#edit-take")
    page.wait_for_selector("text=Drawn picture 1.", timeout=20_000)
    page.wait_for_timeout(1000)  # until the editor has drawn the picture on its canvas
    box = page.locator("#editor canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y - 60)
    page.mouse.down()
    for row in range(-60, 61, 30):  # few moves: without a GPU, the browser draws each slowly
        page.mouse.move(x - 60, y + row, steps=2)
        page.mouse.move(x + 60, y + row, steps=2)
    page.mouse.up()
    page.click("#edit")
    page.wait_for_selector("#results a", timeout=180_000)
    original, red = browser.shown_images(page, "#before")
    assert np.array_equal(original[..., 0], drawn)
    redrawn_HW = (red != original).any(axis=-1)
    assert 0 < redrawn_HW.sum() < 64
    results = browser.shown_images(page, "#results")
    assert len(results) == 4 and not np.array_equal(results[0], results[1])
    assert all(np.array_equal(result[~redrawn_HW], drawn[~redrawn_HW]) for result in results)


def test_a_click_on_a_token_shows_likely_alternatives(open_page):
    page = open_page("?labels=3,none&count=1&seed=7")
    page.wait_for_selector(DRAWN, timeout=180_000)
    page.get_by_role("tab", name="Look inside").click()
    page.click("#inside-take")
    page.click("#look")
    page.wait_for_selector("#maps img", timeout=180_000)
    assert len(browser.shown_images(page, "#reconstructions")) == 4
    page.locator("#tokens img").click(position={"x": 250, "y": 40})
    page.wait_for_selector("text=Scale 3, row 1, column 4", timeout=180_000)
    page.wait_for_selector("#alternatives img", timeout=20_000)
    assert len(browser.shown_images(page, "#alternatives")) == 6


def test_an_invalid_upload_shows_an_error(open_page, tmp_path):
    (tmp_path / "letter.txt").write_text("no picture")
    page = open_page()
    page.get_by_role("tab", name="Edit").click()
    with page.expect_file_chooser() as chooser:
        page.click("#edit-upload")
    chooser.value.set_files(tmp_path / "letter.txt")
    page.wait_for_selector("text=letter.txt is not an image that can be read", timeout=20_000)


@pytest.mark.parametrize(
    ("query", "message"),
    [("labels=11", "labels=11"), ("labels=3&top_p=x", "top_p=x"), ("model=5", "model=5")],
)
def test_an_invalid_link_shows_an_error(open_page, query, message):
    page = open_page(f"?{query}")
    page.wait_for_selector(f"text={message}", timeout=20_000)


def test_an_invalid_option_shows_an_error(open_page):
    page = open_page()
    page.click("text=Options")
    page.locator("label", has_text="guidance_schedule").locator("input, textarea").fill("steep")
    page.click("#draw")
    page.wait_for_selector("text=guidance_schedule=steep", timeout=20_000)


def parts(log):
    return log.read_text().count("part")


@pytest.fixture
def slow_parts(server):
    file = slow_file(server[1])
    file.touch()
    yield
    file.unlink()


def test_one_page_is_computed_at_a_time_and_can_be_stopped(server, chromium, slow_parts):
    address, log = server
    first, second = (chromium.new_page() for _ in range(2))
    start = parts(log)
    first.goto(f"{address}?labels=0,3,6,9&count=16&seed=1")  # 8 parts
    browser.wait_for(lambda: parts(log) > start)
    second.goto(f"{address}?labels=3,none&count=1&seed=1")
    second.wait_for_selector("text=queue: 1/1", timeout=20_000)
    first.click("#stop")
    first.wait_for_selector("#note >> text=stopped", timeout=20_000)
    second.wait_for_selector(DRAWN, timeout=180_000)
    stopped = parts(log)
    assert stopped < start + 8
    first.click("#draw")
    browser.wait_for(lambda: parts(log) > stopped)
    first.close()
    second.locator("#seed input").fill("2")
    second.click("#draw")  # waits only for the part that the closed page had begun
    second.wait_for_url("**seed=2**", timeout=180_000)
    assert parts(log) < stopped + 8
    second.close()


def test_a_page_closed_during_an_upload_prints_no_traceback(weights, tmp_path):
    pytest.importorskip("gradio", reason='needs Gradio: pip install ".[demo]"')
    head = (
        "POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nabc'
    )
    with browser.served(tmp_path, f"--weights={weights}") as (address, _):
        url = urllib.parse.urlparse(address)
        with socket.create_connection((url.hostname, url.port)) as connection:
            connection.sendall(head.encode())
        urllib.request.urlopen(address).read()  # by then, the server has noticed the disconnect
        # `served` checks for a traceback when it exits
