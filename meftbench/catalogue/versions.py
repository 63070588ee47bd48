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

RULES = "torch 2.10 to 2.13, transformers 4.50 to 5.23"


@dataclass(frozen=True)
class Versions:
    """Major and minor numbers; None: the newest that the rules were read from."""

    torch: Version | None = None
    transformers: Version | None = None

    @staticmethod
    def parse(text: str) -> Versions:
        """The versions of "torch=2.4,transformers=4.48"; "" is the newest. Patch numbers are not looked at.

        Raises UserError for another package, and for what is no version.
        """
        found: dict[str, Version] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            matched = re.fullmatch(r"(torch|transformers)\s*={1,2}\s*(\d{1,4})\.(\d{1,4})(?:[.+\w]*)", part)
            if matched is None or matched[1] in found:
                what = f"{part!r} is no version" if matched is None else f"{matched[1]} is given twice"
                raise UserError("--for-versions", what, "write torch=2.4,transformers=4.48")
            found[matched[1]] = (int(matched[2]), int(matched[3]))
        return Versions(**found)

    def __str__(self) -> str:
        """The versions whose rules are taken, as a prediction says it."""
        given = {"torch": self.torch, "transformers": self.transformers}
        named = ", ".join(f"{name} {version[0]}.{version[1]}" for name, version in given.items() if version)
        return f"{named}; others: {RULES}" if named else RULES

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
