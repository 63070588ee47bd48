"""Memory optimisations (levers) that are added to any method by `+`, one in each file; base.py has their interface."""
