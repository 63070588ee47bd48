"""The scripts of reports/campaigns as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "reports" / "campaigns"


def campaign(name: str) -> Any:
    """The script of this name; the same module wherever a test asks for it."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))  # as Python has it that runs one of them: some import others
    if (known := sys.modules.get(f"campaign_{name}")) is not None:
        return known
    spec = importlib.util.spec_from_file_location(f"campaign_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module
