"""Budgets held against a run, and two runs held against each other."""
