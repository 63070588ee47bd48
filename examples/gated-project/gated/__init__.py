"""A project whose model is held to memory budgets."""
