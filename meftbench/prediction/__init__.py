"""Predicts the memory of training steps: they are traced, not computed."""
