"""From configuration to the parts of a run: networks, trainer, plan, and what a run writes down of itself."""
