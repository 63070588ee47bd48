"""Reads the real traces in data/ as what torch wrote before they were converted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

DATA = Path(__file__).parent / "data"
TRACES = sorted(DATA.glob("*.jsonl.gz"))
STATE = {0: "inactive", 1: "active_allocated"}


def as_pickled(path):
    """The dictionary that torch.cuda.memory._snapshot() returned, without its frames."""
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    header, rest = lines[0], lines[1:]
    return {
        "segments": [a_segment(line, header) for line in rest if line["action"] == "final_segment"],
        "device_traces": [[line | {"frames": []} for line in rest if line["action"] != "final_segment"]],
        "allocator_settings": {key: value for key, value in header.items() if key != "action"},
    }


def a_segment(line, header):
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
