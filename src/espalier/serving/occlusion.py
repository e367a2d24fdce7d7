"""Show which parts of an input a prediction rests on: cover one after the other and see how far the output falls.

Zeiler and Fergus 2014, section 4.2, arxiv.org/abs/1311.2901. It needs no gradient, so it runs in any runtime.
Letters: N covered copies, C channels, H height, W width, F features, T tokens.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.spec import UNKNOWN, DataSpec

STEPS = 8  # windows along a side of an image, each a quarter of the side: they overlap, so the map is smooth
MAX_TOKENS = 256  # that are covered, the first ones


def covered(spec: DataSpec, raw: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return copies (N, *shape) of a raw sample, each with a part set to the training mean, and the parts (N, H, W).

    Of a tabular sample (F,) copy n lacks feature n, and the parts are (N, F). Of a text (T,) token n is the unknown one
    in copy n, of the first `MAX_TOKENS`, and the parts are (N, N).
    """
    if spec.input.is_tokens:
        masks = np.eye(min(len(raw), MAX_TOKENS), dtype=np.bool_)
        copies = np.repeat(raw[None], len(masks), axis=0)
        np.fill_diagonal(copies, UNKNOWN)
        return copies, masks
    masks = _windows(*spec.shape[1:]) if spec.is_image else np.eye(spec.shape[0], dtype=np.bool_)
    fill = np.array(spec.mean, dtype=np.float32) * np.float32(spec.scale)
    if spec.is_image:
        return np.where(masks[:, None], fill[:, None, None], raw[None]), masks
    return np.where(masks, fill, raw[None]), masks


def heat(drops: NDArray[np.float32], masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return a map (H, W) or (F,): the mean fall of the output over the copies that lack each position."""
    times = masks.sum(axis=0)
    return np.tensordot(drops, masks.astype(np.float32), axes=1) / np.maximum(times, 1)


def _windows(height: int, width: int) -> NDArray[np.bool_]:
    """Return windows that also reach over the border, so that border pixels are covered as often as others."""
    rows, columns = _spans(height), _spans(width)
    return np.array([np.outer(row, column) for row in rows for column in columns])


def _spans(side: int) -> list[NDArray[np.bool_]]:
    stride = max(1, round(side / STEPS))
    places = np.arange(side)
    return [(places >= start) & (places < start + 2 * stride) for start in range(-stride, side, stride)]
