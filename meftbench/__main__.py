"""`python -m meftbench`."""

from meftbench.cli import main

main()
