"""One verb of the command line per file: a function from a run to its report."""
