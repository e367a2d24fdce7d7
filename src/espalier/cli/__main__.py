"""`python -m espalier.cli`: what a rank and a shell without the command start."""

from espalier.cli import main

main()
