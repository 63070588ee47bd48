"""`python -m meftbench`."""

from meftbench.cli import program

program()
