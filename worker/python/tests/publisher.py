"""A process that publishes KV events as vLLM and SGLang do: a PUB socket, and a ROUTER socket for replays.

Reads orders from its input, a line of JSON each, and answers each with a line once it is done:
``{"events": [...], "rank": 0}`` publishes a batch, ``{"hex": "..."}`` bytes that need be no batch, ``{"lose": n}``
counts batches that nobody is sent but that can be replayed, ``{"forget": true}`` empties the replay's memory,
``{"many": n, "each": m, "first": k}`` publishes n batches of m events of one block each.
"""

import json
import sys
import threading
from collections import deque
from typing import Any

import msgspec
import zmq


class Publisher:
    """Numbers batches, sends them, and remembers the last ones."""

    def __init__(self, events: str, replay: str, topic: str) -> None:
        self._context = zmq.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._pub.set_hwm(0)
        if "*" in events or events.startswith("ipc"):
            self._pub.bind(events.replace("*", "127.0.0.1"))
        else:
            self._pub.connect(events)
        self._topic = topic.encode()
        self._next = 0
        self._lock = threading.Lock()
        self._memory: deque[tuple[int, bytes]] = deque(maxlen=100_000)
        if replay != "-":
            self._replay = self._context.socket(zmq.ROUTER)
            self._replay.bind(replay)
            threading.Thread(target=self._answer, daemon=True).start()

    def send(self, payload: bytes, *, lost: bool = False) -> None:
        with self._lock:
            number = self._next
            self._next += 1
            self._memory.append((number, payload))
        if not lost:
            self._pub.send_multipart((self._topic, number.to_bytes(8, "big"), payload))

    def forget(self) -> None:
        with self._lock:
            self._memory.clear()

    def _answer(self) -> None:
        while True:
            client, _, start = self._replay.recv_multipart()
            with self._lock:
                memory = list(self._memory)
            for number, payload in memory:
                if number >= int.from_bytes(start, "big"):
                    self._replay.send_multipart((client, b"", self._topic, number.to_bytes(8, "big"), payload))
            self._replay.send_multipart((client, b"", b"", (-1).to_bytes(8, "big", signed=True), b""))


def batch(events: list[Any], rank: int | None) -> bytes:
    return msgspec.msgpack.encode([1.5, events] if rank is None else [1.5, events, rank])


def stored(number: int) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": [number],
        "parent_block_hash": number - 1 if number else None,
        "token_ids": [],
        "block_size": 16,
        "medium": "GPU",
    }


def main() -> None:
    publisher = Publisher(*sys.argv[1:4])
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "events" in order:
            publisher.send(batch(order["events"], order.get("rank")), lost=order.get("lost", False))
        elif "hex" in order:
            publisher.send(bytes.fromhex(order["hex"]))
        elif "zeros" in order:
            publisher.send(bytes(order["zeros"]))
        elif "forget" in order:
            publisher.forget()
        else:
            for start in range(order["first"], order["first"] + order["many"] * order["each"], order["each"]):
                publisher.send(batch([stored(number) for number in range(start, start + order["each"])], None))
        print("done", flush=True)


if __name__ == "__main__":
    main()
