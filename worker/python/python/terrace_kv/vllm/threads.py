"""Threads beside the computation. On CPUs vLLM binds a worker's computing threads to processors, the one that starts
all others among them, and keeps processors free for the rest; a new thread inherits the binding of who started it."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def unbound() -> Iterator[None]:
    """Threads that are started inside may run wherever the process may that started this one."""
    own = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, own | os.sched_getaffinity(os.getppid()))
    except OSError:
        # Where one may not, they compete with the computation.
        yield
        return
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)
