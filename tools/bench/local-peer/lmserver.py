"""Gets chunks of one size from LMCache's own server, `batch` at once, each into the same place every time. Prints
`rate GIB_PER_SECOND`.

lmserver.py SIZE COUNT BATCH SECONDS: by LMCache's protocol over one connection, as its connector does, but that the
questions of a batch are sent together. Unverified.
"""

import socket
import subprocess
import sys
import time

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.protocol import ClientCommand, ClientMetaMessage, ServerMetaMessage, ServerReturnCode


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def connect(port):
    for _ in range(600):
        try:
            found = socket.create_connection(("127.0.0.1", port))
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return found
        except ConnectionRefusedError:
            time.sleep(0.1)
    sys.exit("lmcache: its server does not answer")


def message(command, key, size):
    key = CacheEngineKey("bench", 1, 0, key, torch.uint8)
    shape = torch.Size([size, 0, 0, 0])
    return ClientMetaMessage(command, key, size, MemoryFormat.BINARY, torch.uint8, shape).serialize()


def receive(server, place):
    done = 0
    while done < len(place):
        got = server.recv_into(place[done:])
        if not got:
            sys.exit("lmcache: its server closed the connection")
        done += got


def get(server, places, heads, size):
    server.sendall(b"".join(heads))
    head = memoryview(bytearray(ServerMetaMessage.packlength()))
    for place in places:
        receive(server, head)
        meta = ServerMetaMessage.deserialize(bytes(head))
        if meta.code != ServerReturnCode.SUCCESS or meta.length != size:
            sys.exit(f"lmcache: answered {meta}")
        receive(server, place)


def main():
    size, count, batch, seconds = *map(int, sys.argv[1:4]), float(sys.argv[4])
    # It does not take a port again that it had a moment ago.
    port = free_port()
    arguments = [sys.executable, "-m", "lmcache.v1.server", "127.0.0.1", str(port), "cpu"]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        server = connect(port)
        for key in range(count):
            server.sendall(message(ClientCommand.PUT, key + 1, size))
            server.sendall(bytes([key % 251]) * size)
        asked = [message(ClientCommand.GET, key + 1, 0) for key in range(count)]
        places = [memoryview(bytearray(size)) for _ in range(batch)]
        get(server, places[:1], asked[:1], size)
        at, done = 0, 0
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            get(server, places, [asked[(at + one) % count] for one in range(batch)], size)
            if places[0][0] != at % 251:
                sys.exit("lmcache: another chunk came")
            at, done = (at + batch) % count, done + batch
        print("rate", done * size / (time.monotonic() - began) / (1 << 30), flush=True)
    finally:
        process.kill()
        process.wait()


main()
