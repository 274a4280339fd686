"""What every scenario of an engine is told, and how it ends."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from figures import verdict


class Story(Protocol):
    """A scenario with its processes."""

    def end(self) -> None:
        """Ends all of them."""


S = TypeVar("S", bound=Story)


def options(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model, as engines read it")
    parser.add_argument("--terraced", type=Path, required=True, help="the daemon's program; `terrace` lies beside it")
    parser.add_argument("--state", type=Path, required=True, help="folder for logs and for what is stored")
    return parser


def tell(story: S, run: Callable[[S], None]) -> None:
    """Runs a scenario; whatever happens in it, its processes end."""
    try:
        run(story)
        verdict()
    finally:
        story.end()


def no_daemon_of_the_user() -> None:
    """Engines must find the scenario's daemon, not that of the environment."""
    os.environ.pop("TERRACE_SOCKET", None)
