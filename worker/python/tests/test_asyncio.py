"""The same session for asyncio: calls are awaited, and can be cancelled."""

import asyncio
import gc
import threading

import numpy as np
import pytest
import terrace_kv
from conftest import BLOCK_BYTES, PATIENCE, Daemon, keys, manifest, payload


@pytest.fixture(params=["lane", "grpc"])
def way(request: pytest.FixtureRequest, daemon: Daemon) -> dict[str, str]:
    if request.param == "lane":
        return {"socket": str(daemon.socket), "grpc": daemon.grpc}
    return {"grpc": daemon.grpc}


def test_what_was_written_is_read(way: dict[str, str], daemon: Daemon) -> None:
    """A result reaches the wrong future, or none: many calls at once, each with another answer."""

    async def work() -> None:
        async with await terrace_kv.connect_async(**way) as session:
            assert isinstance(session, terrace_kv.AsyncSession)
            space = await session.open_space(manifest())
            names = keys(32)
            sealed = await asyncio.gather(*(session.write(space, [name], [payload(name)]) for name in names))
            assert sealed == [["sealed"]] * 32
            found = await asyncio.gather(*(session.read(space, [name]) for name in names))
            assert [bytes(block) if block else None for (block,) in found] == [payload(name) for name in names]
            assert (await session.exists(space, names))[0] == 32
            assert (await session.match_blocks(space, names)).prefix == 32
            assert await session.touch(space, names) == 32
            assert (await session.prefetch(space, names)).resident == 32
            assert await session.retain(space, names[:1], ttl=1.0) == 1
            with pytest.raises(terrace_kv.InvalidArgument, match="key 0 has 0 bytes"):
                await session.read(space, [b""])
            assert await session.clear(space) == 32

    asyncio.run(asyncio.wait_for(work(), PATIENCE))
    daemon.expect_quiet()


def test_blocks_are_got_into_buffers(way: dict[str, str], daemon: Daemon) -> None:
    """A buffer is let go while it is filled, or is held for ever; or what is lost passes for a good one."""

    async def work() -> None:
        async with await terrace_kv.connect_async(**way) as session:
            space = await session.open_space(manifest())
            names = keys(16)
            await session.write(space, names, [payload(name) for name in names])
            for _ in range(2):
                targets = [bytearray(BLOCK_BYTES) for _ in range(17)]
                getting = session.get(space, [*names, b"absent"], targets, wait=5.0)
                with pytest.raises(BufferError):
                    targets[0].clear()
                assert await getting == [True] * 16 + [False]
                assert [bytes(target) for target in targets[:16]] == [payload(name) for name in names]
                targets[0].clear()
            for bad in ([bytearray(BLOCK_BYTES - 1)], [bytes(BLOCK_BYTES)], []):
                with pytest.raises((terrace_kv.InvalidArgument, BufferError)):
                    await session.get(space, names[:1], bad)
            # Waits for what never comes.
            target = bytearray(BLOCK_BYTES)
            getting = session.get(space, [b"absent"], [target], wait=PATIENCE)
            getting.cancel()
            for _ in range(1000):
                try:
                    target.clear()
                    break
                except BufferError:
                    await asyncio.sleep(0.01)
            assert not target
            with pytest.raises(asyncio.CancelledError):
                await getting
        daemon.expect_leases(0)

    asyncio.run(asyncio.wait_for(work(), PATIENCE))
    daemon.expect_quiet()


def test_leases(daemon: Daemon) -> None:
    """A lease from asyncio blocks the loop, or outlives its views."""

    async def work() -> None:
        session = await terrace_kv.connect_async(daemon.socket)
        space = await session.open_space(manifest())
        names = keys(2)
        lease = await session.lease_write(space, names, wait=5.0)
        assert isinstance(lease, terrace_kv.AsyncWriteLease)
        with lease:
            for name, block in zip(names, lease.blocks, strict=True):
                assert block is not None
                np.frombuffer(block, np.uint8)[:] = np.frombuffer(payload(name), np.uint8)
            assert await lease.seal([0], durability="durable") == ["sealed"]
            assert await lease.abort() == 1
            await lease.release()
        assert daemon.info().leases == 0
        reading = await session.lease_read(space, names)
        assert isinstance(reading, terrace_kv.AsyncReadLease)
        with reading:
            assert reading.outcomes == ["granted", "missing"]
            array = np.frombuffer(reading.blocks[0], np.uint8)
            assert array.tobytes() == payload(names[0])
        assert daemon.info().leases == 1
        del array
        await reading.release()
        daemon.expect_leases(0)
        session.close()

    asyncio.run(asyncio.wait_for(work(), PATIENCE))
    daemon.expect_quiet()


def test_streams(way: dict[str, str]) -> None:
    """An asynchronous iterator ends early, or never."""

    async def work() -> None:
        async with await terrace_kv.connect_async(**way) as session:
            space = await session.open_space(manifest())
            stream = await session.watch()
            await session.write(space, [b"a"], [payload(b"a")])
            async for run in stream:
                if any(event.block_id == space.block_id(b"a") for event in run.events):
                    break
            stream.close()
            assert [run async for run in stream] == []
            parts = [part async for part in await session.snapshot()]
            assert [block.block_id for part in parts for block in part.blocks] == [space.block_id(b"a")]

    asyncio.run(asyncio.wait_for(work(), PATIENCE))


def test_a_cancelled_call_gives_back_what_it_gets(daemon: Daemon) -> None:
    """A caller that went away keeps frames pinned: cancel leases at every moment of theirs."""

    async def work() -> None:
        session = await terrace_kv.connect_async(daemon.socket)
        space = await session.open_space(manifest())
        await session.write(space, keys(4), [payload(name) for name in keys(4)])
        cancelled = 0
        for turn in range(200):
            call = session.lease_read(space, keys(4)) if turn % 2 else session.lease_write(space, keys(2, 10))
            for _ in range(turn % 7):
                await asyncio.sleep(0)
            # It may have its result by now; then nobody takes it.
            cancelled += call.cancel()
            del call
        assert cancelled > 0
        # The session still works, and nothing is left of the leases.
        assert (await session.exists(space, keys(4)))[0] == 4
        gc.collect()
        await asyncio.to_thread(daemon.expect_leases, 0)
        session.close()

    asyncio.run(asyncio.wait_for(work(), PATIENCE))
    daemon.expect_quiet()


def test_waiting_calls_do_not_stop_each_other(daemon: Daemon) -> None:
    """A pool of threads fills up with calls that wait: many waits at once must leave the loop free."""

    async def work() -> None:
        async with await terrace_kv.connect_async(daemon.socket, daemon.grpc) as session:
            space = await session.open_space(manifest())
            before = threading.active_count()
            streams = [await session.watch() for _ in range(64)]
            waits = [asyncio.ensure_future(anext(stream)) for stream in streams]
            await asyncio.sleep(0)
            assert (await session.exists(space, keys(1)))[0] == 0
            assert threading.active_count() == before
            await session.write(space, keys(1), [payload(keys(1)[0])])
            runs = await asyncio.gather(*waits)
            assert all(run.events[0].block_id == space.block_id(keys(1)[0]) for run in runs)

    asyncio.run(asyncio.wait_for(work(), PATIENCE))


def test_a_loop_that_ended_is_no_trouble(daemon: Daemon) -> None:
    """A result comes for a loop that was closed: it must be dropped, and the next loop must work."""

    async def leave() -> None:
        session = await terrace_kv.connect_async(daemon.socket, daemon.grpc)
        space = await session.open_space(manifest())
        await session.write(space, [b"a"], [payload(b"a")])
        for _ in range(20):
            session.lease_read(space, [b"a"])

    for _ in range(3):
        asyncio.run(leave())
    gc.collect()
    daemon.expect_quiet()


def test_outside_a_loop_it_says_so(daemon: Daemon) -> None:
    """A call without a loop hangs or crashes."""
    with pytest.raises(RuntimeError, match="no running event loop"):
        terrace_kv.connect_async(daemon.socket)
