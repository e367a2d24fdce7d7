"""`python -m espalier.cli`: what a rank and a shell without the command start."""

from espalier.cli import main

if __name__ == "__main__":
    main()
