"""How methods look in every figure: colours, markers, line styles.

Colours are those of Okabe and Ito, which colour-blind readers tell apart. A method keeps its colour in every figure;
memory optimisations (levers) and settings change the marker. An exact method has a darker shade of the colour of the
published method.
"""

from __future__ import annotations

from collections.abc import Mapping
from colorsys import hls_to_rgb
from typing import TYPE_CHECKING

from meftbench.catalogue.methods import METHODS
from meftbench.catalogue.metrics import BREAKDOWN
from meftbench.catalogue.peft_methods import PEFT_METHODS
from meftbench.report.results import methods_in_order, rows_of

if TYPE_CHECKING:
    from pandas import DataFrame

COLOUR = {
    "full": "#000000",
    "lora": "#0072B2",
    "houlsby": "#E69F00",
    "pfeiffer": "#7F7F7F",
    "parallel": "#CC79A7",
    "meft1": "#009E73",
    "meft2": "#56B4E9",
    "meft3": "#D55E00",
    "meft1-exact": "#004D38",
    "meft2-exact": "#1B5E8A",
    "meft3-exact": "#7A3500",
}
_FALLBACK = "#5B3A29"


def _distinct_colour(n: int) -> str:
    """The n-th of a series of colours that differ from their neighbours: the hue turns by the golden ratio."""
    red, green, blue = hls_to_rgb(n * 0.618034 % 1, (0.38, 0.52, 0.66)[n % 3], 0.55)
    return f"#{round(255 * red):02X}{round(255 * green):02X}{round(255 * blue):02X}"


_ADDED = [name for name in METHODS if name not in COLOUR and name not in PEFT_METHODS]
COLOUR |= {name: _distinct_colour(n) for n, name in enumerate([*PEFT_METHODS, *_ADDED])}
LINE = {"measured": "-", "counted": "-.", "predicted": "--"}
CATEGORY = dict(
    zip(
        BREAKDOWN,
        ("#0072B2", "#56B4E9", "#E69F00", "#F0E442", "#D55E00", "#CC79A7", "#009E73", "#7F7F7F", "#000000"),
        strict=True,
    )
)
_LEVER_MARKERS = {"": "o", "checkpoint": "s", "offload": "^", "checkpoint+offload": "D"}
SETTING_MARKERS = ("v", "P", "X", "*", "<", ">", "p", "h")


def colour(name: str) -> str:
    """The colour of a method by its name, whatever its levers and settings."""
    return COLOUR.get(name, _FALLBACK)


def distinct_colours(methods: Mapping[str, str]) -> dict[str, str]:
    """A colour for each line. methods: the name of the method of each. The first line of a method has the method's
    colour; further ones, such as those with other settings, have their own: lines in one colour cannot be told apart.
    """
    colours: dict[str, str] = {}
    used: set[str] = {colour(method) for method in methods.values()}
    own: set[str] = set()
    spare = (shade for n in range(10**6) if (shade := _distinct_colour(n)) not in used)
    for line, method in methods.items():
        colours[line] = next(spare) if colour(method) in own else colour(method)
        own.add(colour(method))
    return colours


def markers(frame: DataFrame) -> dict[str, str]:
    """The marker of each method, by its levers; one with settings takes the next that its colour does not have yet."""
    marker_of: dict[str, str] = {}
    taken: set[tuple[str, str]] = set()
    rows = {row["method"]: row for row in rows_of(frame)}
    for method in sorted(methods_in_order(frame), key=lambda name: any(part.settings for part in rows[name]["parts"])):
        usual = [_LEVER_MARKERS[rows[method]["levers"]]] if rows[method]["levers"] in _LEVER_MARKERS else []
        shade = colour(rows[method]["method_name"])
        free = [mark for mark in (*usual, *SETTING_MARKERS) if (shade, mark) not in taken]
        marker_of[method] = free[0] if free else "."
        taken.add((shade, marker_of[method]))
    return marker_of
