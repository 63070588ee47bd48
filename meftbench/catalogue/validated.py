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

from meftbench.catalogue.profiles import CpuProfile, Profile
from meftbench.catalogue.speeds import TimesFound
from meftbench.strict_yaml import read, validated

FILE = Path(__file__).with_name("validated.yaml")
TIMES = Path(__file__).with_name("step_times.yaml")
STEP_PEAKS = ("peak_allocated", "reserved", "device_used")
BETWEEN_STEPS = ("allocated_after_step",)
OPERATOR_PEAKS = ("operator_peak",)


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


def errors_of(quantities: tuple[str, ...], profile: str | None = None, setting: str = "complete") -> list[float]:
    """The errors of figures of these quantities with such settings: of one card, or of all."""
    return [
        error
        for group in validated_figures().groups
        if group.quantity in quantities and group.setting == setting and profile in (None, group.profile)
        for error in group.errors
    ]


def about_validation(profile: Profile) -> str:
    """A sentence: on how many measurements predictions for this card were validated, and how far off they were."""
    own = profile.validated
    if own is not None:
        worst = f"median error {own.median:.2%}, worst {own.worst:.2%}"
        return f"validated on {own.cells} cells of {profile.device}: peak allocated, {worst}"
    if said := _figures(profile.name):
        return f"held against published measurements of {profile.device}: {said}"
    cards = {group.profile for group in validated_figures().groups if group.setting == "complete"}
    names = ", ".join(sorted(name.partition("-")[0].upper() for name in cards))
    return f"not validated on {profile.device}; rules held against published measurements on {names}: {_figures()}"


def about_times(profile: Profile | CpuProfile) -> str:
    """A sentence: where the speeds of a device are from, and how far off step times were that were predicted so."""
    speeds = profile.speeds
    if speeds is None:
        return "no step time is predicted: its profile has no speeds"
    if speeds.validated is not None:
        return f"speeds measured on it; {_times(speeds.validated)}"
    where = "speeds measured on it" if speeds.calibrated else "speeds of its data sheet, with assumed efficiency"
    return f"{where}, not validated there; of a calibrated CPU: {_times(validated(read(TIMES), TimesFound))}"


def _times(found: TimesFound) -> str:
    return f"{found.of} of {found.cells} cells, median error {found.median:.1%}, worst {found.worst:.1%}"


def _figures(profile: str | None = None) -> str:
    """How many peaks, levels between steps and operators with complete settings there are, and the worst errors; and
    of reserved memory, whose settings no source states whole. Their models are language models, their methods full
    fine-tuning, LoRA and others of peft, and that is said."""
    kinds = {"peak": STEP_PEAKS, "level between steps": BETWEEN_STEPS, "operator": OPERATOR_PEAKS}
    found = {kind: errors_of(quantities, profile) for kind, quantities in kinds.items()}
    parts = [
        f"{len(errors)} {_plural(kind, len(errors))} (worst error {max(map(abs, errors)):.2%})"
        for kind, errors in found.items()
        if errors
    ]
    if reserved := errors_of(("reserved",), profile, "partial"):
        sizes = [abs(error) for error in reserved]
        parts.append(f"{len(sizes)} of reserved memory (median {median(sizes):.2%}, worst {max(sizes):.2%})")
    return f"{', '.join(parts)}; of language models, none by a MEFT method" if parts else ""


def _plural(kind: str, count: int) -> str:
    """`kind`, for so many: "peaks", "levels between steps"."""
    first, space, rest = kind.partition(" ")
    return f"{first}{'s' * (count != 1)}{space}{rest}"
