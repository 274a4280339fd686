"""One set of cases that every connector passes. What an engine gets is the right block or a miss, whatever happens."""

import importlib
import itertools
import logging
import os
import re
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PATIENCE, Daemon, wait_for
from connectors import CONNECTORS, Connector, Numbers, Shared
from other_version import OURS, THEIRS, OtherVersion
from terrace_kv import _engine, _versions

pytestmark = pytest.mark.filterwarnings("default")
Make = Callable[..., Connector]
N = 8
ALL = range(N)
# Below what a daemon is waited for in `test_slow_store`, by far: an engine that waits for it takes all of that.
MOMENT, ANSWER = 10.0, 40.0
# How long that daemon stands still once the engine has asked.
PAUSE = 1.5
# What a put, a look-up and a load take at most while a daemon hangs: a few times ANSWER_SECONDS, and what they wait.
HANG = 20.0


def installed(kind: type[Connector]) -> bool:
    return not kind.engine or _versions.installed(kind.engine) is not None


@pytest.mark.parametrize("kind", CONNECTORS)
def test_the_engine_is_here(kind: type[Connector]) -> None:
    """An engine that is not installed has no cases below, and none would be missed: it is said here."""
    if not installed(kind):
        pytest.skip(f"{kind.engine} is not installed: no case of this file is run with its connector {kind.__name__}")
    if kind.engine:
        assert _versions.advice(kind.engine, _versions.installed(kind.engine)) is None


@pytest.fixture(params=filter(installed, CONNECTORS), ids=lambda kind: kind.__name__.lower())
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Connector]:
    """Each connector whose engine is here."""
    found: type[Connector] = request.param
    monkeypatch.setattr(_engine, "RETRY_SECONDS", 0.05)
    # What others deprecate while they are imported is not ours.
    warnings.simplefilter("default")
    return found


@pytest.fixture
def make(kind: type[Connector], daemon: Daemon) -> Iterator[Make]:
    """Makes connectors, by default of one engine after the other with the same settings."""
    made: list[Connector] = []

    def one(where: Path | None = None, change: str = "") -> Connector:
        made.append(kind(where or daemon.socket, **kind.changes.get(change, {})))
        return made[-1]

    yield one
    for connector in made:
        connector.close()


def right(connector: Connector, numbers: Numbers) -> list[bytes]:
    return [connector.bytes_of(number) for number in numbers]


def never_wrong(connector: Connector, numbers: Numbers) -> int:
    """How many come; each is the right one."""
    found = connector.get(numbers)
    pairs = zip(found, right(connector, numbers), strict=True)
    assert all(value in (None, block) for value, block in pairs), "a block that is another"
    return sum(value is not None for value in found)


def misses(connector: Connector, numbers: Numbers = ALL) -> None:
    """There is nothing to be had and nowhere to store; nothing raises, nothing is slow."""
    began = time.monotonic()
    assert connector.look_up(numbers) == 0
    assert connector.get(numbers) == [None] * len(numbers)
    connector.put(numbers)
    assert connector.look_up(numbers) == 0
    assert time.monotonic() - began < PATIENCE / 4


def durable(daemon: Daemon, count: int) -> None:
    nvme = daemon.wire.common.TIER_NVME
    wait_for(
        lambda: sum(tier.frames.sealed for tier in daemon.info().tiers if tier.tier == nvme) >= count,
        f"{count} blocks on the device: {daemon.info()}",
    )


# What is there, and what is not.


def test_hit(make: Make, daemon: Daemon) -> None:
    """Blocks come back under other names, or a lease outlives its load."""
    connector = make()
    connector.put(ALL)
    assert connector.look_up(ALL) == N
    assert connector.get(ALL) == right(connector, ALL)
    daemon.expect_leases(0)


def test_partial_hit(make: Make) -> None:
    """What comes after a gap is taken for the gap, or the gap for a hit."""
    connector = make()
    connector.put(ALL)
    asked = [*ALL, 900, 901]
    assert connector.look_up(asked) == N
    assert connector.get(asked) == [*right(connector, ALL), None, None]
    gap = [0, 1, 2, 900, 3, 4]
    assert connector.look_up(gap) == 3
    found = connector.get(gap)
    assert found[:4] == [*right(connector, gap[:3]), None]
    assert all(value in (None, connector.bytes_of(n)) for value, n in zip(found, gap, strict=True))


def test_miss(make: Make) -> None:
    """A store with other blocks in it answers with one of them."""
    connector = make()
    connector.put(ALL)
    assert connector.look_up(range(500, 508)) == 0
    assert connector.get(range(500, 508)) == [None] * 8


# Who shares.


def test_two_engines_share(make: Make, daemon: Daemon) -> None:
    """What one stored the other computes again, or keeps a second time."""
    one, two = make(), make()
    one.put(ALL)
    sealed = sum(tier.frames.sealed for tier in daemon.info().tiers if tier.tier == daemon.wire.common.TIER_PINNED)
    assert sealed == N
    assert two.get(ALL) == right(one, ALL)
    two.put(ALL)
    again = sum(tier.frames.sealed for tier in daemon.info().tiers if tier.tier == daemon.wire.common.TIER_PINNED)
    assert again == N, "the same block twice"


@pytest.mark.parametrize("change", ["tenant", "dtype", "block", "topology"])
def test_engines_that_differ_share_nothing(make: Make, kind: type[Connector], change: str) -> None:
    """Another tenant, or an engine with another type, block size or topology, gets these bytes."""
    assert kind.changes[change]
    one = make()
    one.put(ALL)
    assert one.look_up(ALL) == N
    other = make(change=change)
    assert other.look_up(ALL) == 0
    assert other.get(ALL) == [None] * N


# The daemon is killed, in every phase.


def test_killed_before_the_look_up(make: Make, daemon: Daemon) -> None:
    connector = make()
    connector.put(ALL)
    daemon.kill()
    wait_for(lambda: connector.look_up(ALL) == 0, "a miss")
    misses(connector)


def test_killed_between_look_up_and_load(make: Make, daemon: Daemon) -> None:
    """A promise that nobody can keep: the load must end, with the right bytes or none."""
    connector = make()
    connector.put(ALL)
    assert connector.promise(ALL) == N
    daemon.kill()
    found = connector.redeem(ALL)
    assert all(value in (None, connector.bytes_of(n)) for value, n in zip(found, ALL, strict=True))
    wait_for(lambda: connector.look_up(ALL) == 0, "a miss")
    misses(connector)


def test_killed_during_a_store(make: Make, daemon: Daemon) -> None:
    """A store must end, without an exception; nothing half is there afterwards."""
    connector, over, wrong = make(), threading.Event(), []

    def store() -> None:
        try:
            for start in itertools.count(0, connector.blocks_max):
                if over.is_set():
                    return
                connector.put(range(start, start + connector.blocks_max))
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=store)
    thread.start()
    wait_for(lambda: sum(tier.frames.sealed for tier in daemon.info().tiers) > 3 * N, "stores under way")
    daemon.kill()
    over.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert not wrong
    wait_for(lambda: connector.look_up(ALL) == 0, "a miss")
    misses(connector)


def test_restart(make: Make, daemon: Daemon, folder: Path, wire: SimpleNamespace) -> None:
    """The engine must find the daemon by itself when it comes back, and in it what was on the device."""
    connector = make()
    connector.put(ALL)
    durable(daemon, N)
    daemon.kill()
    wait_for(lambda: connector.look_up(ALL) == 0, "a miss")
    again = Daemon(folder, wire)
    try:
        wait_for(lambda: connector.look_up(ALL) == N, "hits of the second life")
        assert connector.get(ALL) == right(connector, ALL)
        more = range(100, 108)
        connector.put(more)
        assert connector.get(more) == right(connector, more)
    finally:
        again.kill()


def damage(device: Path, block: bytes) -> None:
    """Turns one byte round behind the block's first bytes, wherever they lie on the device."""
    content = device.read_bytes()
    places = [found.start() for found in re.finditer(re.escape(block[:48]), content)]
    assert places, "the block is not on the device"
    with device.open("r+b") as file:
        for place in places:
            file.seek(place + 48)
            file.write(bytes([content[place + 48] ^ 0xFF]))


def test_a_corrupted_block(make: Make, daemon: Daemon, folder: Path, wire: SimpleNamespace) -> None:
    """A byte of a block turns round on the device while nobody looks: the load of it fails, the others are right, and
    what is computed again is stored again."""
    connector, bad = make(), 5
    connector.put(ALL)
    durable(daemon, N)
    daemon.kill()
    damage(folder / "data" / "nvme0.dat", connector.bytes_of(bad))
    wait_for(lambda: connector.look_up(ALL) == 0, "a miss")
    again = Daemon(folder, wire)
    try:
        wait_for(lambda: connector.look_up(ALL) > 0, "the second life")
        found = connector.get(ALL)
        assert found[bad] is None, "bytes that are not the block's"
        assert all(value in (None, block) for value, block in zip(found, right(connector, ALL), strict=True))
        wait_for(lambda: connector.get(ALL)[:bad] == right(connector, ALL[:bad]), "the blocks before it")

        def repaired() -> bool:
            connector.put(ALL)
            return connector.get(ALL) == right(connector, ALL)

        wait_for(repaired, "the block that was computed again")
    finally:
        again.kill()


# The daemon is full, slow, or forgets a lease.


def overfill(connector: Connector, least_bytes: int) -> None:
    blocks = least_bytes // connector.block_bytes
    for start in range(10_000, 10_000 + blocks, connector.blocks_max):
        connector.put(range(start, start + connector.blocks_max))


def test_full_store(kind: type[Connector], folder: Path, wire: SimpleNamespace) -> None:
    """More is stored than there is room for in memory and on the device: no answer is wrong, and storing goes on."""
    small = Daemon(folder, wire, pinned="16MiB", device="16MiB")
    try:
        connector = kind(small.socket)
        connector.put(ALL)
        overfill(connector, 48 << 20)
        never_wrong(connector, ALL)
        never_wrong(connector, range(10_000, 10_000 + connector.blocks_max))

        def stored() -> bool:
            connector.put(range(500, 508))
            return never_wrong(connector, range(500, 508)) == 8

        wait_for(stored, "room for new blocks")
        small.expect_leases(0)
        connector.close()
    finally:
        small.kill()


def test_slow_store(make: Make, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon stands still for a while: a scheduler does not wait for it, and what comes then is right."""
    monkeypatch.setenv("TERRACE_ANSWER_SECONDS", str(ANSWER))
    connector, more = make(), range(100, 108)
    connector.put(ALL)
    os.kill(daemon.process.pid, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(daemon.process.pid, os.WUNTRACED)[1]), "all of its threads have stopped"
    wake = threading.Timer(PAUSE, os.kill, (daemon.process.pid, signal.SIGCONT))
    try:
        began = time.monotonic()
        if connector.ask(ALL):
            assert time.monotonic() - began < MOMENT
    finally:
        wake.start()
    try:
        connector.put(more)
        never_wrong(connector, ALL)
    finally:
        wake.join()
    wait_for(lambda: never_wrong(connector, ALL) == N, "hits after the pause")

    def stored() -> bool:
        connector.put(more)
        return never_wrong(connector, more) == 8

    wait_for(stored, "stores after the pause")


def test_a_daemon_that_hangs(make: Make, daemon: Daemon) -> None:
    """It stands still and does not come back for long: every call ends soon, as a miss, and it is found afterwards."""
    connector, more = make(), range(100, 108)
    connector.put(ALL)
    os.kill(daemon.process.pid, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(daemon.process.pid, os.WUNTRACED)[1]), "all of its threads have stopped"
    try:
        began = time.monotonic()
        connector.put(more)
        assert connector.look_up(ALL) == 0
        assert connector.get(ALL) == [None] * N
        assert time.monotonic() - began < HANG
        other = make()
        assert other.look_up(ALL) == 0
        assert time.monotonic() - began < 2 * HANG
    finally:
        os.kill(daemon.process.pid, signal.SIGCONT)
    wait_for(lambda: never_wrong(connector, ALL) == N, "hits after it")


def test_a_lease_ends_before_the_load(kind: type[Connector], folder: Path, wire: SimpleNamespace) -> None:
    """The daemon takes a lease back and gives its memory to others: the load is right, or a miss."""
    short = Daemon(folder, wire, "[limits]\nlease_hold_max_ms = 200", pinned="16MiB", device="16MiB")
    try:
        connector = kind(short.socket)

        def promised() -> bool:
            # On a busy machine the leases of a store, or those of the promise, end too early.
            connector.put(ALL)
            if connector.promise(ALL) == N:
                return True
            connector.drop(ALL)
            return False

        wait_for(promised, "a promise")
        short.expect_leases(0)
        other = Shared(short.socket)
        overfill(other, 48 << 20)
        found = connector.redeem(ALL)
        assert all(value in (None, connector.bytes_of(n)) for value, n in zip(found, ALL, strict=True))
        other.close()
        connector.close()
    finally:
        short.kill()


# Wrong settings at the start: the engine starts, and goes on without.


class Heard(logging.Handler):
    """Everything that any logger says, whatever engines do to theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.fixture
def heard(kind: type[Connector]) -> Iterator[list[str]]:
    handler = Heard()
    if kind.engine:
        # An engine sets its loggers up when it is first imported, and takes handlers away.
        importlib.import_module(f"terrace_kv.{kind.engine}")
    names = ("terrace_kv", "vllm", "sglang.terrace_kv", "lmcache.terrace_kv")
    for name in names:
        logging.getLogger(name).addHandler(handler)
    yield handler.said
    for name in names:
        logging.getLogger(name).removeHandler(handler)


@pytest.mark.parametrize("what", ["nothing", "file", "stranger"])
def test_wrong_socket(make: Make, folder: Path, heard: list[str], what: str) -> None:
    """There is no socket, or something else: said, and everything is a miss."""
    where = folder / "wrong.sock"
    listener = socket.socket(socket.AF_UNIX)
    stop = threading.Event()
    if what == "file":
        where.write_text("not a socket")
    elif what == "stranger":
        listener.bind(str(where))
        listener.listen()
        listener.settimeout(0.1)

    def answer() -> None:
        """Says what no terraced says, and hangs up."""
        while what == "stranger" and not stop.is_set():
            try:
                client, _ = listener.accept()
            except TimeoutError:
                continue
            with client:
                client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        connector = make(where)
        misses(connector)
        told = [line for line in heard if f"no terraced at {where}" in line]
        assert told
        assert "goes on without" in told[0]
    finally:
        stop.set()
        thread.join()
        listener.close()


@pytest.mark.parametrize("how", ["refuses", "unreadable", "hangs_up"])
def test_a_daemon_of_another_version(
    kind: type[Connector], folder: Path, wire: SimpleNamespace, heard: list[str], how: str
) -> None:
    """The daemon was upgraded and the engine was not: it starts, says what to do, and finds the right daemon when that
    comes."""
    where = folder / "lane.sock"
    with OtherVersion(where, wire, how) as other:
        connector = kind(where)
        misses(connector)
        assert set(other.asked) == {OURS}
    told = [line for line in heard if f"no terraced at {where}" in line]
    assert told
    assert "goes on without" in told[0]
    if how == "refuses":
        assert f"this daemon speaks {THEIRS}" in told[0]
        assert f"this client speaks lane version {OURS}: use a client and a terraced of one release" in told[0]
    elif how == "unreadable":
        assert "are client and daemon of one version?" in told[0]
    else:
        assert "it closed the connection at hello" in told[0]
    right_one = Daemon(folder, wire)
    try:

        def stored() -> bool:
            connector.put(ALL)
            return never_wrong(connector, ALL) == N

        wait_for(stored, "the daemon of this version")
    finally:
        connector.close()
        right_one.kill()


def test_a_version_that_was_not_tried(
    make: Make, kind: type[Connector], heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is newer than this package: its log names both versions, and it starts."""
    if not kind.engine:
        pytest.skip("the shared piece has no engine")
    monkeypatch.setitem(_versions.SUPPORTED, kind.engine, ("0.0.1",))
    connector = make()
    told = [line for line in heard if "was not tried" in line]
    assert told
    assert "0.0.1" in told[0]
    assert str(_versions.installed(kind.engine)) in told[0]
    connector.put(ALL)
    never_wrong(connector, ALL)
