"""Host memory that this process takes."""

from __future__ import annotations

import platform

from meftbench.records.record import Metric


def host_peak() -> Metric:
    """The most host memory that this process has had resident, in bytes."""
    if platform.system() == "Windows":
        return Metric(None, "measured", absent="not known on Windows")
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return Metric(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "measured")
