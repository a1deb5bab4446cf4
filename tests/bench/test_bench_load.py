"""The client and the loads, against a server whose timings are known."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import replace
from typing import Any

import pytest

from farthing.bench.client import BenchError, Dialect, Record, Target
from farthing.bench.load import Bounds, Closed, Gate, Open, Plan, Send, measure, no_gate, run_load
from farthing.bench.prompts import Job, Span, Workload
from tests.bench.sse_server import Answer, Serve


def plan(url: str, load: Closed | Open, requests: int, **target: Any) -> Plan:
    return Plan(
        Target(url, **target), Workload(Span(16, 16), Span(3, 3)), load, Bounds(requests, 30.0)
    )


def run(plan: Plan, gate: Gate = no_gate) -> tuple[Dialect, list[Record]]:
    records: list[Record] = []
    dialects: list[Dialect] = []
    asyncio.run(measure(plan, on_record=records.append, on_start=dialects.append, gate=gate))
    return dialects[0], records


def test_latencies_are_those_of_the_server(serve: Serve) -> None:
    usage = {
        "prompt_tokens": 20,
        "completion_tokens": 6,
        "cost": 2e-6,
        "cost_details": {"currency": "CNY"},
    }
    server = serve(lambda path, body: Answer(tokens=3, first_s=0.08, gap_s=0.04, usage=usage))
    dialect, (record,) = run(plan(server.url, Closed(1), 1))
    assert dialect == Dialect("tiny", ("stream_options", "ignore_eos"), template_tokens=4)
    assert record.failure is None
    assert 0.08 <= record.ttft_s < 0.5
    assert len(record.gaps_s) == 2
    assert all(0.035 <= gap < 0.5 for gap in record.gaps_s)
    assert record.e2e_s >= 0.16
    assert (record.prompt_tokens, record.output_tokens, record.counted_by) == (20, 6, "usage")
    assert (record.cost, record.currency) == (2e-6, "CNY")


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_prompts_have_the_asked_length_and_share_no_prefix(serve: Serve, endpoint: Any) -> None:
    def handler(path: str, body: dict[str, Any]) -> Answer:
        text = body.get("prompt") or body["messages"][0]["content"]
        return Answer(usage={"prompt_tokens": len(text.split()) + 5, "completion_tokens": 3})

    server = serve(handler)
    _, records = run(plan(server.url, Closed(2), 6, endpoint=endpoint))
    assert [record.prompt_tokens for record in records] == [16] * 6
    prompts = [body.get("prompt") or body["messages"][0]["content"] for body in server.requests]
    assert len({tuple(text.split()[:3]) for text in prompts}) == 7  # the probe's too


def test_a_shared_prefix_is_shared() -> None:
    jobs = Workload(Span(20, 40), Span(1, 9), shared_prefix=8).jobs()
    prompts = [next(jobs).prompt.split() for _ in range(20)]
    assert len({tuple(words[:8]) for words in prompts}) == 1
    assert len({tuple(words[8:11]) for words in prompts}) == 20


def test_without_usage_chunks_are_counted(serve: Serve) -> None:
    server = serve(lambda path, body: Answer(tokens=5))
    dialect, (record,) = run(plan(server.url, Closed(1), 1))
    assert (record.output_tokens, record.counted_by, record.prompt_tokens) == (5, "chunks", None)
    assert dialect.template_tokens == 0


def test_fields_that_a_server_refuses_are_left_out(serve: Serve) -> None:
    def handler(path: str, body: dict[str, Any]) -> Answer:
        if "ignore_eos" in body:
            return Answer(error=(422, "unknown field ignore_eos"))
        return Answer()

    dialect, (record,) = run(plan(serve(handler).url, Closed(1), 1))
    assert dialect.extras == ("stream_options",)
    assert record.failure is None


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (Answer(cut_after=2), "broken stream"),
        (Answer(finish_reason=None), "broken stream"),
        (Answer(raw_event='{"error": {"message": "out of pages"}}'), "error in stream"),
        (Answer(raw_event="{not json"), "bad chunk"),
        (Answer(finish_reason="abort"), "ended by server"),
        (Answer(tokens=0), "no output"),
        (Answer(error=(503, "starting")), "HTTP 503"),
        (Answer(first_s=0.5), "timeout"),
    ],
)
def test_every_way_to_break_is_a_failure_of_its_kind(
    serve: Serve, answer: Answer, failure: str
) -> None:
    answers = iter([Answer(), answer, Answer()])  # the probe's comes first
    server = serve(lambda path, body: next(answers))
    _, records = run(plan(server.url, Closed(1), 2, timeout_s=0.2))
    assert [record.failure for record in records] == [failure, None]


def test_a_closed_loop_keeps_n_requests_under_way(serve: Serve) -> None:
    server = serve(lambda path, body: Answer(first_s=0.05))
    _, records = run(plan(server.url, Closed(4), 12))
    changes = sorted([(r.sent, 1) for r in records] + [(r.ended, -1) for r in records])
    under_way = [sum(step for _, step in changes[: i + 1]) for i in range(len(changes))]
    assert len(records) == 12
    assert max(under_way) == 4


def test_an_open_loop_waits_for_nobody(serve: Serve) -> None:
    server = serve(lambda path, body: Answer(first_s=0.3))
    _, records = run(plan(server.url, Open(rate=200.0), 20))
    assert max(r.due for r in records) < min(r.ended for r in records)
    assert all(record.sent >= record.due for record in records)


def test_open_arrivals_come_at_the_asked_rate() -> None:
    due: list[float] = []

    async def send(job: Job, when: float) -> None:
        due.append(when)

    jobs = Workload(Span(1, 1), Span(1, 1)).jobs()
    asyncio.run(run_load(send, jobs, Open(rate=4000.0, seed=1), Bounds(2000, 30.0)))
    gaps = [after - before for before, after in itertools.pairwise(due)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert 1 / mean == pytest.approx(4000, rel=0.1)
    assert deviation == pytest.approx(mean, rel=0.1)  # exponential gaps


def test_latency_counts_from_when_a_request_was_due(serve: Serve) -> None:
    """A request held back before it is sent is as late as its user sees it."""

    def late(send: Send) -> Send:
        async def gated(job: Job, due: float) -> None:
            await asyncio.sleep(0.2)
            await send(job, due)

        return gated

    server = serve(lambda path, body: Answer())
    _, records = run(plan(server.url, Open(rate=100.0), 3), gate=late)
    assert all(record.ttft_s >= 0.2 and record.e2e_s >= 0.2 for record in records)


def test_time_bounds_a_run(serve: Serve) -> None:
    server = serve(lambda path, body: Answer(first_s=0.02))
    bounded = replace(plan(server.url, Closed(1), 1000), bounds=Bounds(1000, 0.2))
    began = time.perf_counter()
    _, records = run(bounded)
    assert 0 < len(records) <= 10
    assert time.perf_counter() - began < 5


def test_warm_up_is_not_recorded(serve: Serve) -> None:
    server = serve(lambda path, body: Answer())
    _, records = run(replace(plan(server.url, Closed(2), 3), warmup=4))
    assert len(records) == 3
    assert len(server.requests) == 1 + 4 + 3


def test_the_key_is_sent(serve: Serve) -> None:
    server = serve(lambda path, body: Answer())
    run(plan(server.url, Closed(1), 1, api_key="sesame"))
    assert all("authorization: bearer sesame" in head.lower() for head in server.headers)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(error=(401, "no key")), "give one with --api-key"),
        (Answer(error=(404, "no such model")), "no such model; it serves tiny"),
    ],
)
def test_a_server_that_refuses_the_probe_is_not_measured(
    serve: Serve, answer: Answer, message: str
) -> None:
    server = serve(lambda path, body: answer)
    with pytest.raises(BenchError, match=message):
        run(plan(server.url, Closed(1), 1, model="big"))


def test_a_server_that_is_not_there_is_said_so() -> None:
    with pytest.raises(BenchError, match="cannot reach"):
        run(plan("http://127.0.0.1:9", Closed(1), 1))
