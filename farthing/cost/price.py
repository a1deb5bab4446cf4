"""What the machine costs while it is on, whether it works or not."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

NANO = 10**9
"""Nano-units in one unit of currency, and nanoseconds in one second."""

SECONDS_PER_HOUR = 3600
HOURS_PER_YEAR = 365 * 24

Number = int | float | Decimal


class PriceError(ValueError):
    """The flags do not make a price. The message names the flag and the mend."""


@dataclass(frozen=True, slots=True)
class Price:
    """A machine's price by the second, exact, so that sums over millions of steps cannot drift.

    `nano_per_second` is in 10⁻⁹ of the currency per second; `currency` is an ISO 4217 code;
    `basis` says in words where the figure comes from. `str()` gives a line for people.
    """

    nano_per_second: Fraction
    currency: str
    basis: str

    @classmethod
    def from_flags(
        cls,
        *,
        currency: str,
        price_per_hour: Number | None = None,
        purchase_price: Number | None = None,
        lifetime_years: Number | None = None,
        watts: Number | None = None,
        power_price: Number | None = None,
    ) -> Price:
        """The price that the flags of the same names state; 0 where they state none.

        Either `price_per_hour`, or all four of the others: purchase_price / lifetime +
        watts × power_price, with the lifetime in years of 365 days and power_price per kWh.
        Raises PriceError on a negative, missing or contradictory part.
        """
        if not re.fullmatch("[A-Z]{3}", currency):
            raise PriceError(
                f"--currency {currency!r} is not an ISO 4217 code: "
                "give three capital letters, such as CNY"
            )
        owned = {
            "--purchase-price": purchase_price,
            "--lifetime-years": lifetime_years,
            "--watts": watts,
            "--power-price": power_price,
        }
        given = [flag for flag, value in owned.items() if value is not None]
        missing = [flag for flag, value in owned.items() if value is None]
        if price_per_hour is not None and given:
            raise PriceError(
                f"--price-per-hour and {', '.join(given)} state the price twice: "
                "keep --price-per-hour for a hired machine, the others for one you own"
            )
        if given and missing:
            raise PriceError(
                f"the price of a machine you own also needs {', '.join(missing)}: "
                f"add what is missing, or give --price-per-hour in place of {', '.join(given)}"
            )
        if price_per_hour is not None:
            per_hour = _exact("--price-per-hour", price_per_hour)
            return cls(per_hour * NANO / SECONDS_PER_HOUR, currency, "by the hour")
        if not given:
            return cls(
                Fraction(0), currency, "no price given, so every cost is 0: set --price-per-hour"
            )
        purchase, years, power, per_kwh = (_exact(flag, value) for flag, value in owned.items())
        if years == 0:
            raise PriceError("--lifetime-years is 0: give the years the machine is to serve")
        per_hour = purchase / (years * HOURS_PER_YEAR) + power / 1000 * per_kwh
        return cls(
            per_hour * NANO / SECONDS_PER_HOUR,
            currency,
            f"{purchase_price} {currency} over {lifetime_years} years "
            f"and {watts} W at {power_price} {currency}/kWh",
        )

    @property
    def per_hour(self) -> float:
        """The price of an hour, in units of the currency, for showing."""
        return float(self.nano_per_second * SECONDS_PER_HOUR / NANO)

    def nano(self, nanoseconds: int) -> int:
        """What that time costs, in nano-units of the currency, rounded down."""
        rate = self.nano_per_second
        return nanoseconds * rate.numerator // (rate.denominator * NANO)

    def __str__(self) -> str:
        return f"{self.per_hour:.4g} {self.currency} an hour ({self.basis})"


def _exact(flag: str, value: Number | None) -> Fraction:
    """The number as its user wrote it: 0.1 is a tenth, not the nearest binary fraction."""
    decimal = Decimal(str(value))
    if not decimal.is_finite() or decimal < 0:
        raise PriceError(f"{flag} {value} is no price to reckon with: give a number, 0 or more")
    return Fraction(decimal)
