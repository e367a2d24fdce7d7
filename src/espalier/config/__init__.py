"""From the words of a command line to a configuration that is checked and holds no secret."""
