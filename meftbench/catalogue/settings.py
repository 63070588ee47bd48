"""The base class of every method's settings."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

WIDEST = 2**17  # of ranks and adapters; the widest layer of a published model has 53,248 units


class Settings(BaseModel):
    """Hyper-parameters of a method; unknown keys and wrong types are refused before torch is loaded."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)

    @property
    def whole(self) -> bool:
        """Whether the weights of the pre-trained model are trained themselves, so that there is no adapter."""
        return False

    def in_full(self) -> dict[str, Any]:
        """All settings, defaults included, as plain values under their names in a suite; a record holds these."""
        return self.model_dump(mode="json", by_alias=True)
