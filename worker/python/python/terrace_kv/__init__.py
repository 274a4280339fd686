"""Client of Terrace, a KV-cache service for LLM inference.

:func:`connect` opens a session with the ``terraced`` of this machine;
:func:`connect_async` opens one whose calls are awaited. Blocks are objects of
the buffer protocol: ``numpy.frombuffer(block, dtype)``, ``torch.frombuffer`` and
``memoryview`` see shared memory without a copy.

A read is a miss or exactly the bytes that were sealed. Leased bytes are the
daemon's: use them, then call :meth:`Block.check` (or leave the ``with`` block)
before anything derived from them goes anywhere.
"""

from ._errors import (
    BufferInUse,
    ClosedError,
    ConnectError,
    CorruptBlock,
    DeviceFailed,
    ForkedError,
    InvalidArgument,
    NoAnswer,
    ProtocolError,
    Refused,
    SessionEnded,
    StaleBlock,
    TerraceError,
    Throttled,
    Unsupported,
)
from ._manifest import SpaceManifest
from ._native import (
    AsyncReadLease,
    AsyncSession,
    AsyncStream,
    AsyncWriteLease,
    Block,
    BlockMatch,
    Device,
    DeviceBlock,
    DeviceChunk,
    Event,
    Events,
    Match,
    Prefetched,
    ReadLease,
    Session,
    SnapshotPart,
    Space,
    Stream,
    WriteBlock,
    WriteLease,
    chain_keys,
    connect,
    connect_async,
    copy_blocks,
    open_device,
)

__all__ = [
    "AsyncReadLease",
    "AsyncSession",
    "AsyncStream",
    "AsyncWriteLease",
    "Block",
    "BlockMatch",
    "BufferInUse",
    "ClosedError",
    "ConnectError",
    "CorruptBlock",
    "Device",
    "DeviceBlock",
    "DeviceChunk",
    "DeviceFailed",
    "Event",
    "Events",
    "ForkedError",
    "InvalidArgument",
    "Match",
    "NoAnswer",
    "Prefetched",
    "ProtocolError",
    "ReadLease",
    "Refused",
    "Session",
    "SessionEnded",
    "SnapshotPart",
    "Space",
    "SpaceManifest",
    "StaleBlock",
    "Stream",
    "TerraceError",
    "Throttled",
    "Unsupported",
    "WriteBlock",
    "WriteLease",
    "chain_keys",
    "connect",
    "connect_async",
    "copy_blocks",
    "open_device",
]
