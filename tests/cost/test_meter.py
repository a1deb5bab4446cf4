from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.batching.types import Share, StepStats
from farthing.cost.meter import LATE_STEPS, Cost, Meter
from farthing.cost.price import NANO, Price

CNY_PER_HOUR = Price.from_flags(price_per_hour=1.2, currency="CNY")
NANO_PER_NS = Price(Fraction(NANO), "CNY", "one nano-unit a nanosecond")
FREE = Price.from_flags(currency="CNY")


def share(request_id: str, prefill: int = 0, decode: int = 0, cached: int = 0) -> Share:
    return Share(request_id, prefill, decode, cached, context=0, queued_s=0.0)


def step(device_s: float, *shares: Share, overhead_s: float = 0, idle_s: float = 0) -> StepStats:
    return StepStats(
        at=0.0, device_s=device_s, overhead_s=overhead_s, idle_s=idle_s, shares=list(shares)
    )


@dataclass(frozen=True)
class Settle:
    request_id: str


@dataclass(frozen=True)
class Downtime:
    seconds: float


durations = st.floats(0, 30)
ids = st.sampled_from("abcdef")
shares = st.builds(
    share, ids, st.integers(0, 4096), st.integers(0, 64), cached=st.integers(0, 4096)
)
steps = st.builds(
    lambda device, overhead, idle, parts: step(device, *parts, overhead_s=overhead, idle_s=idle),
    durations,
    durations,
    durations,
    st.lists(shares, max_size=6, unique_by=lambda part: part.request_id),
)
histories = st.lists(st.one_of(steps, st.builds(Settle, ids), st.builds(Downtime, durations)))
prices = st.builds(
    Price, st.fractions(0, 10**8, max_denominator=10**6), st.just("CNY"), st.just("drawn")
)


def nanoseconds(event: StepStats | Settle | Downtime) -> int:
    if isinstance(event, StepStats):
        return sum(round(s * NANO) for s in (event.device_s, event.overhead_s, event.idle_s))
    return round(event.seconds * NANO) if isinstance(event, Downtime) else 0


@given(prices, histories)
def test_everything_booked_is_the_price_of_the_time_to_the_last_nano_unit(
    price: Price, history: list[StepStats | Settle | Downtime]
) -> None:
    meter = Meter(price, started=0.0)
    settled: list[Cost] = []
    spent_ns = 0
    before = meter.totals
    for event in history:
        match event:
            case StepStats():
                meter.record(event)
            case Downtime(seconds):
                meter.downtime(seconds)
            case Settle(request_id):
                settled.append(meter.settle(request_id))
        spent_ns += nanoseconds(event)
        now = meter.totals
        assert now.total == price.nano(spent_ns)
        for kind in ("prompt", "completion", "cancelled", "overhead", "idle"):
            assert getattr(now, kind) >= getattr(before, kind) >= 0
        before = now
    settled += [meter.settle(request_id) for request_id in "abcdef"]
    assert sum(cost.prompt for cost in settled) == meter.totals.prompt
    assert sum(cost.completion for cost in settled) == meter.totals.completion
    assert all(min(cost.prompt, cost.completion, cost.cached_tokens) >= 0 for cost in settled)
    assert all(meter.settle(request_id) == Cost() for request_id in "abcdef")


@given(st.lists(steps, min_size=1).flatmap(lambda s: st.tuples(st.just(s), st.permutations(s))))
def test_the_order_of_steps_moves_no_more_than_the_rounding(
    orders: tuple[list[StepStats], list[StepStats]],
) -> None:
    meters = [Meter(CNY_PER_HOUR, 0.0), Meter(CNY_PER_HOUR, 0.0)]
    for meter, order in zip(meters, orders, strict=True):
        for stats in order:
            meter.record(stats)
    one, other = meters
    bookings = len(orders[0])
    assert one.totals.total == other.totals.total
    for request_id in "abcdef":
        cost, again = one.settle(request_id), other.settle(request_id)
        assert abs(cost.prompt - again.prompt) <= bookings
        assert abs(cost.completion - again.completion) <= bookings
        assert cost.cached_tokens == again.cached_tokens


def test_tokens_computed_share_the_device_time() -> None:
    meter = Meter(NANO_PER_NS, started=0.0)
    meter.record(step(1.0, share("a", prefill=60, cached=40), share("b", decode=40), overhead_s=2))
    meter.record(step(0.5, share("a", decode=1), share("b", decode=1), idle_s=3))
    a, b = meter.settle("a"), meter.settle("b")
    assert a == Cost(600_000_000, 0, 250_000_000, cached_tokens=40)
    assert b == Cost(0, 0, 650_000_000)
    assert a + b == Cost(600_000_000, 0, 900_000_000, cached_tokens=40)
    assert (a + b).total == meter.totals.requests == 1_500_000_000
    assert (meter.totals.overhead, meter.totals.idle) == (2 * NANO, 3 * NANO)


def test_many_steps_do_not_drift() -> None:
    price = Price(Fraction(1, 3), "CNY", "less than a nano-unit a step")
    meter = Meter(price, started=0.0)
    stats = step(1e-3, share("a", decode=1))
    for _ in range(300_000):
        meter.record(stats)
    assert meter.settle("a").total == price.nano(300 * NANO) == 100


def test_equal_rows_of_a_full_batch_pay_the_same() -> None:
    # 2 ms steps at 1.20 CNY/h: 20.8 nano-units a row, so rounding each alone would show.
    meter = Meter(CNY_PER_HOUR, started=0.0)
    rows = [share(str(row), decode=1) for row in range(32)]
    for position in range(128):
        meter.record(step(2e-3 + position * 1e-7, *rows))
    costs = [meter.settle(str(row)).total for row in range(32)]
    assert max(costs) <= min(costs) * 1.02


def test_cancelled_while_queued_costs_nothing_and_its_late_step_is_still_booked() -> None:
    meter = Meter(NANO_PER_NS, started=0.0)
    assert meter.settle("gone") == Cost()
    meter.record(step(1.0, share("gone", prefill=10), share("here", decode=10)))
    assert meter.settle("gone") == Cost()
    assert meter.totals.cancelled == meter.settle("here").total == NANO // 2


def test_settled_requests_are_forgotten_in_time() -> None:
    meter = Meter(NANO_PER_NS, started=0.0)
    meter.settle("a")
    for _ in range(LATE_STEPS):
        meter.record(step(0.0))
    meter.record(step(1.0, share("a", decode=1)))
    assert meter.settle("a").total == NANO


def test_prompt_tokens_found_again_after_a_restart_are_the_same_tokens() -> None:
    meter = Meter(CNY_PER_HOUR, started=0.0)
    meter.record(step(1.0, share("a", prefill=10, cached=32)))
    meter.downtime(4.0)
    meter.record(step(1.0, share("a", prefill=26, cached=16)))
    assert meter.settle("a").cached_tokens == 32


def test_device_time_without_tokens_is_overhead() -> None:
    meter = Meter(NANO_PER_NS, started=0.0)
    meter.record(step(1.0))
    meter.record(step(1.0, share("a", cached=5)))
    assert meter.totals.overhead == 2 * NANO
    assert meter.settle("a").cached_tokens == 5


def test_a_clock_difference_below_zero_books_nothing() -> None:
    meter = Meter(NANO_PER_NS, started=0.0)
    meter.record(step(1.0, overhead_s=-2e-9))
    assert meter.totals.total == NANO


@pytest.mark.parametrize("price", [CNY_PER_HOUR, FREE])
def test_balance_shows_time_lost_or_booked_twice(price: Price) -> None:
    meter = Meter(price, started=100.0)
    assert meter.balance(100.0) == 1.0
    meter.downtime(4.0)
    meter.record(step(3.0, share("a", decode=1), overhead_s=1.0, idle_s=2.0))
    assert meter.balance(110.0) == pytest.approx(1.0)
    assert meter.balance(120.0) == pytest.approx(0.5)
    assert meter.balance(105.0) == pytest.approx(2.0)
