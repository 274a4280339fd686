"""vLLM with Terrace from the first prompt to the last daemon's end: what must hold is checked, what it costs printed.

``vllm_scenario.py --model FOLDER --terraced PROGRAM --state FOLDER``. Steps and figures are JSON lines; what does not
hold ends the run, and a figure that misses its bar fails it at its end.
"""

import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from arguments import no_daemon_of_the_user, options, tell
from figures import check, figure, say
from load import fixed_rate, never_repeats
from processes import PATIENCE, Terraced, Up, Vllm
from prompts import exact_prompt, prompt
from transformers import AutoTokenizer

PARTS = "ttft,overhead,rate,shared,daemon,corrupt,lost,restart,worker,hybrid"
PROMPT_TOKENS = 880
ROUNDS = 5
RATIO_MIN = 8.0
EXTERNAL_HITS = "vllm:external_prefix_cache_hits_total"
STORED = "vllm:terrace_blocks_stored_total"
FAILED = "vllm:terrace_blocks_failed_total"


def hits(server: Vllm) -> float:
    """Tokens that came from the store."""
    return server.counters().get(EXTERNAL_HITS, 0.0)


class Story:
    """The processes, and what they answered."""

    def __init__(self, model: Path, terraced: Path, state: Path) -> None:
        self.model = model
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.terraced = Terraced(terraced, state / "store")
        self.program = terraced
        self.state = state
        self.servers: list[Vllm] = []
        self.up: Up | None = None
        self.texts: dict[tuple[int, str], str] = {}

    def server(
        self,
        name: str,
        *,
        plain: bool = False,
        socket: Path | None = None,
        model: Path | None = None,
        options: dict[str, str] | None = None,
        module: str = "terrace_kv.vllm",
    ) -> Vllm:
        connector = {
            "kv_connector": "TerraceConnector",
            "kv_connector_module_path": module,
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"socket": str(socket or self.terraced.socket), **(options or {})},
        }
        server = Vllm(model or self.model, self.state / f"{name}.log", None if plain else connector)
        self.servers.append(server)
        say("vllm started", name=name, seconds=round(server.wait(), 1))
        return server

    def prompt(self, seed: int) -> list[int]:
        """The same for the same seed."""
        return exact_prompt(self.tokenizer, seed, PROMPT_TOKENS)

    def ask(self, server: Vllm, seed: int, way: str) -> float:
        """Asks, and compares the text with what was answered to the same prompt before.

        A prompt that is computed as a whole and one whose beginning is cached run other kernels over other shapes,
        in plain vLLM too. So texts must be equal when they came the same way ("computed" or "cached"), whoever
        cached it; texts of both ways are compared and counted.
        """
        seconds, text = server.ask(self.prompt(seed))
        known = self.texts.setdefault((seed, way), text)
        check(known == text, f"another text for prompt {seed}, {way}: {text!r}, before {known!r}")
        return seconds

    def compare_ways(self) -> None:
        seeds = {seed for seed, _ in self.texts}
        both = [seed for seed in seeds if (seed, "computed") in self.texts and (seed, "cached") in self.texts]
        same = sum(self.texts[seed, "computed"] == self.texts[seed, "cached"] for seed in both)
        say("texts", prompts=len(both), computed_equals_cached=same, example=self.texts[both[0], "cached"])

    def stored(self, server: Vllm, before: float) -> None:
        """Until the blocks of a prompt are in the store, and nothing more comes."""
        deadline, seen = time.monotonic() + PATIENCE, before
        while True:
            check(time.monotonic() < deadline, "the blocks of a prompt never reached the store")
            # Counters travel with a step of the engine.
            server.ask("A", tokens=1)
            now = server.counters().get(STORED, 0)
            if now > before and now == seen:
                return
            seen = now
            time.sleep(0.2)

    def cold_warm_hit(self, server: Vllm) -> None:
        server.ask(prompt(10_000, 200))
        rows: dict[str, list[float]] = {"cold": [], "own_cache": [], "hit": []}
        tokens: list[float] = []
        for seed in range(ROUNDS):
            stored = server.counters().get(STORED, 0)
            rows["cold"].append(self.ask(server, seed, "computed"))
            rows["own_cache"].append(self.ask(server, seed, "cached"))
            self.stored(server, stored)
            server.reset()
            before = hits(server)
            rows["hit"].append(self.ask(server, seed, "cached"))
            found = hits(server) - before
            tokens.append(found)
            check(found > PROMPT_TOKENS // 2, f"{found} tokens came from the store")
        self.compare_ways()
        rounded = {name: [round(value, 4) for value in values] for name, values in rows.items()}
        say("cold, own cache, hit", tokens_from_store=tokens, **rounded)
        cold, own, hit = (statistics.median(rows[name]) for name in ("cold", "own_cache", "hit"))
        figure("vllm_ttft_cold", cold, "s")
        figure("vllm_ttft_own_cache", own, "s")
        figure("vllm_ttft_hit", hit, "s", limit=cold, bar=RATIO_MIN, higher_is_better=False)

    def come_from_the_store(self, server: Vllm, seeds: range) -> None:
        """Has prompts computed and stored, until they are loaded."""
        deadline = time.monotonic() + PATIENCE
        for seed in seeds:
            while True:
                server.reset()
                before = hits(server)
                server.ask(self.prompt(seed), tokens=1)
                if hits(server) - before > PROMPT_TOKENS // 2:
                    break
                check(time.monotonic() < deadline, f"prompt {seed} is not loaded")

    def first_request_hits(self, server: Vllm, name: str, seed: int = 0) -> None:
        before = hits(server)
        seconds = self.ask(server, seed, "cached")
        say(name, seconds=round(seconds, 4), tokens_from_store=hits(server) - before)
        check(hits(server) > before, f"{name}: nothing came from the store")

    def shared(self, first: Vllm) -> None:
        """Another process loads what the first computed, and the store keeps it once for both."""

        def held() -> tuple[int, int]:
            found = self.terraced.spaces()
            return sum(space["pinned_blocks"] for space in found), len(found)

        other = self.server("other")
        stored = first.counters().get(STORED, 0)
        self.ask(first, 6, "computed")
        self.ask(first, 6, "cached")
        self.stored(first, stored)
        before = held()
        self.first_request_hits(other, "another vllm", 6)
        other.reset()
        self.first_request_hits(other, "another vllm, again", 6)
        # What it computed itself has come to the store by then, if it comes at all.
        time.sleep(2)
        after = held()
        figure("vllm_shared_prefix_blocks", after[0], "blocks", limit=before[0], bar=1.0, higher_is_better=False)
        check(after == before, f"blocks and spaces of one prefix: {before} for one process, {after} for two")
        other.kill()

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
            seconds = server.ask(self.prompt(2))[0]
            if hits(server) > before:
                break
            check(time.monotonic() < deadline, "no hits after terraced was started again")
        say("terraced restarted", hit_seconds=round(seconds, 4))

    def corrupted(self, server: Vllm) -> None:
        """Every block on the device is damaged while terraced is away: none is served, the text is that of before, and
        what is computed again is stored and loaded again."""
        stored = server.counters().get(STORED, 0)
        self.ask(server, 9, "computed")
        self.stored(server, stored)
        # Longer than a block waits before it is written.
        time.sleep(2)
        self.terraced.kill()
        turned = self.terraced.damage()
        self.terraced.start()
        # Longer than a connector leaves a daemon alone that was gone.
        time.sleep(2)
        server.reset()
        found, stored = hits(server), server.counters().get(STORED, 0)
        seconds = self.ask(server, 9, "computed")
        served = hits(server) - found
        self.stored(server, stored)
        server.reset()
        self.ask(server, 9, "cached")
        again = hits(server) - found - served
        say("corrupted", bytes_turned=turned, seconds=round(seconds, 4), tokens_from_store=served, tokens_after=again)
        check(turned > 0, "nothing was on the device")
        check(served == 0, "tokens of damaged blocks came from the store")
        check(again > 0, "what was computed again was not stored again")

    def lost(self) -> None:
        """One block of each prompt is lost while it is loaded: it is computed, and nobody reads what is there."""
        server = self.server("losing", module="losing_connector")
        for seed in range(3):
            stored = server.counters().get(STORED, 0)
            self.ask(server, seed + 100, "computed")
            self.stored(server, stored)
            server.reset()
            failed = server.counters().get(FAILED, 0)
            seconds, text = server.ask(self.prompt(seed + 100))
            check(text == self.texts[seed + 100, "computed"], f"another text where a block was lost: {text!r}")
            self.ask(server, seed + 100, "cached")
            check(server.counters().get(FAILED, 0) == failed + 1, "no block was lost")
            say("a block lost", seconds=round(seconds, 4))
        server.kill()

    def restarts(self) -> None:
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
        late.kill()

    def built_in_worker(self) -> None:
        """vLLM and the built-in worker at one daemon, with the same model and prompts: each finds its own blocks."""
        self.up = Up(self.program, self.state / "up", self.state / "up.log")
        self.up.wait()
        server = self.server("beside", socket=self.up.socket)
        ours, theirs = prompt(7, PROMPT_TOKENS), prompt(8, PROMPT_TOKENS)
        server.ask(ours)
        self.stored(server, 0)
        first, again = self.up.ask(ours), self.up.ask(ours)
        say("a prompt of vllm, asked of the built-in worker", cached_tokens=first, cached_tokens_again=again)
        check(first == 0, "the built-in worker found blocks of vllm")
        check(again > 0, "the built-in worker does not find its own blocks")
        self.up.ask(theirs)
        before, stored = hits(server), server.counters().get(STORED, 0)
        server.ask(theirs)
        found = hits(server) - before
        self.stored(server, stored)
        server.reset()
        server.ask(theirs)
        found_again = hits(server) - before - found
        say("a prompt of the built-in worker, asked of vllm", tokens=found, tokens_again=found_again)
        check(found == 0, "vllm found blocks of the built-in worker")
        check(found_again > 0, "vllm does not find its own blocks")
        server.kill()
        self.up.stop()

    def hybrid(self) -> None:
        """A model whose layers see a window or all tokens, in turns: vLLM keeps two tables of blocks for it."""
        model = self.state / "hybrid"
        script = Path(__file__).with_name("hybrid_model.py")
        subprocess.run([sys.executable, script, self.model, model], check=True)
        server = self.server("hybrid", model=model)
        tokens = []
        for seed in range(50, 53):
            stored = server.counters().get(STORED, 0)
            self.ask(server, seed, "computed")
            self.ask(server, seed, "cached")
            self.stored(server, stored)
            server.reset()
            before = hits(server)
            self.ask(server, seed, "cached")
            tokens.append(hits(server) - before)
        server.kill()
        other = self.server("hybrid-again", model=model)
        self.first_request_hits(other, "hybrid, another process", 50)
        layouts = other.log_text().count("terrace: blocks of 32 tokens")
        say("hybrid", groups=layouts, tokens_from_store=tokens)
        check(layouts == 2, f"{layouts} groups of layers")
        check(min(tokens) > PROMPT_TOKENS // 2, f"{tokens} tokens came from the store")
        other.kill()

    def run(self, parts: set[str]) -> None:
        self.terraced.start()
        if parts & {"ttft", "overhead", "rate", "shared", "daemon", "corrupt", "restart"}:
            self.with_smol(parts)
        if "lost" in parts:
            if self.terraced.process is None:
                self.terraced.start()
            self.lost()
        if "worker" in parts:
            self.built_in_worker()
        if "hybrid" in parts:
            if self.terraced.process is None:
                self.terraced.start()
            self.hybrid()

    def with_smol(self, parts: set[str]) -> None:
        first = self.server("first")
        if "ttft" in parts:
            self.cold_warm_hit(first)
        if parts & {"overhead", "rate"}:
            plain = self.server("plain", plain=True)
            if "overhead" in parts:
                # A space of its own: else it would find what the first has stored.
                apart = self.server("apart", options={"model_fingerprint": "apart"})
                other = self.server("plain-again", plain=True)
                never_repeats([first, apart], [plain, other], 100)
                apart.kill()
                other.kill()
            if "rate" in parts:
                fixed_rate({"plain": plain, "terrace": first}, 200)
            plain.kill()
        if "shared" in parts:
            self.shared(first)
        if "daemon" in parts:
            self.come_from_the_store(first, range(3))
            self.daemon_dies(first)
        if "corrupt" in parts:
            self.corrupted(first)
        if "restart" in parts:
            # Again: whatever was on the device before is damaged by now.
            self.come_from_the_store(first, range(3))
        first.kill()
        if "restart" in parts:
            self.restarts()

    def end(self) -> None:
        for server in self.servers:
            server.kill()
        if self.up is not None:
            self.up.stop()
        self.terraced.kill()


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--parts", default=PARTS)
    chosen = parser.parse_args()
    parts = set(chosen.parts.split(","))
    if unknown := parts - set(PARTS.split(",")):
        raise SystemExit(f"unknown parts: {', '.join(sorted(unknown))}; there are {PARTS}")
    no_daemon_of_the_user()
    tell(Story(chosen.model, chosen.terraced, chosen.state), lambda story: story.run(parts))


if __name__ == "__main__":
    main()
