"""SGLang's server on the CPU with Terrace as the third level of its HiCache: what must hold is checked, what it costs
printed.

``sglang_scenario.py --model FOLDER --terraced PROGRAM --state FOLDER``. Steps and figures are JSON lines; what does not
hold ends the run.
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from arguments import no_daemon_of_the_user, options, tell
from figures import check, figure, say
from processes import PATIENCE, Server, Terraced, free_port
from prompts import prompt

# The platform of `sglang_cpu.py`, and how SGLang finds it.
NAME = "terrace_scenario_cpu"
ENTRY_POINTS = f"[sglang.srt.platforms]\n{NAME} = sglang_cpu:activate\n"
PROMPT_TOKENS = 600
PAGE_TOKENS = 16


class Sglang(Server):
    """SGLang's own server."""

    def __init__(self, model: Path, state: Path, name: str, socket: Path) -> None:
        plugin = state / f"{NAME}-0.dist-info"
        plugin.mkdir(exist_ok=True)
        (plugin / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0\n")
        (plugin / "entry_points.txt").write_text(ENTRY_POINTS)
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        storage = {
            "backend_name": "terrace",
            "module_path": "terrace_kv.sglang",
            "class_name": "TerraceStore",
            "interface_v1": 1,
            "socket": str(socket),
        }
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--device", "cpu"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--page-size", str(PAGE_TOKENS)]
        command += ["--attention-backend", "torch_native", "--disable-overlap-schedule", "--disable-cuda-graph"]
        command += ["--mem-fraction-static", "0.2", "--max-total-tokens", "8192"]
        command += ["--enable-hierarchical-cache", "--hicache-mem-layout", "page_first", "--hicache-ratio", "2"]
        command += ["--hicache-storage-backend", "dynamic", "--hicache-storage-backend-extra-config"]
        settings = {
            "SGLANG_PLATFORM": NAME,
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(
                [str(state), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            # SGLang compiles the hash of its pages when it starts; ninja lies beside Python.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        super().__init__([*command, json.dumps(storage)], state / f"{name}.log", settings)

    def _call(self, route: str, body: Any = None, method: str | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + route, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=300) as answer:
            return bytes(answer.read())

    def serves(self) -> bool:
        # It listens before its first prompt, which it asks itself, is answered.
        return "ready to roll" in self.log_text()

    def ask(self, text: str, tokens: int = 8) -> tuple[float, dict[str, int], str]:
        """Seconds, tokens by where they came from, and the text."""
        began = time.monotonic()
        body = {"text": text, "sampling_params": {"max_new_tokens": tokens, "temperature": 0}}
        answer = json.loads(self._call("/generate", body))
        found = answer["meta_info"]["cached_tokens_details"] or {}
        places = {place: int(found.get(place, 0)) for place in ("device", "host", "storage")}
        return time.monotonic() - began, places, answer["text"]

    def forget(self) -> None:
        """Empties its caches of the device and of the host, not the store. Refused while it still copies."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self._call("/flush_cache", method="POST")
                return
            except urllib.error.HTTPError as error:
                check(time.monotonic() < deadline, f"flush_cache: {error}")
            time.sleep(0.1)


class Story:
    def __init__(self, model: Path, terraced: Path, state: Path) -> None:
        self.model, self.state = model, state
        self.terraced = Terraced(terraced, state / "store")
        self.servers: list[Sglang] = []
        self.texts: dict[int, str] = {}

    def server(self, name: str) -> Sglang:
        server = Sglang(self.model, self.state, name, self.terraced.socket)
        self.servers.append(server)
        say("sglang started", name=name, seconds=round(server.wait(), 1))
        return server

    def ask(self, server: Sglang, seed: int, what: str) -> dict[str, int]:
        """Asks, and compares the text with what was answered to the same prompt before."""
        seconds, places, text = server.ask(prompt(seed, PROMPT_TOKENS))
        known = self.texts.setdefault(seed, text)
        say(what, seconds=round(seconds, 3), **places)
        check(known == text, f"another text for prompt {seed}, {what}: {text!r}, before {known!r}")
        return places

    def from_the_store(self, server: Sglang, seed: int, what: str) -> None:
        """Until what was computed has reached the store, and comes from there."""
        deadline = time.monotonic() + PATIENCE
        while True:
            server.forget()
            found = self.ask(server, seed, what)
            if found["storage"] > PROMPT_TOKENS // 2:
                figure(f"sglang_{what.replace(' ', '_')}_tokens", found["storage"], "tokens")
                return
            check(time.monotonic() < deadline, f"{what}: {found}")

    def run(self) -> None:
        self.terraced.start()
        first = self.server("first")
        for seed in range(2):
            check(self.ask(first, seed, "computed")["storage"] == 0, "the store had a prompt that nobody asked")
            check(self.ask(first, seed, "own cache")["device"] > PROMPT_TOKENS // 2, "its own cache does not work")
            self.from_the_store(first, seed, "from the store")
        first.kill()
        second = self.server("second")
        found = self.ask(second, 0, "first request after kill -9")
        check(found["storage"] > PROMPT_TOKENS // 2, f"nothing came from the store: {found}")
        self.terraced.kill()
        second.forget()
        found = self.ask(second, 1, "terraced killed")
        check(found["storage"] == 0, "blocks of a dead daemon")
        self.terraced.start()
        self.from_the_store(second, 0, "terraced restarted")
        second.kill()

    def end(self) -> None:
        for server in self.servers:
            server.kill()
        self.terraced.kill()


def main() -> None:
    chosen = options(__doc__).parse_args()
    no_daemon_of_the_user()
    tell(Story(chosen.model, chosen.terraced, chosen.state.resolve()), Story.run)


if __name__ == "__main__":
    main()
