"""Daemons that die, processes that fork, interpreters that end: clear errors, no faults, no leaks."""

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import terrace_kv
from conftest import PATIENCE, Daemon, keys, manifest, payload, wait_for


def run_python(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(program)]
    here = str(Path(__file__).parent)
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": here},
        check=False,
    )


def test_a_killed_daemon(session: terrace_kv.Session, daemon: Daemon) -> None:
    """The daemon is killed under a session: calls say so at once, blocks are stale, arrays do not fault."""
    space = session.open_space(manifest())
    names = keys(2)
    session.write(space, names, [payload(name) for name in names])
    lane = session.transport == "lane"
    reading = session.lease_read(space, names) if lane else None
    writing = session.lease_write(space, keys(2, start=10)) if lane else None
    (copied, _) = session.read(space, names)
    assert copied is not None
    arrays = [np.frombuffer(block, np.uint8) for block in reading] if reading else []
    frame = np.frombuffer(writing.blocks[0], np.uint8) if writing else None
    os.kill(daemon.process.pid, signal.SIGKILL)
    daemon.process.wait()
    wait_for(lambda: session.closed, "the session's end")
    for call in (
        lambda: session.exists(space, names),
        lambda: session.read(space, names),
        lambda: session.open_space(manifest()),
        lambda: session.write(space, names, [payload(name) for name in names]),
    ):
        with pytest.raises(terrace_kv.SessionEnded, match="open a new one"):
            call()
    assert bytes(copied) == payload(names[0]), "a copy is the caller's"
    copied.check()
    if not (reading and writing and frame is not None):
        return
    assert [array.tobytes() for array in arrays] == [payload(name) for name in names], "still mapped"
    frame[:] = 3
    block = reading.blocks[0]
    assert block is not None
    with pytest.raises(terrace_kv.StaleBlock, match="ended"):
        block.check()
    del frame
    with pytest.raises(terrace_kv.SessionEnded):
        writing.seal()
    writing.close()
    reading.close()
    assert arrays[0].sum() > 0
    with pytest.raises(terrace_kv.ConnectError, match="is terraced running"):
        terrace_kv.connect(daemon.socket)


def test_a_killed_daemon_ends_waiting_calls(daemon: Daemon) -> None:
    """A call that waits when the daemon dies waits for ever."""

    async def work() -> None:
        session = await terrace_kv.connect_async(daemon.socket, daemon.grpc)
        stream = await session.watch()
        wait = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        os.kill(daemon.process.pid, signal.SIGKILL)
        with pytest.raises((terrace_kv.SessionEnded, terrace_kv.Refused, StopAsyncIteration)):
            await asyncio.wait_for(wait, PATIENCE)

    asyncio.run(work())


def test_a_forked_child_gets_an_error(lane: terrace_kv.Session, daemon: Daemon) -> None:
    """A child uses, or ends, its parent's session: it must get an error, may connect anew, and leave the parent be."""
    space = lane.open_space(manifest())
    lane.write(space, keys(2), [payload(name) for name in keys(2)])
    reading = lane.lease_read(space, keys(2))
    writing = lane.lease_write(space, [b"new"])
    (block, _) = reading.blocks
    (frame,) = writing.blocks
    assert block is not None
    assert frame is not None
    child = os.fork()
    if child == 0:
        # A child that hangs must not stay.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(PATIENCE))
        code = 1
        try:
            for use in (
                lambda: lane.exists(space, keys(1)),
                lane.close,
                lambda: lane.closed,
                block.check,
                block.close,
                lambda: memoryview(block),
                lambda: memoryview(frame),
                lambda: frame.fill(payload(b"x")),
                reading.release,
                reading.close,
                lambda: writing.seal([0]),
                writing.close,
                lambda: lane.__enter__(),
            ):
                with pytest.raises(terrace_kv.ForkedError, match="connect again"):
                    use()
            del block, frame, reading, writing, lane
            with terrace_kv.connect(daemon.socket) as own:
                found = own.read(own.open_space(manifest()), keys(2))
                assert [bytes(mine) if mine else None for mine in found] == [payload(name) for name in keys(2)]
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert block.to_bytes() == payload(keys(1)[0])
    reading.check()
    frame.fill(payload(b"new"))
    assert writing.seal() == ["sealed"]


def test_a_session_is_not_pickled(lane: terrace_kv.Session) -> None:
    """A session in another process by pickle is no session: it must be refused where it is pickled."""
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(lane)
    refused = terrace_kv.Refused("no", "NotFound")
    assert pickle.loads(pickle.dumps(refused)).code == "NotFound", "errors cross processes"


def test_ctrl_c_ends_a_waiting_call(daemon: Daemon) -> None:
    """A call that waits cannot be interrupted."""
    program = """
        import os, signal, sys, threading, terrace_kv
        from conftest import manifest
        # Whoever runs the tests in the background may have left it ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        session = terrace_kv.connect(sys.argv[1], sys.argv[2])
        stream = session.watch()
        try:
            threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
            next(stream)
        except KeyboardInterrupt:
            print("interrupted")
        print(session.exists(session.open_space(manifest()), [b"k"])[0])
    """
    done = run_python(program, daemon.socket, daemon.grpc)
    assert (done.returncode, done.stdout.split()) == (0, ["interrupted", "0"]), done.stderr
    daemon.expect_quiet()


@pytest.mark.parametrize("end", ["return", "exit", "error", "daemon-thread", "asyncio", "busy"])
def test_the_interpreter_ends_with_everything_open(daemon: Daemon, end: str) -> None:
    """Ending with sessions, views and calls open hangs or crashes the interpreter."""
    program = """
        import asyncio, sys, threading, time
        import numpy, terrace_kv
        from conftest import keys, manifest, payload
        session = terrace_kv.connect(sys.argv[1], sys.argv[2])
        space = session.open_space(manifest())
        session.write(space, keys(2), [payload(name) for name in keys(2)])
        lease = session.lease_read(space, keys(2))
        array = numpy.frombuffer(lease.blocks[0], numpy.uint8)
        writing = session.lease_write(space, [b"new"])
        frame = numpy.frombuffer(writing.blocks[0], numpy.uint8)
        cycle = [lease, array, frame]
        cycle.append(cycle)
        print("open", flush=True)
        if sys.argv[3] == "exit":
            sys.exit(3)
        if sys.argv[3] == "error":
            raise KeyError("on purpose")
        if sys.argv[3] == "daemon-thread":
            def spin():
                while True:
                    session.exists(space, keys(2))
            threading.Thread(target=spin, daemon=True).start()
            time.sleep(0.1)
        if sys.argv[3] == "asyncio":
            async def leave():
                own = await terrace_kv.connect_async(sys.argv[1], sys.argv[2])
                there = await own.open_space(manifest())
                for _ in range(100):
                    own.read(there, keys(2))
                own.watch()
            asyncio.run(leave())
        if sys.argv[3] == "busy":
            # Results come while the interpreter goes.
            async def flood():
                own = await terrace_kv.connect_async(sys.argv[1], sys.argv[2])
                there = await own.open_space(manifest())
                for _ in range(3000):
                    own.exists(there, keys(2))
            loop = asyncio.new_event_loop()
            loop.run_until_complete(flood())
    """
    done = run_python(program, daemon.socket, daemon.grpc, end)
    expected = {"exit": 3, "error": 1}.get(end, 0)
    assert done.returncode == expected, done.stderr
    assert done.stdout == "open\n"
    assert "panicked" not in done.stderr
    assert "Fatal" not in done.stderr
    daemon.expect_quiet()


@pytest.mark.parametrize("call", ["session.exists(space, [b'a'])", "terrace_kv.connect(path)", "lease.release()"])
def test_a_destructor_at_the_very_end(daemon: Daemon, call: str) -> None:
    """A ``__del__`` that runs when nothing can be imported any more is refused; the process does not abort."""
    program = f"""
        import sys, terrace_kv
        from conftest import keys, manifest, payload
        session = terrace_kv.connect(sys.argv[1])
        space = session.open_space(manifest())
        session.write(space, keys(1), [payload(name) for name in keys(1)])
        lease = session.lease_read(space, keys(1), wait=5.0)
        class Late:
            def __del__(self, terrace_kv=terrace_kv, path=sys.argv[1], session=session, space=space, lease=lease):
                try:
                    {call}
                except terrace_kv.SessionEnded:
                    print("refused")
        late = Late()
    """
    done = run_python(program, daemon.socket)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "refused\n", done.stderr


def test_a_full_tenant_is_throttled_and_recovers(folder: Path, wire: SimpleNamespace) -> None:
    """Over a limit a lease fails or waits for ever: it must say "throttled", and go on when there is room."""
    running = Daemon(folder, wire, extra="[limits]\nleases_per_session = 4\n")
    try:
        with terrace_kv.connect(running.socket) as session:
            space = session.open_space(manifest())
            session.write(space, keys(1), [payload(keys(1)[0])])
            leases = []
            with pytest.raises(terrace_kv.Throttled, match="ask again"):
                for _ in range(8):
                    lease = session.lease_read(space, keys(1))
                    if lease.outcomes == ["throttled"]:
                        raise terrace_kv.Throttled("ask again")
                    leases.append(lease)
            assert len(leases) == 4
            leases.pop().release()
            assert session.lease_read(space, keys(1)).outcomes == ["granted"]
    finally:
        running.kill()


def test_a_throttled_seal_can_be_tried_again(folder: Path, wire: SimpleNamespace) -> None:
    """A block that the daemon did not take can be neither written nor sealed: seal more at once than may wait."""

    async def work() -> None:
        async with await terrace_kv.connect_async(running.socket) as session:
            space = await session.open_space(manifest())
            names = keys(16)
            leases = [await session.lease_write(space, [name], wait=5.0) for name in names]
            for lease in leases:
                for block in lease:
                    block.fill(payload(b"first"))
            sealed = await asyncio.gather(
                *(lease.seal(durability="durable") for lease in leases), return_exceptions=True
            )
            throttled = [at for at, outcome in enumerate(sealed) if isinstance(outcome, terrace_kv.Throttled)]
            assert throttled, f"all at once was not too much: {sealed}"
            for at in throttled:
                for block in leases[at]:
                    block.fill(payload(names[at]))
                assert await leases[at].seal() == ["sealed"]
            found = await session.read(space, names)
            expected = [payload(name if at in throttled else b"first") for at, name in enumerate(names)]
            assert [bytes(block) if block else None for block in found] == expected

    running = Daemon(folder, wire, extra="[limits]\nrequests_waiting = 1\n")
    try:
        asyncio.run(asyncio.wait_for(work(), PATIENCE))
    finally:
        running.kill()


def test_a_stopped_daemon_does_not_stop_other_threads(daemon: Daemon, lane: terrace_kv.Session) -> None:
    """A call to a daemon that hangs holds the interpreter: other threads must run meanwhile."""
    space = lane.open_space(manifest())
    os.kill(daemon.process.pid, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(daemon.process.pid, os.WUNTRACED)[1]), "all of its threads have stopped"
    answered = threading.Event()

    def ask() -> None:
        lane.exists(space, keys(1))
        answered.set()

    thread = threading.Thread(target=ask)
    thread.start()
    counted, until = 0, time.monotonic() + 0.2
    while time.monotonic() < until:
        counted += 1
    assert counted > 100
    assert not answered.is_set()
    os.kill(daemon.process.pid, signal.SIGCONT)
    thread.join(PATIENCE)
    assert answered.is_set()
