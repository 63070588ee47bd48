"""For all tests: hypothesis judges answers, not seconds; processes that share the cores take one share of them each."""

import os

from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

settings.register_profile("meftbench", deadline=None)
settings.load_profile("meftbench")
