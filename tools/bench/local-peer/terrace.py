"""Gets blocks of one size from terraced through the Python package, `batch` at once, into one buffer, verified.
Prints `rate GIB_PER_SECOND`.

terrace.py SOCKET SIZE COUNT BATCH SECONDS
"""
import mmap
import sys
import time

import terrace_kv


def main():
    socket, size, count, batch, seconds = sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5])
    manifest = terrace_kv.SpaceManifest(model="bench", model_fingerprint=b"1", dtype="bytes", layout="python",
                                        tokens_per_block=16, block_bytes=size)
    keys = [key.to_bytes(8, "little") for key in range(count)]
    # In large pages where the kernel has some, as NumPy allocates.
    memory = mmap.mmap(-1, batch * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    places = [memoryview(memory)[at * size : (at + 1) * size] for at in range(batch)]
    with terrace_kv.connect(socket, client_name="bench python") as session:
        space = session.open_space(manifest)
        session.write(space, keys, [bytes([key % 251]) * size for key in range(count)])
        at, done = 0, 0
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            wanted = [keys[(at + one) % count] for one in range(batch)]
            if not all(session.get(space, wanted, places, wait=5.0)):
                sys.exit("terrace: a block was lost")
            if places[0][0] != at % 251 or places[0][-1] != at % 251:
                sys.exit("terrace: another block came")
            at, done = (at + batch) % count, done + batch
    print("rate", done * size / (time.monotonic() - began) / (1 << 30), flush=True)


main()
