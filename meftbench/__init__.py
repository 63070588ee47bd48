"""meftbench: which fine-tuning method fits your GPU, and what does it cost?"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from meftbench.estimates import estimate as estimate
    from meftbench.estimates import fit as fit
    from meftbench.methods import apply_method as apply_method
    from meftbench.methods.saving import load_adapter as load_adapter
    from meftbench.methods.saving import save_adapter as save_adapter
    from meftbench.methods.unloading import unload as unload
    from meftbench.own_model import measure as measure
    from meftbench.planned import plan_for as plan_for
    from meftbench.records.store import load_run as load_run
    from meftbench.report.render.report import plots as plots
    from meftbench.runner import run_suite as run_suite

# The module of each public name. It is imported on first use, so that `import meftbench` and the command line do not
# import torch.
_MODULES = {
    "apply_method": "meftbench.methods",
    "save_adapter": "meftbench.methods.saving",
    "load_adapter": "meftbench.methods.saving",
    "unload": "meftbench.methods.unloading",
    "measure": "meftbench.own_model",
    "estimate": "meftbench.estimates",
    "fit": "meftbench.estimates",
    "plan_for": "meftbench.planned",
    "run_suite": "meftbench.runner",
    "load_run": "meftbench.records.store",
    "plots": "meftbench.report.render.report",
}
__all__ = [*_MODULES]


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'meftbench' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
