"""Whether a file that came from elsewhere may be read: checkpoints, exported programs, and what they name."""
