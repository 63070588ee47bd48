"""The reversible engine: stacks of blocks whose inputs are recomputed from their outputs in the backward pass
(docs/design.md 1 to 5). It can be used without the other parts of meftbench:

blocks = [Block({"layer": layer, "adapter": adapter}, f, g) for ...]
exact = FixedPoint()
stack = ReversibleStack(blocks, Coupling(exact, 1 / 8), Coupling(exact, 1.0), swap=True, carrier=0, tiles="auto")
h_BLD = stack(h_BLD, attention_mask)
"""

from meftbench.reversible.arithmetic import Arithmetic, FixedPoint, Float
from meftbench.reversible.coupling import Coupling
from meftbench.reversible.fork import fork
from meftbench.reversible.stack import Block, Relay, ReversibleStack
from meftbench.reversible.sublayers import SubLayer
from meftbench.reversible.watch import StreamError

__all__ = [
    "Arithmetic",
    "Block",
    "Coupling",
    "FixedPoint",
    "Float",
    "Relay",
    "ReversibleStack",
    "StreamError",
    "SubLayer",
    "fork",
]
