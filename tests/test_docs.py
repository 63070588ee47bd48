"""What the code cites is in the repository, and what the documentation names is there."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer.main

from meftbench.catalogue.backbones import BACKBONES
from meftbench.catalogue.levers import LEVERS
from meftbench.catalogue.methods import METHODS
from meftbench.catalogue.metrics import METRICS
from meftbench.catalogue.models import MODELS
from meftbench.cli import app
from meftbench.plan.budgets import load_budgets
from meftbench.plan.suite import parse_suite
from meftbench.strict_yaml import read

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path
    for folder in ("meftbench", "tests", "suites", "reports/campaigns")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".yaml") and path != Path(__file__)
]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").rglob("*.md"))
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
    """docs/howto/suite.md says of each what it does."""
    text = (ROOT / "docs" / "howto" / "suite.md").read_text()
    assert all(f"`+{lever}`" in text for lever in LEVERS)


def blocks(page, language):
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", page.read_text())


def commands(page):
    """Words of each command line of ours in a page's bash blocks."""
    for block in blocks(page, "bash"):
        for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
            words = shlex.split(line, comments=True)
            if words[:1] == ["meftbench"]:
                yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_name_verbs_and_options_that_there_are(page):
    """`meftbench VERB --option`, in every block of a shell."""
    verbs = typer.main.get_command(app).commands
    for verb, *words in commands(page):
        options = {
            spelled for parameter in verbs[verb].params for spelled in [*parameter.opts, *parameter.secondary_opts]
        }
        for word in words:
            assert not word.startswith("--") or word.partition("=")[0] in options, f"{verb} {word}"


def test_there_are_command_lines():
    """Or the test above would hold of nothing."""
    assert sum(len(list(commands(page))) for page in PAGES) > 25


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_suites_and_budgets_are_read(page, tmp_path, monkeypatch):
    """Each YAML block that is one, but for models and tasks in folders that the reader is to have."""
    for number, block in enumerate(blocks(page, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block.replace("./my-model", "bert-tiny@random"))
        if "\nbudgets:" in block:
            assert load_budgets(file).rows
        elif "\ngrid:" in block and "allow_code" not in block:
            assert parse_suite(read(file)).cells


def test_generated_pages_hold_everything():
    """Verbs, metrics, and what can be named: the functions that fill the marks of the reference."""
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    marks = {mark for page in PAGES for mark in hooks["MARK"].findall(page.read_text())}
    assert marks == set(hooks["GENERATED"])
    made = {name: function() for name, function in hooks["GENERATED"].items()}
    assert all(f"## meftbench {verb}\n" in made["commands"] for verb in typer.main.get_command(app).commands)
    assert all(f"| `{name}` |" in made["metrics"] for name in METRICS)
    assert all(f"| `{name}` |" in made["catalogue"] for name in [*METHODS, *BACKBONES, *MODELS])
    assert all(f"| `+{name}` |" in made["catalogue"] for name in LEVERS)
    assert '"sequence_length"' in made["schema"]
    assert "`meft1-exact(tiles=16)` | 11.6 | 13.1 | 16.1 |" in made["memory"]


def test_links_out_of_the_site_become_words():
    """A page of the site cannot lead to a file that is not part of it."""
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    markdown = "[a](../reports/start/table.md), [b](../../CONTRIBUTING.md), [c](design.md), [d](../models.md)"
    said = "a (`reports/start/table.md` in the repository), b (`CONTRIBUTING.md` in the repository), [c](design.md)"
    assert f"{said}, [d](../models.md)" == hooks["on_page_markdown"](markdown)
