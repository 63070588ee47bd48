"""The claims of the paper, and which cells can be compared with each: the validated content of claims.yaml."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from meftbench.strict_yaml import read, validated

FILE = Path(__file__).with_suffix(".yaml")


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,)


Globs = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Reason(_Strict):
    """A sentence that may explain why our number differs from the paper's.

    when: the facts of a comparison under which it is shown, as globs.  says: the sentence; {fact} in it is filled in.
    against: facts by which another comparison of the same claim differs from this one; its number is {other}.
    """

    when: dict[str, Globs]
    says: str
    against: dict[str, str] | None = None


class Claim(_Strict):
    """A sentence of the paper with its number. The head of claims.yaml says how it is compared with cells.

    unknown: what is not known of its setting.  stated: the number, as a ratio.  bound: the words before the number.
    methods, beside: globs on labels of the methods that it is about, and of those shown for comparison.
    of: what the cells must be that it is compared with, as globs by field.
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


def matches(conditions: Mapping[str, Iterable[str]], facts: Mapping[str, Any]) -> bool:
    """Whether each fact that `conditions` name is known and matches their globs."""
    return all(name in facts and among(globs, facts[name]) for name, globs in conditions.items())


def among(globs: Iterable[str], value: Any) -> bool:
    """Whether `value` matches no glob that follows a "!", and one of the other globs where there are any."""
    excluding = [glob[1:] for glob in globs if glob.startswith("!")]
    including = [glob for glob in globs if not glob.startswith("!")]
    text = str(value)
    return not any(fnmatchcase(text, glob) for glob in excluding) and (
        not including or any(fnmatchcase(text, glob) for glob in including)
    )
