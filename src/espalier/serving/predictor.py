"""A bundle that predicts: raw values in, probabilities out, by ONNX Runtime alone.

Letters: B batch, K classes (1 for a regression).
"""

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from espalier.errors import ConfigError
from espalier.export import bundle
from espalier.export.preprocess import normalise

INPUT, OUTPUT = "input", "logits"  # tensors of every exported file
FORMAT = "onnx"
QUIET = 3  # errors only


class Predictor:
    """The network of a bundle, ready to run; calls from several threads are allowed."""

    def __init__(self, folder: Path, threads: int) -> None:
        """Read, verify and open the bundle.

        Raises:
            ConfigError: the bundle is damaged, holds no ONNX file, or one that the runtime cannot open.
        """
        self.bundle = bundle.read("source", folder)
        self.spec = self.bundle.spec
        if FORMAT not in self.bundle.formats:
            raise ConfigError(
                f"source={folder}: holds {', '.join(self.bundle.formats)}, and a server runs onnx; "
                "export again with onnx in task.format=[...]"
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = QUIET
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads leave the cores alone
        try:
            self._session = onnxruntime.InferenceSession(
                self.bundle.file(FORMAT), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the runtime's own classes share no base
            raise ConfigError(f"source={folder}: ONNX Runtime cannot open the network: {error}") from error

    def predict(self, raw: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities (B, K) of raw samples (B, *shape); for a regression the value (B, 1) in the target's unit."""
        x = normalise(self.spec, raw)
        if self.bundle.sample_by_sample:
            logits_BK = np.concatenate([self._run(sample) for sample in np.split(x, len(x))])
        else:
            logits_BK = self._run(x)
        if not self.spec.num_classes:
            return logits_BK * np.float32(self.spec.target_std) + np.float32(self.spec.target_mean)
        with np.errstate(invalid="ignore"):  # what is not finite is told to the client
            weights_BK = np.exp(logits_BK - logits_BK.max(axis=1, keepdims=True))
            return weights_BK / weights_BK.sum(axis=1, keepdims=True)

    def _run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._session.run([OUTPUT], {INPUT: x})[0]
