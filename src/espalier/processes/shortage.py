"""Turn a lack of memory or disk space into one line that says what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from espalier.errors import EspalierError
from espalier.runs.storage import DISK_IS_FULL

TOO_LARGE = ("can't allocate memory", "Storage size calculation overflowed", "numel: integer multiplication overflow")
CPU_IS_FULL = "DefaultCPUAllocator: can't allocate memory"  # torch has no class for this error


@contextmanager
def explained(folder: Path, data: Any) -> Iterator[None]:
    """Turn a lack of memory or disk space inside the block into an `EspalierError` that names a remedy.

    `data` is the configuration of the data; it is read only then.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and CPU_IS_FULL not in str(error):
            raise
        raise EspalierError(
            f"out of memory: {str(error).splitlines()[0]}; try a data.batch_size below {data.batch_size} "
            "with as much more trainer.accumulate_grad_batches, or trainer.precision=bf16-mixed"
        ) from error
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        where = error.filename or folder
        raise EspalierError(f"{where}: not written, {error.strerror}; make room") from error


def is_of_memory(error: RuntimeError) -> bool:
    """Return whether the error says that a tensor is too large for this machine or for any."""
    return any(reason in str(error) for reason in TOO_LARGE)
