"""A real ``terraced`` in a folder of its own, and what every test asks of it."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import terrace_kv

ROOT = Path(__file__).resolve().parents[3]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
TERRACED = TARGET / "release" / "terraced"
# Longest wait for anything; the machine may be busy with other tests.
PATIENCE = 60.0
BLOCK_BYTES = 64 << 10


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """The first true answer of ``condition``."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def wire(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Messages and stubs that grpcio-tools generates from the wire contract, now."""
    from grpc_tools import protoc

    folder = tmp_path_factory.mktemp("wire")
    protos = ROOT / "proto"
    files = [str(file) for file in sorted((protos / "terrace" / "v1").glob("*.proto"))]
    assert files, "the wire contract is not where it should be"
    options = [f"--proto_path={protos}", f"--python_out={folder}", f"--grpc_python_out={folder}"]
    assert protoc.main(["protoc", *options, *files]) == 0
    sys.path.insert(0, str(folder))
    from terrace.v1 import admin_pb2, admin_pb2_grpc, block_pb2, block_pb2_grpc, common_pb2, lane_pb2

    return SimpleNamespace(
        admin=admin_pb2,
        admin_grpc=admin_pb2_grpc,
        block=block_pb2,
        block_grpc=block_pb2_grpc,
        common=common_pb2,
        lane=lane_pb2,
    )


class Daemon:
    """One running ``terraced``."""

    def __init__(
        self, folder: Path, wire: SimpleNamespace, extra: str = "", *, pinned: str = "32MiB", device: str = "64MiB"
    ) -> None:
        data = folder / "data"
        self.socket = folder / "lane.sock"
        config = folder / "terraced.toml"
        config.write_text(
            f'data_dir = "{data}"\nlane_socket = "{self.socket}"\n'
            'grpc_listen = "127.0.0.1:0"\nmetrics_listen = "127.0.0.1:0"\n'
            f'pinned_bytes = "{pinned}"\nchunk_bytes = "4MiB"\npersist_delay_ms = 50\nwindow_idle_ms = 300\n'
            f'{extra}\n[[device]]\npath = "{data / "nvme0.dat"}"\nbytes = "{device}"\n'
        )
        assert TERRACED.exists(), f"{TERRACED} is missing; build it: cargo build --release -p terraced"
        self.process = subprocess.Popen(
            [TERRACED, "--config", config],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "RUST_LOG": "info"},
        )
        assert self.process.stderr is not None
        printed = []
        for line in self.process.stderr:
            printed.append(line)
            if ready := re.search(r"terraced ready: grpc ([^ ,]+)", line):
                self.grpc = f"http://{ready[1]}"
                break
        else:
            pytest.fail("terraced does not start:\n" + "".join(printed))
        # A full pipe would stop the daemon.
        self.drain = threading.Thread(target=self.process.stderr.read)
        self.drain.start()
        self.channel = grpc.insecure_channel(ready[1])
        self.admin = wire.admin_grpc.AdminServiceStub(self.channel)
        self.wire = wire

    def info(self) -> Any:
        return self.admin.Info(self.wire.admin.InfoRequest(), timeout=PATIENCE)

    def pinned(self) -> int:
        return sum(tier.frames.pinned for tier in self.info().tiers)

    def expect_leases(self, count: int) -> None:
        """Leases end in the background: waits until the daemon has so many."""
        wait_for(lambda: self.info().leases == count, f"{count} leases; there are {self.info().leases}")

    def expect_quiet(self) -> None:
        """Nothing leaks: no session, lease, pinned frame or frame that is being filled."""

        def quiet() -> bool:
            info = self.info()
            busy = sum(tier.frames.pinned + tier.frames.filling for tier in info.tiers)
            return not (info.sessions or info.leases or busy)

        wait_for(quiet, f"a quiet daemon: {self.info()}")

    def kill(self) -> None:
        self.channel.close()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.drain.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not in /tmp, which may be a tmpfs without O_DIRECT. Short, for the socket's path.
    below = TARGET / "tmp"
    below.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="py", dir=below) as name:
        yield Path(name)


@pytest.fixture
def daemon(folder: Path, wire: SimpleNamespace) -> Iterator[Daemon]:
    running = Daemon(folder, wire)
    yield running
    running.kill()


@pytest.fixture(params=["lane", "grpc"])
def session(request: pytest.FixtureRequest, daemon: Daemon) -> Iterator[terrace_kv.Session]:
    """A session over each transport."""
    socket = daemon.socket if request.param == "lane" else None
    with terrace_kv.connect(socket, daemon.grpc, client_name="test") as session:
        assert session.transport == request.param
        yield session


@pytest.fixture
def lane(daemon: Daemon) -> Iterator[terrace_kv.Session]:
    with terrace_kv.connect(daemon.socket, daemon.grpc, client_name="test") as session:
        assert session.transport == "lane"
        yield session


def manifest(**changes: Any) -> terrace_kv.SpaceManifest:
    fields: dict[str, Any] = {
        "model": "test",
        "model_fingerprint": b"\x01",
        "dtype": "f16",
        "layout": "bytes",
        "tokens_per_block": 16,
        "block_bytes": BLOCK_BYTES,
    }
    return terrace_kv.SpaceManifest(**{**fields, **changes})


def keys(count: int, start: int = 0) -> list[bytes]:
    return [index.to_bytes(4, "little") for index in range(start, start + count)]


def payload(key: bytes, length: int = BLOCK_BYTES) -> bytes:
    """Bytes that no other key has."""
    import hashlib

    return hashlib.shake_128(key).digest(length)
