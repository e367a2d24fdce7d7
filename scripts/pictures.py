"""Draw the pictures of docs/pictures anew, from real runs on digits; about five minutes on one core.

    .venv/bin/python scripts/pictures.py             trains, compresses, measures, explains, serves
    .venv/bin/python scripts/pictures.py FOLDER      goes on in a folder where some of these runs are done

Each picture is what a user gets, made smaller; overview.png puts four of them together for README.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs/pictures"
OVERVIEW = PICTURES / "overview.png"
PARTS = ("curves", "pareto", "explanation", "page")  # of the overview
COMMAND = ROOT / ".venv/bin/espalier"
SEVEN = [(90, 50), (230, 50), (140, 280)]  # a line on the page's pad of 320 x 320
RUNS = {  # folder: the words of the command that fills it
    "ResNet-20": ["train"],
    "CNN": ["train", "model=cnn"],
    "small CNN": ["train", "model=cnn", "model.channels=[4,8]"],
    "MLP": ["train", "model=mlp"],
    "8 bits": ["compress", "source=ResNet-20", "compression=[ptq]"],
    "small ResNet": ["compress", "source=ResNet-20", "experiment=digits_small"],
    "measured": [
        *("benchmark", "source=ResNet-20,CNN,small CNN,MLP,8 bits,small ResNet"),
        *("task.runtimes=[onnx]", "task.memory=false", "task.batches=[1]"),
    ],
    "compared": ["report", "source=measured"],
    "explained": ["explain", "source=ResNet-20", 'task.classes=["2","3","5","7"]'],
    "exported": ["export", "source=CNN"],
}


def main() -> None:
    """Fill the folders that are missing, then draw."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(*sys.argv[1:2] or [temporary]).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for name, words in RUNS.items():
            if not (folder / name / "report.json").exists():
                espalier(folder, *words, "logger=[csv]", f"hydra.run.dir={name}")
        PICTURES.mkdir(exist_ok=True)
        shown = {
            "curves": folder / "ResNet-20/figures/curves.png",
            "confusion": folder / "ResNet-20/figures/confusion.png",
            "pareto": folder / "compared/figures/pareto.png",
            "explanation": folder / "explained/figures/explain.png",
            "page": folder / "page.png",
            "report": folder / "report.png",
        }
        photograph(folder, shown["page"], shown["report"])
        for name, source in shown.items():
            save(Image.open(source), PICTURES / f"{name}.png")
        curves, pareto, explanation, page = (Image.open(shown[name]) for name in PARTS)
        save(
            beside(curves.crop((0, 0, curves.width, curves.height // 2)), pareto, explanation, page),
            OVERVIEW,
            width=1400,
        )


def espalier(folder: Path, *words: str) -> None:
    """Run a command in the folder, on one thread, as the figures of README were."""
    print("espalier", *words, flush=True)
    own = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    subprocess.run([COMMAND, *words], cwd=folder, env=own, check=True, stdout=subprocess.DEVNULL)


def photograph(folder: Path, page: Path, report: Path) -> None:
    """Draw a seven on the page of the server and take its picture; take one of the page that compares runs."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright, served(folder) as address:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": 800, "height": 640})
        window.goto(address)
        pad = window.locator("#pad").bounding_box()
        assert pad is not None
        window.mouse.move(pad["x"] + SEVEN[0][0], pad["y"] + SEVEN[0][1])
        window.mouse.down()
        for x, y in SEVEN[1:]:
            window.mouse.move(pad["x"] + x, pad["y"] + y, steps=8)
        window.mouse.up()
        with window.expect_response("**/explain"):
            window.click("#predict")
        window.wait_for_selector("#predict:enabled")
        window.screenshot(path=page, full_page=True)
        window.set_viewport_size({"width": 1280, "height": 1000})
        window.goto((folder / "compared/report.html").as_uri())
        window.screenshot(path=report)
        browser.close()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve the exported network; the address of its page."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    words = [sys.executable, "-m", "espalier.serving", "exported/export", "--port", str(port)]
    server = subprocess.Popen(words, cwd=folder)
    address = f"http://127.0.0.1:{port}/"
    try:
        until = time.monotonic() + 120
        while not answers(address):
            assert time.monotonic() < until, f"no server answers at {address}"
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait()


def answers(address: str) -> bool:
    """Whether a server is there already."""
    try:
        return bool(urllib.request.urlopen(f"{address}health", timeout=5).status == 200)
    except OSError:
        return False


def white(picture: Image.Image) -> Image.Image:
    """Put it on white."""
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture.convert("RGBA"))
    return ground.convert("RGB")


def save(picture: Image.Image, target: Path, width: int = 1000) -> None:
    """Write it on white, no wider than so many pixels."""
    scale = min(1, width / picture.width)
    size = round(picture.width * scale), round(picture.height * scale)
    small = white(picture).resize(size, Image.Resampling.LANCZOS)
    # the palette that keeps rare colours: the median cut would give legends the wrong ones
    small.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=4, dither=Image.Dither.NONE).save(target, optimize=True)
    print(f"{target.relative_to(ROOT)}: {size[0]} x {size[1]}, {target.stat().st_size / 1000:.0f} kB")


def beside(
    *four: Image.Image, width: int = 690, heights: tuple[int, int] = (340, 560), margin: int = 20
) -> Image.Image:
    """Four pictures in two rows, each as large as fits its place."""
    sheet = Image.new("RGB", (2 * width + margin, sum(heights) + margin), "white")
    for place, picture in enumerate(four):
        row, column = divmod(place, 2)
        fitted = white(picture)
        scale = min(width / fitted.width, heights[row] / fitted.height)
        fitted = fitted.resize((round(fitted.width * scale), round(fitted.height * scale)), Image.Resampling.LANCZOS)
        left, top = column * (width + margin), row * (heights[0] + margin)
        sheet.paste(fitted, (left + (width - fitted.width) // 2, top + (heights[row] - fitted.height) // 2))
    return sheet


if __name__ == "__main__":
    main()
