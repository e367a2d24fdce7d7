"""The web page of the server, in a real browser: a digit is drawn with the mouse and read."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from sklearn.datasets import load_digits

from conftest import command
from espalier.spec import DataSpec
from helpers.server import Server, bag_bundle, linear_bundle, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
DIGITS = {  # lines on a pad of 320 x 320
    "1": [[(150, 40), (160, 280)]],
    "0": [[(160, 40), (110, 70), (95, 160), (110, 250), (160, 280), (210, 250), (225, 160), (210, 70), (160, 40)]],
    "7": [[(90, 50), (230, 50), (140, 280)]],
    "4": [[(180, 40), (90, 190), (240, 190)], [(195, 110), (190, 280)]],
}
TABLE = DataSpec.single(
    "table", (3,), scale=1.0, mean=(1.0, 2.0, 3.0), std=(1.0, 1.0, 1.0), target_mean=10.0, target_std=2.0
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A convolutional network that has seen digits for a few epochs."""
    folder = tmp_path_factory.mktemp("digits")
    torch.set_num_threads(1)
    quick = ("logger=[csv]", "callbacks=[checkpoint,monitor]")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command(["train", "model=cnn", "trainer.max_epochs=12", *quick], folder).code == 0
        assert command(["export", "source=latest", quick[0]], folder).code == 0
    [bundle] = folder.glob("logs/export/*/export")
    with serving(["-m", "espalier.serving", str(bundle), "--port", "0"], folder) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A window in which nothing fails unseen."""
    window = browser.new_page(viewport={"width": 900, "height": 1000})
    problems: list[str] = []
    window.on("console", lambda message: problems.append(message.text))
    window.on("pageerror", lambda error: problems.append(str(error)))
    yield window
    window.close()
    assert not problems


def draw(page: Page, lines: list[list[tuple[int, int]]], scale: float = 1.0) -> None:
    page.click("#clear")
    box = page.locator("#pad").bounding_box()
    assert box is not None
    for first, *others in lines:
        page.mouse.move(box["x"] + scale * first[0], box["y"] + scale * first[1])
        page.mouse.down()
        for x, y in others:
            page.mouse.move(box["x"] + scale * x, box["y"] + scale * y, steps=4)
        page.mouse.up()


def predict(page: Page) -> str:
    with page.expect_response("**/explain"):
        page.click("#predict")
    page.wait_for_selector("#predict:enabled")
    return page.locator("#label").inner_text()


@pytest.mark.parametrize("digit", DIGITS)
def test_a_drawn_digit_is_read(page: Page, server: Server, digit: str) -> None:
    page.goto(f"http://127.0.0.1:{server.port}/")
    draw(page, DIGITS[digit])
    assert predict(page) == digit
    assert page.locator("#bars li").count() == 10
    assert page.locator("#heat").is_visible()


def test_a_small_drawing_in_a_corner_is_read_as_a_large_one(page: Page, server: Server) -> None:
    page.goto(f"http://127.0.0.1:{server.port}/")
    draw(page, DIGITS["7"], scale=0.4)
    assert predict(page) == "7"


def test_a_chosen_image_is_read(page: Page, server: Server, tmp_path: Path) -> None:
    digits = load_digits()
    [three, *_] = np.flatnonzero(digits.target == 3)
    Image.fromarray((digits.images[three] * 255 / 16).astype(np.uint8)).save(tmp_path / "three.png")
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.set_input_files("#file", tmp_path / "three.png")
    assert predict(page) == "3"


def test_an_empty_drawing_is_answered_by_a_sentence(page: Page, server: Server) -> None:
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.click("#predict")
    assert page.locator("#problem").inner_text() == "Draw something first, or choose an image."


def test_a_network_of_numbers_gets_a_form(page: Page, tmp_path: Path) -> None:
    bundle = linear_bundle(tmp_path, TABLE, np.array([[1.0], [5.0], [0.0]]))
    with serving(["-m", "espalier.serving", str(bundle), "--port", "0"], tmp_path) as server:
        page.goto(f"http://127.0.0.1:{server.port}/")
        fields = page.locator("#numbers input")
        assert [fields.nth(place).input_value() for place in range(3)] == ["1", "2", "3"]
        fields.nth(1).fill("4")
        assert predict(page) == "30.000"  # 10 + 2 * (5 * (4 - 2))
        assert page.locator("#features li").first.inner_text().split("\n")[0] == "feature 2"


def test_a_network_of_texts_gets_a_box_and_shows_what_each_word_says(page: Page, tmp_path: Path) -> None:
    with serving(["-m", "espalier.serving", str(bag_bundle(tmp_path)), "--port", "0"], tmp_path) as server:
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.click("#predict")
        assert page.locator("#problem").inner_text() == "Write a text first."
        page.fill("#text", "Good good <bad> film, and")  # six words are read
        assert predict(page) == "positive"
        assert page.locator("#bars li").count() == 2
        assert page.locator("#words").inner_text() == "good good < bad > film"
        colours = page.locator("#words span").evaluate_all("all => all.map((each) => each.style.backgroundColor)")
        assert colours[0].startswith("rgba(255, 140, 0, 0.")
        assert colours[3].startswith("rgba(40, 150, 255, 0.")
        assert colours[2] == "rgba(255, 140, 0, 0)"
        assert page.locator("#caption").inner_text().endswith("What follows was cut off.")
