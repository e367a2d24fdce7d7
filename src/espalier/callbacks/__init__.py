"""Everything that only watches or guards a run: Lightning callbacks."""
