"""Leases on a device: what is sealed there is read there, tensors keep their lease, and nothing is sealed under one.

The daemon is real. Its device, and ours, is host memory that stands in for one, asked for by name on both sides, so
that numpy takes it as a CPU's.
"""

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import terrace_kv
from conftest import BLOCK_BYTES, Daemon, keys, manifest, payload

HBM = '[[hbm]]\ndevice = "host-only"\nbytes = "16MiB"\n'


@pytest.fixture
def hbm(folder: Path, wire: SimpleNamespace) -> Iterator[Daemon]:
    running = Daemon(folder, wire, HBM)
    yield running
    running.kill()


@pytest.fixture
def device() -> terrace_kv.Device:
    return terrace_kv.open_device("host-only")


def fill(session: terrace_kv.Session, space: terrace_kv.Space, device: terrace_kv.Device, names: list[bytes]) -> None:
    with session.lease_write_on(device, space, names, wait=20.0) as lease:
        assert lease.outcomes == ["granted"] * len(names)
        for name, block in zip(names, lease.blocks, strict=True):
            assert block is not None
            np.from_dlpack(block)[:] = np.frombuffer(payload(name), np.uint8)
        assert lease.seal() == ["sealed"] * len(names)


def test_blocks_are_computed_and_read_in_place(hbm: Daemon, device: terrace_kv.Device) -> None:
    """A block comes back changed, is a copy, or can be written after it was sealed."""
    names = keys(4)
    with terrace_kv.connect(hbm.socket) as writer:
        fill(writer, writer.open_space(manifest()), device, names)
    # What a session leaves in its window moves out of it, one block after the other.
    hbm.expect_quiet()
    with terrace_kv.connect(hbm.socket) as reader:
        other = terrace_kv.open_device("host-only")
        space = reader.open_space(manifest())
        shape = (2, BLOCK_BYTES // 4)
        with reader.lease_read_on(other, space, names, wait=20.0, dtype="float16", shape=shape) as lease:
            assert lease.prefix == 4
            for name, block in zip(names, lease.blocks, strict=True):
                assert isinstance(block, terrace_kv.DeviceBlock)
                assert block.readonly
                assert block.valid
                array = np.from_dlpack(block)
                assert (array.shape, array.dtype, array.flags.writeable) == (shape, np.float16, False)
                assert array.tobytes() == payload(name)
            assert other.imports == 1, "one mapping for all blocks of a chunk"
            del array, block
            lease.check()
        with reader.lease_read(space, names, wait=20.0) as lease:
            assert [block.to_bytes() for block in lease.blocks if block] == [payload(name) for name in names]
    hbm.expect_quiet()


def test_tensors_keep_their_lease(hbm: Daemon, device: terrace_kv.Device) -> None:
    """The memory goes to another block while an array looks at it."""
    names = keys(1)
    with terrace_kv.connect(hbm.socket) as session:
        space = session.open_space(manifest())
        fill(session, space, device, names)
        hbm.expect_leases(0)
        lease = session.lease_read_on(device, space, names, wait=20.0)
        array = np.from_dlpack(lease.blocks[0])
        with pytest.raises(terrace_kv.BufferInUse):
            lease.release()
        lease.close()
        del lease
        gc.collect()
        hbm.expect_leases(1)
        assert array.tobytes() == payload(names[0])
        del array
        gc.collect()
        hbm.expect_leases(0)


def test_nothing_is_sealed_under_a_tensor(hbm: Daemon, device: terrace_kv.Device) -> None:
    """A store through an array that was made before the seal reaches bytes that others read."""
    with terrace_kv.connect(hbm.socket) as session:
        space = session.open_space(manifest())
        lease = session.lease_write_on(device, space, keys(2), wait=20.0)
        array = np.from_dlpack(lease.blocks[0])
        array[:] = 1
        with pytest.raises(terrace_kv.BufferInUse):
            lease.seal()
        assert lease.seal([1]) == ["sealed"], "the other one has no tensor"
        del array
        assert lease.seal() == ["sealed"]
        sealed = lease.blocks[0]
        assert sealed is not None
        assert not np.from_dlpack(sealed).flags.writeable
        with pytest.raises(terrace_kv.InvalidArgument):
            lease.seal([0])
        lease.close()
        with pytest.raises(terrace_kv.ClosedError):
            lease.seal()
        with pytest.raises(terrace_kv.ClosedError):
            np.from_dlpack(sealed)
    hbm.expect_quiet()


def test_a_device_that_is_not_the_daemons_is_refused(daemon: Daemon, device: terrace_kv.Device) -> None:
    """Blocks are read from memory that nobody lent."""
    with terrace_kv.connect(daemon.socket) as session:
        space = session.open_space(manifest())
        for call in (session.lease_read_on, session.lease_write_on):
            with pytest.raises(terrace_kv.InvalidArgument, match="owns no memory of this device"):
                call(device, space, keys(1))
    with terrace_kv.connect(grpc=daemon.grpc) as session, pytest.raises(terrace_kv.Unsupported):
        session.lease_read_on(device, session.open_space(manifest()), keys(1))


def test_the_daemon_dies_under_a_tensor(hbm: Daemon, device: terrace_kv.Device) -> None:
    """The process faults, or takes what it read for valid."""
    names = keys(1)
    with terrace_kv.connect(hbm.socket) as session:
        space = session.open_space(manifest())
        fill(session, space, device, names)
        lease = session.lease_read_on(device, space, names, wait=20.0)
        array = np.from_dlpack(lease.blocks[0])
        hbm.process.kill()
        hbm.process.wait()
        while not session.closed:
            pass
        assert not lease.valid
        with pytest.raises(terrace_kv.StaleBlock):
            lease.check()
        assert array.tobytes() == payload(names[0]), "the memory is there as long as it is mapped"


def test_asyncio(hbm: Daemon, device: terrace_kv.Device) -> None:
    """A call blocks the loop's thread, or answers with something else than its blocking twin."""

    async def run() -> None:
        async with await terrace_kv.connect_async(hbm.socket) as session:
            space = await session.open_space(manifest())
            with await session.lease_write_on(device, space, keys(1), wait=20.0) as lease:
                block = lease.blocks[0]
                assert block is not None
                np.from_dlpack(block)[:] = 7
                assert await lease.seal() == ["sealed"]
            pinned = await session.lease_read_on(device, space, keys(1), wait=20.0)
            assert np.from_dlpack(pinned.blocks[0]).max() == 7
            await pinned.release()
            assert await session.shrink(device, 4 << 20, wait=20.0) >= 4 << 20

    asyncio.run(run())
