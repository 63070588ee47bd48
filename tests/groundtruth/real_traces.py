"""The real traces in data/, as the campaign that replays them reads them."""

from __future__ import annotations

import runpy
from pathlib import Path

_CAMPAIGN = runpy.run_path(str(Path(__file__).resolve().parents[2] / "reports" / "campaigns" / "published_traces.py"))
TRACES = _CAMPAIGN["TRACES"]
as_pickled = _CAMPAIGN["as_pickled"]
replayed_traces = _CAMPAIGN["replayed_traces"]
