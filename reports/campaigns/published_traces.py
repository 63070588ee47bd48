"""Real traces of torch's allocator on GPUs, replayed by the rules of meftbench.prediction.

    python reports/campaigns/published_traces.py

Prints how many allocations each trace of tests/groundtruth/data has, and how many of them the rules put at the address
that torch chose. README.md beside the traces says whose they are.
"""

from __future__ import annotations

import gzip
import json
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from meftbench.snapshots.file import read_device
from meftbench.snapshots.replay import replay

DATA = Path(__file__).resolve().parents[2] / "tests" / "groundtruth" / "data"
TRACES = sorted(DATA.glob("*.jsonl.gz"))
STATE = {0: "inactive", 1: "active_allocated"}


def as_pickled(path: Path) -> dict[str, Any]:
    """The dictionary that torch.cuda.memory._snapshot() returned, without its frames."""
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    header, rest = lines[0], lines[1:]
    return {
        "segments": [_segment(line, header) for line in rest if line["action"] == "final_segment"],
        "device_traces": [[line | {"frames": []} for line in rest if line["action"] != "final_segment"]],
        "allocator_settings": {key: value for key, value in header.items() if key != "action"},
    }


def _segment(line: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    return {
        "device": 0,
        "address": line["addr"],
        "total_size": line["size"],
        "stream": line["stream"],
        "segment_type": line["kind"],
        "segment_pool_id": (0, 0),
        "is_expandable": header["expandable_segments"],
        "frames": [],
        "blocks": [
            {"address": address, "size": size, "requested_size": requested, "state": STATE[allocated], "frames": []}
            for address, size, requested, allocated in line["blocks"]
        ],
    }


def replayed_traces() -> pd.DataFrame:
    """A row a trace: its file, allocations, how many of them got torch's address, and the peaks in bytes."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for trace in TRACES:
            file = Path(folder) / "snapshot.pickle"
            file.write_bytes(pickle.dumps(as_pickled(trace)))
            found = replay(read_device(file))
            rows.append(
                {
                    "trace": trace.name,
                    "allocations": found.allocations,
                    "equal_addresses": found.agreeing,
                    "peak_allocated_bytes": found.peak("allocated"),
                    "peak_reserved_bytes": found.peak("reserved"),
                    "replayed_peak_reserved_bytes": found.replayed_reserved_peak,
                }
            )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    print(replayed_traces().to_string(index=False))
    sys.exit()
