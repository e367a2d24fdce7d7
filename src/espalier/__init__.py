"""Train, compress, measure and ship neural networks."""

from espalier.processes.telemetry import switch_off

switch_off()  # here, because every part of the package is imported after this line
