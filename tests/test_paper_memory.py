"""The paper's memory, predicted for its card: what is committed, and what docs/paper.md says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from meftbench.plan.suite import load_suite
from meftbench.records.store import load_run
from meftbench.report.results import frame_of
from meftbench.report.views.claims import claim_tables

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "reports" / "paper-memory-predicted"


@pytest.fixture(scope="module")
def tables():
    return claim_tables(frame_of(load_run(REPORT)))


def test_the_report_is_of_the_shipped_suite():
    """Every cell of it, on the paper's card, with the settings that methods have now, and none failed."""
    records = load_run(REPORT).records

    assert {cell.cell_id for cell in load_suite("sweep-paper-memory").on("predicted:a6000").cells} == {
        record.cell_id for record in records
    }
    assert {"ok"} == {record.status for record in records}


def test_the_committed_table_says_what_the_claims_come_to(tables):
    text = (REPORT / "table.md").read_text(encoding="utf-8").replace("\\", "")

    assert 2 == len(tables)
    for table in tables:
        assert all(note in text for note in table.notes)
        assert all(line in text for row in table.rows for line in row.texts)


def test_the_page_says_the_same(tables):
    """At 16 x 512: MEFT, and full fine-tuning with checkpointing, by attention."""
    page = " ".join((ROOT / "docs" / "paper.md").read_text(encoding="utf-8").split())
    eager, fused = (row.ours for row in tables[0].rows[:2])
    beside = [next(line.split()[1] for line in ours if line.startswith("full+checkpoint")) for ours in (eager, fused)]
    percent = [said.split("%")[0] + " %" for said in (eager[0], fused[0], *beside)]

    assert f"is {percent[0]} on BERT-base with eager attention and {percent[1]} with a fused kernel" in page
    assert f"checkpointing full fine-tuning saves {percent[2]} and {percent[3]}" in page
