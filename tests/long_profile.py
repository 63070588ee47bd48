"""The long profile: what takes too many minutes for every landing, and is run where MEFTBENCH_HOSTILE asks for it."""

import os

import pytest

# Mutated inputs of each kind of file: 1,000 take an hour.
LONG = int(os.environ.get("MEFTBENCH_HOSTILE") or 0)

many_minutes = pytest.mark.skipif(not LONG, reason="takes many minutes: run with MEFTBENCH_HOSTILE=1000")
