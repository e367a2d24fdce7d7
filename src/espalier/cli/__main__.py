"""`python -m espalier.cli`: the command as ranks start it, and shells in which `espalier` is not installed."""

from espalier.cli import main

if __name__ == "__main__":
    main()
