"""The long profile: what takes too many minutes for every landing, and is run where MEFTBENCH_HOSTILE asks for it."""

import os

import pytest

# Mutated inputs of each kind of file: 1,000 take an hour.
LONG = int(os.environ.get("MEFTBENCH_HOSTILE") or 0)

many_minutes = pytest.mark.skipif(not LONG, reason="takes many minutes: run with MEFTBENCH_HOSTILE=1000")


def sampled(cases, every):
    """The cases of a parametrised test of which all but each `every`-th, from the first on, are of the long profile."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[many_minutes] * (number % every != 0))
        for number, case in enumerate(cases)
    ]
