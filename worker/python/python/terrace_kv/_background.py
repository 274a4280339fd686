"""Work that an engine does not wait for: a bounded queue with daemon threads behind it."""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable


class Background:
    """Runs calls in the order they come, on ``threads`` threads. Refuses what does not fit into the queue.

    The threads are daemons: they never hold up the end of the interpreter. A block that is not sealed by then
    was never there. A forked child starts threads of its own.
    """

    def __init__(self, name: str, *, threads: int = 1, limit: int = 1024) -> None:
        self._name = name
        self._thread_count = threads
        self._limit = limit
        self._pid = 0
        self._stopped = False

    def _start(self) -> None:
        self._pid = os.getpid()
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(self._limit)
        self._threads = [
            threading.Thread(target=self._run, args=(self._queue,), name=f"{self._name}-{index}", daemon=True)
            for index in range(self._thread_count)
        ]
        for thread in self._threads:
            thread.start()

    def start(self) -> None:
        """Starts the threads now rather than with the first call: they inherit what the caller is bound to."""
        if self._pid != os.getpid():
            self._start()

    def submit(self, call: Callable[[], None]) -> bool:
        """Whether there was room for it."""
        if self._stopped:
            return False
        self.start()
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            return False
        return True

    def _run(self, calls: "queue.Queue[Callable[[], None] | None]") -> None:
        while (call := calls.get()) is not None:
            try:
                call()
            except Exception:
                logging.getLogger("terrace_kv").exception("a background call of %s failed", self._name)
            finally:
                # What it refers to must not live until the next call comes.
                del call

    def stop(self, seconds: float) -> None:
        """Lets what runs and what waits end, for at most so long."""
        self._stopped = True
        if self._pid != os.getpid():
            return
        deadline = time.monotonic() + seconds
        for _ in self._threads:
            try:
                self._queue.put(None, timeout=max(0.0, deadline - time.monotonic()))
            except queue.Full:
                break
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
