"""What every connector does: one session that comes back by itself, spaces, and whole blocks in and out.

A connector must never harm its engine. So nothing here raises because of the daemon: what cannot be had is a
miss, what cannot be stored is dropped, and both are counted. A daemon that does not answer is left alone for
a while. Everything may be used from several threads; a forked child opens a session of its own.
"""

import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ._errors import ForkedError, NoAnswer, SessionEnded, TerraceError
from ._manifest import SpaceManifest
from ._native import Block, ReadLease, Session, Space, WriteBlock, WriteLease, connect, copy_blocks, map_blocks

ANSWER_SECONDS = 2.0
"""A daemon that says nothing for so long, beyond what a call lets it wait, is given up. Engines can compute instead."""
RETRY_SECONDS = 1.0
"""After a daemon was found missing or silent, it is asked again only after this time."""
FRESH_SECONDS = 1.0
"""Over gRPC a space that was opened longer ago is opened again before a read: somebody may have cleared it."""
PUT_BLOCKS = 32
"""Most blocks in one write lease: what is reserved, copied and sealed in one go."""

_forkable: "weakref.WeakSet[Store | Counters]" = weakref.WeakSet()


def _after_fork() -> None:
    for thing in list(_forkable):
        thing.after_fork()


os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where the daemon is, and who asks."""

    socket: str | None
    grpc: str | None
    tenant: str
    token: str
    client_name: str
    answer_seconds: float = ANSWER_SECONDS

    @classmethod
    def of(cls, options: Mapping[str, Any], client_name: str) -> "Target":
        """From an engine's configuration; what it leaves out comes from the environment (``TERRACE_SOCKET``, ...).

        Raises :class:`ValueError` for an ``answer_seconds`` that cannot be meant.
        """

        def text(name: str) -> str:
            return str(options.get(name) or os.environ.get(f"TERRACE_{name.upper()}", ""))

        client_name = f"{client_name} pid {os.getpid()}"
        socket, grpc = text("socket"), text("grpc")
        answer = options.get("answer_seconds", os.environ.get("TERRACE_ANSWER_SECONDS", ANSWER_SECONDS))
        try:
            answer_seconds = float(answer)
        except (TypeError, ValueError):
            answer_seconds = math.nan
        if not 0.0 < answer_seconds <= 3600.0:
            raise ValueError(f"`answer_seconds` is {answer!r}; it must be above 0 and at most 3600")
        return cls(
            socket=socket or None,
            grpc=grpc or None,
            tenant=text("tenant"),
            token=text("token"),
            client_name=client_name,
            answer_seconds=answer_seconds,
        )

    def __str__(self) -> str:
        return self.socket or self.grpc or "nowhere: set `socket`, or TERRACE_SOCKET"


class Counters:
    """Sums that several threads add to."""

    def __init__(self) -> None:
        self.after_fork()
        _forkable.add(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, float] = {}

    def add(self, name: str, amount: float = 1) -> None:
        with self._lock:
            self._sums[name] = self._sums.get(name, 0) + amount

    def take(self) -> dict[str, float]:
        """Everything since the last call."""
        with self._lock:
            taken, self._sums = self._sums, {}
        return taken


class Store:
    """A session with the daemon, opened when it is first needed and again when it ended."""

    def __init__(self, target: Target, logger: logging.Logger | None = None) -> None:
        self.target = target
        self.counters = Counters()
        self._logger = logger or logging.getLogger("terrace_kv")
        self._said = ""
        self.after_fork()
        _forkable.add(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._silent_until = 0.0
        self._closed = False

    def session(self) -> Session | None:
        """The session, or ``None`` while there is no daemon."""
        session = self._session
        if session is not None and not session.closed:
            return session
        if self._closed or time.monotonic() < self._silent_until:
            return None
        with self._lock:
            if self._session is not None and not self._session.closed:
                return self._session
            if self._closed or time.monotonic() < self._silent_until:
                return None
            return self._connect()

    def _connect(self) -> Session | None:
        target = self.target
        try:
            self._session = connect(
                target.socket,
                target.grpc,
                tenant=target.tenant,
                token=target.token,
                client_name=target.client_name,
                answer_within=target.answer_seconds,
            )
        except (TerraceError, ValueError) as error:
            self._session = None
            self._silent_until = time.monotonic() + RETRY_SECONDS
            self._say(f"no terraced at {target}: {error}. The engine goes on without; nothing is cached meanwhile")
            return None
        self._say("")
        transport = self._session.transport
        self._logger.info("connected to terraced at %s over %s", target, transport)
        return self._session

    def _say(self, what: str) -> None:
        if what and not self._said:
            self._logger.warning(what)
        self._said = what

    def failed(self, error: TerraceError) -> None:
        """Notes what went wrong, and leaves a daemon alone that is gone or does not answer."""
        self.counters.add("errors")
        if isinstance(error, SessionEnded | ForkedError):
            self._session = None
        elif isinstance(error, NoAnswer):
            self._silent_until = time.monotonic() + RETRY_SECONDS
        self._logger.debug("terraced: %s: %s", type(error).__name__, error)

    def pause(self, seconds: float) -> None:
        """Asks nothing for a while: the daemon is slower than computing."""
        self._silent_until = max(self._silent_until, time.monotonic() + seconds)

    @property
    def silent(self) -> bool:
        """Whether it is not worth asking now."""
        return self._closed or time.monotonic() < self._silent_until

    def copy_out(self, blocks: Sequence[Block], targets: Sequence[Any], threads: int = 1) -> list[bool]:
        """Copies whole blocks into buffers; answers which copies were compared with their checksum and are good."""
        try:
            good = copy_blocks(blocks, targets, threads=threads)
        except (TerraceError, BufferError) as error:
            self._logger.warning("terrace: blocks cannot be copied there: %s", error)
            good = [False] * len(blocks)
        self.counters.add("errors", good.count(False))
        return good

    def map_ahead(self, blocks: Sequence[Block]) -> None:
        """Has blocks mapped that are copied soon."""
        try:
            map_blocks(blocks)
        except TerraceError as error:
            self.failed(error)

    def close(self) -> None:
        """Ends the session; nothing is asked any more."""
        self._closed = True
        session, self._session = self._session, None
        if session is not None:
            try:
                session.close()
            except TerraceError as error:
                self.failed(error)

    def prefix(self, spaces: "Sequence[StoreSpace]", keys: Sequence[bytes]) -> int:
        """How many keys from the first on all spaces hold."""
        return sum(1 for _ in _leading(self.present(spaces, keys, mode="prefix")))

    def prefix_now(self, spaces: "Sequence[StoreSpace]", keys: Sequence[bytes], within: float) -> int | None:
        """As :meth:`prefix`, asked on the caller's thread: ``None`` where nobody answers in so many seconds, or where
        the session or a space would have to be opened before."""
        session = self._session
        if session is None or session.closed or self.silent or len(keys) > session.blocks_max:
            return None
        opened = [space.opened_in(session) for space in spaces]
        bundle = [space for space in opened if space is not None]
        if not bundle or len(bundle) < len(opened):
            return None
        try:
            return session.exists(bundle, keys, within=within)[0]
        except TerraceError:
            # What is wrong shows when it is asked again, beside the caller.
            return None

    def present(self, spaces: "Sequence[StoreSpace]", keys: Sequence[bytes], mode: str = "set") -> list[bool]:
        """Which keys all spaces hold."""
        flags: list[bool] = []
        try:
            opened = [space.open() for space in spaces]
            session = self.session()
            if session is None or any(space is None for space in opened):
                return [False] * len(keys)
            bundle = [space for space in opened if space is not None]
            for part in _parts(keys, session.blocks_max):
                found = session.exists(bundle, part, mode=mode)[1]  # type: ignore[arg-type]
                flags += found
                if mode == "prefix" and not all(found):
                    break
        except TerraceError as error:
            self.failed(error)
            for space in spaces:
                space.forget()
        return flags + [False] * (len(keys) - len(flags))


class Reading:
    """Blocks that are pinned and verified, for as long as it is open. ``None`` is a miss."""

    def __init__(self, blocks: list[Block | None], leases: list[ReadLease]) -> None:
        self.blocks = blocks
        self._leases = leases

    @property
    def prefix(self) -> int:
        """Blocks from the first on without a gap."""
        return sum(1 for _ in _leading(block is not None for block in self.blocks))

    def good(self) -> list[bool]:
        """For each key: whether everything read until now was its block. Ask after use."""

        def valid(block: Block | None) -> bool:
            try:
                return block is not None and block.valid
            except TerraceError:
                return False

        return [valid(block) for block in self.blocks]

    def close(self) -> None:
        for lease in self._leases:
            try:
                lease.close()
            except TerraceError:
                continue
        self.blocks, self._leases = [], []

    def __enter__(self) -> "Reading":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StoreSpace:
    """A space of a store, opened again whenever the session or the space became another."""

    def __init__(self, store: Store, manifest: SpaceManifest, compute_cost: tuple[float, float] | None = None) -> None:
        self.store = store
        self.manifest = manifest
        self._compute_cost = compute_cost
        self._opened: tuple[Session, Space, float] | None = None

    def open(self, age_max: float = FRESH_SECONDS) -> Space | None:
        """The space in the session of now; ``None`` while there is no daemon.

        Checksums are those of a generation, which ends when anybody clears the space. Leases over the lane say it.
        Streams over gRPC do not: what is read by an old one is a miss, and what is stored by it is refused, so there
        whoever stores asks for the space of now.

        Raises what the daemon refuses.
        """
        session = self.store.session()
        if session is None:
            return None
        opened, now = self._opened, time.monotonic()
        if opened is not None and opened[0] is session and (session.transport == "lane" or now - opened[2] < age_max):
            return opened[1]
        space = session.open_space(self.manifest, compute_cost=self._compute_cost)
        self._opened = (session, space, now)
        return space

    def opened_in(self, session: Session) -> Space | None:
        """The space, if it is open in this session of the lane."""
        opened = self._opened
        return opened[1] if opened is not None and opened[0] is session and session.transport == "lane" else None

    def forget(self) -> None:
        """Opens it again before its next use."""
        self._opened = None

    def clear(self) -> bool:
        """Drops every block of the space, for everybody."""
        try:
            session, space = self.store.session(), self.open()
            if session is None or space is None:
                return False
            session.clear(space)
        except TerraceError as error:
            self.store.failed(error)
            return False
        finally:
            self.forget()
        return True

    def read(self, keys: Sequence[bytes], *, wait: float, verify: bool = True) -> Reading:
        """Pins what is there, waiting at most ``wait`` seconds for slower tiers.

        ``verify`` compares each block with its checksum before anybody uses it.
        """
        blocks: list[Block | None] = []
        leases: list[ReadLease] = []
        try:
            session, space = self.store.session(), self.open()
            if session is not None and space is not None:
                for part in _parts(keys, session.blocks_max):
                    if session.transport == "lane":
                        lease = session.lease_read(space, part, wait=wait)
                        leases.append(lease)
                        blocks += lease.blocks
                    else:
                        # Copied, and compared when they came.
                        blocks += session.read(space, part, wait=wait)
        except TerraceError as error:
            self.store.failed(error)
            self.forget()
        blocks += [None] * (len(keys) - len(blocks))
        if verify:
            blocks = [block if block is not None and self._sound(block) else None for block in blocks]
        return Reading(blocks, leases)

    def _sound(self, block: Block) -> bool:
        try:
            block.verify()
        except TerraceError as error:
            self.store.failed(error)
            return False
        return True

    def get(self, keys: Sequence[bytes], take: Callable[[int, Block], None], *, wait: float) -> list[bool]:
        """Gives every block that is there to ``take(index, block)``; answers which were good until after that."""
        with self.read(keys, wait=wait) as reading:
            for index, block in enumerate(reading.blocks):
                if block is None:
                    continue
                try:
                    take(index, block)
                except TerraceError as error:
                    # Its lease ended since: from here on it is not good.
                    self.store.failed(error)
            return reading.good()

    def put(
        self,
        keys: Sequence[bytes],
        give: Callable[[int, "WriteBlock | bytearray"], bool],
        *,
        parent: bytes | None = None,
        wait: float = 1.0,
    ) -> list[bool]:
        """Stores the blocks that are not there yet: ``give(index, frame)`` fills a frame, or answers that it cannot
        any more, which ends the call. Each block is the child of the one before it, the first of ``parent``.

        Answers which blocks are there now. Nothing of a space that was cleared meanwhile is stored.
        """
        there: list[bool] = []
        try:
            session, space = self.store.session(), self.open(age_max=0.0)
            if session is not None and space is not None:
                for part in _parts(keys, min(session.blocks_max, PUT_BLOCKS)):
                    stored, go_on = self._put_part(session, space, part, len(there), give, parent, wait)
                    there += stored
                    parent = part[-1]
                    if not go_on:
                        break
        except TerraceError as error:
            self.store.failed(error)
            self.forget()
        return there + [False] * (len(keys) - len(there))

    def _put_part(
        self,
        session: Session,
        space: Space,
        keys: Sequence[bytes],
        start: int,
        give: Callable[[int, "WriteBlock | bytearray"], bool],
        parent: bytes | None,
        wait: float,
    ) -> tuple[list[bool], bool]:
        if session.transport != "lane":
            return self._put_copies(session, space, keys, start, give, parent)
        lease: WriteLease = session.lease_write(space, keys, parent=parent, wait=wait)
        try:
            there = [outcome == "exists" for outcome in lease.outcomes]
            filled: list[int] = []
            go_on = True
            for index, block in enumerate(lease.blocks):
                if block is None:
                    continue
                go_on = give(start + index, block)
                if not go_on:
                    break
                filled.append(index)
            for index, outcome in zip(filled, lease.seal(filled) if filled else [], strict=True):
                there[index] = outcome in ("sealed", "already")
                self.store.counters.add("blocks_stored", outcome == "sealed")
            return there, go_on
        finally:
            lease.close()

    def _put_copies(
        self,
        session: Session,
        space: Space,
        keys: Sequence[bytes],
        start: int,
        give: Callable[[int, "WriteBlock | bytearray"], bool],
        parent: bytes | None,
    ) -> tuple[list[bool], bool]:
        there = sum(1 for _ in _leading(session.exists(space, keys)[1]))
        parent = keys[there - 1] if there else parent
        payloads: list[bytearray] = []
        for index in range(there, len(keys)):
            payload = bytearray(space.block_bytes)
            if not give(start + index, payload):
                break
            payloads.append(payload)
        names = keys[there : there + len(payloads)]
        outcomes = session.write(space, names, payloads, parent=parent) if names else []
        stored = [True] * there + [outcome in ("sealed", "already") for outcome in outcomes]
        self.store.counters.add("blocks_stored", outcomes.count("sealed"))
        return stored + [False] * (len(keys) - len(stored)), there + len(names) == len(keys)


def _parts(keys: Sequence[bytes], size: int) -> list[Sequence[bytes]]:
    return [keys[start : start + size] for start in range(0, len(keys), size)]


def _leading(flags: Any) -> Any:
    for flag in flags:
        if not flag:
            return
        yield flag
