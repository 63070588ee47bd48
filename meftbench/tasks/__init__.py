"""The data side of quality runs: rows of a task, examples a model takes, and the score of its answers."""
