"""Builds the parts of a run from its configuration: networks, trainer, plan, and the records a run writes."""
