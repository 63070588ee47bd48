"""What every method's settings have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Hyper-parameters of a method; unknown keys and wrong types are refused before torch is loaded."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)

    def in_full(self) -> dict[str, Any]:
        """All settings as plain values under the names of a suite, defaults filled in: what a record says."""
        return self.model_dump(mode="json", by_alias=True)
