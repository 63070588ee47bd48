"""What the shell completes: names of the catalogue, suites, and run folders.

Each function takes what is typed so far and returns the words that begin so, with their help where they have one. They
run at every press of the tab key, so they import what they list and nothing else. After
`meftbench --install-completion` the shell asks them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

Words = list[tuple[str, str]]


def _beginning(incomplete: str, words: Iterable[tuple[str, str]]) -> Words:
    return [(word, about) for word, about in words if word.startswith(incomplete)]


def methods(incomplete: str) -> Words:
    """Methods; behind a `+`, the levers that the label does not have yet."""
    from meftbench.catalogue.levers import LEVERS
    from meftbench.catalogue.methods import METHODS

    label, plus, begun = incomplete.rpartition("+")
    if not plus:
        return _beginning(begun, ((name, method.summary) for name, method in METHODS.items()))
    having = {part.partition("(")[0] for part in label.split("+")}
    levers = ((name, lever.summary) for name, lever in LEVERS.items() if name not in having)
    return [(f"{label}+{name}", about) for name, about in _beginning(begun, levers)]


def method_lists(incomplete: str) -> Words:
    """The last method of a list with commas."""
    before, comma, begun = incomplete.rpartition(",")
    return [(f"{before}{comma}{word}", about) for word, about in methods(begun)]


def models(incomplete: str) -> Words:
    """Models; with `@random` where an @ was typed."""
    from meftbench.catalogue.models import MODELS

    ending = "@random" if "@" in incomplete else ""
    return _beginning(incomplete, ((f"{name}{ending}", model.summary) for name, model in MODELS.items()))


def profiles(incomplete: str) -> Words:
    """Device profiles of the package."""
    from meftbench.catalogue.profiles import PROFILES

    return _beginning(incomplete, ((name, "") for name in PROFILES))


def suites(incomplete: str) -> Words:
    """Suites of the package and of ./suites; where a folder or file is begun, the shell completes it."""
    from meftbench.plan.suite import shipped_suites

    local = [file.stem for file in sorted(Path("suites").glob("*.yaml")) if ".budgets" not in file.name]
    return _beginning(incomplete, ((name, "") for name in sorted({*shipped_suites(), *local})))


def tasks(incomplete: str) -> Words:
    """Tasks of the package."""
    from meftbench.catalogue.tasks import TASKS

    return _beginning(incomplete, ((name, task.summary) for name, task in TASKS.items()))


def optimizers(incomplete: str) -> Words:
    """Optimizers."""
    from meftbench.catalogue.optimizers import OPTIMIZERS

    return _beginning(incomplete, ((name, optimizer.summary) for name, optimizer in OPTIMIZERS.items()))


def precisions(incomplete: str) -> Words:
    """Precisions."""
    from meftbench.catalogue.choices import PRECISIONS

    return _beginning(incomplete, ((name, "") for name in PRECISIONS))


def metrics(incomplete: str) -> Words:
    """Metrics of a record."""
    from meftbench.catalogue.metrics import METRICS

    return _beginning(incomplete, ((name, kind.meaning) for name, kind in METRICS.items()))


def schemas(incomplete: str) -> Words:
    """Published formats, for `list schema`."""
    from meftbench.schemas import FORMATS

    return _beginning(incomplete, ((name, what) for name, (_, what) in FORMATS.items()))


def runs(incomplete: str) -> Words:
    """Run folders, the newest first: those of ./runs and ./reports, and those in the folder that is begun."""
    begun = os.path.dirname(incomplete)
    places = [begun] if begun else [".", "runs", "reports"]
    files = [file for place in places for file in Path(place).glob("*/records.jsonl")]
    files.sort(key=lambda file: (-file.stat().st_mtime, str(file)))
    return _beginning(incomplete, ((str(file.parent), "") for file in files))


def runs_and_models(incomplete: str) -> Words:
    """What `export` takes: run folders, then models."""
    return [*runs(incomplete), *models(incomplete)]
