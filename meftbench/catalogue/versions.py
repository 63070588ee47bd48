"""Versions of torch and transformers for which a prediction's rules hold, and which rules are known to differ.

The rules were read from the sources that their docstrings name, and hold for the versions that `RULES` names. Where a
rule is known to have been another in older versions, and by what, it is here, with its source
(prediction/older_rules.py carries it out).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from meftbench.errors import UserError

Version = tuple[int, int]

RULES = "torch 2.10 to 2.13, transformers 4.55 to 5.23"
# Of these versions any rule is known; outside of them a prediction would say what nobody has looked at.
KNOWN: dict[str, tuple[Version, Version]] = {
    "torch": ((1, 10), (2, 13)),
    "transformers": ((4, 15), (5, 23)),
    "liger": ((0, 4), (0, 8)),  # of liger-kernel; read from 0.4.2 to 0.8.5 (prediction/fused_losses.py)
}


@dataclass(frozen=True)
class Versions:
    """Major and minor numbers; None: the newest that the rules were read from."""

    torch: Version | None = None
    transformers: Version | None = None
    liger: Version | None = None

    @staticmethod
    def parse(text: str) -> Versions:
        """The versions of "torch=2.4,transformers=4.48"; "" is the newest. Patch numbers are not looked at.

        Raises UserError for another package, for what is no version, and for versions of which no rule is known.
        """
        found: dict[str, Version] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            matched = re.fullmatch(
                r"(torch|transformers|liger)\s*={1,2}\s*([0-9]{1,4})\.([0-9]{1,4})(?:\.[0-9]+)?(?:[.+a-z][.+a-z0-9]*)?",
                part,
            )
            if matched is None or matched[1] in found:
                what = f"{part!r} is no version" if matched is None else f"{matched[1]} is given twice"
                raise UserError("--for-versions", what, "write torch=2.4,transformers=4.48")
            name, version = matched[1], (int(matched[2]), int(matched[3]))
            oldest, newest = KNOWN[name]
            if not oldest <= version <= newest:
                what = f"the rules of {name} {matched[2]}.{matched[3]} are not known"
                cure = f"name one from {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}, or leave it out"
                raise UserError("--for-versions", what, cure)
            found[name] = version
        return Versions(**found)

    def __str__(self) -> str:
        """The versions whose rules are taken, as a prediction says it."""
        given = {"torch": self.torch, "transformers": self.transformers, "liger": self.liger}
        named = ", ".join(f"{name} {version[0]}.{version[1]}" for name, version in given.items() if version)
        return f"{named} where they are known to differ from those of {RULES}" if named else RULES

    @property
    def separate_cublaslt_workspace(self) -> bool:
        """Whether cuBLASLt has a workspace of its own, 1 MiB, for products with a bias vector: in torch 2.9.0, by a
        snapshot of it (docs/measuring.md); torch 2.10 shares that of cuBLAS (CublasHandlePool.cpp)."""
        return self.torch == (2, 9)

    @property
    def cublas_in_allocator(self) -> bool:
        """Whether torch's allocator holds the workspaces of cuBLAS: since torch 2.0; before, cuBLAS allocated its own
        (github.com/pytorch/pytorch pull request 85447)."""
        return self.torch is None or self.torch >= (2, 0)

    @property
    def foreach_optimizer(self) -> bool:
        """Whether optimizers update all parameters together: by default since torch 2.0 (torch/optim/optimizer.py)."""
        return self.torch is None or self.torch >= (2, 0)

    @property
    def keeps_gradients(self) -> bool:
        """Whether zero_grad sets gradients to zero instead of dropping them: by default before torch 2.0."""
        return not self.foreach_optimizer

    @property
    def softmax_keeps_input(self) -> bool:
        """Whether softmax's backward pass keeps its input beside its output: before torch 1.11, which took the dtype
        of the input in its place (`_softmax_backward_data`)."""
        return self.torch is not None and self.torch < (1, 11)

    @property
    def prefers_cudnn_attention(self) -> bool:
        """Whether cuDNN comes before flash: not in torch 2.9 and before (overlay.attention_kernel)."""
        return self.torch is None or self.torch >= (2, 10)

    @property
    def has_varlen_attention(self) -> bool:
        """Whether torch has attention over sequences of different lengths with windows and shared heads of keys: since
        torch 2.12 (torch/nn/attention/varlen.py)."""
        return self.torch is None or self.torch >= (2, 12)

    @property
    def repeats_keys(self) -> bool:
        """Whether keys and values that heads of queries share are repeated before attention: before torch 2.5, whose
        attention takes them as they are, and before transformers 4.55, which asks it to (pull request 39412)."""
        of_torch = self.torch is not None and self.torch < (2, 5)
        return of_torch or (self.transformers is not None and self.transformers < (4, 55))

    @property
    def groups_experts(self) -> bool:
        """Whether all experts of a layer run by products of groups of rows, whose shapes do not depend on the routing:
        since transformers 5 (transformers/integrations/moe.py); before, each was a module with rows of its own."""
        return self.transformers is None or self.transformers >= (5, 0)

    @property
    def shifts_logits(self) -> bool:
        """Whether a causal loss converts the logits to float32 and copies them without the last position: before
        transformers 4.50, which shifts the labels instead (transformers/loss/loss_utils.py, ForCausalLMLoss)."""
        return self.transformers is not None and self.transformers < (4, 50)

    @property
    def widens_logits(self) -> bool:
        """Whether a causal model's forward converts its logits to float32, so that those of the lower precision are not
        kept beside them: before transformers 4.46, whose loss does it (modeling_llama.py, LlamaForCausalLM)."""
        return self.transformers is not None and self.transformers < (4, 46)


NOW = Versions()
