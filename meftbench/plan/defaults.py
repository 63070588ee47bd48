"""Defaults of predictions: the device profile, and the methods and sequence lengths of `fit`.

Nothing is imported here, so that `--help` stays fast.
"""

PROFILE = "a100-80gb"
FITTED_METHODS = (
    *("full", "full+checkpoint", "lora", "lora+checkpoint", "lora+checkpoint+chunked_loss", "parallel"),
    *("meft1-exact", "meft1-exact+chunked_loss"),
)
FITTED_LENGTHS = (512,)
