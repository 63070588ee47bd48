"""Memory optimisations that compose with any method by `+`, a file each; `base.py` says what one is."""
