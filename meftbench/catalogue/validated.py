"""How far predictions were from what others measured and published, as the package carries it.

The file is written by `python reports/campaigns/published.py reports/published`, which has every figure behind it; the
figures themselves are in the repository and not in the package.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from meftbench.catalogue.profiles import PROFILES, Profile
from meftbench.strict_yaml import read, validated

FILE = Path(__file__).with_name("validated.yaml")
PEAKS = ("peak_allocated", "reserved", "device_used")


class Group(BaseModel):
    """The errors of one kind of figure. errors: predicted by measured, minus one, in the order of the table.

    source: who measured.  quantity: what was measured (reports/published/figures.yaml).  setting: complete, where
    nothing is known that would change the bytes; partial otherwise.  rules: the versions whose rules were taken.
    profile: of the card.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    source: str
    quantity: str
    setting: Literal["complete", "partial"]
    rules: str
    profile: str
    errors: list[float] = Field(min_length=1)

    @property
    def median(self) -> float:
        """Of the errors without their signs."""
        return median(abs(error) for error in self.errors)

    @property
    def worst(self) -> float:
        return max(abs(error) for error in self.errors)


class Validated(BaseModel):
    """Everything that was held against real measurements. torch, transformers: versions that predicted.
    traces, allocations, equal_addresses: of real allocators, replayed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    schema_: Literal[1] = Field(alias="schema")
    torch: str
    transformers: str
    traces: int
    allocations: int
    equal_addresses: int
    groups: list[Group]


@cache
def validated_figures() -> Validated:
    return validated(read(FILE), Validated)


def peak_errors(profile: str | None = None) -> list[float]:
    """The errors of peaks with complete settings: of one card, or of all."""
    return [
        error
        for group in validated_figures().groups
        if group.quantity in PEAKS and group.setting == "complete" and profile in (None, group.profile)
        for error in group.errors
    ]


def about_validation(profile: Profile) -> str:
    """A sentence: on how many measurements predictions for this card were validated, and how far off they were."""
    own = profile.validated
    if own is not None:
        return f"validated on {own.cells} cells of this card: {_off(own.median, own.worst)} (peak allocated)"
    of_card, of_all = peak_errors(profile.name), peak_errors()
    if of_card:
        return f"held against {len(of_card)} published peaks of this card: {_spread(of_card)}"
    cards = {group.profile for group in validated_figures().groups if group.setting == "complete"}
    names = ", ".join(sorted(PROFILES[name].device for name in cards if name in PROFILES))
    return f"not validated on this card; rules held against {len(of_all)} published peaks ({names}): {_spread(of_all)}"


def _spread(errors: list[float]) -> str:
    sizes = [abs(error) for error in errors]
    return _off(median(sizes), max(sizes))


def _off(middle: float, worst: float) -> str:
    return f"median error {middle:.2%}, worst {worst:.2%}"
