from farthing.batching.admission import ArrivalRate, BatchFormation, BatchLimit


def test_the_rate_falls_while_nobody_comes() -> None:
    rate = ArrivalRate()
    assert rate.per_second(0.0) == 0.0
    for arrival in (0.0, 0.1, 0.2, 0.3, 0.4):
        rate.record(arrival)
    assert rate.per_second(0.4) == 10.0
    assert rate.per_second(4.0) == 1.0


def test_a_request_alone_on_a_quiet_server_starts_at_once() -> None:
    formation = BatchFormation(batch_min=4, max_wait_s=0.2)
    assert formation.wait_s(now=10.0, oldest=10.0, waiting=1, rate=0.0) == 0.0
    assert formation.wait_s(now=10.0, oldest=10.0, waiting=1, rate=1.0) == 0.0


def test_a_wait_ends_when_the_batch_is_full_or_t_max_has_passed() -> None:
    formation = BatchFormation(batch_min=4, max_wait_s=0.2)
    assert 0 < formation.wait_s(now=10.0, oldest=10.0, waiting=1, rate=100.0) <= 0.2
    assert formation.wait_s(now=10.0, oldest=10.0, waiting=4, rate=100.0) == 0.0
    assert formation.wait_s(now=10.2, oldest=10.0, waiting=1, rate=100.0) == 0.0


def test_the_limit_follows_the_load_between_its_bounds() -> None:
    limit = BatchLimit(batch_min=4, batch_max=32, hold_s=2.0)
    assert limit.update(demand=1, now=0.0) == 4
    assert [limit.update(demand=100, now=0.1) for _ in range(5)] == [8, 16, 32, 32, 32]
    assert limit.update(demand=10, now=1.0) == 32, "a short lull changes nothing"
    assert limit.update(demand=10, now=2.2) == 16
    assert limit.update(demand=10, now=9.0) == 16, "half of it is wanted"
    assert [limit.update(demand=0, now=now) for now in (12.0, 15.0, 18.0)] == [8, 4, 4]
