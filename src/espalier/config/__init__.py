"""Turns the words of a command line into a configuration that is checked and holds no secret."""
