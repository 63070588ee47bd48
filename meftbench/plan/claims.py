"""What the paper claims, and which cells speak of it: the data of claims.yaml, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from meftbench.strict_yaml import read, validated

FILE = Path(__file__).with_suffix(".yaml")


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,)


Globs = Annotated[tuple[str, ...], BeforeValidator(_listed)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Reason(_Strict):
    """A sentence that may explain a difference, and the facts under which it does. {fact} in it is filled in.

    against: another comparison of the same claim, which differs in these facts; its number is {other}.
    """

    when: dict[str, Globs]
    says: str
    against: dict[str, str] | None = None


class Claim(_Strict):
    """A sentence of the paper with its number, as a ratio. How it is held against cells: the head of claims.yaml.

    unknown: of its setting.  bound: what stands before the number.
    methods, beside: labels of the methods that it speaks of, and of those shown beside them.
    """

    name: str
    text: str
    source: str
    unknown: str
    stated: float
    bound: Literal["", "up to", "over"] = ""
    number: Literal["saving", "share", "score", "gap"]
    metric: Literal["paper_meft_activation_bytes", "score"]
    methods: Globs
    beside: Globs = ()
    of: dict[str, Globs]
    reasons: list[Reason]


class _File(_Strict):
    schema_: Literal[1] = Field(alias="schema")
    claims: list[Claim]


@cache
def paper_claims() -> tuple[Claim, ...]:
    """The claims in the order of the file."""
    return tuple(validated(read(FILE), _File).claims)


def matches(wanted: Mapping[str, Iterable[str]], facts: Mapping[str, Any]) -> bool:
    """Whether each fact that is wanted is there and as wanted."""
    return all(name in facts and among(globs, facts[name]) for name, globs in wanted.items())


def among(globs: Iterable[str], value: Any) -> bool:
    """Whether one of the globs matches, where there are any, and none of those that begin with "!"."""
    refused = [glob[1:] for glob in globs if glob.startswith("!")]
    taken = [glob for glob in globs if not glob.startswith("!")]
    said = str(value)
    return not any(fnmatchcase(said, glob) for glob in refused) and (
        not taken or any(fnmatchcase(said, glob) for glob in taken)
    )
