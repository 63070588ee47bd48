"""A price list of the user's own: what an hour of a card costs. None is shipped, since prices change."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from meftbench.errors import UserError
from meftbench.strict_yaml import read, validated

_EXAMPLE = "cards: {a100-80gb: {per_hour: 1.50, currency: USD}}"


class Price(BaseModel):
    """per_hour: of one card.  currency: as it is to be printed, such as USD."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    per_hour: float = Field(gt=0, le=10**6, allow_inf_nan=False)
    currency: str = Field(pattern=r"^\S{1,8}$")

    def per_million_tokens(self, tokens_per_s: float) -> float:
        """What a million tokens cost, in `currency`."""
        return self.per_hour / 3600 * 1e6 / tokens_per_s


class Prices(BaseModel):
    """cards: by the name of a device profile, as in `meftbench list profiles` or in a profile of one's own."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    schema_: Literal[1] = Field(alias="schema")
    cards: dict[str, Price] = Field(min_length=1)


def price_of(file: Path, card: str) -> Price:
    """The price of `card` in the file. Raises UserError: the file has a fault, or has no such card."""
    document = read(file)
    prices = validated(document, Prices).cards
    if card not in prices:
        what = f"there is no price of {card} among {', '.join(prices)}"
        raise UserError(document.where(("cards",)), what, f"add it: {_EXAMPLE.replace('a100-80gb', card)}")
    return prices[card]
