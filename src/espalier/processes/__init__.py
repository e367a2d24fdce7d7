"""The processes of a run: launching them, signals, time limits, and the batch that they share."""
