"""Clusters of Ray whose nodes are processes of this machine. What is here needs `pip install 'meftbench[ray]'`."""

import os
import tempfile
from pathlib import Path

import pytest

from sweeps import path_for_workers

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def marks(tmp_path_factory):
    """The folder in which stand-ins leave marks; nodes have it, and where stand-ins are, from their start on."""
    folder = tmp_path_factory.mktemp("marks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAND_IN_TOLD", str(folder / "told.txt"))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), path_for_workers()]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Of nodes; Ray's own sockets need a short path.
        (folder / "temporary").mkdir()
        patch.setenv("RAY_TMPDIR", tempfile.gettempdir())
        patch.setenv("TMPDIR", str(folder / "temporary"))
        yield folder


@pytest.fixture(scope="module")
def cluster(marks):
    """Three nodes of one CPU each; a test that ends one adds another."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def ray_engine(cluster):
    """Engines on the cluster, by what replaces the worker."""
    from meftbench.runner.ray_engine import RayEngine

    def make(**options):
        return RayEngine(cluster.address, **options)

    return make
