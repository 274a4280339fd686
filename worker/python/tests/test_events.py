"""What engines publish, read by a router: real processes, real sockets, bytes as vLLM and SGLang encode them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import terrace_kv
from conftest import TARGET, Daemon, manifest, payload, wait_for

ROUTER = TARGET / "release" / "terrace-router"
PUBLISHER = Path(__file__).with_name("publisher.py")
# Two blocks of 16 tokens, and what vLLM (sha256_cbor) and SGLang call them in their events.
TOKENS = list(range(32))
VLLM = [2233398808101521225, 17911472383915781900]
SGLANG = [6738917275443968386, 0x4681C0107C38F402]


class Router:
    """One running ``terrace-router``, without a daemon unless one is given."""

    def __init__(self, *engines: str, grpc: str = "http://127.0.0.1:1", extra: tuple[str, ...] = ()) -> None:
        assert ROUTER.exists(), f"{ROUTER} is missing; build it: cargo build --release --bin terrace-router"
        line = [ROUTER, "--listen", "127.0.0.1:0", "--grpc", grpc, "--engine-lost-seconds", "2", *extra]
        for engine in engines:
            line += ["--engine", engine]
        self.process = subprocess.Popen(line, stderr=subprocess.PIPE, env={**os.environ, "NO_COLOR": "1"}, text=True)
        self.log: list[str] = []
        assert self.process.stderr is not None
        self._drain = threading.Thread(target=lambda: self.log.extend(self.process.stderr or ()))
        self._drain.start()
        pattern = re.compile(r"router listens.*address=(\S+)")
        found = wait_for(lambda: next(filter(None, map(pattern.search, list(self.log))), None), "the router's address")
        self.url = f"http://{found[1]}"

    def call(self, route: str, body: bytes | None = None, method: str | None = None) -> tuple[int, Any]:
        request = urllib.request.Request(self.url + route, data=body, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def post(self, route: str, body: Any) -> tuple[int, Any]:
        status, text = self.call(route, body if isinstance(body, bytes) else json.dumps(body).encode())
        return status, json.loads(text)

    def holders(self, tokens: list[int] = TOKENS) -> dict[str, tuple[int, dict[str, int]]]:
        status, answer = self.post("/admin/prefix", {"tokens": tokens})
        assert status == 200, answer
        return {holder["name"]: (holder["blocks"], holder["tiers"]) for holder in answer["holders"]}

    def blocks(self, tokens: list[int] = TOKENS) -> dict[str, int]:
        return {name: blocks for name, (blocks, _) in self.holders(tokens).items()}

    def metric(self, name: str, engine: str | None = "v") -> int:
        label = "" if engine is None else f'{{engine="{engine}"}}'
        text = self.call("/metrics")[1].decode()
        found = re.search(rf"^{re.escape(name + label)} (\d+)$", text, re.MULTILINE)
        assert found, f"no {name}{label} in\n{text}"
        return int(found[1])

    def memory(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) << 10  # type: ignore[index]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self._drain.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


class Publisher:
    """One running publisher."""

    def __init__(self, events: str, replay: str = "-", topic: str = "") -> None:
        line = [sys.executable, PUBLISHER, events, replay, topic]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def order(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        self._answer()

    def publish(self, *events: Any, rank: int | None = None, lost: bool = False) -> None:
        self.order(events=list(events), rank=rank, lost=lost)

    def _answer(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() in ("ready\n", "done\n")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def stored(
    blocks: list[int], parent: int | None = None, tokens: list[int] | None = None, **more: Any
) -> dict[str, Any]:
    event = {"type": "BlockStored", "block_hashes": blocks, "parent_block_hash": parent, "token_ids": tokens or []}
    return {**event, "block_size": 16, "lora_id": None, "medium": "GPU", "lora_name": None, **more}


def removed(blocks: list[int], medium: str = "GPU") -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": blocks, "medium": medium}


def ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    found = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return found


class Pair:
    """A router that follows one publisher, which listens."""

    def __init__(self, *, replay: bool = True, topic: str = "", extra: str = "") -> None:
        events, again = ports(2)
        self._events, self._again, self._topic = f"tcp://*:{events}", f"tcp://127.0.0.1:{again}", topic
        self._again = self._again if replay else "-"
        asked = f",replay={self._again}" if replay else ""
        self.publisher = Publisher(self._events, self._again, topic)
        self.router = Router(f"name=v,connect=tcp://127.0.0.1:{events}{asked}{extra}")
        wait_for(lambda: self.router.metric("terrace_router_engine_connected"), "a connection")
        self._warm()

    def _warm(self) -> None:
        # A subscription takes effect some time after the connection: batches of nothing show when.
        def arrived() -> bool:
            self.publisher.publish()
            return self.router.metric("terrace_router_engine_batches_total") > 0

        wait_for(arrived, "a first batch")

    def restart(self) -> None:
        self.publisher.kill()
        self.publisher = Publisher(self._events, self._again, self._topic)

    def wait(self, expected: dict[str, int], tokens: list[int] = TOKENS) -> None:
        wait_for(lambda: self.router.blocks(tokens) == expected, f"{expected}; there is {self.router.blocks(tokens)}")

    def stop(self) -> None:
        self.publisher.kill()
        self.router.stop()


@pytest.fixture
def pairs() -> Iterator[Any]:
    made: list[Any] = []

    def make(thing: Any) -> Any:
        made.append(thing)
        return thing

    yield make
    for thing in made:
        thing.kill() if isinstance(thing, Publisher) else thing.stop()


def test_both_encodings_name_the_blocks_of_a_prompt(pairs: Any) -> None:
    """A router that reads one encoding only, or hashes otherwise than the engine, sees an empty cache: maps and the
    older arrays, numbers and bytes, of vLLM and SGLang, found by tokens alone."""
    pair = pairs(Pair())
    pair.publisher.publish(stored(VLLM[:1], tokens=TOKENS[:16]), rank=0)
    pair.wait({"v#0": 1})
    pair.publisher.publish(["BlockStored", VLLM[1:], VLLM[0], TOKENS[16:], 16, None, "CPU", None], rank=0)
    pair.wait({"v#0": 2})
    assert pair.router.holders() == {"v#0": (2, {"hbm": 1, "pinned": 1, "nvme": 0})}
    pair.publisher.publish(["BlockRemoved", [VLLM[1]], "CPU"], rank=0)
    pair.wait({"v#0": 1})
    pair.publisher.publish({"type": "AllBlocksCleared"}, rank=0)
    pair.wait({})
    digest = bytes(24) + VLLM[0].to_bytes(8, "big")
    (events,) = ports(1)
    other = pairs(Publisher(f"tcp://*:{events}"))
    router = pairs(Router(f"name=s,connect=tcp://127.0.0.1:{events},hash=sglang"))

    def seen() -> bool:
        other.publish(stored(SGLANG, tokens=TOKENS, medium="DISK", cache_salt=None, session_id=None), rank=1)
        return router.blocks() == {"s#1": 2}

    wait_for(seen, "SGLang's blocks")
    assert router.holders()["s#1"][1] == {"hbm": 0, "pinned": 0, "nvme": 2}
    hexadecimal = msgspec.msgpack.encode([1.5, [stored([digest])], 0]).hex()
    pair.publisher.order(hex=hexadecimal)
    pair.wait({"v#0": 1})


VLLM_PYTHON = os.environ.get("TERRACE_VLLM_PYTHON")
# Takes a line before each batch.
VLLMS_OWN = f"""
import sys
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch, ZmqEventPublisher
publisher = ZmqEventPublisher(0, endpoint=sys.argv[1], replay_endpoint=sys.argv[2], topic="kv")
stored = dict(block_hashes={VLLM}, parent_block_hash=None, token_ids={TOKENS}, block_size=16, lora_id=None,
              medium="GPU", lora_name=None)
events = {{"stored": BlockStored(**stored), "removed": BlockRemoved(block_hashes={VLLM[1:]}, medium="GPU")}}
print("ready", flush=True)
for line in sys.stdin:
    publisher.publish(KVEventBatch(ts=1.0, events=[events[line.strip()]]))
    print("done", flush=True)
"""


@pytest.mark.skipif(VLLM_PYTHON is None, reason="TERRACE_VLLM_PYTHON names no Python with vLLM in it")
def test_vllms_own_publisher(pairs: Any) -> None:
    """Our publisher of these tests could be wrong in the same way as the router: vLLM's class, its sockets and its
    encoding, followed from before and, by its replay, from after."""
    events, replay = ports(2)
    line = [VLLM_PYTHON, "-c", VLLMS_OWN, f"tcp://*:{events}", f"tcp://127.0.0.1:{replay}"]
    vllm = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert vllm.stdin is not None
    assert vllm.stdout is not None

    def publish(what: str) -> None:
        vllm.stdin.write(f"{what}\n")
        vllm.stdin.flush()
        assert vllm.stdout.readline() == "done\n"

    assert wait_for(vllm.stdout.readline, "vLLM") == "ready\n"
    router = pairs(Router(f"name=v,connect=tcp://127.0.0.1:{events},replay=tcp://127.0.0.1:{replay}"))
    wait_for(lambda: publish("stored") or router.blocks() == {"v/kv#0": 2}, "vLLM's blocks")
    publish("removed")
    wait_for(lambda: router.blocks() == {"v/kv#0": 1}, "a block less")
    late = pairs(Router(f"name=v,connect=tcp://127.0.0.1:{events},replay=tcp://127.0.0.1:{replay}"))
    wait_for(lambda: late.blocks() == {"v/kv#0": 1}, "the same by the replay")
    vllm.kill()
    vllm.communicate()


def test_what_was_missed_is_replayed(pairs: Any) -> None:
    """Batches that never arrive would leave blocks that are gone, or hide blocks that are there: the replay socket is
    asked for them."""
    pair = pairs(Pair())
    pair.publisher.publish(stored(VLLM[:1]), lost=True)
    pair.publisher.publish(lost=True)
    pair.publisher.publish(stored(VLLM[1:], VLLM[0]))
    pair.wait({"v": 2})
    assert pair.router.metric("terrace_router_engine_gaps_total") == 1
    assert pair.router.metric("terrace_router_engine_forgotten_total") == 0
    pair.publisher.publish(removed(VLLM[1:]), lost=True)
    pair.publisher.order(forget=True)
    pair.publisher.publish()
    pair.wait({})
    assert pair.router.metric("terrace_router_engine_forgotten_total") == 1, "what cannot be had is not believed"


def test_a_router_that_starts_late_learns_what_can_be_replayed(pairs: Any) -> None:
    """A router's restart must not cost what engines remember: it asks for all of it."""
    events, again = ports(2)
    publisher = pairs(Publisher(f"tcp://*:{events}", f"tcp://127.0.0.1:{again}"))
    publisher.order(many=5000, each=1, first=100)
    publisher.publish(stored(VLLM))
    router = pairs(Router(f"name=v,connect=tcp://127.0.0.1:{events},replay=tcp://127.0.0.1:{again}"))
    wait_for(lambda: router.blocks() == {"v": 2}, "the replayed blocks")
    assert router.metric("terrace_router_engine_batches_total") == 5001
    assert router.metric("terrace_router_engine_forgotten_total") == 0


def test_a_router_that_reads_slowly_learns_what_can_be_replayed(pairs: Any) -> None:
    """A publisher's socket throws away the end of a replay that is read too slowly. A router that stands still in the
    middle of one would wait for the end, forget what it had, and know nothing until it connects again."""
    import zmq

    events, again = ports(2)
    publisher = pairs(Publisher(f"tcp://*:{events}", f"tcp://127.0.0.1:{again}"))
    publisher.order(many=4000, each=100, first=100)
    publisher.publish(stored(VLLM))
    router = pairs(Router(f"name=v,connect=tcp://127.0.0.1:{events},replay=tcp://127.0.0.1:{again}"))
    wait_for(lambda: any("events are followed" in line for line in router.log), "the connection")
    router.process.send_signal(signal.SIGSTOP)
    # The publisher answers one after the other: a second answer means that the first was sent or thrown away.
    with zmq.Context() as context, context.socket(zmq.DEALER) as other:
        other.connect(f"tcp://127.0.0.1:{again}")
        other.send_multipart((b"", (1 << 63).to_bytes(8, "big")))
        assert other.poll(60_000)
        other.recv_multipart()
    router.process.send_signal(signal.SIGCONT)
    wait_for(lambda: router.blocks() == {"v": 2}, "the replayed blocks")
    assert router.metric("terrace_router_engine_batches_total") == 4001
    assert router.metric("terrace_router_engine_forgotten_total") == 0


def test_a_new_life_begins_with_nothing(pairs: Any) -> None:
    """A publisher that died and came back at the same address, with numbers that fit, would be credited its old life's
    blocks; one whose connection broke only would lose them."""
    pair = pairs(Pair())
    pair.publisher.publish(stored(VLLM))
    pair.wait({"v": 2})
    pair.restart()
    pair.publisher.publish(stored(VLLM[:1]))
    for _ in range(40):
        pair.publisher.publish()
    pair.wait({"v": 1})
    assert pair.router.metric("terrace_router_engine_forgotten_total") >= 1


def test_a_publisher_that_disappears_holds_nothing(pairs: Any) -> None:
    """Requests would be sent to a cache that died: it is forgotten once it was away for the time that was set."""
    pair = pairs(Pair(replay=False, topic="kv@pod", extra=",topic=kv@"))
    pair.publisher.publish(stored(VLLM))
    pair.wait({"v/kv@pod": 2})
    pair.publisher.kill()
    wait_for(lambda: pair.router.metric("terrace_router_engine_connected") == 0, "the end of the connection")
    pair.wait({})
    assert pair.router.metric("terrace_router_engine_holders", None) == 0


def test_engines_that_come_to_the_router(pairs: Any) -> None:
    """vLLM connects where its endpoint names a host. Several engines share a port and are told apart by topic; of two
    with one topic the newer counts, however late the older one speaks."""
    (events,) = ports(1)
    address = f"tcp://127.0.0.1:{events}"
    router = pairs(Router(f"name=v,bind={address}"))
    one, two = pairs(Publisher(address, topic="kv@a")), pairs(Publisher(address, topic="kv@b"))

    def wait(expected: dict[str, int], publisher: Publisher, *batch: Any) -> None:
        def seen() -> bool:
            publisher.publish(*batch)
            return router.blocks() == expected

        wait_for(seen, f"{expected}; there is {router.blocks()}")

    wait({"v/kv@a": 2}, one, stored(VLLM))
    wait({"v/kv@a": 2, "v/kv@b": 1}, two, stored(VLLM[:1]))
    again = pairs(Publisher(address, topic="kv@a"))
    wait({"v/kv@a": 1, "v/kv@b": 1}, again, stored(VLLM[:1]))
    one.publish(stored(VLLM))
    before = router.metric("terrace_router_engine_repeated_total")
    wait_for(lambda: one.publish(stored(VLLM)) or router.metric("terrace_router_engine_repeated_total") > before, "it")
    assert router.blocks() == {"v/kv@a": 1, "v/kv@b": 1}, "the old one is not listened to"
    again.kill()
    wait_for(lambda: router.blocks() == {"v/kv@b": 1}, "the end of a publisher")


def test_bytes_that_are_no_events_change_nothing(pairs: Any) -> None:
    """A damaged or hostile publisher must neither stop the router nor make it keep what it sends: bad MessagePack is
    counted, and a message of more than 16 MiB ends the connection before it is read."""
    pair = pairs(Pair())
    pair.publisher.publish(stored(VLLM))
    pair.wait({"v": 2})
    good = msgspec.msgpack.encode([1.5, [stored([1, 2, 3])], None])
    bad = [b"", b"\xc1", b"\xdd\xff\xff\xff\xff", good[:-1], good + b"\x00", b"\x93\xcb" + bytes(8) + b"\xdc\xff\xff"]
    for damaged in bad:
        pair.publisher.order(hex=damaged.hex())
    wait_for(lambda: pair.router.metric("terrace_router_engine_bad_total") == len(bad), "the count of bad batches")
    pair.wait({"v": 2})
    before = pair.router.memory()
    pair.publisher.order(zeros=(16 << 20) + 1)
    wait_for(lambda: any("more than 16777216 bytes" in line for line in pair.router.log), "a refusal")
    assert pair.router.memory() < before + (8 << 20), "what is too long is not read"
    pair.publisher.order(forget=True)
    pair.publisher.publish(stored(VLLM[:1]))
    pair.publisher.publish()
    wait_for(lambda: pair.router.blocks() == {"v": 1}, "the next connection")
    with socket.create_connection(("127.0.0.1", int(pair.router.url.rsplit(":", 1)[1]))) as one:
        one.sendall(b"GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        assert one.recv(64).startswith(b"HTTP/1.1 503")


def test_a_million_tiny_events(pairs: Any) -> None:
    """Engines that tell of each block alone, faster than the router reads, would make it queue without end: a million
    events go in, all are counted, and memory stays bounded."""
    pair = pairs(Pair())
    pair.publisher.order(many=10_000, each=100, first=10)
    wait_for(lambda: pair.router.metric("terrace_router_engine_events_total") >= 1_000_000, "a million events")
    assert pair.router.metric("terrace_router_engine_bad_total") == 0
    pair.publisher.publish(stored(VLLM))
    pair.wait({"v": 2})
    assert pair.router.memory() < 512 << 20


def test_what_dynamo_posts(pairs: Any) -> None:
    """Dynamo's workers and pools as holders: named by their own hashes, told twice, gone, and not MessagePack."""
    router = pairs(Router())

    def event(worker: int, number: int, **more: Any) -> dict[str, Any]:
        blocks = [{"block_hash": VLLM[0], "tokens_hash": 1, "mm_extra_info": None}]
        data = {"stored": {"parent_hash": None, "start_position": None, "blocks": blocks}}
        return {
            "worker_id": worker,
            "storage_tier": "host_pinned",
            "event": {"event_id": number, "data": data, "dp_rank": 0},
            **more,
        }

    owner = {"residency_domain": "cache_owner", "state_source": {"pool": 1, "slot": 2}}
    body = msgspec.msgpack.encode([event(7, 0), event(7, 0), event(7, 2, **owner)])
    status, answer = router.post("/events/dynamo?hash=vllm-sha256-cbor", body)
    assert (status, answer) == (200, {"applied": 2, "repeated": 1, "gaps": 1, "ignored": 0})
    names = router.holders()
    assert names.pop("dynamo/7#0") == (1, {"hbm": 0, "pinned": 1, "nvme": 0})
    assert [name.startswith("dynamo/owner/") for name in names] == [True]
    assert router.call("/events/dynamo/7", method="DELETE")[0] == 200
    assert router.call("/events/dynamo/7", method="DELETE")[0] == 404
    assert list(router.blocks()) == list(names), "the pool outlives the worker"
    assert router.post("/events/dynamo", b"\xc1")[0] == 400
    assert router.post("/events/dynamo?hash=md5", body)[0] == 400
    assert router.post("/events/dynamo", bytes((16 << 20) + 1))[0] == 413


# The daemon's blocks, as other routers see them.

# What vLLM (sha256_cbor) and Dynamo call the two blocks of TOKENS.
KEYS = [
    bytes.fromhex("dc918a88b139e5afe60b88eda27508d4aee16c10fdc354791efea06206ac0749"),
    bytes.fromhex("c300ec275d7bf08af8fc63e76cdc0086911bbc7091e03c5cf892553bef84ef0c"),
]


class Subscriber:
    """Reads what a router publishes; asks for a replay."""

    def __init__(self, events: int, replay: int) -> None:
        import zmq

        self._zmq, self._context = zmq, zmq.Context()
        self._sub = self._context.socket(zmq.SUB)
        self._sub.connect(f"tcp://127.0.0.1:{events}")
        self._sub.subscribe(b"")
        self._replay = f"tcp://127.0.0.1:{replay}"

    def next(self) -> tuple[int, list[Any]]:
        assert self._sub.poll(60_000), "nothing is published"
        topic, number, payload = self._sub.recv_multipart()
        assert topic == b"terrace"
        return int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)[1]

    def replay(self, start: int) -> list[tuple[int, list[Any]]]:
        """By a REQ socket, as vLLM's own example asks."""
        with self._context.socket(self._zmq.DEALER) as asking:
            asking.connect(self._replay)
            asking.send_multipart((b"", start.to_bytes(8, "big")))
            found = []
            while True:
                assert asking.poll(60_000), "no replay"
                _, _, number, payload = asking.recv_multipart()
                if number == b"\xff" * 8:
                    return found
                found.append((int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)[1]))

    def stop(self) -> None:
        self._context.destroy(linger=0)


SGLANG_KEYS = [
    bytes.fromhex("5d85718ec594b982c252d0279e5966ffca33a5eaf2a455038d3ab331fde70cea"),
    bytes.fromhex("4681c0107c38f402cd1bc30b0b09a65202dba31f98269d9d7f63f5e0dea6901a"),
]
# For each engine its blocks' keys, their numbers in its events, and how the router is told to follow it.
ENGINES = {"vllm": (KEYS, VLLM, ""), "sglang": (SGLANG_KEYS, SGLANG, ",hash=sglang")}
LAYOUTS = {"vllm": "bytes", "sglang": "sglang,opaque,0"}


def fill(daemon: Daemon, keys: list[bytes], engine: str = "vllm", **changes: Any) -> terrace_kv.Session:
    """Stores blocks as an engine's connector does."""
    session = terrace_kv.connect(daemon.socket, daemon.grpc, client_name="test")
    space = session.open_space(manifest(**{"engine": engine, "layout": LAYOUTS.get(engine, "bytes"), **changes}))
    assert session.write(space, keys, [payload(key) for key in keys], durability="durable") == ["sealed"] * len(keys)
    return session


@pytest.mark.parametrize("name", ENGINES)
def test_other_routers_ask_for_blocks(pairs: Any, daemon: Daemon, name: str) -> None:
    """Dynamo's router would credit nothing, or what is not there: the blocks of a daemon by their tokens, by Dynamo's
    hashes and by an engine's numbers, and a hole between them."""
    keys, numbers, how = ENGINES[name]
    (events,) = ports(1)
    engine = pairs(Publisher(f"tcp://*:{events}"))
    options = ("--names-max", "1000")
    router = pairs(Router(f"name=v,connect=tcp://127.0.0.1:{events}{how}", grpc=daemon.grpc, extra=options))
    with fill(daemon, keys[:1], name):
        asked = {"tokens": TOKENS, "block_size": 16}
        wait_for(lambda: router.post("/check_blocks", asked) == (200, {"ranges": [[0, 1]]}), "the first block")
        by_hash = {"block_hashes": [1, *numbers, 2]}
        assert router.post("/check_blocks", by_hash) == (200, {"ranges": []}), "nobody has told what they are"

        def told() -> bool:
            engine.publish(stored(numbers, tokens=TOKENS))
            return router.post("/check_blocks", by_hash) == (200, {"ranges": [[1, 2]]})

        wait_for(told, "the block by its number")
        fill(daemon, keys[1:], name).close()
        wait_for(lambda: router.post("/check_blocks", by_hash) == (200, {"ranges": [[1, 3]]}), "the second block")
        assert router.post("/check_blocks", {**asked, "block_size": 32}) == (200, {"ranges": []})
        assert router.post("/check_blocks", {**asked, "model": "other"}) == (200, {"ranges": []})
        assert router.post("/check_blocks", {**asked, "cache_namespace": "a"}) == (200, {"ranges": []})
        for bad in ({}, {"tokens": TOKENS}, {"tokens": TOKENS, "block_size": 0}, {"block_hashes": [-1]}, [1]):
            assert router.post("/check_blocks", bad)[0] == 400
        assert router.blocks()[daemon.grpc] == 2


def test_spaces_that_say_nothing_of_tokens(pairs: Any, daemon: Daemon) -> None:
    """A state without its K and V, another rank's part, or a chunk whose name says nothing of its tokens would be
    credited as if a prompt could be loaded by it."""
    router = pairs(Router(grpc=daemon.grpc))
    spaces: list[dict[str, Any]] = [
        {"engine": "sglang", "layout": "sglang,mamba,0"},
        {"engine": "sglang", "topology": "tp2,pp1,cp1", "rank": 1},
        {"engine": "lmcache", "tokens_per_block": 1, "topology": "named"},
        {"engine": "python"},
    ]
    for count, changes in enumerate(spaces, start=1):
        fill(daemon, SGLANG_KEYS, **changes).close()
        wait_for(lambda: router.metric("terrace_router_index_blocks", None) == 2 * count, "the blocks")  # noqa: B023
    for size in (1, 16):
        asked = {"tokens": TOKENS, "block_size": size}
        assert router.post("/check_blocks", asked) == (200, {"ranges": []})
    fill(daemon, SGLANG_KEYS, "sglang").close()
    asked = {"tokens": TOKENS, "block_size": 16}
    wait_for(lambda: router.post("/check_blocks", asked) == (200, {"ranges": [[0, 2]]}), "the blocks of K and V")


@pytest.mark.parametrize("name", ENGINES)
def test_what_is_published(pairs: Any, daemon: Daemon, name: str) -> None:
    """Dynamo's indexer adds up what it is sent: the blocks of a daemon as an engine would publish them, a replay of all
    of it, everything at once, and that they are gone when the daemon is."""
    keys, numbers, how = ENGINES[name]
    events, replay, engine_port = ports(3)
    engine = pairs(Publisher(f"tcp://*:{engine_port}"))
    owner = f"{'01' * 16}:{'02' * 16}/{'03' * 8}/{'04' * 16}"
    options = ("--publish", f"tcp://127.0.0.1:{events}", "--publish-replay", f"tcp://127.0.0.1:{replay}")
    options = (*options, "--cache-owner", owner, "--publish-worker", "77", "--model-name", "m")
    router = pairs(Router(f"name=v,connect=tcp://127.0.0.1:{engine_port}{how}", grpc=daemon.grpc, extra=options))
    subscriber = pairs(Subscriber(events, replay))
    with fill(daemon, keys, name):

        def dumped() -> list[Any]:
            engine.publish(stored(numbers, tokens=TOKENS))
            answer = json.loads(router.call("/dump")[1])
            return answer.get("m:default", {}).get("events", [])

        events_of = wait_for(lambda: len(dumped()) == 2 and dumped(), "two blocks")
    assert [event["worker_id"] for event in events_of] == [77, 77]
    assert {event["residency_domain"] for event in events_of} == {"cache_owner"}
    assert events_of[0]["state_source"]["slot"] == {"digest": [4] * 16, "source": "explicit"}
    batches = subscriber.replay(0)
    assert batches[0] == (0, [{"type": "AllBlocksCleared"}])
    found = [event for _, events in batches for event in events if event["type"] == "BlockStored"]
    assert {event["medium"] for event in found} <= {"CPU_PINNED", "DISK"}
    tokens = [token for event in found for token in event["token_ids"]]
    assert tokens[:32] == TOKENS
    hashes = [block for event in found for block in event["block_hashes"]]
    by_hash = {"block_hashes": hashes[:2]}
    assert router.post("/check_blocks", by_hash) == (200, {"ranges": [[0, 2]]}), "its own names"
    daemon.kill()

    def gone() -> bool:
        return any(event["type"] == "BlockRemoved" for _, events in subscriber.replay(1) for event in events)

    wait_for(gone, "that they are gone")
    number, _ = subscriber.next()
    assert number > 0, "it came late, and can ask for what it missed"


def test_a_subscriber_that_does_not_read(pairs: Any, daemon: Daemon) -> None:
    """A subscriber that stops would hold all that is published: it is cut off, and others go on."""
    events, replay, engine_port = ports(3)
    engine = pairs(Publisher(f"tcp://*:{engine_port}"))
    options = ("--publish", f"tcp://127.0.0.1:{events}", "--publish-replay", f"tcp://127.0.0.1:{replay}")
    router = pairs(Router(f"name=v,connect=tcp://127.0.0.1:{engine_port}", grpc=daemon.grpc, extra=options))
    # Speaks just enough of the protocol to be sent everything, and never reads.
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", events))
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16 + 1 + 31)
        ready = b"\x05READY\x0bSocket-Type" + (3).to_bytes(4, "big") + b"SUB"
        deaf.sendall(greeting + bytes([4, len(ready)]) + ready + b"\x00\x01\x01")
        wait_for(lambda: engine.publish() or router.metric("terrace_router_engine_batches_total"), "the engine")
        subscriber = pairs(Subscriber(events, replay))
        session = terrace_kv.connect(daemon.socket, daemon.grpc, client_name="test")
        space = session.open_space(manifest(engine="vllm", tokens_per_block=2048, block_bytes=4096))
        with session:
            # Blocks without parents, each a batch of its own; together more than the kernel holds for a connection.
            for start in range(0, 2000, 100):
                keys = []
                for number in range(start, start + 100):
                    tokens = [number] + [60_000] * 2047
                    keys.append(vllm_key(tokens))
                    number_told = int.from_bytes(keys[-1][24:], "big")
                    engine.publish(stored([number_told], tokens=tokens, block_size=2048))
                session.write(space, keys, [payload(key, 4096) for key in keys])
            wait_for(lambda: router.metric("terrace_router_published_cut_off_total", None) == 1, "the cut")
            assert router.metric("terrace_router_published_batches_total", None) > 256
            assert subscriber.next()[1], "the others go on"


def vllm_key(tokens: list[int]) -> bytes:
    """sha256_cbor of a first block."""
    import hashlib

    def head(major: int, number: int) -> bytes:
        if number < 24:
            return bytes([major << 5 | number])
        size = 1 if number < 1 << 8 else 2 if number < 1 << 16 else 4
        return bytes([major << 5 | {1: 24, 2: 25, 4: 26}[size]]) + number.to_bytes(size, "big")

    seed = b"vllm-none-hash"
    root = hashlib.sha256(head(3, len(seed)) + seed).digest()
    body = b"\x83" + head(2, 32) + root + head(4, len(tokens)) + b"".join(head(0, token) for token in tokens) + b"\xf6"
    return hashlib.sha256(body).digest()


def test_a_killed_router_is_warm_within_seconds(pairs: Any, daemon: Daemon) -> None:
    """A router that was killed would place prompts as if nothing were cached, for as long as it knows nothing: a new
    one knows the daemon's blocks before it is asked for long."""
    keys = [number.to_bytes(32, "big") for number in range(200)]
    with fill(daemon, [*KEYS, *keys]):
        first = pairs(Router(grpc=daemon.grpc))
        wait_for(lambda: first.blocks().get(daemon.grpc) == 2, "the first router's index")
        wait_for(lambda: first.metric("terrace_router_index_blocks", None) == 202, "all of it")
        first.stop()
        began = time.monotonic()
        second = pairs(Router(grpc=daemon.grpc))
        wait_for(lambda: second.blocks().get(daemon.grpc) == 2, "the second router's index")
        wait_for(lambda: second.metric("terrace_router_index_blocks", None) == 202, "all of it")
        assert time.monotonic() - began < 10, "starting the program included"


def test_the_warmest_prefixes_are_shown(pairs: Any) -> None:
    """An operator would look at the wrong prefixes, or at too many: `terrace prefix hot` and `tree` of a router with
    two branches of one trunk."""
    terrace = TARGET / "release" / "terrace"
    assert terrace.exists(), f"{terrace} is missing; build it: cargo build --release --bin terrace"
    pair = pairs(Pair())
    trunk = list(range(1, 65))
    pair.publisher.publish(stored(trunk), stored([100], 64), stored([200], 64), rank=0)
    pair.publisher.publish(stored(trunk), stored([100], 64), rank=1)
    wait_for(lambda: pair.router.metric("terrace_router_index_blocks", None) == 66, "the blocks")

    def show(*line: str) -> str:
        done = subprocess.run(
            [terrace, "prefix", *line, "--router", pair.router.url], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def hottest() -> Any:
        hot = json.loads(show("hot", "-o", "json", "--limit", "2"))
        return hot if hot["prefixes"][0]["holders"] == ["v#0", "v#1"] else None

    hot = wait_for(hottest, "what both ranks have")
    assert (hot["blocks_in_all"], len(hot["prefixes"])) == (66, 2)
    assert hot["prefixes"][0]["tiers"] == {"hbm": 2 * hot["prefixes"][0]["blocks"], "pinned": 0, "nvme": 0}
    lines = show("tree").splitlines()
    assert lines[0].startswith("FIRST BLOCK")
    assert [line.startswith("  ") for line in lines[1:4]] == [False, True, True], lines
    assert "66 blocks are known, 66 of them shown" in lines[-1]
    status, answer = pair.router.call("/admin/hot?limit=1001")
    assert status == 400
    assert b"from 1 to 1000" in answer
