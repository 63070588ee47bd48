"""Methods: the ways to fine-tune, each with its settings.

A new one needs a settings class and an entry here, and a file with the function that `home` names (CONTRIBUTING.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from meftbench.catalogue.levers import LEVERS
from meftbench.catalogue.peft_methods import PEFT_METHODS
from meftbench.catalogue.settings import WIDEST, Settings


class Full(Settings):
    """Full fine-tuning has no hyper-parameters of its own."""

    @property
    def whole(self) -> bool:
        return True


class Lora(Settings):
    """Low-rank adaptation (Hu et al. 2021)."""

    rank: int = Field(default=8, ge=1, le=WIDEST)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] | None = None  # None: the backbone's query and value projections


class LoraFA(Lora):
    """LoRA with its first factor A frozen at its random start (LoRA-FA, Zhang et al. 2023, arXiv 2308.03303v1).

    Only B is trained, with the cell's own optimizer, so that the projection A·x of `rank` numbers a token is kept for
    the backward pass and x is not. The correction of B's gradient that version 2 of the paper adds belongs to an
    optimizer (peft's LoraFAOptimizer), and is no part of the method here.
    """


class Mezo(Settings):
    """MeZO (Malladi et al., NeurIPS 2023): two forward passes a step, and no backward pass.

    epsilon: how far weights are moved along a random direction to either side, times a standard normal number each.
    trained: `full`: every weight that is not frozen; `lora`: low-rank updates.
    rank, alpha, targets: of the updates, as for `lora`; None: its defaults.
    """

    epsilon: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    trained: Literal["full", "lora"] = "full"
    rank: int | None = Field(default=None, ge=1, le=WIDEST)
    alpha: float | None = Field(default=None, gt=0)
    targets: list[str] | None = None

    @field_validator("rank", "alpha", "targets")
    @classmethod
    def _needs_lora(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("trained") == "full":
            raise ValueError("needs trained: lora")
        return value

    @property
    def whole(self) -> bool:
        return self.trained == "full"

    def of_lora(self) -> Lora:
        """The settings of the low-rank updates."""
        given = {"rank": self.rank, "alpha": self.alpha, "targets": self.targets}
        return Lora.model_validate({name: value for name, value in given.items() if value is not None})

    def in_full(self) -> dict[str, Any]:
        defaults = {} if self.whole else {name: getattr(self.of_lora(), name) for name in ("rank", "alpha")}
        return super().in_full() | defaults


class Bottleneck(Settings):
    """Bottleneck adapters: down-projection to `adapter_size`, activation, up-projection."""

    adapter_size: int = Field(default=64, ge=1, le=WIDEST)
    activation: str | None = None  # None: the backbone's own
    init_std: float = Field(default=0.02, ge=0)


def _pieces(value: Any) -> Any:
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError("must be auto, or a whole number from 1")
    return value


def _step_bits(value: Any) -> Any:
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 30):
        raise ValueError("must be auto, or a whole number from 1 to 30")
    return value


Pieces = Annotated[Literal["auto"] | int, BeforeValidator(_pieces)]
StepBits = Annotated[Literal["auto"] | int, BeforeValidator(_step_bits)]


class Reversible(Bottleneck):
    """What all methods share whose layers are reversed in the backward pass.

    arithmetic: `exact`: fixed-point streams, whose reversal has no error.
    step_bits: the fixed-point step is 2^-step_bits; `auto`: one step for each channel, from the values in the first
        batch, and widened where a later batch needs more.
    stream_bits: the size of the integers that hold the streams: 32, as a float32 has; or 64, so that the fixed point
        adds no error to float32 even where a language model has values of very different size. 64 takes 8 bytes more
        for each element of a hidden state (4 in each of two streams), whatever the depth, and has no fused kernels.
    tiles, head_groups: the pieces in which token-wise work and attention are recomputed; `auto`: chosen by the shape.
    strict: verify in every step, at three blocks, that reversal was exact.
    """

    arithmetic: Literal["float", "exact"] = "exact"
    step_bits: StepBits = "auto"
    stream_bits: Literal[32, 64] = 32
    reversible_layers: Literal["all"] | int = "all"
    reversible_at: Literal["top", "bottom"] = "top"
    remaining: Literal["adapted", "frozen"] = "adapted"
    tiles: Pieces = 1
    head_groups: Pieces = 1
    strict: bool = False

    @field_validator("strict")
    @classmethod
    def _strict_needs_exact(cls, value: bool, info: ValidationInfo) -> bool:
        _check_exact(value, info)
        return value

    @field_validator("stream_bits")
    @classmethod
    def _wide_needs_exact(cls, value: int, info: ValidationInfo) -> int:
        if value == 64 and info.data.get("arithmetic") == "float":
            raise ValueError("64 needs arithmetic: exact")
        return value


def _check_exact(value: int | None, info: ValidationInfo) -> None:
    if value and info.data.get("arithmetic") == "float":
        raise ValueError("needs arithmetic: exact")


# λ = 2^-4 = 1/16: the smallest number of bits with which all three variants are close to the pre-trained model before
# training, both for an encoder with post-norms and for a language model with pre-norms (reports/start).
SIDE_BITS = 4


class Meft(Reversible):
    """MEFT (Liao, Tan, Monz, NeurIPS 2023, section 3); only adapter_size, lambda and beta are settings of the paper.

    arithmetic: `float` as published; `exact`: fixed-point streams, whose reversal has no error. Its factors below 1
        are 2^-side_bits, and that many bits of each element are saved in every block (side bits).
    coupling, output: how the two streams are coupled, and which one is the result (docs/design.md 2).
    adapter_input: what the adapter reads that is a sublayer by itself (G of MEFT1, F of MEFT2): the stream, as
        published, or the stream normed as the layer's attention reads it. In post-norm models the two are the same.
    """

    arithmetic: Literal["float", "exact"] = "float"
    side_bits: int | None = Field(default=None, ge=1, le=8)  # None: 4 where exact
    lambda_: float | None = Field(default=None, gt=0, alias="lambda")  # None: the variant's value, 0.1 or 1
    beta: float | None = Field(default=None, gt=0)
    coupling: Literal["paper", "centred"] = "paper"
    output: Literal["mean", "last"] = "mean"
    adapter_input: Literal["stream", "normed"] = "stream"

    @field_validator("side_bits")
    @classmethod
    def _bits_need_exact(cls, value: int | None, info: ValidationInfo) -> int | None:
        _check_exact(value, info)
        return value

    @field_validator("lambda_", "beta")
    @classmethod
    def _power_of_two(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is None or info.data.get("arithmetic") != "exact":
            return value
        if value not in [2.0**-m for m in range(9)]:
            raise ValueError("must be 1, 1/2, 1/4 ... or 1/256 where arithmetic is exact (1/8 is side_bits: 3)")
        side_bits = info.data.get("side_bits")
        if side_bits is not None and value not in (1.0, 2.0**-side_bits):
            raise ValueError(f"contradicts side_bits: {side_bits}, which is {2.0**-side_bits:g}; leave one of them out")
        return value

    def in_full(self) -> dict[str, Any]:
        # A record or a saved adapter states the number of bits, because the default may change.
        by_default = self.side_bits is None and self.lambda_ is None and self.beta is None
        return super().in_full() | ({"side_bits": SIDE_BITS} if by_default and self.arithmetic == "exact" else {})

    def small_factor(self, published: float) -> float:
        """The factor near zero where none is named: the published one, or the power of two of `side_bits`."""
        return published if self.arithmetic == "float" else 2.0 ** -(self.side_bits or SIDE_BITS)


class MeftExact(Meft):
    """MEFT with exact reversal and token-wise work in tiles; recommended over the arithmetic of the paper.

    Before training its output is close to that of the pre-trained model, which the paper's coupling does not achieve on
    deep pre-norm models.
    """

    # Version of the defaults, a part of the cell's id: cells measured under other defaults are told apart, though their
    # labels are the same (1: the paper's coupling, mean, 3 side bits).
    defaults: ClassVar[int] = 2

    arithmetic: Literal["exact"] = "exact"
    coupling: Literal["paper", "centred"] = "centred"
    output: Literal["mean", "last"] = "last"
    adapter_input: Literal["stream", "normed"] = "normed"
    tiles: Pieces = "auto"
    head_groups: Pieces = "auto"


class TwoStep(Reversible):
    """Midpoint and leapfrog (Gal et al., arXiv:2512.02056, eq. 2.4 and 2.6): a hidden state is computed from the two
    before it (docs/design.md 1). Layers are frozen and hold an adapter in parallel with the feed-forward, as MEFT's do.
    """

    arithmetic: Literal["exact"] = "exact"
    tiles: Pieces = "auto"
    head_groups: Pieces = "auto"


class Bdia(TwoStep):
    """BDIA (Zhang, Lewis, Kleijn, arXiv:2407.09093), whose γ is ±2^-side_bits: ±1/2 as published.

    With more bits training starts nearer to the pre-trained model, at that many bits of each element and layer.
    """

    side_bits: int = Field(default=1, ge=1, le=8)


@dataclass(frozen=True)
class Method:
    """A way to fine-tune: its settings, where it is applied, and its line in `list methods`.

    given: further arguments of the function, after the model and the settings.
    refuses: memory optimisations (levers) that do not work with the method, and why.
    backward: whether a step has a backward pass; without one, the method has an optimizer of its own.
    """

    settings: type[Settings]
    home: str  # "module:function", imported when the method is applied
    summary: str
    given: tuple[str, ...] = ()
    refuses: dict[str, str] = field(default_factory=dict)
    backward: bool = True


METHODS: dict[str, Method] = {
    "full": Method(Full, "meftbench.methods.full:apply", "every weight is trained that is not frozen"),
    "lora": Method(Lora, "meftbench.methods.lora:apply", "low-rank updates beside frozen weights (HF peft)"),
    "lora-fa": Method(
        LoraFA, "meftbench.methods.lora:apply_fa", "lora, of which only B is trained, A frozen (HF peft)"
    ),
    "mezo": Method(
        Mezo, "meftbench.methods.mezo:apply", "two forward passes a step, no backward pass: the floor", backward=False
    ),
    "houlsby": Method(
        Bottleneck, "meftbench.methods.adapters:apply_houlsby", "an adapter after attention and one after feed-forward"
    ),
    "pfeiffer": Method(
        Bottleneck, "meftbench.methods.adapters:apply_pfeiffer", "one adapter after feed-forward, between two norms"
    ),
    "parallel": Method(
        Bottleneck, "meftbench.methods.adapters:apply_parallel", "one adapter in parallel with feed-forward"
    ),
    "meft1": Method(
        Meft, "meftbench.methods.meft:apply_meft1", "reversible, paper's arithmetic; the layer is F, an adapter is G"
    ),
    "meft2": Method(
        Meft, "meftbench.methods.meft:apply_meft2", "reversible, paper's arithmetic; an adapter is F, the layer is G"
    ),
    "meft3": Method(
        Meft, "meftbench.methods.meft:apply_meft3", "reversible, paper's arithmetic; attention is F, feed-forward is G"
    ),
    "meft1-exact": Method(
        MeftExact, "meftbench.methods.meft:apply_meft1", "meft1, its reversal exact and in tiles: use this"
    ),
    "meft2-exact": Method(MeftExact, "meftbench.methods.meft:apply_meft2", "meft2, its reversal exact and in tiles"),
    "meft3-exact": Method(MeftExact, "meftbench.methods.meft:apply_meft3", "meft3, its reversal exact and in tiles"),
    "bdia": Method(
        Bdia,
        "meftbench.methods.two_step:apply_bdia",
        "reversible, exact; the pre-trained layers in evaluation, steps of 1/2 or 3/2 of theirs in training",
    ),
    "midpoint": Method(
        TwoStep,
        "meftbench.methods.two_step:apply_midpoint",
        "reversible, exact, without side bits; the layer before the last plus twice what a layer adds",
    ),
    "leapfrog": Method(
        TwoStep,
        "meftbench.methods.two_step:apply_leapfrog",
        "reversible, exact, without side bits; the step before is repeated, plus what a layer adds",
    ),
} | {
    name: Method(entry.settings, "meftbench.methods.peft_zoo:apply", entry.line, (name,), entry.refuses)
    for name, entry in PEFT_METHODS.items()
}


def why_refused(method: str, lever: str) -> str | None:
    """Why the method does not work with the lever; None: it does."""
    entry = METHODS[method]
    if not entry.backward and not LEVERS[lever].in_forward:
        return f"{lever} saves memory for a backward pass, and {method} has none"
    return entry.refuses.get(lever)
