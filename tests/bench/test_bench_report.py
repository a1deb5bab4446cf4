"""Statistics of made-up records, exactly; and what a person gets to see."""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from farthing.bench.client import Record
from farthing.bench.command import add_arguments, run
from farthing.bench.report import Percentiles, render, summarise, write_plot
from tests.bench.sse_server import Answer, Serve


def record(due: float, ttft: float, gap: float, tokens: int, **other: object) -> Record:
    chunks = tuple(due + ttft + gap * i for i in range(tokens))
    fields = {
        "due": due,
        "sent": due,
        "chunk_times": chunks,
        "ended": chunks[-1],
        "prompt_tokens": 10,
        "output_tokens": tokens,
        "counted_by": "usage",
    } | other
    return Record(**fields)  # type: ignore[arg-type]  # a test's own choice of fields


def test_percentiles_are_numpys() -> None:
    rng = random.Random(7)
    values = [rng.lognormvariate(0, 1) for _ in range(501)]
    percentiles = Percentiles.of(values)
    assert percentiles is not None
    assert percentiles.mean == pytest.approx(np.mean(values))
    for share, value in ((50, percentiles.p50), (90, percentiles.p90), (99, percentiles.p99)):
        assert value == pytest.approx(np.percentile(values, share))
    assert Percentiles.of([]) is None


def test_a_summary_of_known_records() -> None:
    summary = summarise(
        [
            record(100.0, 0.5, 0.1, 11, cost=3e-6, currency="CNY"),
            record(101.0, 1.5, 0.2, 6, cost=1e-6, currency="CNY"),
            record(101.5, 9.0, 9.0, 2, failure="broken stream", ended=102.0),
        ]
    )
    assert summary.requests == 3
    assert summary.failures == {"broken stream": 1}
    assert summary.seconds == pytest.approx(3.5)  # 100.0 to 101 + 1.5 + 5 × 0.2
    assert summary.ttft is not None
    assert summary.ttft.p50 == pytest.approx(1.0)
    assert summary.ttft.p90 == pytest.approx(1.4)
    assert summary.inter_token is not None
    assert summary.inter_token.mean == pytest.approx((10 * 0.1 + 5 * 0.2) / 15)
    assert summary.per_output_token is not None
    assert summary.per_output_token.mean == pytest.approx(0.15)
    assert summary.e2e is not None
    assert summary.e2e.mean == pytest.approx((1.5 + 2.5) / 2)
    assert summary.output_tokens_per_s == pytest.approx(17 / 3.5)
    assert summary.requests_per_s == pytest.approx(2 / 3.5)
    assert (summary.prompt_tokens, summary.output_tokens) == (20, 17)
    assert summary.cost_per_million_tokens == pytest.approx(4e-6 / 37 * 1e6)
    assert summary.cost_per_million_output_tokens == pytest.approx(4e-6 / 17 * 1e6)
    assert summary.currency == "CNY"


def test_no_cost_is_made_up_where_one_is_missing() -> None:
    summary = summarise([record(0.0, 0.1, 0.1, 3, cost=1e-6), record(0.0, 0.1, 0.1, 3)])
    assert summary.cost is None
    assert summary.cost_per_million_tokens is None


def test_a_run_of_failures_alone_is_reported(tmp_path: Path) -> None:
    failed = record(0.0, 0.1, 0.1, 3, chunk_times=(), output_tokens=0, ended=0.2, failure="timeout")
    summary = summarise([failed] * 4)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(render(summary))
    assert "4 × timeout" in capture.get()
    write_plot(tmp_path / "a.png", "failures", summary, [failed] * 4)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(words))


def test_the_command_writes_table_json_and_picture(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = {"prompt_tokens": 128, "completion_tokens": 3, "cost": 131e-6}
    server = serve(lambda path, body: Answer(usage=usage, gap_s=0.01))
    figures, picture = tmp_path / "out" / "a.json", tmp_path / "out" / "a.png"
    words = ["--url", server.url + "/v1/", "--rate", "100", "--requests", "5"]
    assert command(*words, "--json", str(figures), "--plot", str(picture)) == 0
    out = capsys.readouterr().out
    assert "time to first token" in out
    assert "cost per 1M tokens" in out
    content = json.loads(figures.read_text())
    assert content["summary"]["cost_per_million_tokens"] == pytest.approx(1.0)
    assert content["plan"]["load"] == {
        "kind": "open",
        "rate": 100.0,
        "seed": content["plan"]["load"]["seed"],
    }
    assert len(content["requests"]) == 5
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_failed_requests_fail_the_command(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter([Answer()] * 2 + [Answer(cut_after=1)] * 3)
    server = serve(lambda path, body: next(answers))
    assert command("--url", server.url, "--requests", "4", "--warmup", "0") == 1
    out = capsys.readouterr().out
    assert "3 × broken stream" in out


def test_what_cannot_be_measured_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--url", "http://127.0.0.1:9") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "farthing bench" in line]
    assert "start the server or mend --url" in line


@pytest.mark.parametrize(
    "words",
    [
        ["--url", "localhost:8000"],
        ["--prompt-tokens", "9:3"],
        ["--rate", "0"],
        ["--rate", "1", "--concurrency", "2"],
        ["--requests", "0"],
    ],
)
def test_wrong_values_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command(*words)


def test_ctrl_c_reports_what_was_measured(serve: Serve) -> None:
    server = serve(lambda path, body: Answer(first_s=0.05))
    code = (
        "import argparse, signal, sys\n"
        # As in a terminal: a shell's background jobs, and what they start, ignore SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from farthing.bench.command import add_arguments, run\n"
        "parser = argparse.ArgumentParser()\n"
        "add_arguments(parser)\n"
        "sys.exit(run(parser.parse_args()))\n"
    )
    words = ["--url", server.url, "--requests", "10000", "--warmup", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(server.requests) < 6:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "time to first token" in out
    assert "interrupted" in err
    assert "Traceback" not in err
