"""Ways to make a network smaller or faster, one per file: pure functions and a thin callback that decides when."""
