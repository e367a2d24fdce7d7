"""Whether a picture file means the same in training and over HTTP: every mode and format, both readers, each bit.

    python scripts/chaos/skew.py

Each of the files goes through the reader of training into a network's input, and through a server on 127.0.0.1 whose
network answers with exactly what it was given. Prints a line per file and the count; exit code 1 if any differs.
"""

import base64
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from espalier.data import pictures
from espalier.data.hub_images import HubImages
from espalier.spec import DataSpec
from helpers.server import Server, linear_bundle, serving

SIDE = 8
BACKGROUND = "#205080"  # no grey, so that a forgotten one shows


def files(seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Names and contents of picture files; sizes differ from the network's, so that scaling is compared as well."""
    random = np.random.default_rng(seed)
    height, width = 13, 19
    grey = random.integers(0, 256, (height, width), dtype=np.uint8)
    colour = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    alpha = Image.fromarray(random.integers(0, 256, (height, width), dtype=np.uint8))
    luma, deep = Image.fromarray(grey), grey.astype(np.uint16) * 257
    clear, faint = colour.copy(), Image.merge("LA", (luma, alpha))
    clear.putalpha(alpha)
    palette = colour.quantize(16)
    key = colour.getpixel((0, 0))
    yield "1.png", _saved(luma.convert("1"), "PNG")
    yield "l.png", _saved(luma, "PNG")
    yield "l_key.png", _saved(luma, "PNG", transparency=int(grey[0, 0]))
    yield "la.png", _saved(faint, "PNG")
    yield "p.png", _saved(palette, "PNG")
    yield "p_key.png", _saved(palette, "PNG", transparency=3)
    yield "p_alpha.png", _saved(palette, "PNG", transparency=bytes(range(0, 256, 16)))
    yield "rgb.png", _saved(colour, "PNG")
    yield "rgb_key.png", _saved(colour, "PNG", transparency=key)
    yield "rgba.png", _saved(clear, "PNG")
    yield "i16.png", _saved(Image.fromarray(deep), "PNG")
    yield "i16_key.png", _saved(Image.fromarray(deep), "PNG", transparency=int(deep[0, 0]))
    yield "animated.png", _saved(clear, "PNG", save_all=True, append_images=[clear.rotate(180)])
    yield "l.jpg", _saved(luma, "JPEG")
    yield "rgb.jpg", _saved(colour, "JPEG")
    yield "cmyk.jpg", _saved(colour.convert("CMYK"), "JPEG")
    yield "ycbcr.jpg", _saved(colour.convert("YCbCr"), "JPEG")
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        yield f"exif_{turn}.jpg", _saved(colour, "JPEG", exif=exif)
    yield "animated.gif", _saved(colour, "GIF", save_all=True, append_images=[colour.rotate(180)])
    yield "transparent.gif", _saved(clear, "GIF")
    yield "rgb.webp", _saved(colour, "WEBP")
    yield "rgba.webp", _saved(clear, "WEBP", lossless=True)
    yield "animated.webp", _saved(clear, "WEBP", save_all=True, append_images=[clear.rotate(180)], lossless=True)
    yield "rgb.bmp", _saved(colour, "BMP")
    yield "p.bmp", _saved(palette, "BMP")
    yield "1.tif", _saved(luma.convert("1"), "TIFF")
    yield "i16b.tif", _saved(Image.frombytes("I;16B", luma.size, deep.astype(">u2").tobytes()), "TIFF")
    yield "i.tif", _saved(Image.fromarray(deep.astype(np.int32)), "TIFF")
    yield "f.tif", _saved(Image.fromarray(grey.astype(np.float32) / 255), "TIFF")
    yield "cmyk.tif", _saved(colour.convert("CMYK"), "TIFF")
    yield "lab.tif", _saved(colour.convert("LAB"), "TIFF")
    yield "ycbcr.tif", _saved(colour.convert("YCbCr"), "TIFF")
    yield "rgba.tif", _saved(clear, "TIFF", compression="tiff_lzw")
    yield "16.ppm", b"P6 %d %d 65535\n" % colour.size + (np.asarray(colour).astype(">u2") * 257).tobytes()
    yield "16.pgm", b"P5 %d %d 65535\n" % luma.size + deep.astype(">u2").tobytes()


def trained(folder: Path, channels: int) -> dict[str, NDArray[np.uint8]]:
    """Return what training sees of each file, (C, S, S), out of a folder in which two classes hold all of them."""
    knobs: dict[str, Any] = {"path": str(folder), "subset": None, "image_column": "image", "label_column": "label"}
    knobs |= {"train_split": "train", "val_split": "train", "test_split": "train", "val_share": 0.1, "test_share": 0.1}
    knobs |= {
        "channels": channels,
        "image_size": SIDE,
        "mean": None,
        "std": None,
        "in_memory": True,
        "broken": "refuse",
    }
    data = HubImages(**knobs, num_workers=0, batch_size=4, augment={}, seed=0, background=BACKGROUND)
    paths = sorted(str(path) for path in folder.rglob("*.*"))
    return {Path(path).name: x.numpy() for path, x in zip(paths, data.splits.train.x, strict=True)}


def spec_of(channels: int) -> DataSpec:
    """Return a spec of which each pixel is a class, so that an answer can tell all of them."""
    names = tuple(f"pixel {number}" for number in range(channels * SIDE * SIDE))
    shape = (channels, SIDE, SIDE)
    background = pictures.colour(BACKGROUND)
    return DataSpec.single("skew", shape, 255.0, (0.0,) * channels, (1.0,) * channels, names, background=background)


def asked(server: Server, route: str, content: bytes) -> Any:
    """Return the answer to a picture file, sent as it is; to /predict in base64 as well, which must say the same."""
    status, answer = server.ask("POST", route, content, "image/png")
    assert status == 200, answer
    if route == "/predict":
        wrapped = json.dumps({"inputs": [{"image": base64.b64encode(content).decode()}]})
        assert server.ask("POST", route, wrapped) == (status, answer), "a file in base64 is another picture"
    return answer


def compare(channels: int, contents: dict[str, bytes], folder: Path) -> dict[str, bool]:
    """Whether the server's network was given the array that training makes of a file, and answers to it as to that."""
    for number, (name, content) in enumerate(contents.items()):
        path = folder / "pictures" / f"class {number % 2}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    seen = trained(folder / "pictures", channels)
    size = channels * SIDE * SIDE
    bundle = linear_bundle(folder, spec_of(channels), np.eye(size) * 8)
    equal = {}
    with serving(["-m", "espalier.serving", str(bundle), "--port", "0"], folder) as server:
        for name, content in contents.items():
            shown = base64.b64decode(asked(server, "/explain", content)["image"])
            given = np.atleast_3d(np.asarray(Image.open(io.BytesIO(shown)))).transpose(2, 0, 1)
            said = asked(server, "/predict", content)["predictions"]
            equal[name] = np.array_equal(given, seen[name]) and said == server.predict(seen[name][None])
    return equal


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def main() -> int:
    """Compare all files in colour and in grey."""
    contents = dict(files())
    failed = 0
    for channels in (3, 1):
        with tempfile.TemporaryDirectory() as name:
            equal = compare(channels, contents, Path(name))
        for file, is_equal in equal.items():
            mode = Image.open(io.BytesIO(contents[file])).mode
            print(f"{channels} channels  {file:<18} {mode:<6} {'equal' if is_equal else 'DIFFERS'}")
        failed += len(equal) - sum(equal.values())
        print(f"{channels} channels: {sum(equal.values())} of {len(equal)} files equal in training and over HTTP")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
