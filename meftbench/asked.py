"""What predictions are asked, checked: the cell, and arguments that come from the command line or from Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from meftbench.catalogue.profiles import PREDICTED, CpuProfile, Profile, find_device, find_profile
from meftbench.errors import UserError, unknown
from meftbench.plan.cell import Cell
from meftbench.plan.factories import check_allowed, places_of
from meftbench.plan.models import check_model, image_tokens, known_config, max_positions
from meftbench.plan.point import cell_of
from meftbench.units import format_bytes, parse_bytes

Tell = Callable[[str], None]


def silent(line: str) -> None:
    """The default of `tell`: shows no progress."""


def nothing() -> None:
    """The default of `ready`: does nothing."""


def asked_cell(
    verb: str,
    model: str | Mapping[str, Any],
    method: str | Mapping[str, Any],
    profile: str,
    config: Mapping[str, Any] | None,
    settings: Mapping[str, Any] | None,
    allow_code: bool = False,
    **values: Any,
) -> Cell:
    """The cell to be predicted, checked like a cell of a suite.

    verb: the command or function, for messages.  values: further fields by axis; None: not given.
    Raises UserError: a value is wrong, or the user's own code is needed and not allowed.
    """
    named_device = (find_device if verb == "estimate" else find_profile)(profile, f"{verb}: profile")
    fields: dict[str, Any] = {"device": "counted" if isinstance(named_device, CpuProfile) else PREDICTED + profile}
    # As in a suite, a name, or a mapping that has it beside the settings.
    overrides = {"config": mapping_of("config", config)} if config else {}
    fields["model"] = {**(model if isinstance(model, Mapping) else {"name": model}), **overrides}
    named = method if isinstance(method, Mapping) else {"name": method}
    fields["method"] = {**named, **mapping_of("settings", settings)}
    cell = cell_of(verb, fields | {key: value for key, value in values.items() if value is not None})
    check_allowed(places_of(cell, f"{verb}: model", f"{verb}: batch"), [cell], allow_code)
    return cell


def check_room(memory_bytes: int, device: Profile) -> None:
    """Raises UserError: a card with so much memory has no room even for the context of a process."""
    if memory_bytes <= device.context_bytes:
        what = f"{format_bytes(memory_bytes)} is no more than the context of a process takes"
        raise UserError("memory", f"{what} ({format_bytes(device.context_bytes)})", "write more, such as 24GiB")


def check_names(verb: str, arguments: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises UserError: an argument is none of `known`."""
    for name in arguments:
        if name not in known:
            raise unknown(verb, "argument", name, known)


def text_of(name: str, value: Any) -> str:
    """`value`, a text or a path, as text. Raises UserError: it is neither."""
    if not isinstance(value, str | os.PathLike):
        raise UserError(name, f"{value!r} is not a text", "give one, or leave it out")
    return os.fspath(value)


def mapping_of(name: str, value: Any) -> dict[str, Any]:
    """`value` as a dictionary, empty for None. Raises UserError: it is no mapping."""
    if value is not None and not isinstance(value, Mapping):
        raise UserError(name, f"{value!r} is not a mapping", "give a dictionary, or leave it out")
    return dict(value or {})


def check_jobs(jobs: Any) -> None:
    """Raises UserError: `jobs` is no number of processes."""
    if not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1:
        raise UserError("jobs", f"{jobs!r} is no number of processes", "give a whole number from 1")


def bytes_of(size: Any) -> int:
    """The bytes of "24GiB" or of a number. Raises UserError: it is no amount of memory."""
    try:
        return parse_bytes(size)
    except ValueError as error:
        what, _, cure = str(error).partition("; ")
        raise UserError("memory", what, cure) from None


def positions_of(verb: str, model: str, overrides: dict[str, Any]) -> tuple[int | None, int | None]:
    """The longest sequence of `model` (None: not known), and the tokens of an image where it reads images, its only
    length (else None)."""
    check_model(f"{verb}: model", model, overrides)
    of_image = image_tokens(known_config(model, overrides) or {})
    return of_image or max_positions(model, overrides), of_image
