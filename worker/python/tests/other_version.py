"""A daemon of another release, as far as a client gets with it: it knows other versions of the wire than ours."""

import socket
import struct
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Self

FAILED_PRECONDITION = 9
OURS, THEIRS = 1, 2


def receive(stream: socket.socket) -> bytes:
    """One frame of the lane, or nothing at its end."""
    head = stream.recv(4, socket.MSG_WAITALL)
    return stream.recv(struct.unpack("<I", head)[0], socket.MSG_WAITALL) if len(head) == 4 else b""


def frame(message: bytes) -> bytes:
    return struct.pack("<I", len(message)) + message


class OtherVersion:
    """Listens where the daemon should, until the end of the ``with``.

    How it answers a hello: ``refuses`` it, as docs/on-wire.md says; in a framing that is ``unreadable`` for us; or it
    ``hangs_up``.
    """

    def __init__(self, path: Path, wire: SimpleNamespace, how: str) -> None:
        self.wire = wire
        self.how = how
        self.asked: list[int] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.path = path
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.serve)

    def __enter__(self) -> Self:
        self.listener.settimeout(0.1)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.listener.close()
        self.path.unlink()

    def serve(self) -> None:
        while not self.stop.is_set():
            try:
                client, _ = self.listener.accept()
            except TimeoutError:
                continue
            with client:
                client.settimeout(5.0)
                self.answer(client)

    def answer(self, client: socket.socket) -> None:
        request = self.wire.lane.LaneRequest.FromString(receive(client))
        assert request.WhichOneof("op") == "hello"
        self.asked.append(request.hello.version)
        if self.how == "refuses":
            message = f"lane version {request.hello.version} is not spoken here; this daemon speaks {THEIRS}"
            error = self.wire.lane.LaneError(code=FAILED_PRECONDITION, message=message)
            client.sendall(frame(self.wire.lane.LaneResponse(id=request.id, error=error).SerializeToString()))
        elif self.how == "unreadable":
            # Field 1 of wire type 7, which there is not.
            client.sendall(frame(b"\x0f" * 8))
