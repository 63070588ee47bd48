"""What the code cites is in the repository, and what the documentation names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from meftbench.plan.catalogue import LEVERS

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path
    for folder in ("meftbench", "tests", "suites", "reports/campaigns")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".yaml") and path != Path(__file__)
]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
CITED = re.compile(r"docs/(\w+)\.md((?:,? (?:to |and )?\d+)*)")


def test_every_citation_has_its_section():
    """`docs/design.md 3` is a file with a heading that begins with 3; and such citations there are."""
    cited = [(path, *found.groups()) for path in SOURCES for found in CITED.finditer(path.read_text())]
    assert len(cited) > 40
    for path, page, sections in cited:
        headings = re.findall(r"(?m)^## (\d+)\.", (ROOT / "docs" / f"{page}.md").read_text())
        assert set(re.findall(r"\d+", sections)) <= set(headings), f"{path}: docs/{page}.md {sections}"


def test_nothing_cites_what_a_reader_does_not_have():
    """Documents outside the repository."""
    outside = re.compile(r"\b(?:DESIGN|MEASURING|PAPER|EXAMPLES)(?:\.md|,? \d)")
    assert [] == [str(path) for path in [*SOURCES, *PAGES] if outside.search(path.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    """Those into the repository, with the anchor of a heading where there is one."""
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            heads = re.findall(r"(?m)^#+ (.+)$", linked.read_text())
            slugs = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in slugs, f"{page.name}: {target}"


def test_every_lever_is_explained():
    """README says of each when to take it."""
    text = (ROOT / "README.md").read_text()
    assert all(f"`+{lever}`" in text for lever in LEVERS)
