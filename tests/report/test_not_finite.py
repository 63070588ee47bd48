"""Records in which any number is NaN or infinite: every report of them is made, and says so."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from meftbench.cli import _exit_code

REPORTS = Path(__file__).parents[2] / "reports"
WORDS = ("NaN", "Infinity", "-Infinity")


def broken_run(folder, source, words, share, seed=1):
    """A copy of a committed run, a share of whose numbers are `words`."""
    drawn = random.Random(seed)
    folder.mkdir()
    for name in ("suite.yaml", "environment.json"):
        shutil.copy(source / name, folder / name)
    with (folder / "records.jsonl").open("w") as stream:
        for line in (source / "records.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["cell"].get("training") and record["cell"]["training"]["task"] != "sst2":
                continue  # one task of six says as much
            for metric in record["metrics"].values():
                number = isinstance(metric.get("value"), int | float) and not isinstance(metric["value"], bool)
                if number and drawn.random() < share:
                    metric["value"] = drawn.choice(words)
            stream.write(json.dumps(record) + "\n")
    return folder


@pytest.mark.parametrize(
    ("name", "words", "share"),
    [
        ("minilm-cpu", ("Infinity",), 1.0),
        ("quality-minilm", WORDS, 0.5),
    ],
)
def test_any_number_that_is_not_finite_is_reported(tmp_path, capsys, name, words, share):
    run = broken_run(tmp_path / "run", REPORTS / name, words, share)

    for arguments in (["show"], ["show", "--json"], ["report"], ["export", "--format", "csv"]):
        code = _exit_code([arguments[0], str(run), *arguments[1:]])
        assert 0 == code, (arguments, capsys.readouterr().err)
    assert 0 == _exit_code(["compare", str(REPORTS / name), str(run)])
    assert 0 == _exit_code(["compare", str(run), str(REPORTS / name), "--json"])
    said = (run / "table.md").read_text()
    assert "NaN" in said or "∞" in said or "nan" in said
    assert list((run / "plots").glob("*.svg")) or list((run / "plots").glob("*.png"))
