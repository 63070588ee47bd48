"""What the types of all published formats share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Bytes = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
# JSON has no infinity and no NaN: they are written as these words.
Number = int | float | Literal["NaN", "Infinity", "-Infinity"]
Source = Literal["measured", "counted", "predicted"]


class Published(BaseModel):
    """A type of a published format. Later versions of meftbench may add fields, and take none away."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True, populate_by_name=True)


class MethodPart(Published):
    """A method or a lever. A list of them, the method first, says as fields what a method's label says as text."""

    name: str
    settings: dict[str, Any]
    """Those that differ from the defaults."""
