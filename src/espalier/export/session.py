"""ONNX Runtime on the CPU, opened with the same options by everything that runs a file; needs no torch.

x86 processors without VNNI multiply uint8 with int8 two at a time and add the products in 16 bits, where they saturate:
outputs of 8-bit networks were wrong by up to 28 % of the largest there, without a word (onnxruntime.ai, "Quantize ONNX
models", on U8S8). `PRECISION` makes the runtime use uint8 for both on such processors, which is exact.
"""

import logging
from pathlib import Path

import onnxruntime

PRECISION = ("session.x64quantprecision", "1")

log = logging.getLogger(__name__)


def options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """Return options that print errors alone and keep 8 bits exact; `threads` None lets the runtime choose."""
    chosen = onnxruntime.SessionOptions()
    chosen.log_severity_level = 3  # errors
    chosen.add_session_config_entry(*PRECISION)
    if threads is not None:
        chosen.intra_op_num_threads = threads
        chosen.inter_op_num_threads = 1
    return chosen


def opened(path: Path, chosen: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """Open a file in ONNX Runtime.

    `PRECISION` is dropped, with a warning, for a file of an earlier version in which operators share 8-bit constants.

    Raises:
        Exception: of the runtime's own classes, which share no base: it cannot open the file.
    """
    try:
        return onnxruntime.InferenceSession(path, chosen, providers=["CPUExecutionProvider"])
    except Exception as error:
        if "replace the existing tensor" not in str(error):
            raise
        chosen.add_session_config_entry(PRECISION[0], "0")
        log.warning("%s: its 8 bits are not exact on this processor; export it again", path)
        return onnxruntime.InferenceSession(path, chosen, providers=["CPUExecutionProvider"])
