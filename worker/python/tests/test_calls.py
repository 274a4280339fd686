"""What every session can do, over the socket and over gRPC."""

import array

import pytest
import terrace_kv
from conftest import BLOCK_BYTES, Daemon, keys, manifest, payload, wait_for


def test_what_was_written_is_read(session: terrace_kv.Session, daemon: Daemon) -> None:
    """Bytes get lost, mixed up or cut off on the way: write blocks that all differ, read them back."""
    space = session.open_space(manifest())
    assert space.block_bytes == BLOCK_BYTES
    names = keys(5)
    written = session.write(space, names, [payload(name) for name in names], durability="durable")
    assert written == ["sealed"] * 5
    assert session.write(space, names[:1], [payload(names[0])]) == ["already"]

    found = session.read(space, [*names, b"absent"])
    assert found[5] is None, "a miss is None"
    for name, block in zip(names, found[:5], strict=True):
        assert block is not None
        assert bytes(block) == payload(name)
        assert block.to_bytes() == payload(name)
        assert block.id == space.block_id(name)
        assert len(block) == block.nbytes == BLOCK_BYTES
    session.close()
    daemon.expect_quiet()


def test_other_bytes_under_a_name_are_refused(session: terrace_kv.Session) -> None:
    """A second writer with other bytes changes what readers get: the first seal must win."""
    space = session.open_space(manifest())
    session.write(space, [b"k"], [payload(b"k")])
    outcome = session.write(space, [b"k"], [payload(b"other")])
    assert outcome in (["already"], ["conflict"])
    (block,) = session.read(space, [b"k"])
    assert block is not None
    assert bytes(block) == payload(b"k")


def test_payloads_of_any_buffer(session: terrace_kv.Session) -> None:
    """A buffer of another item size is cut or misread: store from several kinds of buffer."""
    space = session.open_space(manifest())
    content = payload(b"x")
    floats = array.array("d", content)
    kinds = [content, bytearray(content), memoryview(content), floats]
    names = keys(len(kinds))
    session.write(space, names, kinds)
    assert [bytes(block) for block in session.read(space, names) if block] == [content] * len(kinds)
    with pytest.raises(TypeError):
        session.write(space, [b"text"], ["x" * BLOCK_BYTES])  # type: ignore[list-item]
    with pytest.raises(BufferError, match="contiguous"):
        session.write(space, [b"strided"], [memoryview(bytes(2 * BLOCK_BYTES))[::2]])


def test_what_is_there(session: terrace_kv.Session) -> None:
    """A look-up counts a block behind a gap, or misses one: ask for a prefix with a hole."""
    space = session.open_space(manifest())
    names = keys(6)
    present = [0, 1, 3]
    for index in present:
        session.write(space, [names[index]], [payload(names[index])])

    prefix, flags = session.exists(space, names, mode="set")
    assert (prefix, [index for index, flag in enumerate(flags) if flag]) == (2, present)
    assert session.exists(space, names)[0] == 2
    match = session.match_blocks([space], names, mode="set")
    assert match.prefix == 2
    assert [index for index, block in enumerate(match.blocks) if block.present] == present
    assert match.blocks[0].tier == "pinned"
    assert match.blocks[0].fetch_seconds >= 0
    assert len(session.match_blocks(space, names).blocks) == 2, "in prefix mode only the prefix is listed"
    other = session.open_space(manifest(rank=1))
    assert session.match_blocks([space, other], names).prefix == 0, "every space of a bundle must hold it"


def test_upkeep(session: terrace_kv.Session) -> None:
    """A call goes to the wrong operation, or its count is lost: each has another answer."""
    space = session.open_space(manifest(), compute_cost=(0.02, 0.0001))
    names = keys(3)
    session.write(space, names, [payload(name) for name in names])
    assert session.touch(space, [*names, b"absent"]) == 3
    prefetched = session.prefetch(space, names)
    assert (prefetched.started, prefetched.resident) == (0, 3)
    assert session.retain(space, names[:2], ttl=5.0, priority=90) == 2
    assert session.clear(space) == 3
    assert session.exists(session.open_space(manifest()), names)[0] == 0
    assert session.flush_windows() >= 0


def test_streams(session: terrace_kv.Session) -> None:
    """A follower misses a seal, or sees it under another name: watch one, then compare with the snapshot."""
    space = session.open_space(manifest())
    stream = session.watch()
    session.write(space, [b"a", b"b"], [payload(b"a"), payload(b"b")])
    sealed = {}
    for run in stream:
        assert run.incarnation == session.incarnation
        assert not run.resync
        sealed.update({event.block_id: event for event in run.events if event.kind == "sealed"})
        if len(sealed) == 2:
            break
    stream.close()
    assert next(stream, None) is None, "a closed stream ends"
    a, b = space.block_id(b"a"), space.block_id(b"b")
    assert set(sealed) == {a, b}
    assert sealed[b].parent_id == a
    assert sealed[a].space_id == space.id
    assert sealed[a].length == BLOCK_BYTES

    parts = list(session.snapshot())
    assert parts[-1].last
    blocks = {block.block_id: block for part in parts for block in part.blocks}
    assert set(blocks) == {a, b}
    assert "pinned" in blocks[a].tiers


def test_bad_arguments_are_named(session: terrace_kv.Session) -> None:
    """Nonsense reaches the daemon, or an error says nothing: each must name what is wrong."""
    space = session.open_space(manifest())
    name, content = b"k", payload(b"k")
    cases = [
        (lambda: session.read(space, [b""]), "key 0 has 0 bytes"),
        (lambda: session.read(space, [b"x" * 65]), "65 bytes"),
        (lambda: session.write(space, [name], [content[:-1]]), f"{BLOCK_BYTES - 1} bytes"),
        (lambda: session.write(space, [name, b"j"], [content]), "2 keys and 1 payloads"),
        (lambda: session.write(space, [name], [content], durability="maybe"), '"readable", "durable"'),
        (lambda: session.exists(space, [name], mode="all"), '"prefix", "set"'),
        (lambda: session.exists([], [name]), "no space"),
        (lambda: session.read(space, [name], wait=-1.0), "wait is -1"),
        (lambda: session.read(space, [name], wait=float("nan")), "wait is NaN"),
        (lambda: session.retain(space, [name], ttl=1.0, priority=101), "priority is 101"),
        (lambda: session.open_space(manifest(block_bytes=0)), "block_bytes is 0"),
        (lambda: session.open_space(manifest(kind="ring")), 'kind is "ring"'),
        (lambda: session.touch(space, [name] * (session.blocks_max + 1)), "split the request"),
    ]
    for call, expected in cases:
        with pytest.raises(terrace_kv.InvalidArgument) as caught:
            call()
        assert expected in str(caught.value)
    with pytest.raises(TypeError):
        session.read(space, ["text"])  # type: ignore[list-item]


def test_a_space_belongs_to_its_session(daemon: Daemon) -> None:
    """The handle of another session names another space here: it must be refused."""
    first = terrace_kv.connect(daemon.socket)
    second = terrace_kv.connect(daemon.socket)
    space = first.open_space(manifest())
    with pytest.raises(terrace_kv.InvalidArgument, match="another session"):
        second.read(space, [b"k"])


def test_connecting_fails_clearly(daemon: Daemon) -> None:
    """Nobody there, nobody named, an address that is none: each says so, quickly."""
    with pytest.raises(terrace_kv.ConnectError, match="no daemon was named"):
        terrace_kv.connect()
    with pytest.raises(terrace_kv.ConnectError, match="is terraced running"):
        terrace_kv.connect(str(daemon.socket) + ".absent")
    with pytest.raises(terrace_kv.ConnectError):
        terrace_kv.connect(grpc="http://127.0.0.1:1")
    with pytest.raises(terrace_kv.ConnectError, match="no address"):
        terrace_kv.connect(grpc="not an address")
    # A socket that nobody serves falls back to gRPC.
    with terrace_kv.connect(str(daemon.socket) + ".absent", daemon.grpc) as session:
        assert session.transport == "grpc"


def test_what_a_transport_cannot_do(daemon: Daemon) -> None:
    """A call that the transport lacks hangs or answers nonsense: it must say what is needed."""
    with terrace_kv.connect(grpc=daemon.grpc) as session:
        space = session.open_space(manifest())
        for call in (session.lease_read, session.lease_write):
            with pytest.raises(terrace_kv.Unsupported, match="local socket"):
                call(space, [b"k"])
    with terrace_kv.connect(daemon.socket) as session, pytest.raises(terrace_kv.Unsupported, match="gRPC"):
        session.watch()


def test_a_wrong_token_is_refused(folder, wire) -> None:
    """A tenant's blocks are open to whoever asks: without its token there is no session, on either way."""
    running = Daemon(folder, wire, extra='[[tenant]]\nname = "red"\ntoken = "secret"\n')
    try:
        for way in ({"socket": running.socket}, {"grpc": running.grpc}):
            with terrace_kv.connect(**way, tenant="red", token="secret") as session:
                assert not session.closed
            with pytest.raises(terrace_kv.Refused) as caught:
                terrace_kv.connect(**way, tenant="red", token="wrong")
            assert caught.value.code in {"Unauthenticated", "PermissionDenied"}
    finally:
        running.kill()


def test_chain_keys_name_whole_blocks_only() -> None:
    """Two prompts share a key although they differ, or a partial block gets one."""
    tokens = list(range(40))
    whole = terrace_kv.chain_keys(tokens, 16)
    assert len(whole) == 2
    assert [len(key) for key in whole] == [16, 16]
    changed = terrace_kv.chain_keys([*tokens[:15], 99, *tokens[16:]], 16)
    assert changed[0] != whole[0]
    assert changed[1] != whole[1], "a key names all tokens before it"
    assert terrace_kv.chain_keys([*tokens[:32], 7], 16) == whole
    with pytest.raises(terrace_kv.InvalidArgument):
        terrace_kv.chain_keys(tokens, 0)


def test_blocks_survive_a_restart(folder, wire) -> None:
    """What was acknowledged as durable is gone after kill -9."""
    names = keys(3)
    running = Daemon(folder, wire)
    with terrace_kv.connect(running.socket) as session:
        space = session.open_space(manifest())
        session.write(space, names, [payload(name) for name in names], durability="durable")
        first = session.incarnation
    running.kill()
    running = Daemon(folder, wire)
    try:
        with terrace_kv.connect(running.socket) as session:
            assert session.incarnation > first
            space = session.open_space(manifest())
            wait_for(lambda: session.exists(space, names)[0] == 3, "the catalog")
            found = session.read(space, names)
            assert [bytes(block) if block else None for block in found] == [payload(name) for name in names]
            with session.lease_read(space, names, wait=10.0, purpose="decode") as lease:
                assert lease.prefix == 3
    finally:
        running.kill()
