"""The engine: layers whose inputs are recomputed from their outputs (DESIGN 3). Usable without the rest."""

from meftbench.reversible.arithmetic import Arithmetic, Float
from meftbench.reversible.coupling import Coupling
from meftbench.reversible.stack import Block, ReversibleStack

__all__ = ["Arithmetic", "Block", "Coupling", "Float", "ReversibleStack"]
