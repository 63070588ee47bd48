"""Fine-tuning on a task: reading its rows, encoding them for a model, training, and scoring the answers."""
