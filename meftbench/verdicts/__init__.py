"""Judging a run against its budgets, comparing two runs, and comparing predictions with measurements."""
