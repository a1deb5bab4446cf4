from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.bench.sse_server import Serve, running


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a server that answers as the handler says; it stops with the test."""
    with ExitStack() as stack:
        yield lambda handler: stack.enter_context(running(handler))
