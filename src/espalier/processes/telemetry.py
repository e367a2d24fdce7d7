"""Switch off the usage reports of libraries before any of them is imported.

ONNX Runtime from 1.29 on writes a device id and a queue of events below HOME and sends them (github.com/microsoft/
onnxruntime, issue 27379), as soon as it is imported. A value that a user has set stays as it is.
"""

import os

OFF = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub and datasets
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",  # crashes of the W&B client, to its makers
    "DO_NOT_TRACK": "true",  # whoever else asks, donottrack.sh
}


def switch_off() -> None:
    """Set the environment variables that switch reports off, for this process and all that it starts."""
    for name, value in OFF.items():
        os.environ.setdefault(name, value)
