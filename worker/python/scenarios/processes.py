"""The processes of a scenario: ``terraced``, vLLM's server and all of Terrace, each killed and started again as the
story wants."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

START_SECONDS = 300.0
# Blocks that are on their way into the store; every wait ends long before.
PATIENCE = 60.0
# Less than a block, and no divisor of its length on the device.
DAMAGE_STRIDE = 256 << 10


class Terraced:
    """The daemon, with its state in one folder, so that a new life finds what the last one wrote."""

    def __init__(self, program: Path, folder: Path) -> None:
        self._program = program
        self._folder = folder
        self.socket = folder / "lane.sock"
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "terraced.toml").write_text(
            f'data_dir = "{folder}"\nlane_socket = "{self.socket}"\n'
            'grpc_listen = "127.0.0.1:0"\nmetrics_listen = "127.0.0.1:0"\n'
            'pinned_bytes = "512MiB"\npersist_delay_ms = 50\n'
            f'[[device]]\npath = "{folder / "nvme0.dat"}"\nbytes = "1GiB"\n'
        )
        self.grpc = ""

    def start(self) -> None:
        log = self._folder / "terraced.log"
        with log.open("ab") as out:
            offset = out.tell()
            self.process = subprocess.Popen(
                [self._program, "--config", self._folder / "terraced.toml"],
                stdout=out,
                stderr=out,
                env={**os.environ, "RUST_LOG": "info"},
            )
        deadline = time.monotonic() + START_SECONDS
        while True:
            found = re.search(r"terraced ready: grpc ([^ ,]+)", log.read_bytes()[offset:].decode(errors="replace"))
            if found:
                self.grpc = f"http://{found[1]}"
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"terraced does not start; see {log}")
            time.sleep(0.05)

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def damage(self) -> int:
        """Turns a byte round every 256 KiB of what is on the device, at least one in each block; answers how many."""
        assert self.process is None, "the device belongs to a daemon that runs"
        turned = 0
        with (self._folder / "nvme0.dat").open("r+b") as device:
            for at in range(DAMAGE_STRIDE, device.seek(0, os.SEEK_END), DAMAGE_STRIDE):
                device.seek(at)
                page = device.read(4096)
                if any(page):
                    device.seek(at)
                    device.write(bytes([page[0] ^ 0xFF]))
                    turned += 1
        return turned

    def spaces(self) -> list[dict[str, Any]]:
        """Each space with what it holds."""
        return spaces(self._program, self.grpc)


def spaces(terraced: Path, grpc: str) -> list[dict[str, Any]]:
    """What ``terrace``, which lies beside ``terraced``, says of a daemon's spaces."""
    command = [terraced.with_name("terrace"), "space", "ls", "--output", "json", "--endpoint", grpc]
    found: list[dict[str, Any]] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


class Up:
    """All of Terrace, with its own workers and its own front door: ``terrace up``."""

    def __init__(self, terraced: Path, home: Path, log: Path) -> None:
        self._terraced = terraced
        self._log = log
        self.socket = home / "lane.sock"
        self._port = free_port()
        command = [terraced.with_name("terrace"), "up", "--home", home, "--port", str(self._port)]
        command += ["--prefill", "1", "--decode", "1", "--pinned-bytes", "512MiB", "--nvme-bytes", "1GiB"]
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while "ready: http" not in self._log.read_text(errors="replace"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"terrace up does not start; see {self._log}")
            time.sleep(0.1)

    def ask(self, prompt: str) -> int:
        """Has a prompt computed; answers how many of its tokens came from the cache."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        try:
            connection.request("GET", "/v1/models")
            model = json.loads(connection.getresponse().read())["data"][0]["id"]
            body = json.dumps({"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0})
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise RuntimeError(f"terrace answered {answer.status}: {text!r}")
            return int(json.loads(text)["usage"]["prompt_tokens_details"]["cached_tokens"])
        finally:
            connection.close()

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """An engine's server, with all its processes."""

    def __init__(self, command: list[str], log: Path, settings: dict[str, str]) -> None:
        self._log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, env={**os.environ, **settings}, start_new_session=True
            )

    def serves(self) -> bool:
        """Whether it answers requests."""
        raise NotImplementedError

    def wait(self) -> float:
        """Until it serves; answers how long that took."""
        began = time.monotonic()
        while True:
            with contextlib.suppress(OSError):
                if self.serves():
                    return time.monotonic() - began
            if self.process.poll() is not None or time.monotonic() > began + START_SECONDS:
                raise RuntimeError(f"the server does not start; see {self._log}")
            time.sleep(0.25)

    def log_text(self) -> str:
        return self._log.read_text(errors="replace")

    def kill(self) -> None:
        """kill -9 of the server and all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Vllm(Server):
    """vLLM's OpenAI server. ``connector`` is its ``--kv-transfer-config``, or ``None`` for plain vLLM."""

    def __init__(self, model: Path, log: Path, connector: dict[str, Any] | None) -> None:
        self._port = free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", "smol", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--dtype", "bfloat16", "--max-model-len", "2048", "--enforce-eager", "--block-size", "32"]
        command += ["--max-num-seqs", "16", "--prefix-caching-hash-algo", "sha256_cbor"]
        if connector is not None:
            command += ["--kv-transfer-config", json.dumps(connector)]
        settings = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_SERVER_DEV_MODE": "1",
            # For connectors beside this file.
            "PYTHONPATH": str(Path(__file__).parent),
            # With a connector vLLM keeps one processor more free for it, and none at all where there are two: servers
            # that are compared must compute with the same.
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",
            # Huge pages, where the kernel has some: which small ones a process gets decides by several percent how
            # quickly it computes, for as long as it lives.
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        }
        super().__init__(command, log, settings)

    def serves(self) -> bool:
        return self._call("GET", "/health")[0] == 200

    def _call(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        try:
            connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def reset(self) -> None:
        """Empties vLLM's own prefix cache, not the store."""
        status, text = self._call("POST", "/reset_prefix_cache")
        if status != 200:
            raise RuntimeError(f"reset_prefix_cache: {status} {text!r}")

    def counters(self) -> dict[str, float]:
        """Sums of its counters by name, over all labels."""
        sums: dict[str, float] = {}
        for line in self._call("GET", "/metrics")[1].decode().splitlines():
            if found := re.match(r"(vllm:\w+_total)\{.*\} (\S+)$", line):
                sums[found[1]] = sums.get(found[1], 0) + float(found[2])
        return sums

    def ask(self, prompt: str | list[int], tokens: int = 16, **more: Any) -> tuple[float, str]:
        """Seconds to the first token, and the text."""
        body = {"model": "smol", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        try:
            began = time.monotonic()
            connection.request(
                "POST",
                "/v1/completions",
                json.dumps({**body, "ignore_eos": True, **more}),
                {"Content-Type": "application/json"},
            )
            answer = connection.getresponse()
            if answer.status != 200:
                raise RuntimeError(f"vLLM answered {answer.status}: {answer.read()!r}")
            first, text = 0.0, ""
            for line in answer:
                if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "choices" not in event:
                    raise RuntimeError(f"vLLM failed the request: {event}")
                first = first or time.monotonic() - began
                text += event["choices"][0]["text"]
            return first, text
        finally:
            connection.close()
