"""Hands results to asyncio. Called inside the event loop that waits for them."""

from asyncio import Future
from typing import Any


def resolve(future: "Future[Any]", value: Any, error: BaseException | None) -> None:
    if future.done():
        # Cancelled meanwhile; what was granted goes with `value`.
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
