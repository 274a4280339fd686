"""What every connector builds on: it must never harm its engine, whatever becomes of the daemon."""

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import PATIENCE, Daemon, keys, manifest, payload, wait_for
from terrace_kv import _engine
from terrace_kv._background import Background
from terrace_kv._engine import Store, StoreSpace, Target
from test_faults import run_python


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_engine, "RETRY_SECONDS", 0.05)


def store(daemon: Daemon, transport: str = "lane", **options: Any) -> Store:
    where = {"socket": daemon.socket} if transport == "lane" else {"grpc": daemon.grpc}
    return Store(Target.of({**where, **options}, "test"))


def fill(names: list[bytes]) -> Any:
    def give(index: int, frame: Any) -> bool:
        memoryview(frame)[:] = payload(names[index])
        return True

    return give


def stored(space: StoreSpace, names: list[bytes]) -> list[bytes | None]:
    found: list[bytes | None] = [None] * len(names)
    good = space.get(names, lambda index, block: found.__setitem__(index, bytes(block)), wait=5.0)
    return [value if fine else None for value, fine in zip(found, good, strict=True)]


@pytest.mark.parametrize("transport", ["lane", "grpc"])
def test_hit_partial_hit_and_miss(daemon: Daemon, transport: str) -> None:
    """A gap is taken for a hit, or bytes come back under another name."""
    space = StoreSpace(store(daemon, transport), manifest())
    names = keys(70)
    assert all(space.put(names, fill(names)))
    asked = [*names[:40], b"absent", *names[40:]]
    assert space.store.prefix([space], asked) == 40
    assert space.store.present([space], asked) == [True] * 40 + [False] + [True] * 30
    assert stored(space, asked) == [None if name == b"absent" else payload(name) for name in asked]
    assert all(space.put(names, lambda *_: pytest.fail("stored already")))


def test_a_source_that_goes_away_stores_nothing_more(daemon: Daemon) -> None:
    """An engine takes its memory back in the middle: what was not copied by then must not be sealed."""
    space = StoreSpace(store(daemon), manifest())
    names = keys(40)
    whole = fill(names)
    answers = space.put(names, lambda index, frame: index < 5 and whole(index, frame))
    assert answers == [True] * 5 + [False] * 35
    assert space.store.prefix([space], names) == 5


@pytest.mark.parametrize("change", [{"rank": 1}, {"layout": "other"}, {"model": "other"}])
def test_another_manifest_is_another_space(daemon: Daemon, change: dict[str, Any]) -> None:
    """Two engines that differ in one thing serve each other's blocks."""
    first = store(daemon)
    space = StoreSpace(first, manifest())
    space.put(keys(3), fill(keys(3)))
    other = StoreSpace(first, manifest(**change))
    assert first.prefix([space], keys(3)) == 3
    assert first.prefix([other], keys(3)) == 0
    assert first.prefix([space, other], keys(3)) == 0, "every rank must hold it"


def test_no_daemon_at_all(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The socket is wrong, or nobody is there: said once, everything is a miss, nothing raises, nothing is slow."""
    space = StoreSpace(Store(Target.of({"socket": str(folder / "nobody.sock")}, "test")), manifest())
    began = time.monotonic()
    for _ in range(50):
        assert stored(space, keys(3)) == [None] * 3
        assert space.put(keys(3), fill(keys(3))) == [False] * 3
        assert space.store.prefix([space], keys(3)) == 0
    assert time.monotonic() - began < PATIENCE / 4
    said = [record.message for record in caplog.records if "no terraced at" in record.message]
    assert len(said) == 1
    assert "goes on without" in said[0]


def test_the_daemon_dies_and_comes_back(daemon: Daemon, folder: Path, wire: SimpleNamespace) -> None:
    """It is killed while blocks are held, and started again: misses meanwhile, and then what it had made durable."""
    space = StoreSpace(store(daemon), manifest())
    names = keys(5)
    session = space.store.session()
    assert session is not None
    session.write(space.open(), names, [payload(name) for name in names], durability="durable")  # type: ignore[arg-type]
    with space.read(names, wait=5.0) as reading:
        assert reading.good() == [True] * 5
        arrays = [np.frombuffer(block, np.uint8) for block in reading.blocks if block is not None]
        daemon.kill()
        assert all(array.sum() > 0 for array in arrays), "no fault"
        wait_for(lambda: reading.good() == [False] * 5, "what was read since to be bad")
    del arrays
    assert stored(space, names) == [None] * 5
    assert space.put(names, fill(names)) == [False] * 5
    again = Daemon(folder, wire)
    try:
        wait_for(lambda: stored(space, names) == [payload(name) for name in names], "hits of the second life")
    finally:
        again.kill()


def test_a_daemon_that_hangs_is_left_alone(daemon: Daemon) -> None:
    """It is stopped, not dead: a paused store asks nothing, and the engine goes on."""
    space = StoreSpace(store(daemon), manifest())
    space.put(keys(3), fill(keys(3)))
    os.kill(daemon.process.pid, signal.SIGSTOP)
    try:
        space.store.pause(PATIENCE)
        assert space.store.silent
    finally:
        os.kill(daemon.process.pid, signal.SIGCONT)


def test_a_cleared_space_is_opened_again(daemon: Daemon) -> None:
    """Somebody clears the space under us: nothing old is served, and storing works again by itself."""
    space = StoreSpace(store(daemon), manifest())
    space.put(keys(3), fill(keys(3)))
    assert StoreSpace(store(daemon), manifest()).clear()
    assert stored(space, keys(3)) == [None] * 3
    wait_for(lambda: all(space.put(keys(3), fill(keys(3)))), "the space to be opened again")
    for reader in (space, StoreSpace(store(daemon), manifest())):
        assert stored(reader, keys(3)) == [payload(name) for name in keys(3)]


def test_a_lease_ends_during_a_load(folder: Path, wire: SimpleNamespace) -> None:
    """The daemon takes the lease back while blocks are copied: what was copied is not good, and nothing is raised."""
    short = Daemon(folder, wire, "[limits]\nlease_hold_max_ms = 200")
    try:
        space = StoreSpace(store(short), manifest())
        # On a busy machine a lease may end before its blocks are sealed.
        wait_for(lambda: all(space.put(keys(5), fill(keys(5)))), "the blocks")

        def take(index: int, block: Any) -> None:
            view = memoryview(block)
            if index == 1:
                short.expect_leases(0)
                # The daemon has ended the lease; that it says so may be still on the way.
                wait_for(lambda: not block.valid, "the notice")
            bytes(view)

        assert space.get(keys(5), take, wait=5.0) == [False] * 5
        space.store.close()
    finally:
        short.kill()


def test_fork_after_connect(daemon: Daemon) -> None:
    """A child uses its parent's store: it must get a session of its own and leave the parent's alone."""
    space = StoreSpace(store(daemon), manifest())
    space.put(keys(3), fill(keys(3)))
    child = os.fork()
    if child == 0:
        signal.alarm(int(PATIENCE))
        os._exit(0 if stored(space, keys(3)) == [payload(name) for name in keys(3)] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert stored(space, keys(3)) == [payload(name) for name in keys(3)]


def test_the_interpreter_ends_in_the_middle_of_a_save(daemon: Daemon) -> None:
    """The process ends while a thread fills a frame: no hang, no crash, and a block is whole or not there."""
    program = """
        import sys, threading
        from conftest import keys, manifest, payload
        from terrace_kv._background import Background
        from terrace_kv._engine import Store, StoreSpace, Target

        space = StoreSpace(Store(Target.of({"socket": sys.argv[1]}, "test")), manifest())
        names, begun = keys(2000), threading.Event()

        def give(index, frame):
            memoryview(frame)[:] = payload(names[index])
            if index == 40:
                begun.set()
            return True

        saves = Background("save")
        saves.submit(lambda: space.put(names, give))
        assert begun.wait(30)
    """
    done = run_python(program, daemon.socket)
    assert done.returncode == 0, done.stderr
    assert "Fatal" not in done.stderr
    daemon.expect_quiet()
    space = StoreSpace(store(daemon), manifest())
    found = stored(space, keys(200))
    assert found[0] == payload(keys(1)[0])
    assert all(value in (None, payload(name)) for name, value in zip(keys(200), found, strict=True))


def test_background_refuses_what_does_not_fit() -> None:
    """A queue without a limit grows while the daemon is slow."""
    gate, calls = threading.Event(), Background("test", limit=2)
    started = threading.Event()
    assert calls.submit(lambda: (started.set(), gate.wait(PATIENCE)))  # type: ignore[func-returns-value]
    assert started.wait(PATIENCE)
    assert calls.submit(lambda: None)
    assert calls.submit(lambda: None)
    assert not calls.submit(lambda: None)
    gate.set()
    calls.stop(PATIENCE)
    assert not calls.submit(lambda: None)


def test_environment_names_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERRACE_SOCKET", "/from/environment")
    assert Target.of({}, "test").socket == "/from/environment"
    assert Target.of({"socket": "/named"}, "test").socket == "/named"


@pytest.mark.parametrize("seconds", ["soon", 0, -1, 1e9, None])
def test_a_wait_that_cannot_be_meant(seconds: object) -> None:
    """A wrong option would let an engine wait for good, or not at all: it is said at its start."""
    with pytest.raises(ValueError, match="answer_seconds"):
        Target.of({"answer_seconds": seconds}, "test")


def test_how_long_a_daemon_is_waited_for(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """The option or the environment does not reach the session: a daemon that hangs holds its callers for a minute."""
    monkeypatch.setenv("TERRACE_ANSWER_SECONDS", "0.3")
    assert Target.of({}, "test").answer_seconds == 0.3
    assert Target.of({"answer_seconds": 7}, "test").answer_seconds == 7
    held = Store(Target.of({"socket": str(daemon.socket)}, "test"))
    space = StoreSpace(held, manifest())
    assert space.put(keys(1), fill(keys(1))) == [True]
    os.kill(daemon.process.pid, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(daemon.process.pid, os.WUNTRACED)[1]), "all of its threads have stopped"
    try:
        began = time.monotonic()
        assert held.prefix([space], keys(1)) == 0
        assert time.monotonic() - began < 20
        assert held.silent
    finally:
        os.kill(daemon.process.pid, signal.SIGCONT)
