"""A run of as many cells as wanted, made from the records of a committed one: other shapes, other identities."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

COMMITTED = Path(__file__).resolve().parents[1] / "reports" / "minilm-cpu"


def a_large_run(folder: Path, cells: int, grown: int = 0) -> Path:
    """A run folder with `cells` records, the committed ones again and again with other batch sizes.

    grown: of so many cells, evenly spread, the activation peak and its largest buffer are 512 bytes larger.
    """
    folder.mkdir(parents=True)
    for name in ("suite.yaml", "environment.json"):
        shutil.copy(COMMITTED / name, folder / name)
    lines = (COMMITTED / "records.jsonl").read_text().splitlines()
    every = cells // grown if grown else cells + 1
    with (folder / "records.jsonl").open("w") as stream:
        for index in range(cells):
            record = json.loads(lines[index % len(lines)])
            batch_size = 1 + index // len(lines)
            cell = record["cell"]
            cell["label"] = cell["label"].replace(f"/b{cell['batch_size']}/", f"/b{batch_size}/")
            cell["batch_size"] = cell["micro_batch_size"] = batch_size
            record |= {"cell_id": f"{index:016x}", "record_id": f"record-{index}"}
            if index % every == every - 1:
                record["metrics"]["activation_peak_bytes"]["value"] += 512
                record["metrics"]["peak_buffers"]["value"][0]["bytes"] += 512
            stream.write(json.dumps(record) + "\n")
    return folder
