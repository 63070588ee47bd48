"""The bottleneck adapter: the module that every adapter method and MEFT insert."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meftbench.errors import unknown


class Bottleneck(nn.Module):
    """x -> up(activation(down(x))), without a residual of its own.

    D hidden size, r bottleneck dimension: 2·D·r + r + D parameters.
    Weights N(0, init_std²), biases 0 (Liao et al. 2023, section 3; Houlsby et al. 2019 for "near identity").
    activation: a name transformers knows ("gelu", "relu"). Raises UserError for any other.
    """

    def __init__(self, hidden_size: int, adapter_size: int, activation: str, init_std: float) -> None:
        super().__init__()
        from transformers.activations import ACT2FN

        if activation not in ACT2FN:
            raise unknown("adapter", "activation", activation, ACT2FN)
        self.down = nn.Linear(hidden_size, adapter_size)
        self.activation: nn.Module = ACT2FN[activation]
        self.up = nn.Linear(adapter_size, hidden_size)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=init_std)
            nn.init.zeros_(linear.bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        output_BLD: Tensor = self.up(self.activation(self.down(x_BLD)))
        return output_BLD

    def zero(self) -> None:
        """Make the adapter's output zero whatever it reads (for the starting-point shift, docs/design.md 2)."""
        with torch.no_grad():
            self.up.weight.zero_()
            self.up.bias.zero_()
