"""Views of blocks: they show shared memory in place, and hold a lease exactly as long as they live."""

import ctypes
import gc
import os
import resource
import signal
import threading
import warnings

import numpy as np
import pytest
import terrace_kv
from conftest import BLOCK_BYTES, Daemon, keys, manifest, payload, wait_for


@pytest.fixture
def space(lane: terrace_kv.Session) -> terrace_kv.Space:
    space = lane.open_space(manifest())
    names = keys(4)
    lane.write(space, names, [payload(name) for name in names])
    return space


def test_views_show_the_bytes(lane: terrace_kv.Session, space: terrace_kv.Space, daemon: Daemon) -> None:
    """A view shows another frame, a copy, or lets one write: look through every kind of it."""
    names = keys(4)
    with lane.lease_read(space, [*names, b"absent"], ttl=60.0) as lease:
        assert lease.outcomes == ["granted"] * 4 + ["missing"]
        assert lease.reasons == [None] * 4 + ["unknown"]
        assert (len(lease), lease.prefix) == (5, 4)
        assert list(lease)[4] is None
        for name, block in zip(names, lease.blocks[:4], strict=True):
            assert block is not None
            expected = payload(name)
            view = memoryview(block)
            assert (view.readonly, view.format, view.itemsize, view.shape) == (True, "B", 1, (BLOCK_BYTES,))
            assert view == expected
            halves = np.frombuffer(block, np.float16)
            assert halves.shape == (BLOCK_BYTES // 2,)
            assert halves.tobytes() == expected
            assert not halves.flags.writeable
            again = np.frombuffer(block, np.uint8)
            assert again.ctypes.data == halves.ctypes.data, "both look at one place: nothing was copied"
            assert again.ctypes.data % 4096 == 0
            with pytest.raises(TypeError):
                ctypes.c_char.from_buffer(block)
            block.verify()
            block.check()
            target = np.zeros(BLOCK_BYTES // 4, np.float32)
            block.read_into(target)
            assert target.tobytes() == block.to_bytes() == expected
            del view, halves, again
    daemon.expect_leases(0)


def test_torch_tensors_are_no_copies(lane: terrace_kv.Session, daemon: Daemon) -> None:
    """A tensor is a copy, or its memory goes while it lives: torch keeps a buffer's owner, not the buffer."""
    torch = pytest.importorskip("torch", reason="torch is not installed: its tensors were NOT tested")
    space = lane.open_space(manifest())
    expected = torch.arange(BLOCK_BYTES // 2, dtype=torch.int16)
    with lane.lease_write(space, keys(1), wait=5.0) as writing:
        tensor = torch.frombuffer(writing.blocks[0], dtype=torch.int16)
        tensor.copy_(expected)
        with pytest.raises(terrace_kv.BufferInUse):
            writing.seal()
        del tensor
        assert writing.seal() == ["sealed"]
    with lane.lease_read(space, keys(1)) as reading, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        tensor = torch.frombuffer(reading.blocks[0], dtype=torch.int16)
        assert tensor.data_ptr() == np.frombuffer(reading.blocks[0], np.uint8).ctypes.data
        with pytest.raises(terrace_kv.BufferInUse):
            reading.release()
    gc.collect()
    assert daemon.info().leases == 1
    assert torch.equal(tensor, expected)
    del tensor
    daemon.expect_leases(0)


def test_a_view_lives_as_long_as_its_owner(lane: terrace_kv.Session, space: terrace_kv.Space, daemon: Daemon) -> None:
    """As torch does it: the buffer is released at once, its owner kept, and the memory used on."""
    lease = lane.lease_read(space, keys(1))
    with memoryview(lease.blocks[0]) as view:
        owner = view.obj
    with pytest.raises(terrace_kv.BufferInUse):
        lease.release()
    lease.close()
    gc.collect()
    assert daemon.info().leases == 1
    del owner
    daemon.expect_leases(0)
    with lane.lease_write(space, [b"new"]) as writing:
        with memoryview(writing.blocks[0]) as view:
            owner = view.obj
        with pytest.raises(terrace_kv.BufferInUse):
            writing.seal()
        del owner, view
        assert writing.seal() == ["sealed"]


def test_a_lease_lives_as_long_as_its_last_view(
    lane: terrace_kv.Session, space: terrace_kv.Space, daemon: Daemon
) -> None:
    """The lease ends under an array that is in use, or never: end everything else first, then the array."""
    lease = lane.lease_read(space, keys(2))
    first, second = (np.frombuffer(block, np.uint8) for block in lease)
    daemon.expect_leases(1)
    del lease
    gc.collect()
    assert daemon.info().leases == 1, "arrays keep what they show"
    del first
    gc.collect()
    assert daemon.info().leases == 1
    assert second.tobytes() == payload(keys(2)[1])
    part = second[10:20]
    del second
    assert part.tobytes() == payload(keys(2)[1])[10:20], "a slice keeps it too"
    assert daemon.info().leases == 1
    del part
    daemon.expect_leases(0)
    assert daemon.pinned() == 0


def test_blocks_end_their_lease_when_closed(lane: terrace_kv.Session, space: terrace_kv.Space, daemon: Daemon) -> None:
    """A closed block goes on, or its lease does."""
    lease = lane.lease_read(space, keys(1))
    (block,) = lease.blocks
    assert block is not None
    array = np.frombuffer(block, np.uint8)
    with block:
        pass
    assert block.closed
    uses = (
        lambda: memoryview(block),
        lambda: bytes(block),
        lambda: np.frombuffer(block, np.uint8),
        block.check,
        block.verify,
        block.to_bytes,
        lambda: block.valid,
        block.__enter__,
    )
    for use in uses:
        with pytest.raises(terrace_kv.ClosedError, match="closed"):
            use()
    block.close()
    assert array.tobytes() == payload(keys(1)[0]), "a view outlives the block's close"
    del array
    lease.close()
    daemon.expect_leases(0)


def test_release_waits_for_views_to_go(lane: terrace_kv.Session, space: terrace_kv.Space, daemon: Daemon) -> None:
    """`release` takes the frame from under an array: it must refuse, and do it once the array is gone."""
    lease = lane.lease_read(space, keys(2))
    array = np.frombuffer(lease.blocks[0], np.uint8)
    with pytest.raises(terrace_kv.BufferInUse, match="1 views"):
        lease.release()
    assert array.tobytes() == payload(keys(2)[0])
    del array
    lease.release()
    assert daemon.info().leases == 0, "it is released when the call is back"
    lease.release()


def test_a_moved_fence_is_noticed(lane: terrace_kv.Session, space: terrace_kv.Space, daemon: Daemon) -> None:
    """A block is replaced under its reader: clear the space, and ask every way there is."""
    lease = lane.lease_read(space, keys(2))
    one, two = lease.blocks
    assert one is not None
    assert two is not None
    array = np.frombuffer(one, np.uint8)
    # Ends every lease on the space: its blocks are gone.
    with terrace_kv.connect(daemon.socket) as other:
        assert other.clear(other.open_space(manifest())) == 4
    wait_for(lambda: not one.valid, "the fence to move")
    for ask in (one.check, one.verify, one.to_bytes, lambda: memoryview(two), lease.check):
        with pytest.raises(terrace_kv.StaleBlock):
            ask()
    with pytest.raises(terrace_kv.StaleBlock), two:
        pass
    with pytest.raises(terrace_kv.StaleBlock), lease:
        pass
    assert array.nbytes == BLOCK_BYTES, "old memory can still be touched"


def test_an_error_is_not_hidden_by_a_stale_block(lane: terrace_kv.Session, space: terrace_kv.Space) -> None:
    """`with` replaces the error of its body by its own."""
    lease = lane.lease_read(space, keys(1))
    with pytest.raises(KeyError), lease:
        lane.close()
        raise KeyError
    with pytest.raises(terrace_kv.ClosedError):
        _ = lease.blocks


def test_frames_are_filled_in_place(lane: terrace_kv.Session, daemon: Daemon) -> None:
    """What is sealed is not what was stored: fill frames in every way, and read them back by another session."""
    space = lane.open_space(manifest())
    names = keys(3)
    contents = [payload(name) for name in names]
    with lane.lease_write(space, names, wait=5.0) as lease:
        assert lease.outcomes == ["granted"] * 3
        view, array, filled = lease.blocks
        assert view is not None
        assert array is not None
        assert filled is not None
        with memoryview(view) as target:
            assert not target.readonly
            target[:] = contents[0]
        halves = np.frombuffer(array, np.float16)
        halves[:] = np.frombuffer(contents[1], np.float16)
        filled.fill(np.frombuffer(contents[2], np.float32))
        with pytest.raises(terrace_kv.BufferInUse, match="block 1 has 1 writable view"):
            lease.seal()
        with pytest.raises(terrace_kv.BufferInUse, match="block 1"):
            lease.abort([1])
        del halves
        assert lease.seal([0, 1]) == ["sealed", "sealed"]
        assert lease.seal(durability="durable") == ["sealed"], "what is left"
        with pytest.raises(terrace_kv.BufferInUse, match=r"lease.reader\(0\)"):
            memoryview(view)
        with pytest.raises(terrace_kv.InvalidArgument, match="cannot be sealed"):
            lease.seal([0])
        for index, content in enumerate(contents):
            for _twice in range(2):
                with lease.reader(index) as block:
                    assert bytes(block) == content
    with pytest.raises(terrace_kv.ClosedError):
        lease.seal()
    daemon.expect_leases(0)
    with terrace_kv.connect(daemon.socket) as other:
        found = other.read(other.open_space(manifest()), names)
        assert [bytes(block) if block else None for block in found] == contents
    with lane.lease_write(space, names) as lease:
        assert lease.outcomes == ["exists"] * 3
        assert lease.blocks == [None] * 3


def test_what_is_not_sealed_goes_back(lane: terrace_kv.Session, daemon: Daemon) -> None:
    """Frames leak when nobody seals them: leave them by abort, by close, by the collector and by an error."""
    space = lane.open_space(manifest())
    lease = lane.lease_write(space, keys(2))
    assert lease.abort([0]) == 1
    with pytest.raises(terrace_kv.ClosedError):
        memoryview(lease.blocks[0])  # type: ignore[arg-type]
    lease.release()
    assert daemon.info().leases == 0
    lane.lease_write(space, keys(2)).close()
    daemon.expect_leases(0)
    lease = lane.lease_write(space, keys(2))
    blocks = lease.blocks
    del lease
    gc.collect()
    assert daemon.info().leases == 1, "blocks keep their lease"
    del blocks
    daemon.expect_leases(0)
    with pytest.raises(KeyError), lane.lease_write(space, keys(2)):
        raise KeyError
    daemon.expect_leases(0)
    assert lane.read(space, keys(2)) == [None, None]


def test_a_store_after_close_cannot_reach_others(lane: terrace_kv.Session, daemon: Daemon) -> None:
    """An array outlives its write lease: stores through it must neither fault nor change what others read."""
    space = lane.open_space(manifest())
    lease = lane.lease_write(space, keys(1))
    array = np.frombuffer(lease.blocks[0], np.uint8)
    lease.close()
    del lease
    gc.collect()
    assert daemon.info().leases == 1, "the frame is not given away while it can be written"
    array[:] = 7
    del array
    daemon.expect_leases(0)
    lane.write(space, keys(1), [payload(b"fresh")])
    (block,) = lane.read(space, keys(1))
    assert block is not None
    assert bytes(block) == payload(b"fresh")


def test_wrong_lengths_are_refused(lane: terrace_kv.Session, space: terrace_kv.Space) -> None:
    """A copy runs past the end of a frame or a target."""
    (block,) = lane.lease_read(space, keys(1)).blocks
    assert block is not None
    for target in (bytearray(BLOCK_BYTES - 1), bytearray(BLOCK_BYTES + 1), bytearray()):
        with pytest.raises(terrace_kv.InvalidArgument, match=f"blocks have {BLOCK_BYTES}"):
            block.read_into(target)
    with pytest.raises(BufferError, match="read-only"):
        block.read_into(bytes(BLOCK_BYTES))
    with lane.lease_write(space, [b"new"]) as lease:
        (frame,) = lease.blocks
        assert frame is not None
        for source in (b"", bytes(BLOCK_BYTES - 1), bytes(BLOCK_BYTES + 1)):
            with pytest.raises(terrace_kv.InvalidArgument, match=f"blocks have {BLOCK_BYTES}"):
                frame.fill(source)


def test_pieces_that_lie_apart(lane: terrace_kv.Session, space: terrace_kv.Space) -> None:
    """Rows of an array are stored or loaded in the wrong order, or with bytes between them."""
    rows, width = 8, BLOCK_BYTES // 8
    whole = np.random.default_rng(1).integers(0, 256, (rows, 3, width), np.uint8)
    sources = [whole[:, 1], whole[::-1, 2], whole.reshape(-1)[: 2 * BLOCK_BYTES : 2], whole[:, 0].T]
    names = [b"rows", b"backwards", b"bytes", b"columns"]
    with lane.lease_write(space, names, wait=5.0) as lease:
        for frame, source in zip(lease.blocks, sources, strict=True):
            assert frame is not None
            frame.fill(source)
        assert lease.seal() == ["sealed"] * len(names)
    with lane.lease_read(space, names) as reading:
        targets = [np.zeros_like(whole)[:, 1] for _ in names]
        for block, source, target in zip(reading.blocks, sources, targets, strict=True):
            assert block is not None
            block.verify()
            assert block.to_bytes() == source.tobytes()
            block.read_into(target)
            assert target.tobytes() == source.tobytes()
            assert not target.base[:, 0].any()
            assert not target.base[:, 2].any()
            target[:] = 0
        assert terrace_kv.copy_blocks(reading.blocks, targets, threads=2) == [True] * len(names)  # type: ignore[arg-type]
        assert [target.tobytes() for target in targets] == [source.tobytes() for source in sources]


def test_stores_after_a_fill_are_summed(lane: terrace_kv.Session, space: terrace_kv.Space) -> None:
    """A checksum that a fill computed is sealed with other bytes: store through a view after it, and before it."""
    names = [b"after", b"before", b"itself"]
    with lane.lease_write(space, names, wait=5.0) as lease:
        after, before, itself = lease.blocks
        assert after is not None
        assert before is not None
        assert itself is not None
        after.fill(payload(b"x"))
        view = np.frombuffer(after, np.uint8)
        view[0] ^= 1
        old = np.frombuffer(before, np.uint8)
        before.fill(payload(b"x"))
        old[0] ^= 1
        itself.fill(payload(b"x"))
        with pytest.raises(terrace_kv.InvalidArgument, match="view of the frame"):
            itself.fill(memoryview(itself))
        del view, old
        assert lease.seal() == ["sealed"] * 3
    changed = bytes([payload(b"x")[0] ^ 1]) + payload(b"x")[1:]
    with lane.lease_read(space, names) as reading:
        assert [block and block.to_bytes() for block in reading.blocks] == [changed, changed, payload(b"x")]


def test_copies_let_other_threads_run(lane: terrace_kv.Session, space: terrace_kv.Space) -> None:
    """A call that waits holds the interpreter: another thread must get on meanwhile."""
    counted = 0
    waiting = threading.Event()
    ended = threading.Event()

    # A watch without events waits until one comes, and others are not the one.
    stream = lane.watch()

    def follow() -> None:
        waiting.set()
        for run in stream:
            if any(event.block_id == space.block_id(b"event") for event in run.events):
                break
        ended.set()

    thread = threading.Thread(target=follow)
    thread.start()
    waiting.wait()
    while counted < 1000:
        counted += 1
        assert lane.exists(space, keys(1))[0] == 1
    assert not ended.is_set()
    lane.write(space, [b"event"], [payload(b"event")])
    thread.join(timeout=60)
    assert ended.is_set()


def test_many_leases_from_many_threads(lane: terrace_kv.Session, daemon: Daemon) -> None:
    """Two threads mix up their blocks, or a lease is lost between them."""
    space = lane.open_space(manifest())
    errors: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            names = keys(4, start=1000 * (thread + 1))
            for turn in range(25):
                with lane.lease_write(space, names, wait=10.0) as lease:
                    for name, frame in zip(names, lease.blocks, strict=True):
                        if frame is not None:
                            frame.fill(payload(name))
                    lease.seal()
                with lane.lease_read(space, names, wait=10.0) as read:
                    for name, block in zip(names, read.blocks, strict=True):
                        if block is not None:
                            assert block.to_bytes() == payload(name), (thread, turn)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    daemon.expect_leases(0)


def test_mapped_blocks_cost_no_faults(lane: terrace_kv.Session, daemon: Daemon) -> None:
    """Loads of what was looked up wait for each page: read what another session stored, mapped before."""
    names = keys(64)
    lane.write(lane.open_space(manifest()), names, [payload(name) for name in names])
    with terrace_kv.connect(daemon.socket) as other:
        space = other.open_space(manifest())
        with other.lease_read(space, names, wait=5.0) as lease:
            blocks = [block for block in lease.blocks if block is not None]
            assert len(blocks) == 64
            terrace_kv.map_blocks(blocks)
            views = [np.frombuffer(block, np.uint8) for block in blocks]
            total = 0
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
            for view in views:
                total += int(view[0]) + int(view[-1])
            faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
            assert total == sum(payload(name)[0] + payload(name)[-1] for name in names)
            assert faults <= 2, f"{faults} faults"
            del view, views


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_many_blocks_are_copied_in_one_call(lane: terrace_kv.Session, threads: int) -> None:
    """Copies by several threads land in each other's places, or one that is lost passes for a good one."""
    big = 1 << 20
    space = lane.open_space(manifest(block_bytes=big))
    names = keys(9)
    lane.write(space, names, [payload(name, big) for name in names])
    with lane.lease_read(space, names, wait=5.0) as lease:
        blocks = [block for block in lease.blocks if block is not None]
        assert len(blocks) == 9
        targets = [bytearray(big) for _ in names]
        assert terrace_kv.copy_blocks(blocks, targets, threads=threads) == [True] * 9
        assert [bytes(target) for target in targets] == [payload(name, big) for name in names]
        # The same place twice: whatever is left there, it is one of the two.
        assert terrace_kv.copy_blocks(blocks, [targets[0]] * 9, threads=threads) == [True] * 9
        assert bytes(targets[0]) == payload(names[-1], big)
        # Rows between each other, as of several layers, and again the same ones.
        whole = np.zeros((16, 9, big // 16), np.uint8)
        between = [whole[:, place] for place in range(9)]
        assert terrace_kv.copy_blocks(blocks, between, threads=threads) == [True] * 9  # type: ignore[arg-type]
        assert [target.tobytes() for target in between] == [payload(name, big) for name in names]
        assert terrace_kv.copy_blocks(blocks, between[:1] * 9, threads=threads) == [True] * 9  # type: ignore[arg-type]
        assert between[0].tobytes() == payload(names[-1], big)
        blocks[3].close()
        assert terrace_kv.copy_blocks(blocks, targets, threads=threads) == [True] * 3 + [False] + [True] * 5
    assert terrace_kv.copy_blocks(blocks, targets, threads=threads) == [False] * 9
    assert terrace_kv.copy_blocks([], [], threads=threads) == []


def test_blocks_are_got_into_buffers(session: terrace_kv.Session, daemon: Daemon) -> None:
    """A block lands at another's place, one that is lost passes for a good one, or a lease stays behind."""
    space = session.open_space(manifest())
    names = keys(3)
    session.write(space, names, [payload(name) for name in names])
    for _ in range(2):
        targets = [bytearray(BLOCK_BYTES) for _ in range(4)]
        assert session.get(space, [*names, b"absent"], targets, wait=5.0) == [True, True, True, False]
        assert [bytes(target) for target in targets[:3]] == [payload(name) for name in names]
    for bad in ([bytearray(BLOCK_BYTES - 1)], [bytes(BLOCK_BYTES)], []):
        with pytest.raises((terrace_kv.InvalidArgument, BufferError)):
            session.get(space, names[:1], bad)
    whole = memoryview(bytearray(2 * BLOCK_BYTES))
    with pytest.raises(terrace_kv.InvalidArgument, match="share memory"):
        session.get(space, names[:2], [whole[:BLOCK_BYTES], whole[BLOCK_BYTES - 1 : -1]])
    assert session.get(space, names[:2], [whole[:BLOCK_BYTES], whole[BLOCK_BYTES:]], wait=5.0) == [True, True]
    assert bytes(whole) == payload(names[0]) + payload(names[1])
    daemon.expect_leases(0)


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_several_threads_get_and_write(daemon: Daemon, threads: int | None) -> None:
    """What several threads move lands in another's place, or a child of theirs waits for threads that it has not."""
    big = 1 << 20
    names = keys(12)
    with terrace_kv.connect(daemon.socket, copy_threads=threads) as lane:
        space = lane.open_space(manifest(block_bytes=big))
        lane.write(space, names, [payload(name, big) for name in names])

        def check(session: terrace_kv.Session, space: terrace_kv.Space) -> None:
            for _ in range(2):
                targets = [bytearray(big) for _ in names]
                assert session.get(space, names, targets, wait=5.0) == [True] * len(names)
                assert [bytes(target) for target in targets] == [payload(name, big) for name in names]

        check(lane, space)
        child = os.fork()
        if child == 0:
            # A child that hangs must not stay.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)
            code = 1
            try:
                with terrace_kv.connect(daemon.socket, copy_threads=threads) as own:
                    check(own, own.open_space(manifest(block_bytes=big)))
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        check(lane, space)
    with pytest.raises((ValueError, OverflowError, TypeError)):
        terrace_kv.connect(daemon.socket, copy_threads=0)


def test_copies_to_places_that_cannot_be_meant(lane: terrace_kv.Session) -> None:
    """Too short, read-only, or too few targets: refused before anything is written."""
    space = lane.open_space(manifest())
    lane.write(space, keys(2), [payload(name) for name in keys(2)])
    with lane.lease_read(space, keys(2), wait=5.0) as lease:
        one, two = lease.blocks
        assert one is not None
        assert two is not None
        first = bytearray(BLOCK_BYTES)
        for second in (bytearray(BLOCK_BYTES - 1), bytes(BLOCK_BYTES)):
            with pytest.raises((terrace_kv.InvalidArgument, BufferError)):
                terrace_kv.copy_blocks([one, two], [first, second])
        with pytest.raises(terrace_kv.InvalidArgument):
            terrace_kv.copy_blocks([one, two], [first])
        assert not any(first)
