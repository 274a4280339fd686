"""vLLM with Terrace from the first prompt to the last daemon's end: what must hold is checked, what it costs printed.

``vllm_scenario.py --model FOLDER --terraced PROGRAM --state FOLDER``. Figures are JSON lines; what does not hold
ends the run.
"""

import argparse
import json
import os
import random
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from processes import Terraced, Vllm

PROMPT_TOKENS = 880
ROUNDS = 5
RATIO_MIN = 8.0
# Blocks that are on their way into the store; every wait ends long before.
PATIENCE = 30.0


SENTENCES = [
    "The river rises in the hills and runs through three old towns before it reaches the sea.",
    "A baker who wants good bread must wait for the dough, and there is no way to hurry it.",
    "Most of the letters in the archive were written in winter, when the roads were closed.",
    "Sailors learned to read the colour of the water long before they had charts of the coast.",
    "The train to the capital leaves at seven in the morning and arrives a little after noon.",
    "Glass is made of sand, ash and lime, and it takes a great deal of heat to melt them.",
    "In the garden behind the school the children grow beans, onions and a few sunflowers.",
    "The clock in the market square has been ten minutes late for as long as anybody remembers.",
]


def prompt(seed: int, tokens: int = PROMPT_TOKENS) -> str:
    """About so many tokens of plain text that no other seed has, with an end that any model can go on from."""
    chosen = random.Random(seed)
    lines = [f"Note {chosen.randrange(10**6)}: {chosen.choice(SENTENCES)}" for _ in range(max(1, tokens // 26))]
    return "\n".join([*lines, "Question: What is the capital of France? Answer: The capital of France is"])


def say(step: str, **figures: Any) -> None:
    print(json.dumps({"step": step, **figures}), flush=True)


def check(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"FAILED: {what}")


def hits(server: Vllm) -> float:
    return server.counters().get("vllm:external_prefix_cache_hits_total", 0.0)


class Story:
    """The processes, and what they answered."""

    def __init__(self, model: Path, terraced: Terraced, state: Path) -> None:
        self.model = model
        self.terraced = terraced
        self.state = state
        self.servers: list[Vllm] = []
        self.texts: dict[tuple[int, str], str] = {}
        self.connector = {
            "kv_connector": "TerraceConnector",
            "kv_connector_module_path": "terrace_kv.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"socket": str(terraced.socket)},
        }

    def server(self, name: str, *, plain: bool = False) -> Vllm:
        server = Vllm(self.model, self.state / f"{name}.log", None if plain else self.connector)
        self.servers.append(server)
        say("vllm started", name=name, seconds=round(server.wait(), 1))
        return server

    def ask(self, server: Vllm, seed: int, way: str) -> float:
        """Asks, and compares the text with what was answered to the same prompt before.

        A prompt that is computed as a whole and one whose beginning is cached run other kernels over other shapes,
        in plain vLLM too. So texts must be equal when they came the same way ("computed" or "cached"), whoever
        cached it; texts of both ways are compared and counted.
        """
        seconds, text = server.ask(prompt(seed))
        known = self.texts.setdefault((seed, way), text)
        check(known == text, f"another text for prompt {seed}, {way}: {text!r}, before {known!r}")
        return seconds

    def compare_ways(self) -> None:
        seeds = {seed for seed, _ in self.texts}
        both = [seed for seed in seeds if (seed, "computed") in self.texts and (seed, "cached") in self.texts]
        same = sum(self.texts[seed, "computed"] == self.texts[seed, "cached"] for seed in both)
        say("texts", prompts=len(both), computed_equals_cached=same, example=self.texts[both[0], "cached"])

    def stored(self, server: Vllm, before: float) -> None:
        """Until the blocks of a prompt are in the store."""
        deadline = time.monotonic() + PATIENCE
        while server.counters().get("vllm:terrace_blocks_stored_total", 0) <= before:
            check(time.monotonic() < deadline, "the blocks of a prompt never reached the store")
            # Counters travel with a step of the engine.
            server.ask("A", tokens=1)

    def cold_warm_hit(self, server: Vllm) -> None:
        server.ask(prompt(10_000, 200))
        rows: dict[str, list[float]] = {"cold": [], "warm": [], "hit": []}
        tokens: list[float] = []
        for seed in range(ROUNDS):
            stored = server.counters().get("vllm:terrace_blocks_stored_total", 0)
            rows["cold"].append(self.ask(server, seed, "computed"))
            rows["warm"].append(self.ask(server, seed, "cached"))
            self.stored(server, stored)
            server.reset()
            before = hits(server)
            rows["hit"].append(self.ask(server, seed, "cached"))
            found = hits(server) - before
            tokens.append(found)
            check(found > PROMPT_TOKENS // 2, f"{found} tokens came from the store")
        medians = {name: statistics.median(values) for name, values in rows.items()}
        ratio = medians["cold"] / medians["hit"]
        say("cold, warm, hit", ratio=round(ratio, 1), **{name: round(value, 4) for name, value in medians.items()})
        self.compare_ways()
        say(
            "of these",
            tokens_from_store=tokens,
            **{name: [round(value, 4) for value in values] for name, values in rows.items()},
        )
        check(ratio >= RATIO_MIN, f"a hit is only {ratio:.1f} times as fast")

    def first_request_hits(self, server: Vllm, name: str, seed: int = 0) -> None:
        before = hits(server)
        seconds = self.ask(server, seed, "cached")
        say(name, seconds=round(seconds, 4), tokens_from_store=hits(server) - before)
        check(hits(server) > before, f"{name}: nothing came from the store")

    def daemon_dies(self, server: Vllm) -> None:
        """kill -9 of terraced under load: everything is answered, and after its restart there are hits again."""
        answered, stop = [], threading.Event()

        def load() -> None:
            seed = 100
            while not stop.is_set():
                answered.append(server.ask(prompt(seed, 200), tokens=4)[0])
                seed += 1

        thread = threading.Thread(target=load)
        thread.start()
        time.sleep(2)
        self.terraced.kill()
        gone = len(answered)
        server.reset()
        seconds = self.ask(server, 1, "computed")
        time.sleep(2)
        during = len(answered) - gone
        self.terraced.start()
        time.sleep(2)
        stop.set()
        thread.join()
        check(during > 0, "nothing was answered without the daemon")
        say(
            "terraced killed",
            answered_without=during,
            slowest=round(max(answered), 3),
            prompt_computed=round(seconds, 4),
        )
        deadline = time.monotonic() + PATIENCE
        while True:
            server.reset()
            before = hits(server)
            seconds = server.ask(prompt(2))[0]
            if hits(server) > before:
                break
            check(time.monotonic() < deadline, "no hits after terraced was started again")
        say("terraced restarted", hit_seconds=round(seconds, 4))

    def overhead(self, server: Vllm, plain: Vllm, count: int) -> None:
        """Prompts that never repeat, in turns to both: what does the connector cost?"""
        rows: dict[str, list[float]] = {"terrace": [], "plain": []}
        for index in range(count):
            asked = [("terrace", server, 20_000), ("plain", plain, 30_000)]
            for name, target, first in asked if index % 2 else asked[::-1]:
                rows[name].append(target.ask(prompt(first + index, 160), tokens=8)[0])
        medians = {name: statistics.median(values) for name, values in rows.items()}
        means = {f"{name}_mean": round(statistics.fmean(values), 4) for name, values in rows.items()}
        slower = medians["terrace"] / medians["plain"] - 1
        say("never repeats", prompts=count, slower_percent=round(100 * slower, 1), **medians, **means)

    def run(self, parts: set[str]) -> None:
        self.terraced.start()
        first = self.server("first")
        if "ttft" in parts:
            self.cold_warm_hit(first)
        for seed in range(3):
            first.ask(prompt(seed))
        if "overhead" in parts:
            self.overhead(first, plain := self.server("plain", plain=True), 100)
            plain.kill()
        if "shared" in parts:
            other = self.server("other")
            self.first_request_hits(other, "another vllm")
            other.kill()
        if "daemon" in parts:
            self.daemon_dies(first)
        first.kill()
        if "restart" in parts:
            second = self.server("second")
            self.first_request_hits(second, "vllm killed and started again")
            self.terraced.kill()
            second.reset()
            slow = [round(self.ask(second, seed, "computed"), 4) for seed in range(3)]
            say("terraced stopped for good", answered=len(slow), seconds=slow)
            second.kill()
            late = self.server("late")
            say("vllm started without terraced", seconds=round(self.ask(late, 0, "computed"), 4))
            check("no terraced at" in late.log_text(), "the log does not say that there is no daemon")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", type=Path, required=True)
    options.add_argument("--terraced", type=Path, required=True)
    options.add_argument("--state", type=Path, required=True)
    options.add_argument("--parts", default="ttft,overhead,shared,daemon,restart")
    chosen = options.parse_args()
    os.environ.pop("TERRACE_SOCKET", None)
    story = Story(chosen.model, Terraced(chosen.terraced, chosen.state / "store"), chosen.state)
    try:
        story.run(set(chosen.parts.split(",")))
        say("done")
    finally:
        for server in story.servers:
            server.kill()
        story.terraced.kill()


if __name__ == "__main__":
    main()
