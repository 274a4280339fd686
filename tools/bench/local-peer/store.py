"""Gets values of one size from Mooncake Store, `batch` at once, into a registered buffer. Prints `rate GIB_PER_SECOND`.

store.py own|other|shared SIZE COUNT BATCH SECONDS: in a process that owns the segment, from another one over TCP, or
from another one that shares memory with the owner (`mooncake_client`).
Unverified, and into the same place each time.
"""
import ctypes
import os
import pathlib
import subprocess
import sys
import time

from mooncake.store import MooncakeDistributedStore

MASTER = "127.0.0.1:50051"
SEGMENT_BYTES = 512 << 20
POOL_BYTES = 256 << 20
OWNER = "127.0.0.1:50052"


def connect(segment):
    store = MooncakeDistributedStore()
    for _ in range(50):
        if store.setup("127.0.0.1", "P2PHANDSHAKE", segment, 256 << 20, "tcp", "", MASTER) == 0:
            return store
        time.sleep(0.1)
    sys.exit("mooncake: no master answers")


def attach():
    for _ in range(50):
        store = MooncakeDistributedStore()
        if store.setup_dummy(POOL_BYTES, POOL_BYTES // 2, OWNER) == 0:
            return store
        time.sleep(0.1)
    sys.exit("mooncake: no owner answers")


def own(store, size, count):
    value = bytes([7]) * size
    for key in range(count):
        if store.put(f"{size}:{key}", value) != 0:
            sys.exit("mooncake: a put failed")


def buffer_of(store, length):
    buffer = ctypes.create_string_buffer(length)
    if store.register_buffer(ctypes.addressof(buffer), length) != 0:
        sys.exit("mooncake: cannot register a buffer")
    return buffer


def measure(store, place, size, count, batch, seconds):
    places, sizes, at, done = [place + size * one for one in range(batch)], [size] * batch, 0, 0
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        keys = [f"{size}:{(at + one) % count}" for one in range(batch)]
        found = [store.get_into(keys[0], place, size)] if batch == 1 else store.batch_get_into(keys, places, sizes)
        if found != sizes:
            sys.exit(f"mooncake: got {found}")
        at, done = (at + batch) % count, done + batch
    print("rate", done * size / (time.monotonic() - began) / (1 << 30), flush=True)


def main():
    place, size, count, batch, seconds = sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5])
    if place == "hold":
        # Its segment goes with it.
        store = connect(SEGMENT_BYTES)
        own(store, size, count)
        print("held", flush=True)
        sys.stdin.read()
        return
    master = subprocess.Popen([pathlib.Path(sys.executable).with_name("mooncake_master")], stdout=subprocess.DEVNULL)
    holder = None
    try:
        time.sleep(1)
        if place == "own":
            store = connect(SEGMENT_BYTES)
            own(store, size, count)
        elif place == "shared":
            program = pathlib.Path(sys.executable).with_name("mooncake_client")
            arguments = ["--host=127.0.0.1", "--port=50052", "--metadata_server=P2PHANDSHAKE", "--protocol=tcp",
                         f"--master_server_address={MASTER}", f"--global_segment_size={SEGMENT_BYTES}"]
            holder = subprocess.Popen([program, *arguments], stdout=subprocess.DEVNULL)
            store = attach()
            own(store, size, count)
        else:
            arguments = [sys.executable, __file__, "hold", *sys.argv[2:]]
            holder = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            while (said := holder.stdout.readline()) != "held\n":
                if not said:
                    sys.exit("mooncake: the holder of the segment failed")
            store = connect(0)
        if place == "shared":
            # What the owner writes into must lie in the memory that they share.
            target = store.alloc_from_mem_pool(size * batch)
            if store.register_buffer(target, size * batch) != 0:
                sys.exit("mooncake: cannot register a buffer")
        else:
            buffer = buffer_of(store, size * batch)
            target = ctypes.addressof(buffer)
        measure(store, target, size, count, batch, seconds)
    finally:
        for process in (holder, master):
            if process:
                process.kill()
    os._exit(0)


main()
