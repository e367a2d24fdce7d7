"""Turn a user's values into network input in numpy, so that servers and scripts without torch do as training did.

Letters: B batch, C channels, H height, W width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from espalier.data import pictures
from espalier.spec import DataSpec, Input

if TYPE_CHECKING:
    from PIL import Image

# As bundles state them, for those who prepare their samples themselves.
FORMULA = "(raw / scale - mean) / std, float32; mean and std per channel, or per feature"
PICTURE = (
    "turned as its EXIF says, put on the colour background where it is transparent, made grey or RGB, "
    "the middle cut out and scaled bilinearly to the size in shape; raw = pixel / 255 * scale"
)

WORDS = r"Unicode form NFC, lower case, pieces that match \w+|[^\w\s]"
TEXT = {"words": WORDS, "characters": "Unicode form NFC, one by one", "bytes": "UTF-8, each as two hexadecimal digits"}
IDS = "the id of a piece is 2 + its place in vocabulary, 1 where it is not there; 0 pads; int64"


def stated(spec: DataSpec) -> dict[str, str]:
    """Return how raw values become network input, in words."""
    texts = [f"{TEXT[each.cut]}; {IDS}" for each in spec.inputs if each.is_tokens]
    found = {"text": "; ".join(dict.fromkeys(texts))} if texts else {}
    return found if len(texts) == len(spec.inputs) else {"formula": FORMULA, "picture": PICTURE, **found}


def normalise(spec: DataSpec | Input, raw: NDArray) -> NDArray[np.float32]:
    """Return the model input of raw values (B, *shape) by `FORMULA`, bit-equal to `data.transforms.Normalise`."""
    shape = (len(spec.mean), *[1] * (len(spec.shape) - 1))
    mean = np.array(spec.mean, dtype=np.float32).reshape(shape)
    std = np.array(spec.std, dtype=np.float32).reshape(shape)
    return (raw.astype(np.float32) / np.float32(spec.scale) - mean) / std


def prepared(spec: DataSpec, raw: Sequence[NDArray]) -> list[NDArray]:
    """Return what the network is called with, of raw values per input; tokens stay as they are."""
    pairs = zip(spec.inputs, raw, strict=True)
    return [values if each.is_tokens else normalise(each, values) for each, values in pairs]


def raw_of(spec: DataSpec, image: "Image.Image") -> NDArray[np.float32]:
    """Return a picture as raw values (C, H, W), read as training reads it; white is `scale`, black is 0."""
    return scaled(spec, pictures.to_array(image, spec.shape, spec.background))


def scaled(spec: DataSpec, pixels_HWC: pictures.Pixels) -> NDArray[np.float32]:
    """Return pixels (H, W, C) of 0 to 255 as raw values (C, H, W) in the unit of the data set."""
    return pixels_HWC.transpose(2, 0, 1).astype(np.float32) * np.float32(spec.scale / 255)
