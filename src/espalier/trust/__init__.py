"""Checks of files from elsewhere before they are read: checkpoints, exported programs, and the names in them."""
