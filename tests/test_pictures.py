"""Pictures from a folder to a report and over HTTP, as a user meets them."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import QUICK, Command

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "chaos"))
import skew

WORDS = (
    "data=hub_images",
    "data.image_size=8",
    "data.channels=1",
    "data.batch_size=4",
    "model=mlp",
    "model.hidden=[8]",
)
SAMPLE = (
    "p_alpha.png",
    "rgba.png",
    "i16.png",
    "i16_key.png",
    "cmyk.jpg",
    "exif_6.jpg",
    "animated.webp",
    "f.tif",
    "lab.tif",
)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two classes of ten pictures."""
    for name, shade in (("cat", 40), ("dog", 200)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(10):
            pixels = np.full((8, 8), shade + number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{number}.png")
    return tmp_path / "pets"


def test_what_was_found_is_printed_and_stands_in_the_report(espalier: Command, pets: Path) -> None:
    (pets / ".hidden").mkdir()
    done = espalier("train", *WORDS, *QUICK, "data.path=pets", "trainer.max_epochs=1")
    assert done.code == 0
    found = "pets: 2 classes (cat, dog); train 14 pictures of 2 classes, val 2 of 2, test 4 of 2"
    found += "; left out: 1 hidden (.hidden)"
    assert found in done.out.splitlines()
    assert f"* {found}" in (done.run / "report.md").read_text().splitlines()


def test_a_run_does_not_go_on_with_other_pictures_than_it_began_with(espalier: Command, pets: Path) -> None:
    assert espalier("train", *WORDS, *QUICK, "data.path=pets", "trainer.max_epochs=1", "hydra.run.dir=run").code == 0
    for number in range(10):
        (pets / "cat" / f"{number}.png").rename(pets / "cat" / f"{number}.txt")
    for number in range(5):
        Image.new("L", (8, 8)).save(pets / "cat" / f"{number}.png")
    done = espalier("train", "resume=run")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "began with 14 training samples" in done.err


def test_an_evaluation_says_that_the_pictures_have_changed_since_the_training(espalier: Command, pets: Path) -> None:
    assert espalier("train", *WORDS, *QUICK, "data.path=pets", "trainer.max_epochs=1", "hydra.run.dir=run").code == 0
    for number in range(4):
        (pets / "cat" / f"{number}.png").unlink()
    done = espalier("evaluate", "source=run", *QUICK)
    assert done.code == 0
    told = next(line for line in done.out.splitlines() if line.startswith("pets: has 12 training samples where "))
    assert "was trained on 14; the data have changed, so samples of other splits may be among those" in told
    assert f"* {told}" in (done.run / "report.md").read_text().splitlines()


def test_pictures_that_were_renamed_may_have_changed_splits_and_that_is_said(espalier: Command, pets: Path) -> None:
    assert espalier("train", *WORDS, *QUICK, "data.path=pets", "trainer.max_epochs=1", "hydra.run.dir=run").code == 0
    done = espalier("evaluate", "source=run", *QUICK)
    assert (done.code, "have changed" in done.out) == (0, False)
    assert espalier("evaluate", "source=run", *QUICK, "data.broken=skip").code == 0  # a key that data=digits lacks
    for path in [*pets.glob("*/*.png")]:
        path.rename(path.with_name(f"{9 - int(path.stem)}_.png"))  # the other way round
    done = espalier("evaluate", "source=run", *QUICK)
    assert done.code == 0
    told = next(
        line for line in done.out.splitlines() if line.startswith("pets: its 14 training samples are not those")
    )
    assert "the data have changed, so samples of other splits may be among those it has seen" in told
    done = espalier("train", "resume=run")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "its 14 training samples are not those that it began with" in done.err


@pytest.mark.parametrize("kind", ["damaged", "too few", "one class", "flat"])
def test_pictures_that_cannot_be_trained_on_are_one_line_and_no_folder(
    espalier: Command, pets: Path, kind: str
) -> None:
    if kind == "damaged":
        (pets / "cat" / "cut.png").write_bytes((pets / "cat" / "1.png").read_bytes()[:50])
    for path in pets.glob("*/*.png"):
        if (kind == "too few" and path.stem != "0") or (kind, path.parent.name) == ("one class", "dog"):
            path.unlink()
        elif kind == "flat":
            path.rename(pets / f"{path.parent.name}{path.name}")
    done = espalier("train", *WORDS, *QUICK, "data.path=pets", "hydra.run.dir=run")
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert "data.path=pets" in done.err
    assert not (done.folder / "run").exists()


def test_a_file_is_the_same_array_in_training_and_over_http(tmp_path: Path) -> None:
    contents = {name: content for name, content in skew.files() if name in SAMPLE}
    equal = skew.compare(3, contents, tmp_path)
    assert equal == dict.fromkeys(SAMPLE, True)
    assert len(dict(skew.files())) >= 40
