"""Pictures by matplotlib: results in, a Figure out."""
