from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from farthing.cost.price import NANO, Price, PriceError

HOUR_NS = 3600 * NANO
OWNED: dict[str, Any] = {
    "purchase_price": 26000,
    "lifetime_years": 3,
    "watts": 800,
    "power_price": Decimal("0.6"),
}


@pytest.mark.parametrize("amount", [1.2, "1.20"])
def test_by_the_hour_is_exact(amount: float | str) -> None:
    price = Price.from_flags(
        price_per_hour=Decimal(amount) if isinstance(amount, str) else amount, currency="CNY"
    )
    assert price.nano_per_second == Fraction(1_200_000_000, 3600)
    assert price.nano(HOUR_NS) == 1_200_000_000
    assert price.currency == "CNY"
    assert str(price) == "1.2 CNY an hour (by the hour)"


def test_owned_machine_over_its_lifetime() -> None:
    # Two 4090s over three years: 26,000 CNY, and 12,614.4 CNY of power at 800 W and 0.6 CNY/kWh.
    price = Price.from_flags(currency="CNY", **OWNED)
    assert price.nano(3 * 8760 * HOUR_NS) == 38_614_400_000_000
    assert "26000 CNY over 3 years and 800 W at 0.6 CNY/kWh" in str(price)


def test_nothing_given_is_zero_and_says_so() -> None:
    price = Price.from_flags(currency="EUR")
    assert price.nano(HOUR_NS) == 0
    assert str(price) == "0 EUR an hour (no price given, so every cost is 0: set --price-per-hour)"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"price_per_hour": -1}, "--price-per-hour -1 .* 0 or more"),
        ({"price_per_hour": float("nan")}, "--price-per-hour nan"),
        ({"price_per_hour": float("inf")}, "--price-per-hour inf"),
        ({"price_per_hour": 1, "watts": 300}, "--price-per-hour and --watts state the price twice"),
        ({"purchase_price": 26000, "watts": 800}, "also needs --lifetime-years, --power-price"),
        (OWNED | {"watts": -800}, "--watts -800"),
        (OWNED | {"lifetime_years": 0}, "--lifetime-years is 0"),
        ({"currency": "yuan"}, "--currency 'yuan' .* three capital letters"),
    ],
)
def test_errors_name_the_flag_and_the_mend(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(PriceError, match=message):
        Price.from_flags(**({"currency": "CNY"} | flags))
