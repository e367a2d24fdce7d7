"""The states of a run on disk, each in one word."""

FINISHED, RUNNING, STOPPED, FAILED = "finished", "running", "stopped", "failed"
STATES = (FINISHED, RUNNING, STOPPED, FAILED)  # stopped: it can go on, by resume=RUN
