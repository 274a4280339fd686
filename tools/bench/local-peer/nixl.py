"""Reads blocks of one size from another process's memory through NIXL's UCX backend over shared memory, `batch` at once,
into a registered buffer. Prints `rate GIB_PER_SECOND`.

nixl.py SIZE COUNT BATCH SECONDS
Unverified, and into the same place each time. The lists of all blocks are prepared once; a request is made of places in
them, as nobody knows before which blocks are wanted.
"""
import os
import pickle
import subprocess
import sys
import time

# Read by UCX when it is loaded.
os.environ["UCX_TLS"] = "shm,tcp,self"

import numpy as np
from nixl_cu12._api import nixl_agent, nixl_agent_config

OWNER, READER = "owner", "reader"


def memory(agent, size, count, filled):
    """Registered memory of so many blocks, and where they lie."""
    bytes_ = np.full(size * count, filled, np.uint8)
    base = bytes_.ctypes.data
    agent.register_memory([(base, size * count, 0, "")], "DRAM")
    return bytes_, [(base + size * at, size, 0) for at in range(count)]


def hold(size, count):
    agent = nixl_agent(OWNER, nixl_agent_config(backends=["UCX"]))
    _bytes, blocks = memory(agent, size, count, 7)
    print(pickle.dumps((agent.get_agent_metadata(), blocks)).hex(), flush=True)
    sys.stdin.read()


def wait(agent, handle):
    state = agent.transfer(handle)
    while state == "PROC":
        state = agent.check_xfer_state(handle)
    if state != "DONE":
        sys.exit(f"nixl: a transfer ended as {state}")


def main():
    size, count, batch, seconds = *map(int, sys.argv[1:4]), float(sys.argv[4])
    arguments = [sys.executable, __file__, "hold", *sys.argv[1:3]]
    holder = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        said = ""
        # Its libraries may say things first.
        while not said.startswith("80"):
            said = holder.stdout.readline()
            if not said:
                sys.exit("nixl: the process that holds the blocks failed")
        described, blocks = pickle.loads(bytes.fromhex(said))
        agent = nixl_agent(READER, nixl_agent_config(backends=["UCX"]))
        owner = agent.add_remote_agent(described)
        target, places = memory(agent, size, batch, 0)
        here, there = agent.prep_xfer_dlist("", places, "DRAM"), agent.prep_xfer_dlist(owner, blocks, "DRAM")
        here_all = list(range(batch))

        def get(at):
            handle = agent.make_prepped_xfer(
                "READ", here, here_all, there, [(at + one) % count for one in here_all]
            )
            wait(agent, handle)
            agent.release_xfer_handle(handle)

        get(0)
        done, began = 0, time.monotonic()
        while time.monotonic() - began < seconds:
            get(done * batch % count)
            done += 1
        took = time.monotonic() - began
        if not (target == 7).all():
            sys.exit("nixl: what was read is not what is held")
        print("rate", done * batch * size / took / (1 << 30), flush=True)
    finally:
        holder.kill()
    os._exit(0)


if sys.argv[1] == "hold":
    hold(int(sys.argv[2]), int(sys.argv[3]))
else:
    main()
