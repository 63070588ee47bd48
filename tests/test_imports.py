"""No module imports itself by way of others; what names lead to is not an import (`home` in the catalogue)."""

from __future__ import annotations

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
