"""Dynamo's own indexer and router follow what our router publishes, and catch up with it. Skipped without Dynamo."""

import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Daemon, wait_for
from test_events import ENGINES, KEYS, TOKENS, VLLM, Publisher, Router, fill, ports, stored

PYTHON = os.environ.get("TERRACE_DYNAMO", "")
"""A Python with ai-dynamo, as docs/engines/dynamo.md installs it."""
pytestmark = pytest.mark.skipif(not PYTHON, reason="TERRACE_DYNAMO names no Python with ai-dynamo in it")
MODEL, WORKER = "m", 77


class Indexer:
    """One running ``python -m dynamo.indexer``."""

    def __init__(self, *arguments: str) -> None:
        (port,) = ports(1)
        self.url = f"http://127.0.0.1:{port}"
        line = [PYTHON, "-m", "dynamo.indexer", "--port", str(port), "--block-size", "16", *arguments]
        self.process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(self.listens, "Dynamo's indexer")

    def listens(self) -> bool:
        assert self.process.poll() is None, "Dynamo's indexer has ended"
        try:
            return self.ask("/workers")[0] == 200
        except urllib.error.URLError:
            return False

    def ask(self, route: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + route, data, {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def register(self, events: int, replay: int) -> None:
        status, answer = self.ask(
            "/register",
            {
                "instance_id": WORKER,
                "endpoint": f"tcp://127.0.0.1:{events}",
                "replay_endpoint": f"tcp://127.0.0.1:{replay}",
                "model_name": MODEL,
                "block_size": 16,
            },
        )
        assert status == 201, answer

    def credits(self, tokens: list[int] = TOKENS) -> dict[str, int]:
        """Tokens of a prompt that the worker is credited, by tier."""
        status, answer = self.ask("/query", {"token_ids": tokens, "model_name": MODEL})
        assert status == 200, answer
        found = answer["instances"].get(str(WORKER), {})
        return {name: found[name] for name in ("longest_matched", "gpu", "cpu", "disk") if found.get(name)}

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Selection(Indexer):
    """One running ``python -m dynamo.select_service``."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        line = [PYTHON, "-m", "dynamo.select_service", "--port", str(port)]
        self.process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(self.listens, "Dynamo's selection service")


@pytest.fixture
def started() -> Iterator[Any]:
    """Ends what a test has started."""
    running: list[Any] = []
    yield lambda one: running.append(one) or one
    for one in reversed(running):
        (one.kill if hasattr(one, "kill") else one.stop)()


@pytest.mark.parametrize("name", ENGINES)
def test_dynamos_indexer_credits_what_the_daemon_holds(started: Any, daemon: Daemon, name: str) -> None:
    """Dynamo hashes, decodes and counts otherwise than we think, so that its router credits nothing: two blocks of a
    daemon are found by their tokens, in the tiers of a daemon, and gone with it."""
    keys, numbers, how = ENGINES[name]
    events, replay, engine_port = ports(3)
    engine = started(Publisher(f"tcp://*:{engine_port}"))
    options = ("--publish", f"tcp://127.0.0.1:{events}", "--publish-replay", f"tcp://127.0.0.1:{replay}")
    options = (*options, "--publish-worker", str(WORKER), "--model-name", MODEL)
    started(Router(f"name=v,connect=tcp://127.0.0.1:{engine_port}{how}", grpc=daemon.grpc, extra=options))
    indexer = started(Indexer())
    indexer.register(events, replay)
    with fill(daemon, keys, name):

        def credited() -> bool:
            engine.publish(stored(numbers, tokens=TOKENS))
            return indexer.credits().get("longest_matched") == 32

        wait_for(credited, "two blocks at Dynamo's indexer")
        assert set(indexer.credits()) <= {"longest_matched", "cpu", "disk"}
        assert indexer.credits([5, *TOKENS[1:]]) == {}, "another prompt"
    daemon.kill()
    wait_for(lambda: indexer.credits() == {}, "that they are gone")


def test_dynamos_indexer_recovers_from_the_dump(started: Any, daemon: Daemon) -> None:
    """An indexer that starts with a router as its peer has what the router publishes, before any event."""
    events, replay, engine_port = ports(3)
    engine = started(Publisher(f"tcp://*:{engine_port}"))
    options = ("--publish", f"tcp://127.0.0.1:{events}", "--publish-replay", f"tcp://127.0.0.1:{replay}")
    options = (*options, "--publish-worker", str(WORKER), "--model-name", MODEL)
    router = started(Router(f"name=v,connect=tcp://127.0.0.1:{engine_port}", grpc=daemon.grpc, extra=options))
    with fill(daemon, KEYS):

        def dumped() -> bool:
            engine.publish(stored(VLLM, tokens=TOKENS))
            return len(json.loads(router.call("/dump")[1]).get(f"{MODEL}:default", {}).get("events", [])) == 2

        wait_for(dumped, "two blocks in the dump")
        workers = f"{WORKER}=tcp://127.0.0.1:{events}"
        peer = started(Indexer("--model-name", MODEL, "--workers", workers, "--peers", router.url))
        assert peer.credits().get("longest_matched") == 32


def test_dynamos_router_picks_the_worker_beside_the_daemon(started: Any, daemon: Daemon) -> None:
    """Dynamo's selection service, which is its router alone, sends a prompt anywhere: of two workers it picks the one
    whose daemon holds the prompt, and says how much of it."""
    events, replay, engine_port, other_port, port = ports(5)
    engine = started(Publisher(f"tcp://*:{engine_port}"))
    started(Publisher(f"tcp://*:{other_port}"))
    options = ("--publish", f"tcp://127.0.0.1:{events}", "--publish-replay", f"tcp://127.0.0.1:{replay}")
    options = (*options, "--publish-worker", str(WORKER), "--model-name", MODEL)
    started(Router(f"name=v,connect=tcp://127.0.0.1:{engine_port}", grpc=daemon.grpc, extra=options))
    service = started(Selection(port))
    beside = {"kv_events_endpoint": f"tcp://127.0.0.1:{events}", "replay_endpoint": f"tcp://127.0.0.1:{replay}"}
    for worker, ways in ((WORKER, beside), (WORKER + 1, {"kv_events_endpoint": f"tcp://127.0.0.1:{other_port}"})):
        described = {"worker_id": worker, "model_name": MODEL, "block_size": 16, "endpoint": f"http://worker-{worker}"}
        status, answer = service.ask("/workers", {**described, **ways})
        assert status in (200, 201), answer
        assert answer["lifecycle"] == "schedulable", answer
    with fill(daemon, KEYS):

        def picked(tokens: list[int]) -> tuple[int, int]:
            engine.publish(stored(VLLM, tokens=TOKENS))
            status, answer = service.ask("/select", {"token_ids": [*tokens, 7], "model_name": MODEL})
            assert status == 200, answer
            return answer["worker_id"], answer["overlap"]["longest_matched"]

        wait_for(lambda: picked(TOKENS) == (WORKER, 32), "that the worker beside the daemon is picked")
        assert {picked(TOKENS)[0] for _ in range(8)} == {WORKER}
        assert picked([5, *TOKENS[1:]])[1] == 0, "another prompt"
