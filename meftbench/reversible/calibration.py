"""Calibration: the range of fixed-point streams is taken from the model, `step_bits: auto` (docs/design.md 3).

Language models hold values of very different size in their residual stream: in SmolLM2-135M one channel of the first
token exceeds 20,000 while most channels stay below 100. With one step for all channels, most of them would lose eight
bits to that one. So the step of each channel is a power of two of its own, chosen such that there are HEADROOM bits
above the largest value of the first forward pass. If a later pass leaves the range, it is run again with a wider one.

Shape suffixes: B samples, L positions, D hidden size; N blocks + 1.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from meftbench.reversible.arithmetic import ChannelSteps
from meftbench.reversible.watch import StreamError

# Room above the largest value met, in bits. The rounding error at that value is then smaller than float32's, unless
# the step would have to be finer than FINEST.
HEADROOM = 2
# 64-bit integers have bits to spare: values 64 times as large stay within the range, and a value of about 2⁻²² of the
# largest still keeps all the bits of a float32.
HEADROOM_OF_64 = 6
# Bounds of k, where the step is 2⁻ᵏ: the finest step in 32 bits; with the coarsest, an int32 still holds the largest
# float32. In 64 bits the finest step has as many bits as the range.
FINEST, COARSEST = 30, -100
# A channel that holds nearly nothing in one batch may hold more in the next, so each channel gets room for at least
# this share of the median channel's largest value.
SILENT = 1 / 16


class CalibratedRange(nn.Module):
    """The fixed-point steps of a stack, one per channel; None before the first forward pass of the model.

    It is a module without parameters, so that the steps are copied, pickled and saved with the model: they are its
    extra state in `state_dict`, int16 (D,), empty before calibration.
    widenings: how often a pass left the range and was run again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: ChannelSteps | None = None
        self.widenings = 0

    def calibrate(self, largest_ND: Tensor, limit: float, first_layer: int) -> None:
        """Take the steps from the largest |value| of each channel before each block and after the last.

        limit: what a stream may hold, in steps.
        Raises StreamError: values are NaN or infinite; it names the first layer that made them.
        """
        self.steps = ChannelSteps(self._fitted(largest_ND, limit, first_layer))

    def widen(self, largest_ND: Tensor, limit: float, first_layer: int) -> None:
        """Take coarser steps where channels need them; no step becomes finer, and at least one becomes coarser.

        Raises StreamError: as `calibrate` does.
        """
        assert self.steps is not None
        previous_D = self.steps.bits_D
        bits_D = torch.minimum(previous_D, self._fitted(largest_ND, limit, first_layer))
        if torch.equal(bits_D, previous_D):
            # The values were computed in floating point and just fit: rounding to steps made them leave the range.
            bits_D = previous_D - 1
        self.steps = ChannelSteps(bits_D)
        self.widenings += 1
        if self.widenings == 1:
            channels = int((bits_D < previous_D).sum())
            warnings.warn(
                f"a hidden state left the range of the fixed-point streams in {channels} of {len(bits_D)} channels; "
                "the range was widened and the forward pass run again (said once; counted as range_widenings)",
                stacklevel=2,
            )

    def _fitted(self, largest_ND: Tensor, limit: float, first_layer: int) -> Tensor:
        largest_ND = largest_ND.to("cpu", torch.float64)
        finite_N = torch.isfinite(largest_ND).all(1)
        if not finite_N.all():
            block = int((~finite_N).nonzero()[0])
            where = f"layer {first_layer + block - 1}" if block else "the stack's input"
            what = "the range of its streams cannot be calibrated: it holds NaN or infinity"
            raise StreamError(where, what, "check the model's weights and inputs, or use bf16 or fp32 instead of fp16")
        largest_D = largest_ND.amax(0)
        largest_D = largest_D.clamp(min=float(largest_D.median()) * SILENT)
        # frexp: value = mantissa · 2ᵉ with 1/2 <= mantissa < 1, so every value is below 2ᵉ.
        range_bits = int(math.log2(limit))
        finest, headroom = (FINEST, HEADROOM) if range_bits < 32 else (range_bits, HEADROOM_OF_64)
        bits_D = range_bits - headroom - torch.frexp(largest_D).exponent
        bits_D = torch.where(largest_D == 0, finest, bits_D)
        return bits_D.clamp(COARSEST, finest).to(torch.int16)

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.int16) if self.steps is None else self.steps.bits_D.clone()

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = ChannelSteps(state.clone()) if state.numel() else None


class Largest:
    """Observer of a forward pass: the largest |value| of each channel before each block, and after the last."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def __call__(self, direction: str, block: int, streams: list[Tensor]) -> None:
        self.add(streams)

    def add(self, streams: list[Tensor]) -> None:
        largest = [torch.linalg.vector_norm(s.flatten(0, 1).float(), math.inf, 0) for s in streams]
        self._rows.append(torch.maximum(*largest))

    def table(self) -> Tensor:
        """(N, D), float32."""
        return torch.stack(self._rows)


def computed(tensor: Tensor) -> bool:
    """Whether the tensor holds values; fake and meta tensors, by which a step is traced, do not."""
    return not (isinstance(tensor, FakeTensor) or tensor.is_meta)
