"""The page of `ddrf-fast demo`, served by a real process and used in a real Chromium.

`DDRF_FAST_SCREENSHOTS=docs/images pytest tests/test_demo_page.py` makes the documentation's pictures anew.
"""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import ddrf_fast
from ddrf_fast.data import from_float, read_image, write_image
from ddrf_fast.data.thermal import ThermalRange
from ddrf_fast.demo.sample import SAMPLE_INFRARED, SAMPLE_VISIBLE
from ddrf_fast.demo.trial import Damage, measure_fused, measure_restored, try_pair

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra: test)")
pytest.importorskip("gradio", reason="Gradio is not installed (extra: demo)")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)"
)
PATIENCE = 60_000  # ms, on a busy machine


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with _served(tmp_path_factory.mktemp("uploads")) as address:
        yield address


@contextmanager
def _served(temporary, *options, how=signal.SIGINT):
    """Address of the page; the server ends well when it is interrupted, and leaves no uploads behind."""
    server = subprocess.Popen(
        [sys.executable, "-m", "ddrf_fast", "demo", "--no-browser", "--device", "cpu", *options],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(temporary)},
    )  # fmt: skip
    line = server.stdout.readline()
    match = re.match(r"http://127\.0\.0\.1:\d+/", line)
    assert match, line
    yield match.group()
    server.send_signal(how)
    assert server.wait(timeout=60) == 0
    assert [path for path in temporary.rglob("*") if path.is_file()] == []


def test_sigterm_ends_it_as_well(tmp_path):
    with _served(tmp_path, how=signal.SIGTERM) as address:
        assert address


@pytest.mark.parametrize(
    ("host", "reason"),
    [("nowhere.invalid", "not known|failure in name"), ("192.0.2.1", "assign requested address")],
)
def test_where_nothing_can_listen_is_told_at_once(host, reason):
    from ddrf_fast.demo.page import serve  # needs Gradio

    with pytest.raises(OSError, match=f"the page cannot be served at {host}: .*({reason})"):
        serve(ddrf_fast.Fuser(device="cpu"), host=host, open_browser=False)


def test_a_port_that_is_taken_is_told():
    from ddrf_fast.demo.page import serve  # needs Gradio

    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(OSError, match="Address already in use"),
    ):
        serve(ddrf_fast.Fuser(device="cpu"), port=taken.getsockname()[1], open_browser=False)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 900)], ids=["desktop"])
def page(request, browser, address):
    """The page, once it has fused the sample pair; it must not complain, nor speak to another host."""
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(PATIENCE)
    wrong = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else wrong.append(r.url)
    )
    page.goto(address)
    page.wait_for_selector("#tables td")
    yield page
    page.close()
    assert wrong == []


def _shown(page, name):
    """The pixels of one of the results."""
    return _pixels(page, page.locator(f"#{name} img"))


def _pixels(page, shown):
    """The pixels of a picture, RGB or grey as sent."""
    content = page.request.get(shown.get_attribute("src")).body()
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    return image[..., ::-1] if image.ndim == 3 else image


def _type(page, text):
    """Writes a thermal range."""
    page.get_by_label("Thermal values").fill(text)
    page.get_by_label("Thermal values").press("Enter")


def _choose(page, number, path):
    """Replaces the visible (0) or the infrared (1) image."""
    box = page.locator(".page-file").nth(number)
    box.get_by_label("Clear").click()
    box.locator("input[type=file]").set_input_files(path)
    box.get_by_text(Path(path).suffix, exact=False).first.wait_for()


def _spread(page, name):
    """Chooses a thermal range."""
    page.get_by_label("Thermal values").click()
    page.get_by_role("option", name=name).click()


def _fuse(page):
    page.locator("#fuse").press("Enter")


def _picture(page, name):
    folder = os.environ.get("DDRF_FAST_SCREENSHOTS")
    if folder:
        _settled(page)
        page.wait_for_timeout(1500)  # until what moves has come to rest
        content = page.screenshot(full_page=True)
        picture = Image.open(io.BytesIO(content)).convert("RGB").quantize(128)  # a third of the size
        picture.save(Path(folder) / name, optimize=True)


def _settled(page):
    """Waits until the tables are those of the picture: the time in them is that of the message."""
    page.wait_for_function(
        """() => {
            const said = document.querySelector('#status').innerText.match(/ in ([0-9]+) ms/);
            const listed = document.querySelector('#tables').innerText.match(/fuse\\s+([0-9.]+) ms/);
            return said && listed && Math.abs(said[1] - listed[1]) < 0.6;
        }"""
    )


def _expect_in_tables(page, measure: float):
    """Waits for it: measures come after the picture, and those of the last one may be there still."""
    playwright.expect(page.locator("#tables")).to_contain_text(f"{measure:.3f}", timeout=PATIENCE)


def test_an_uploaded_pair_is_fused_as_by_the_library(page, tmp_path):
    visible, infrared = tmp_path / "mine.png", tmp_path / "thermal.tif"
    write_image(visible, read_image(SAMPLE_VISIBLE)[40:281, 100:301])
    write_image(infrared, read_image(SAMPLE_INFRARED)[40:281, 100:301].astype(np.uint16) * 257)
    _choose(page, 0, visible)
    _choose(page, 1, infrared)
    page.get_by_text("Press Fuse").wait_for()
    _fuse(page)
    page.get_by_text(re.compile(r"Fused 201 × 241 pixels in \d+ ms")).wait_for()
    shown = _shown(page, "fused")
    trial = try_pair(ddrf_fast.Fuser(device="cpu"), visible, infrared, Damage())
    np.testing.assert_array_equal(shown, from_float(trial.images["fused"][0].permute(1, 2, 0).numpy()))
    # The page fuses floats, this the bytes: rounding may decide between two levels.
    by_file = ddrf_fast.fuse(visible, infrared, device="cpu")
    np.testing.assert_allclose(shown.astype(int), by_file, atol=1, rtol=0)
    page.get_by_label("Infrared | restored").check()
    page.wait_for_function("document.querySelectorAll('#slider img').length == 2")


def test_thermal_values_are_mapped_as_chosen(page, tmp_path):
    visible, infrared = tmp_path / "mine.png", tmp_path / "counts.tif"
    write_image(visible, read_image(SAMPLE_VISIBLE)[40:241, 100:301])
    counts = 7000 + 4 * read_image(SAMPLE_INFRARED)[40:241, 100:301].astype(np.uint16)
    write_image(infrared, counts)
    lowest, highest = counts.min(), counts.max()
    fuser = ddrf_fast.Fuser(device="cpu")
    status, preview = page.locator("#status"), page.get_by_alt_text("Infrared image")

    _choose(page, 0, visible)
    _choose(page, 1, infrared)
    hint = f"16 bit, but values from {lowest} to {highest} only: choose “1st to 99th percentile”"
    status.get_by_text(hint).wait_for()
    _fuse(page)
    status.get_by_text(re.compile(f"Fused 201 × 201 pixels .*{hint}")).wait_for()

    low, high = np.percentile(counts, (1, 99))
    for choose, asked, bounds in (
        (lambda: _spread(page, "1st to 99th percentile"), "percentile", (low, high)),
        (lambda: _spread(page, "Lowest to highest"), "minmax", (lowest, highest)),
        (lambda: _type(page, "7100,7900"), "7100,7900", (7100, 7900)),
    ):
        before = preview.get_attribute("src")
        choose()
        mapped = f"Infrared values from {bounds[0]:g} to {bounds[1]:g} became black to white."
        status.get_by_text(mapped).wait_for()
        assert "16 bit" not in status.inner_text()
        trial = try_pair(fuser, visible, infrared, Damage(), ThermalRange.parse(asked))
        expected = np.interp(counts, bounds, (0, 1))
        np.testing.assert_allclose(trial.clean["infrared"][0, 0], expected, atol=1e-6)
        for name in ("fused", "infrared-restored"):
            image = from_float(trial.images[name][0].permute(1, 2, 0).numpy())
            np.testing.assert_array_equal(_shown(page, name), image.squeeze())
        playwright.expect(preview).not_to_have_attribute("src", before, timeout=PATIENCE)
        np.testing.assert_array_equal(
            _pixels(page, preview), from_float(trial.clean["infrared"][0, 0].numpy())
        )
        _expect_in_tables(page, measure_fused(trial)["fused"]["VIF"])
    # As the library does it with the file.
    by_file = ddrf_fast.fuse(visible, infrared, device="cpu", thermal_range=(7100, 7900))
    np.testing.assert_allclose(_shown(page, "fused").astype(int), by_file, atol=1, rtol=0)

    _type(page, "warm")
    page.get_by_role("alert").get_by_text("thermal_range must be full, minmax").wait_for()
    page.locator("#fused img").wait_for(state="detached")


def test_the_page_begins_with_the_settings_of_the_command(tmp_path):
    with _served(tmp_path, "--thermal-range", "30,200", "--color", "gray", "--clean") as address:
        config = json.loads(urllib.request.urlopen(f"{address}config").read())
    (value,) = [
        component["props"]["value"]
        for component in config["components"]
        if component["props"].get("label") == "Thermal values"
    ]
    assert value == "30,200"


def test_degradations_change_the_result_and_its_measures(page):
    before, scores = _shown(page, "fused"), page.locator("#tables").inner_text()
    assert "Restored images" not in scores
    source = page.locator("#fused img").get_attribute("src")
    page.get_by_label("All of them").check()
    page.get_by_label("number input for Noise").fill("15")
    page.get_by_label("number input for Noise").press("Enter")
    expected = try_pair(
        ddrf_fast.Fuser(device="cpu"), SAMPLE_VISIBLE, SAMPLE_INFRARED, Damage(blur="mixed", noise=15)
    )
    page.get_by_text("Restored images").wait_for()
    fused = from_float(expected.images["fused"][0].permute(1, 2, 0).numpy())
    for _ in range(60):
        shown = _shown(page, "fused")
        if np.array_equal(shown, fused):
            break
        page.wait_for_timeout(500)
    np.testing.assert_array_equal(shown, fused)
    assert np.abs(shown.astype(int) - before).mean() > 1
    assert page.locator("#fused img").get_attribute("src") != source
    for measured in (measure_fused(expected)["fused"], measure_restored(expected)["infrared, restored"]):
        _expect_in_tables(page, measured["SSIM"])
    _picture(page, "page.png")


@pytest.mark.parametrize("kind", ["size", "swapped", "damaged"])
def test_a_bad_pair_is_told_in_words(page, tmp_path, kind):
    bad = tmp_path / "bad.png"
    if kind == "size":
        write_image(bad, read_image(SAMPLE_INFRARED)[:100, :120])
    elif kind == "swapped":
        write_image(bad, read_image(SAMPLE_VISIBLE))
    else:
        bad.write_bytes(SAMPLE_INFRARED.read_bytes()[:20])
    _choose(page, 1, bad)
    page.locator("#status").get_by_text("bad.png" if kind == "damaged" else "Press Fuse").wait_for()
    _fuse(page)
    words = {"size": "120x100", "swapped": "swapped?", "damaged": "bad.png: "}[kind]
    page.locator("#fused img").wait_for(state="detached")
    problem = page.get_by_role("alert").get_by_text(words)
    problem.wait_for()
    assert str(tmp_path.parent) not in problem.inner_text()
    assert page.locator("#tables td").count() == 0


@pytest.mark.parametrize("page", [(390, 844)], indirect=True, ids=["phone"])
def test_it_fits_a_phone_and_every_control_has_a_name(page):
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('.gradio-container :is(button, input, textarea)')].filter(
            e => e.offsetParent && !(e.ariaLabel || e.title || e.innerText || e.labels?.length
                                     || e.querySelector('img[alt]:not([alt=""])'))).map(e => e.outerHTML)"""
    )
    assert nameless == []
    _picture(page, "page-phone.png")
