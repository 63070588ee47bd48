"""No module imports itself by way of others; what names lead to is not an import (`home` in the catalogue)."""

from __future__ import annotations

import re
from pathlib import Path

import grimp


def test_no_modules_import_each_other():
    """Also by way of others, and inside functions. Imports for type checkers alone are left out."""
    graph = grimp.build_graph("meftbench", exclude_type_checking_imports=True)
    remaining = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    assert len(remaining) > 100
    while free := [module for module, imported in remaining.items() if not imported & remaining.keys()]:
        for module in free:
            del remaining[module]
    assert {} == remaining


ROOT = Path(__file__).resolve().parents[1]


def test_a_cell_passes_through_few_files():
    """The table of CONTRIBUTING: at most fifteen files from a suite to a row, each with the function it names, each
    tied to one before it: by an import, or by the name of its module where the torch side must not be imported."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split("### From a suite to a row of its table")[1].split("\n## ")[0]
    path = re.findall(r"^\| `(\w+(?:/\w+)*\.py)` \| `(\w+)` \|", text, re.MULTILINE)
    sources = [(ROOT / "meftbench" / file).read_text() for file, _ in path]
    modules = [f"meftbench.{file.removesuffix('.py').replace('/', '.')}" for file, _ in path]

    assert 10 <= len(path) <= 15
    for (file, function), source in zip(path, sources, strict=True):
        assert re.search(rf"^(?:def|class) {function}\b", source, re.MULTILINE), f"{file}: {function}"
    for number in range(1, len(path)):
        before = range(number)
        assert any(modules[number] in sources[i] or modules[i] in sources[number] for i in before), path[number]
