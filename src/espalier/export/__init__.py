"""From a trained network to a file that runs without torch, and what that file does when it runs."""
