"""Memory of steps that are not computed."""
