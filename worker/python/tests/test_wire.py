"""A client of plain grpcio, written from the wire contract and docs/on-wire.md alone.

Nothing of the package is used but to look from the other side. Identities and checksums are computed here, in
Python, so that a slip in the documents or in the daemon shows.
"""

import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import terrace_kv
from conftest import BLOCK_BYTES, PATIENCE, Daemon, keys, manifest, payload
from other_version import FAILED_PRECONDITION, OURS, THEIRS, frame, receive

# ---- BLAKE3 of one chunk (up to 1,024 bytes), from its specification.

WORD = 0xFFFFFFFF
IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
ORDER = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
LANES = (
    (0, 4, 8, 12),
    (1, 5, 9, 13),
    (2, 6, 10, 14),
    (3, 7, 11, 15),
    (0, 5, 10, 15),
    (1, 6, 11, 12),
    (2, 7, 8, 13),
    (3, 4, 9, 14),
)
CHUNK_START, CHUNK_END, ROOT, KEYED_HASH, DERIVE_CONTEXT, DERIVE_MATERIAL = 1, 2, 8, 16, 32, 64


def rotated(word: int, bits: int) -> int:
    return (word >> bits | word << (32 - bits)) & WORD


def compress(chain: Iterable[int], block: bytes, flags: int) -> list[int]:
    message = list(struct.unpack("<16I", block.ljust(64, b"\0")))
    state = [*chain, *IV[:4], 0, 0, len(block), flags]
    for _ in range(7):
        for at, (a, b, c, d) in enumerate(LANES):
            for word, first, second in ((message[2 * at], 16, 12), (message[2 * at + 1], 8, 7)):
                state[a] = (state[a] + state[b] + word) & WORD
                state[d] = rotated(state[d] ^ state[a], first)
                state[c] = (state[c] + state[d]) & WORD
                state[b] = rotated(state[b] ^ state[c], second)
        message = [message[index] for index in ORDER]
    return [state[index] ^ state[index + 8] for index in range(8)]


def blake3(data: bytes, key: Iterable[int] = IV, flags: int = 0) -> bytes:
    assert len(data) <= 1024
    blocks = [data[at : at + 64] for at in range(0, len(data), 64)] or [b""]
    chain = list(key)
    for index, block in enumerate(blocks):
        last = index == len(blocks) - 1
        start = CHUNK_START if index == 0 else 0
        chain = compress(chain, block, flags | start | (CHUNK_END | ROOT if last else 0))
    return struct.pack("<8I", *chain)


def derived(context: str, data: bytes) -> bytes:
    key = struct.unpack("<8I", blake3(context.encode(), flags=DERIVE_CONTEXT))
    return blake3(data, key, DERIVE_MATERIAL)


def keyed(key: bytes, data: bytes) -> bytes:
    return blake3(data, struct.unpack("<8I", key), KEYED_HASH)


# ---- CRC-64/NVMe, from its parameters: reflected, all ones in and out.


def crc_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x9A6C9329AC4BC9B5 if value & 1 else 0)
        table.append(value)
    return table


CRC_TABLE = crc_table()


def crc64(data: bytes) -> int:
    value = 0xFFFFFFFFFFFFFFFF
    for byte in data:
        value = CRC_TABLE[(value ^ byte) & 0xFF] ^ value >> 8
    return value ^ 0xFFFFFFFFFFFFFFFF


# ---- The client.

PIECE_BYTES = 20_000


class Client:
    """A session over gRPC, as docs/on-wire.md tells it."""

    def __init__(self, daemon: Daemon, wire: SimpleNamespace) -> None:
        self.wire = wire.block
        self.common = wire.common
        self.stub = wire.block_grpc.BlockServiceStub(daemon.channel)
        self.ended = threading.Event()
        self.stream = self.stub.Session(self.hello())
        opened = next(self.stream).opened
        self.metadata = [("terrace-session", opened.session.hex())]
        self.requests = 0

    def hello(self) -> Iterator[Any]:
        yield self.wire.SessionRequest(client="plain grpcio")
        # The session ends with its stream.
        self.ended.wait()

    def call(self, name: str, request: Any) -> Any:
        return getattr(self.stub, name)(request, metadata=self.metadata, timeout=PATIENCE)

    def request_id(self) -> int:
        self.requests += 1
        return self.requests

    def open_space(self, wanted: terrace_kv.SpaceManifest) -> SimpleNamespace:
        fields = {**vars(wanted), "kind": self.common.SPACE_KIND_CHAIN}
        opened = self.call("OpenSpace", self.wire.OpenSpaceRequest(manifest=self.common.SpaceManifest(**fields)))
        tenant = derived("terrace 2026 tenant id v1", b"default")[:16]
        assert opened.tenant_id == tenant
        texts = (
            wanted.model.encode(),
            wanted.model_fingerprint,
            wanted.dtype.encode(),
            wanted.layout.encode(),
        )
        texts += (wanted.topology.encode(), wanted.engine.encode())
        numbers = (
            wanted.weights_generation,
            wanted.block_bytes,
            wanted.tokens_per_block,
            1,
            wanted.group,
            wanted.rank,
        )
        canonical = tenant + b"".join(struct.pack("<Q", len(text)) + text for text in texts)
        canonical += struct.pack("<QQIIII", *numbers)
        assert opened.space_id == derived("terrace 2026 space id v1", canonical)[:16]
        return SimpleNamespace(
            handle=opened.space, id=opened.space_id, key=opened.tenant_key, generation=opened.generation
        )

    def block_id(self, space: SimpleNamespace, key: bytes) -> bytes:
        return keyed(space.key, space.id + key)[:16]

    def checksum(self, space: SimpleNamespace, key: bytes, content: bytes) -> int:
        seed = self.block_id(space, key) + struct.pack("<QQ", len(content), space.generation)
        return crc64(seed + content)

    def write(self, space: SimpleNamespace, blocks: dict[bytes, bytes], wrong: int = 0) -> list[int]:
        def parts() -> Iterator[Any]:
            yield self.wire.WriteRequest(
                header=self.wire.WriteHeader(
                    request_id=self.request_id(),
                    space=space.handle,
                    keys=list(blocks),
                    durability=self.wire.DURABILITY_DURABLE,
                )
            )
            for index, (key, content) in enumerate(blocks.items()):
                for offset in range(0, len(content), PIECE_BYTES):
                    data = content[offset : offset + PIECE_BYTES]
                    last = offset + len(data) == len(content)
                    total = self.checksum(space, key, content) ^ wrong if last else None
                    piece = self.wire.WritePiece(index=index, offset=offset, data=data, checksum=total)
                    yield self.wire.WriteRequest(piece=piece)

        return list(self.call("Write", parts()).outcomes)

    def read(self, space: SimpleNamespace, names: list[bytes]) -> list[bytes | None]:
        found: list[bytes | None] = [None] * len(names)
        sums: dict[int, int] = {}
        pieces = 0
        request = self.wire.ReadRequest(space=space.handle, keys=names, wait_ms=5000)
        for piece in self.call("Read", request):
            if piece.outcome != self.wire.GRANT_OUTCOME_GRANTED:
                continue
            pieces += 1
            before = found[piece.index] or b""
            assert piece.offset == len(before), "pieces come in order without a gap"
            assert piece.block_id == self.block_id(space, names[piece.index])
            found[piece.index] = before + piece.data
            sums[piece.index] = piece.checksum
        for index, content in enumerate(found):
            if content is not None:
                assert sums[index] == self.checksum(space, names[index], content), "not what was sealed"
        return found


@pytest.fixture
def client(daemon: Daemon, wire: SimpleNamespace) -> Iterator[Client]:
    client = Client(daemon, wire)
    yield client
    client.ended.set()
    daemon.expect_quiet()


def test_the_algorithms_are_those_of_the_standards() -> None:
    """A slip in this file would be taken for one of the daemon: known answers first."""
    assert crc64(b"123456789") == 0xAE8B14860A799888
    assert blake3(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert blake3(bytes(index % 251 for index in range(1024))).hex() == (
        "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7"
    )


def test_what_was_written_is_read(client: Client, daemon: Daemon) -> None:
    """The wire does not do what it documents: write in pieces, read back, and from the other side."""
    space = client.open_space(manifest())
    blocks = {name: payload(name) for name in keys(3)}
    sealed, already = client.wire.SEAL_OUTCOME_SEALED, client.wire.SEAL_OUTCOME_ALREADY
    assert client.write(space, blocks) == [sealed] * 3
    assert client.write(space, blocks) == [already] * 3
    assert client.read(space, [*blocks, b"absent"]) == [*blocks.values(), None]
    with terrace_kv.connect(daemon.socket) as session:
        there = session.open_space(manifest())
        assert [there.block_id(name) for name in blocks] == [client.block_id(space, name) for name in blocks]
        found = session.read(there, list(blocks))
        assert [bytes(block) if block else None for block in found] == list(blocks.values())
        session.write(there, [b"other"], [payload(b"other")])
    assert client.read(space, [b"other"]) == [payload(b"other")]


def test_a_wrong_checksum_is_refused(client: Client) -> None:
    """Bytes that were damaged on their way are sealed."""
    space = client.open_space(manifest())
    with pytest.raises(grpc.RpcError) as caught:
        client.write(space, {b"k": payload(b"k")}, wrong=1)
    assert caught.value.code() == grpc.StatusCode.DATA_LOSS or "checksum" in caught.value.details()
    assert client.read(space, [b"k"]) == [None]


def test_the_key_chain(client: Client) -> None:
    """The package names a prompt's blocks otherwise than the contract: compute the keys from it."""
    tokens = [7, 9, 2**31, 11, 5, 3]
    key, expected = bytes(16), []
    for at in range(0, 4, 2):
        key = derived("terrace 2026 prefix chain v1", key + struct.pack("<2I", *tokens[at : at + 2]))[:16]
        expected.append(key)
    assert terrace_kv.chain_keys(tokens[:5], 2) == expected


def test_another_lane_version_is_refused(daemon: Daemon, wire: SimpleNamespace) -> None:
    """A client of another release is taken for one of this: it is told what this daemon speaks, no session opens."""
    for version in (0, THEIRS):
        hello = wire.lane.LaneRequest(id=7, hello=wire.lane.LaneHello(version=version, client="of another release"))
        with socket.socket(socket.AF_UNIX) as stream:
            stream.settimeout(PATIENCE)
            stream.connect(str(daemon.socket))
            stream.sendall(frame(hello.SerializeToString()))
            answer = wire.lane.LaneResponse.FromString(receive(stream))
            assert answer.id == 7
            assert answer.error.code == FAILED_PRECONDITION
            assert f"lane version {version} is not spoken here; this daemon speaks {OURS}" in answer.error.message
            assert receive(stream) == b"", "it goes on talking"
    assert daemon.info().sessions == 0


def test_a_server_of_another_contract() -> None:
    """Over gRPC, whoever answers knows no terrace.v1: the error says so and what to do."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(terrace_kv.Refused) as caught:
            terrace_kv.connect(None, f"http://127.0.0.1:{port}", client_name="test")
        assert caught.value.code == "Unimplemented"
        assert "this client speaks terrace.v1: use a client and a terraced of one release" in str(caught.value)
    finally:
        server.stop(None)


def test_without_a_session_nothing_is_answered(client: Client) -> None:
    """A stranger reads blocks: a call without the session's token must be refused."""
    space = client.open_space(manifest())
    client.write(space, {b"k": payload(b"k", BLOCK_BYTES)})
    request = client.wire.ReadRequest(space=space.handle, keys=[b"k"])
    for metadata in ([], [("terrace-session", "00" * 16)]):
        with pytest.raises(grpc.RpcError) as caught:
            list(client.stub.Read(request, metadata=metadata, timeout=PATIENCE))
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
