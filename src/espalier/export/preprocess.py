"""From what a user has to what a network takes, in numpy: servers and scripts without torch do as training did.

Letters: B batch, C channels, H height, W width.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from espalier.spec import DataSpec

if TYPE_CHECKING:
    from PIL import Image

# As bundles state it, for those who prepare their samples themselves.
FORMULA = "(raw / scale - mean) / std, float32; mean and std per channel, or per feature"
PICTURE = "grey or RGB, the middle cut out and scaled bilinearly to the size in shape; raw = pixel / 255 * scale"


def normalise(spec: DataSpec, raw: NDArray) -> NDArray[np.float32]:
    """Model input of raw values (B, *shape): `FORMULA`, bit-equal to `data.prepare.Normalise`."""
    shape = (len(spec.mean), *[1] * (len(spec.shape) - 1))
    mean = np.array(spec.mean, dtype=np.float32).reshape(shape)
    std = np.array(spec.std, dtype=np.float32).reshape(shape)
    return (raw.astype(np.float32) / np.float32(spec.scale) - mean) / std


def raw_of(spec: DataSpec, image: "Image.Image") -> NDArray[np.float32]:
    """A picture as raw values (C, H, W): in the channels of the spec, its middle scaled to the size of the spec.

    White is `scale`, black is 0, whatever the unit of the raw values. An orientation tag is obeyed, transparency is
    put on black.
    """
    from PIL import Image, ImageOps

    channels, height, width = spec.shape
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or "transparency" in image.info:
        colour = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colour.size, (0, 0, 0, 255)), colour)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    pixels_HWC = np.asarray(image, dtype=np.float32).reshape(height, width, channels)
    return pixels_HWC.transpose(2, 0, 1) * np.float32(spec.scale / 255)
