"""What every method's settings have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Hyper-parameters of a method; unknown keys and wrong types are refused before torch is loaded."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)
