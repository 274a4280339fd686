"""The native half. Import its names from ``terrace_kv``."""

from asyncio import Future
from collections.abc import AsyncIterator, Iterator, Sequence
from os import PathLike
from types import TracebackType
from typing import Generic, Literal, Self, TypeVar, final

from typing_extensions import Buffer

from ._manifest import SpaceManifest

Durability = Literal["readable", "durable"]
"""When a seal is answered: as soon as the block can be read, or when it would survive a power cut."""
MatchMode = Literal["prefix", "set"]
MissReason = Literal["unknown", "filling", "checksum", "device", "cheaper_to_recompute"]
"""Nobody holds it; still being written; a copy was damaged and dropped; the device failed; recomputing is quicker."""
Outcome = Literal["granted", "promoting", "missing", "throttled", "exists"]
"""Pinned or reserved; being brought in, lease again; not to be had; over a limit, back off; sealed already."""
Purpose = Literal["prefill", "decode"]
SealOutcome = Literal["sealed", "already", "conflict", "lost", "not_durable"]
"""Published; was there; other bytes were there and stay; the lease no longer covers it; published, not durable."""
Tier = Literal["hbm", "pinned", "nvme", "remote"]

_Item = TypeVar("_Item", covariant=True)

def connect(
    socket: str | PathLike[str] | None = None,
    grpc: str | None = None,
    *,
    tenant: str = "",
    token: str = "",
    client_name: str | None = None,
    answer_within: float | None = None,
    copy_threads: int | None = None,
) -> Session:
    """Opens a session.

    ``socket`` is the path of the daemon's lane socket, the quick way on its own machine; ``grpc`` its address,
    ``http://host:port``, for when there is no socket or nobody answers on it, and for streams. An empty tenant
    is "default". ``client_name`` is what operators see. ``answer_within`` are the seconds after which a daemon that
    says nothing, beyond what a call lets it wait, is given up with :class:`NoAnswer`; without it a minute.
    ``copy_threads`` are the threads that copy what one ``get`` or ``write`` over the socket moves, from 4 MiB on, and
    from 256 KiB on where calls follow each other; without it as many as the process may run on, at most 4. Those that
    help are shared by all sessions.

    Raises :class:`ConnectError` if nobody answers, :class:`Refused` if the daemon refuses the tenant.
    """

def connect_async(
    socket: str | PathLike[str] | None = None,
    grpc: str | None = None,
    *,
    tenant: str = "",
    token: str = "",
    client_name: str | None = None,
    answer_within: float | None = None,
    copy_threads: int | None = None,
) -> Future[AsyncSession]:
    """As :func:`connect`, for asyncio. Call it in a running event loop."""

def chain_keys(tokens: Sequence[int], tokens_per_block: int) -> list[bytes]:
    """Keys of the whole blocks of a prompt, 16 bytes each. A key names its block's tokens and all before them.
    The unfilled tail has no key."""

def copy_blocks(blocks: Sequence[Block], targets: Sequence[Buffer], *, threads: int = 1) -> list[bool]:
    """Copies each block into the writable buffer at its place, as :meth:`Block.read_into`, in one call with
    the interpreter released; with ``threads`` above 1 by so many, if there is much to copy. Answers which copies were
    compared with their checksum and are the block; a target of another holds anything."""

def map_blocks(blocks: Sequence[Block]) -> None:
    """Has the pages of blocks mapped into this process, with the interpreter released: whoever copies or reads them
    soon does not wait for it. Nothing else changes."""

def open_device(name: str) -> Device:
    """Opens a device: ``cuda:0``, or ``host-only``, host memory that stands in for one (for tests).

    Raises :class:`DeviceFailed` if it is not there; nothing else is taken instead.
    """

@final
class Device:
    """A device, to map memory of it that another process lends."""

    @property
    def kind(self) -> Literal["cuda", "host-only"]:
        """What stands behind it."""
    @property
    def name(self) -> str:
        """What the driver calls it."""
    @property
    def imports(self) -> int:
        """Chunks of other processes that are mapped here."""
    def allocate(self, nbytes: int) -> DeviceChunk:
        """Makes a chunk of at least ``nbytes``, all zeros. Raises :class:`DeviceFailed` if the device is full."""
    def import_chunk(self, descriptor: int, nbytes: int) -> DeviceChunk:
        """Maps a chunk of another process by its descriptor, which stays the caller's. ``nbytes`` is the
        chunk's whole length. The memory lives while anybody maps it, the other process or not.

        Raises :class:`InvalidArgument` if the descriptor is no such chunk.
        """

@final
class DeviceChunk:
    """Device memory that is mapped in this process until it and all blocks and tensors of it are gone."""

    @property
    def nbytes(self) -> int:
        """Mapped length."""
    def export(self) -> int:
        """A descriptor for another process. The caller closes it. Whoever imports it can write."""
    def block(
        self,
        offset: int,
        nbytes: int,
        *,
        dtype: str = "uint8",
        shape: Sequence[int] | None = None,
        readonly: bool = True,
        lease: object = None,
    ) -> DeviceBlock:
        """A part of it. ``shape`` is one direction of all elements if not given. ``lease`` is kept until the
        block and every tensor of it are gone; check it before what was computed goes anywhere.

        ``dtype`` is a name of numpy, ``bfloat16``, ``float8_e4m3fn`` or ``float8_e5m2``.
        """

@final
class DeviceBlock:
    """A part of a chunk, for ``torch.from_dlpack``, ``cupy.from_dlpack``, ``numpy.from_dlpack`` (host-only) and
    whatever knows ``__cuda_array_interface__``. Nothing is copied.

    A sealed block is ``readonly``: consumers are told so, and nothing in a device can stop them. torch refuses
    read-only memory by ``__cuda_array_interface__``, and takes it by DLPack.
    """

    @property
    def nbytes(self) -> int:
        """Length."""
    @property
    def dtype(self) -> str:
        """Type of the elements."""
    @property
    def shape(self) -> tuple[int, ...]:
        """Elements in each direction."""
    @property
    def readonly(self) -> bool:
        """Whether consumers are told not to write."""
    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
    @property
    def valid(self) -> bool:
        """Of a leased block: whether everything that was read until now was the block's, or the frame is still
        ours. Ask when the work that reads it has ended (``torch.cuda.synchronize()``)."""
    def close(self) -> None:
        """Refuses further use. Tensors that exist keep the memory and the lease."""
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __dlpack__(
        self,
        *,
        stream: object = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, object]: ...

class _Session:
    @property
    def incarnation(self) -> int:
        """Life of the daemon; another number means that it was started again."""
    @property
    def blocks_max(self) -> int:
        """Most keys in one request."""
    @property
    def transport(self) -> Literal["lane", "grpc"]:
        """ "lane": blocks are mapped. "grpc": blocks are copied."""
    @property
    def closed(self) -> bool:
        """Whether the session has ended: every leased block is stale and every call fails."""
    def close(self) -> None:
        """Ends the session now, and with it its leases. Views stay mapped, but are nobody's any more."""

@final
class Session(_Session):
    """A session whose calls block, with other threads running meanwhile. Ends as a context manager does.

    Every call raises :class:`SessionEnded` once the daemon is gone, :class:`InvalidArgument` for what cannot be
    meant, :class:`Refused` for what the daemon refuses, :class:`ForkedError` in a forked child.
    """

    def open_space(self, manifest: SpaceManifest, *, compute_cost: tuple[float, float] | None = None) -> Space:
        """Opens a space. Opening it again is cheap, and shows its current generation.

        ``compute_cost`` is what computing one block costs: seconds of the first block of a prompt (above 0),
        and seconds more for each block before it. Only with it may the daemon answer that recomputing is
        quicker than loading.

        Raises :class:`InvalidArgument` if a field of the manifest is out of bounds.
        """
    def exists(
        self,
        spaces: Space | Sequence[Space],
        keys: Sequence[bytes],
        *,
        mode: MatchMode = "prefix",
        within: float | None = None,
    ) -> tuple[int, list[bool]]:
        """Which keys every space of the bundle holds: keys present from the first on without a gap, and one
        flag a key. In mode "prefix" flags after the first absent key are false; "set" looks at each.

        With ``within`` raises :class:`NoAnswer` where the daemon has not answered in so many seconds.
        """
    def match_blocks(
        self, spaces: Space | Sequence[Space], keys: Sequence[bytes], *, mode: MatchMode = "prefix"
    ) -> Match:
        """Which keys every space of the bundle holds, where, and how soon they could be read.

        Touches no disk and promises nothing. In mode "prefix" only the prefix is listed.
        """
    def lease_read(
        self,
        space: Space,
        keys: Sequence[bytes],
        *,
        wait: float = 0.0,
        ttl: float | None = None,
        purpose: Purpose = "prefill",
    ) -> ReadLease:
        """Pins blocks for reading in place.

        ``wait``: seconds that the answer may wait for blocks of slower tiers. ``ttl``: seconds after which
        the daemon takes the blocks back from a process that hangs; leases renew themselves meanwhile. A
        decode's blocks are read before a prefill's.

        Raises :class:`Unsupported` over gRPC; use ``read`` there.
        """
    def get(
        self,
        space: Space,
        keys: Sequence[bytes],
        targets: Sequence[Buffer],
        *,
        wait: float = 0.0,
        purpose: Purpose = "prefill",
    ) -> list[bool]:
        """Copies each block into the writable, contiguous buffer at its place, with the interpreter released. Answers
        which copies were compared with their checksum and are the block; the target of another holds anything. The
        quickest way to a block by value: one that was got before is found without asking the daemon. Targets must not
        share memory: several threads may copy.

        ``wait``: seconds that the answer may wait for blocks of slower tiers.
        """
    def lease_write(
        self,
        space: Space,
        keys: Sequence[bytes],
        *,
        parent: bytes | None = None,
        wait: float = 0.0,
        ttl: float | None = None,
    ) -> WriteLease:
        """Reserves frames for blocks, each the child of the one before it, the first of ``parent``.

        Raises :class:`Unsupported` over gRPC; use ``write`` there.
        """
    def lease_read_on(
        self,
        device: Device,
        space: Space,
        keys: Sequence[bytes],
        *,
        wait: float = 0.0,
        ttl: float | None = None,
        purpose: Literal["prefill", "decode"] = "prefill",
        dtype: str = "uint8",
        shape: Sequence[int] | None = None,
    ) -> DeviceReadLease:
        """Pins blocks in the daemon's memory on a device, for tensors of ``dtype`` and ``shape`` (``None``: flat).

        What does not come to the device within ``wait`` seconds is granted in host memory, if it is there.
        :class:`InvalidArgument` if the daemon owns no memory of the device."""
    def lease_write_on(
        self,
        device: Device,
        space: Space,
        keys: Sequence[bytes],
        *,
        parent: bytes | None = None,
        wait: float = 0.0,
        ttl: float | None = None,
        dtype: str = "uint8",
        shape: Sequence[int] | None = None,
    ) -> DeviceWriteLease:
        """Reserves frames in the daemon's memory on a device, each block the child of the one before it.

        A key that the device has no room for is ``elsewhere``: write it by :meth:`write`."""
    def shrink(self, device: Device, nbytes: int, *, wait: float = 0.0) -> int:
        """Says how many bytes of the device the caller needs in all, in place of what the session said before, and
        waits up to ``wait`` seconds until they are free. Answers how many the daemon leaves free now, to all who asked.
        It holds until the session ends."""
    def read(self, space: Space, keys: Sequence[bytes], *, wait: float = 5.0) -> list[Block | None]:
        """Copies blocks out over either transport, each compared with its checksum; ``None`` is a miss.

        ``wait``: seconds to wait for blocks of slower tiers. Raises :class:`Throttled` if the daemon stays
        over a limit.
        """
    def write(
        self,
        space: Space,
        keys: Sequence[bytes],
        payloads: Sequence[Buffer],
        *,
        parent: bytes | None = None,
        durability: Durability = "readable",
    ) -> list[SealOutcome]:
        """Stores and seals blocks over either transport, each the child of the one before it.

        Each payload is ``space.block_bytes`` long and C-contiguous. ``bytes`` are sent from where they lie;
        other buffers are copied once, so that nobody changes them meanwhile. "durable" answers when the
        blocks would survive a power cut.

        Raises :class:`Throttled` if the daemon stays over a limit; some blocks may have been sealed then.
        """
    def touch(self, space: Space, keys: Sequence[bytes]) -> int:
        """Marks blocks as used; answers how many were there."""
    def prefetch(self, space: Space, keys: Sequence[bytes]) -> Prefetched:
        """Starts bringing blocks into memory and does not wait for them."""
    def retain(self, space: Space, keys: Sequence[bytes], *, ttl: float, priority: int = 50) -> int:
        """Asks for blocks to be kept for ``ttl`` seconds; answers for how many there was quota.

        ``priority`` is 0 (evict as usual) to 100 (evict last).
        """
    def clear(self, space: Space) -> int:
        """Drops every block of a space, durably; answers how many there were. Open the space again before
        writing to it."""
    def flush_windows(self) -> int:
        """Hands back every window that nobody writes into; answers how many the daemon took. They go back
        by themselves when they are full or idle."""
    def watch(self, from_sequence: int | None = None) -> Stream[Events]:
        """Streams what happens to the tenant's blocks, from now on or from a sequence number on.

        Raises :class:`Unsupported` unless ``connect`` was given a gRPC address.
        """
    def snapshot(self) -> Stream[SnapshotPart]:
        """Streams everything the tenant holds at one sequence number; watch from there to stay current."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

@final
class AsyncSession(_Session):
    """The same session where calls answer with asyncio futures. A call starts at once; cancelling its future
    ends it and gives back what it was granted. Errors are those of :class:`Session`."""

    def open_space(self, manifest: SpaceManifest, *, compute_cost: tuple[float, float] | None = None) -> Future[Space]:
        """Opens a space. Opening it again is cheap, and shows its current generation.

        ``compute_cost`` is what computing one block costs: seconds of the first block of a prompt (above 0),
        and seconds more for each block before it. Only with it may the daemon answer that recomputing is
        quicker than loading.

        Raises :class:`InvalidArgument` if a field of the manifest is out of bounds.
        """
    def exists(
        self,
        spaces: Space | Sequence[Space],
        keys: Sequence[bytes],
        *,
        mode: MatchMode = "prefix",
        within: float | None = None,
    ) -> Future[tuple[int, list[bool]]]:
        """Which keys every space of the bundle holds: keys present from the first on without a gap, and one
        flag a key. In mode "prefix" flags after the first absent key are false; "set" looks at each.

        With ``within`` raises :class:`NoAnswer` where the daemon has not answered in so many seconds.
        """
    def match_blocks(
        self, spaces: Space | Sequence[Space], keys: Sequence[bytes], *, mode: MatchMode = "prefix"
    ) -> Future[Match]:
        """Which keys every space of the bundle holds, where, and how soon they could be read.

        Touches no disk and promises nothing. In mode "prefix" only the prefix is listed.
        """
    def lease_read(
        self,
        space: Space,
        keys: Sequence[bytes],
        *,
        wait: float = 0.0,
        ttl: float | None = None,
        purpose: Purpose = "prefill",
    ) -> Future[AsyncReadLease]:
        """Pins blocks for reading in place.

        ``wait``: seconds that the answer may wait for blocks of slower tiers. ``ttl``: seconds after which
        the daemon takes the blocks back from a process that hangs; leases renew themselves meanwhile. A
        decode's blocks are read before a prefill's.

        Raises :class:`Unsupported` over gRPC; use ``read`` there.
        """
    def get(
        self,
        space: Space,
        keys: Sequence[bytes],
        targets: Sequence[Buffer],
        *,
        wait: float = 0.0,
        purpose: Purpose = "prefill",
    ) -> Future[list[bool]]:
        """Copies each block into the writable, contiguous buffer at its place. Answers which copies were compared with
        their checksum and are the block; the target of another holds anything. Targets are held in place until the
        call has ended, and hold anything if it is cancelled.

        ``wait``: seconds that the answer may wait for blocks of slower tiers.
        """
    def lease_write(
        self,
        space: Space,
        keys: Sequence[bytes],
        *,
        parent: bytes | None = None,
        wait: float = 0.0,
        ttl: float | None = None,
    ) -> Future[AsyncWriteLease]:
        """Reserves frames for blocks, each the child of the one before it, the first of ``parent``.

        Raises :class:`Unsupported` over gRPC; use ``write`` there.
        """
    def lease_read_on(
        self,
        device: Device,
        space: Space,
        keys: Sequence[bytes],
        *,
        wait: float = 0.0,
        ttl: float | None = None,
        purpose: Literal["prefill", "decode"] = "prefill",
        dtype: str = "uint8",
        shape: Sequence[int] | None = None,
    ) -> Future[AsyncDeviceReadLease]: ...
    def lease_write_on(
        self,
        device: Device,
        space: Space,
        keys: Sequence[bytes],
        *,
        parent: bytes | None = None,
        wait: float = 0.0,
        ttl: float | None = None,
        dtype: str = "uint8",
        shape: Sequence[int] | None = None,
    ) -> Future[AsyncDeviceWriteLease]: ...
    def shrink(self, device: Device, nbytes: int, *, wait: float = 0.0) -> Future[int]: ...
    def read(self, space: Space, keys: Sequence[bytes], *, wait: float = 5.0) -> Future[list[Block | None]]:
        """Copies blocks out over either transport, each compared with its checksum; ``None`` is a miss.

        ``wait``: seconds to wait for blocks of slower tiers. Raises :class:`Throttled` if the daemon stays
        over a limit.
        """
    def write(
        self,
        space: Space,
        keys: Sequence[bytes],
        payloads: Sequence[Buffer],
        *,
        parent: bytes | None = None,
        durability: Durability = "readable",
    ) -> Future[list[SealOutcome]]:
        """Stores and seals blocks over either transport, each the child of the one before it.

        Each payload is ``space.block_bytes`` long and C-contiguous. ``bytes`` are sent from where they lie;
        other buffers are copied once, so that nobody changes them meanwhile. "durable" answers when the
        blocks would survive a power cut.

        Raises :class:`Throttled` if the daemon stays over a limit; some blocks may have been sealed then.
        """
    def touch(self, space: Space, keys: Sequence[bytes]) -> Future[int]:
        """Marks blocks as used; answers how many were there."""
    def prefetch(self, space: Space, keys: Sequence[bytes]) -> Future[Prefetched]:
        """Starts bringing blocks into memory and does not wait for them."""
    def retain(self, space: Space, keys: Sequence[bytes], *, ttl: float, priority: int = 50) -> Future[int]:
        """Asks for blocks to be kept for ``ttl`` seconds; answers for how many there was quota.

        ``priority`` is 0 (evict as usual) to 100 (evict last).
        """
    def clear(self, space: Space) -> Future[int]:
        """Drops every block of a space, durably; answers how many there were. Open the space again before
        writing to it."""
    def flush_windows(self) -> Future[int]:
        """Hands back every window that nobody writes into; answers how many the daemon took. They go back
        by themselves when they are full or idle."""
    def watch(self, from_sequence: int | None = None) -> Future[AsyncStream[Events]]:
        """Streams what happens to the tenant's blocks, from now on or from a sequence number on.

        Raises :class:`Unsupported` unless ``connect`` was given a gRPC address.
        """
    def snapshot(self) -> Future[AsyncStream[SnapshotPart]]:
        """Streams everything the tenant holds at one sequence number; watch from there to stay current."""
    def __aenter__(self) -> Future[Self]: ...
    def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Future[None]: ...

@final
class Space:
    """A space that a session opened. Goes stale when anybody clears it or the session ends: open it again."""

    @property
    def id(self) -> bytes:
        """Identity of the space, 16 bytes."""
    @property
    def block_bytes(self) -> int:
        """Payload of one block in bytes."""
    @property
    def frame_bytes(self) -> int:
        """Bytes from one frame to the next in memory."""
    @property
    def generation(self) -> int:
        """Generation when it was opened; ``clear`` moves it."""
    def block_id(self, key: bytes) -> bytes:
        """Identity of the block that is called ``key`` here, 16 bytes."""

@final
class Block(Buffer):
    """A sealed block: ``nbytes`` read-only bytes.

    ``memoryview(block)``, ``numpy.frombuffer(block, dtype)`` and ``torch.frombuffer(block, dtype=...)`` show it
    without a copy. From ``lease_read`` the bytes lie in shared memory: use them, then ``check`` before anything
    derived from them goes anywhere. From ``read`` they are a copy that was compared with its checksum.

    As a context manager it checks at its end. A view that outlives ``close`` keeps the lease until it goes.
    """

    @property
    def id(self) -> bytes:
        """Identity, 16 bytes."""
    @property
    def nbytes(self) -> int:
        """Payload length in bytes."""
    @property
    def closed(self) -> bool:
        """Whether ``close`` was called or a ``with`` ended."""
    @property
    def valid(self) -> bool:
        """Whether everything read until now was the block. One load of shared memory."""
    def check(self) -> None:
        """Raises :class:`StaleBlock` unless everything read until now was the block."""
    def verify(self) -> None:
        """Compares the bytes in place with the sealed checksum.

        Raises :class:`CorruptBlock` or :class:`StaleBlock`.
        """
    def read_into(self, target: Buffer) -> None:
        """Copies the block into a writable buffer of ``nbytes`` bytes, whose elements may lie apart, and compares the
        copy with the checksum. Raises :class:`CorruptBlock` or :class:`StaleBlock`; the target then holds anything."""
    def to_bytes(self) -> bytes:
        """A copy that was compared with the checksum. Raises :class:`CorruptBlock` or :class:`StaleBlock`."""
    def close(self) -> None:
        """Refuses further use, and ends the lease when its last view and block are gone."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
    def __len__(self) -> int: ...

@final
class WriteBlock(Buffer):
    """A frame to be filled: ``nbytes`` writable bytes in shared memory.

    ``memoryview(block)[:] = ...`` and ``numpy.frombuffer(block, dtype)[:] = ...`` store in place. No view may be
    alive when the block is sealed or given back.
    """

    @property
    def id(self) -> bytes:
        """Identity, 16 bytes."""
    @property
    def index(self) -> int:
        """Position in the lease."""
    @property
    def nbytes(self) -> int:
        """Payload length in bytes."""
    def fill(self, source: Buffer) -> None:
        """Copies ``nbytes`` bytes in, in the order of the source's elements, which may lie apart, and computes the
        checksum in the same pass: a seal that follows does not look at them again. Lets other threads run meanwhile."""
    def __len__(self) -> int: ...

class ReadLease:
    """Blocks pinned for reading. Ends when it and its blocks are closed or collected and no view is left.

    As a context manager it checks all blocks at its end and closes them.
    """

    @property
    def id(self) -> int | None:
        """The daemon's number of the lease; ``None`` when nothing was granted."""
    @property
    def blocks(self) -> list[Block | None]:
        """One block a key, ``None`` where it was not granted."""
    @property
    def outcomes(self) -> list[Outcome]:
        """What became of each key."""
    @property
    def reasons(self) -> list[MissReason | None]:
        """Why a key is missing; ``None`` for those that are not."""
    @property
    def prefix(self) -> int:
        """Blocks granted from the first key on without a gap."""
    @property
    def valid(self) -> bool:
        """Whether everything read until now of all open blocks was theirs."""
    def check(self) -> None:
        """Raises :class:`StaleBlock` unless everything read until now of all open blocks was theirs."""
    def close(self) -> None:
        """Closes every block. Does not wait."""
    def release(self) -> None:
        """Closes every block, and waits until the daemon knows that the lease has ended.

        Raises :class:`BufferInUse` while views are alive.
        """
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Block | None]: ...

@final
class AsyncReadLease(ReadLease):
    """A :class:`ReadLease` whose ``release`` is awaited."""

    def release(self) -> Future[None]: ...  # type: ignore[override]

class DeviceReadLease:
    """Blocks pinned for reading on a device. Ends when it and its blocks are closed or collected and no tensor is
    left.

    As a context manager it checks all blocks at its end and closes them: end the work that reads them before.
    """

    @property
    def id(self) -> int | None:
        """The daemon's number of the lease; ``None`` when nothing was granted."""
    @property
    def blocks(self) -> list[DeviceBlock | Block | None]:
        """One entry a key: on the device, else in host memory, else ``None``."""
    @property
    def outcomes(self) -> list[str]:
        """``granted``, ``promoting``, ``missing`` or ``throttled``, one a key."""
    @property
    def reasons(self) -> list[str | None]:
        """Why a key is ``missing``."""
    @property
    def prefix(self) -> int:
        """Blocks granted from the first key on without a gap, wherever they are."""
    @property
    def valid(self) -> bool:
        """Whether everything read until now of all blocks was theirs."""
    def check(self) -> None:
        """Raises :class:`StaleBlock` unless ``valid``."""
    def close(self) -> None:
        """Closes every block; the lease ends with the last tensor."""
    def release(self) -> None:
        """Closes every block and waits until the daemon knows. :class:`BufferInUse` while a tensor exists."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[DeviceBlock | Block | None]: ...

class AsyncDeviceReadLease(DeviceReadLease):
    """A :class:`DeviceReadLease` whose ``release`` is awaited."""

    def release(self) -> Future[None]: ...  # type: ignore[override]

class DeviceWriteLease:
    """Frames reserved for writing on a device. What is not sealed goes back when it and its blocks are closed or
    collected and no tensor is left."""

    @property
    def id(self) -> int | None:
        """The daemon's number of the lease; ``None`` when nothing was granted."""
    @property
    def blocks(self) -> list[DeviceBlock | None]:
        """One frame a key, ``None`` where none was granted on the device. ``readonly`` once it is sealed."""
    @property
    def outcomes(self) -> list[str]:
        """``granted``, ``exists``, ``elsewhere`` (the device has no room), ``missing`` or ``throttled``, one a key."""
    @property
    def reasons(self) -> list[str | None]:
        """Why a key is ``missing``."""
    def seal(
        self, indexes: Sequence[int] | None = None, *, durability: Literal["readable", "durable"] = "readable"
    ) -> list[str]:
        """Publishes the blocks at these positions (all that are not sealed) with the checksums of what is in them,
        which a kernel computes on a GPU. One word a block, as of :meth:`WriteLease.seal`.

        End the work that stores into them before (``torch.cuda.synchronize()``). :class:`BufferInUse` while a tensor
        of one exists. What holds a block by ``__cuda_array_interface__`` is not seen."""
    def close(self) -> None:
        """Gives back what is not sealed and unpins the rest, with the last tensor of a frame."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[DeviceBlock | None]: ...

class AsyncDeviceWriteLease(DeviceWriteLease):
    """A :class:`DeviceWriteLease` whose ``seal`` is awaited."""

    def seal(  # type: ignore[override]
        self, indexes: Sequence[int] | None = None, *, durability: Literal["readable", "durable"] = "readable"
    ) -> Future[list[str]]: ...

class WriteLease:
    """Frames reserved for writing. What is not sealed goes back when it and its blocks are closed or collected
    and no view is left."""

    @property
    def id(self) -> int | None:
        """The daemon's number of the lease; ``None`` when nothing was granted."""
    @property
    def blocks(self) -> list[WriteBlock | None]:
        """One block a key, ``None`` where no frame was granted."""
    @property
    def outcomes(self) -> list[Outcome]:
        """What became of each key; "exists" means sealed already, nothing to do."""
    @property
    def reasons(self) -> list[MissReason | None]:
        """Why a key is missing; ``None`` for those that are not."""
    def seal(self, indexes: Sequence[int] | None = None, *, durability: Durability = "readable") -> list[SealOutcome]:
        """Publishes the blocks at these positions, or all that can be written, with the checksums of what is in
        their frames now. From here on they are immutable, whatever the outcome; they stay pinned until the
        lease ends. After :class:`Throttled` or :class:`Refused` nothing was sealed, and they can be written again.

        Raises :class:`BufferInUse` while a view of one is alive, :class:`InvalidArgument` for a position that
        cannot be sealed.
        """
    def abort(self, indexes: Sequence[int] | None = None) -> int:
        """Gives back the frames at these positions, or all that can be written; answers how many.

        Raises :class:`BufferInUse` while a view of one is alive.
        """
    def reader(self, index: int) -> Block:
        """A reading block of one that this lease has sealed. It may be stale if the seal lost ("already" and worse)."""
    def close(self) -> None:
        """Gives back what was not sealed and unpins the rest, once no view is left. Does not wait."""
    def release(self) -> None:
        """As ``close``, and waits until the daemon knows. Raises :class:`BufferInUse` while views are alive."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[WriteBlock | None]: ...

@final
class AsyncWriteLease(WriteLease):
    """A :class:`WriteLease` whose ``seal``, ``abort`` and ``release`` are awaited."""

    def seal(  # type: ignore[override]
        self, indexes: Sequence[int] | None = None, *, durability: Durability = "readable"
    ) -> Future[list[SealOutcome]]: ...
    def abort(self, indexes: Sequence[int] | None = None) -> Future[int]: ...  # type: ignore[override]
    def release(self) -> Future[None]: ...  # type: ignore[override]

class Stream(Generic[_Item]):
    """What a stream yields, as it comes."""

    def close(self) -> None:
        """Ends the stream."""
    def __iter__(self) -> Self: ...
    def __next__(self) -> _Item: ...

@final
class AsyncStream(Stream[_Item]):
    """The same as an asynchronous iterator."""

    def __aiter__(self) -> AsyncIterator[_Item]: ...
    def __anext__(self) -> Future[_Item]: ...

@final
class Match:
    """Which blocks are there."""

    @property
    def prefix(self) -> int:
        """Keys present from the first one on without a gap."""
    @property
    def blocks(self) -> list[BlockMatch]:
        """One entry a key looked at."""

@final
class BlockMatch:
    """One position of a :class:`Match`."""

    @property
    def present(self) -> bool:
        """Whether every space of the bundle holds it."""
    @property
    def tier(self) -> Tier | None:
        """Fastest tier that holds all of it."""
    @property
    def holder(self) -> str:
        """Node that holds it; empty means the daemon's own."""
    @property
    def fetch_seconds(self) -> float:
        """Estimated time until it could be read from memory, in seconds."""

@final
class Prefetched:
    """What a prefetch did."""

    @property
    def started(self) -> int:
        """Blocks being brought in."""
    @property
    def resident(self) -> int:
        """Blocks that were there already."""

@final
class Events:
    """A run of events without a gap."""

    @property
    def incarnation(self) -> int:
        """Life of the daemon."""
    @property
    def sequence(self) -> int:
        """Sequence number of the first event."""
    @property
    def events(self) -> list[Event]:
        """The events."""
    @property
    def resync(self) -> bool:
        """The numbers asked for are gone: take a snapshot. Ends the stream."""

@final
class SnapshotPart:
    """A part of a snapshot."""

    @property
    def incarnation(self) -> int:
        """Life of the daemon."""
    @property
    def sequence(self) -> int:
        """Watch from this number on to stay current."""
    @property
    def blocks(self) -> list[Event]:
        """Blocks, as "sealed" events. A parent comes before its children."""
    @property
    def last(self) -> bool:
        """This is the last part."""

@final
class Event:
    """What happened to a block."""

    @property
    def kind(self) -> Literal["sealed", "moved", "evicted", "cleared", "unknown"]:
        """A copy became readable; the set of tiers changed; the last copy is gone; the space is empty."""
    @property
    def space_id(self) -> bytes:
        """Space, 16 bytes."""
    @property
    def block_id(self) -> bytes | None:
        """Block, 16 bytes; ``None`` when the space was cleared."""
    @property
    def parent_id(self) -> bytes | None:
        """Block before it, 16 bytes; ``None`` if none is known."""
    @property
    def tiers(self) -> list[Tier]:
        """Tiers that hold it now."""
    @property
    def length(self) -> int:
        """Payload length in bytes."""
