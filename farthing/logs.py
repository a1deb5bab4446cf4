"""How both processes log: one line an event, on standard error."""

from __future__ import annotations

import logging


def set_up(level: str) -> None:
    """Log events of this level ("debug" to "error") and graver ones."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # uvicorn's account of its own start and httpx's of every download say nothing new.
    for talkative in ("uvicorn.error", "httpx"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
