"""kill -9 of the command, of jobs, actors, workers, cells and whole nodes of clusters at random moments: nothing lost,
repeated, torn or left.

By the campaign that is printed in reports/kills, with fewer kills.
"""

import importlib.util
import os

import pytest
from slurm_cluster import INSTALLED

from campaigns import campaign
from meftbench.errors import DONE

kills = campaign("kills")
LACKING = {
    "ray": importlib.util.find_spec("ray") is None,
    "slurm": importlib.util.find_spec("submitit") is None or not (INSTALLED or os.environ.get("CI_SLURM")),
}


@pytest.mark.parametrize("engine", ["ray", "slurm"])
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_at_random_moments_on_a_cluster(tmp_path, engine):
    if LACKING[engine]:
        pytest.skip(f"needs {engine}")
    arguments = [str(tmp_path), "--kills", "6", "--seed", "7", "--load", "stand-in", "--engine", engine]

    assert DONE == kills.main(arguments)

    rows = kills.read_kills(tmp_path / "kills.csv")
    assert (rows.victim != "").sum() >= 6
    assert not rows[[*kills.COUNTS]].to_numpy().any(), rows
