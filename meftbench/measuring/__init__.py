"""From a cell to its measurements: the model and its training step, and the passes that observe it."""
