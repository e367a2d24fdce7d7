"""The command line with a rank that fails: `FAULT=kill,1,5` kills rank 1 at its sixth batch; with -1 as it starts.

The time of the fault goes to the file that FAULT_AT names.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from espalier.cli import entry
from espalier.learners.learner import Learner

FAULT, RANK, BATCH = os.environ["FAULT"].split(",")


def fail() -> None:
    """Do what the environment asks for, once another process has been left behind."""
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(os.environ["FAULT_AT"]).write_text(str(time.time()))
    if FAULT == "raise":
        raise ValueError("the moon is wrong")
    if FAULT == "exit":
        os._exit(7)
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[FAULT])


def training_step(self: Learner, data: Any, batch_idx: int) -> Any:
    """Return the real one, after the fault."""
    if batch_idx == int(BATCH) and str(self.global_rank) == RANK:
        fail()
    return whole(self, data, batch_idx)


whole = Learner.training_step
Learner.training_step = training_step  # type: ignore[method-assign]

if __name__ == "__main__":
    if BATCH == "-1" and os.environ.get("LOCAL_RANK") == RANK:
        fail()
    entry.main()
