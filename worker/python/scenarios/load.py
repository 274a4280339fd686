"""Requests at a fixed rate, and prompts that never repeat: what a server with Terrace does beside a plain one."""

import statistics
import threading
import time
from dataclasses import dataclass

from figures import figure, say
from processes import Vllm
from prompts import prompt

NEVER_TOKENS, NEVER_ANSWER = 64, 2
# At most so much slower than plain vLLM, on prompts that never repeat.
SLOWDOWN_MAX = 0.02
SHARED_TOKENS, OWN_TOKENS, ANSWER = 600, 26, 2
BUSY = 0.7
PILOTS = 5


def never_repeats(terrace: Vllm, plain: Vllm, count: int) -> None:
    """Prompts that nobody asks twice, each to both servers, in turns: what does the connector cost?"""
    rows: dict[str, list[float]] = {"terrace": [], "plain": []}
    for index in range(count):
        asked = [("terrace", terrace), ("plain", plain)]
        for name, server in asked if index % 2 else asked[::-1]:
            # Both have it for the first time.
            rows[name].append(server.ask(prompt(20_000 + index, NEVER_TOKENS), tokens=NEVER_ANSWER)[0])
    ours, theirs = statistics.median(rows["terrace"]), statistics.median(rows["plain"])
    # Each prompt with itself: what disturbs the machine disturbs one pair.
    pairs = statistics.median(a / b for a, b in zip(rows["terrace"], rows["plain"], strict=True))
    for name, values in rows.items():
        figure(f"vllm_never_repeats_mean_{name}", statistics.fmean(values), "s")
    figure("vllm_never_repeats_plain", theirs, "s")
    figure("vllm_never_repeats", ours, "s", limit=theirs, bar=1 / (1 + SLOWDOWN_MAX), higher_is_better=False)
    figure("vllm_never_repeats_slower", 100 * (pairs - 1), "percent")


@dataclass
class Answered:
    """One request of a load: seconds from its arrival to its first token, and when it ended."""

    first: float
    ended: float


def fixed_rate(servers: dict[str, Vllm], count: int) -> None:
    """Requests with one shared beginning, which arrive at the same rate at each server, one server after the other;
    each begins with nothing in vLLM's own cache. The shared beginning is in the store of who has one."""
    pilots: list[float] = []
    for name, server in servers.items():
        for index in range(PILOTS):
            began = time.monotonic()
            server.ask(_request(f"pilot {name}", index), tokens=ANSWER)
            if name == "plain" and index:
                pilots.append(time.monotonic() - began)
    per_second = BUSY / statistics.median(pilots)
    say("fixed rate", requests=count, per_second=round(per_second, 3), shared_tokens=SHARED_TOKENS)
    for name, server in servers.items():
        # The store takes what the pilots computed, and the engine forgets it.
        time.sleep(1)
        server.reset()
        answers = _arrive(server, name, count, per_second)
        firsts = sorted(answer.first for answer in answers)
        last = max(answer.ended for answer in answers)
        figure(f"vllm_fixed_rate_{name}_throughput", count / last, "requests/s")
        figure(f"vllm_fixed_rate_{name}_first_request", answers[0].first, "s")
        for percent in (50, 90, 99):
            value = firsts[min(len(firsts) - 1, len(firsts) * percent // 100)]
            figure(f"vllm_fixed_rate_{name}_ttft_p{percent}", value, "s")


def _request(name: str, index: int) -> str:
    seed = 40_000 + sum(name.encode()) * 1000 + index
    return prompt(seed, SHARED_TOKENS + OWN_TOKENS, shared=SHARED_TOKENS, shared_seed=39_999)


def _arrive(server: Vllm, name: str, count: int, per_second: float) -> list[Answered]:
    """Asks at fixed times, whether the answers before have come or not."""
    answers: list[Answered | None] = [None] * count
    began = time.monotonic()

    def one(index: int) -> None:
        first, _ = server.ask(_request(name, index), tokens=ANSWER)
        answers[index] = Answered(first, time.monotonic() - began)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for index, thread in enumerate(threads):
        time.sleep(max(0.0, began + index / per_second - time.monotonic()))
        thread.start()
    for thread in threads:
        thread.join()
    found = [answer for answer in answers if answer is not None]
    if len(found) != count:
        raise SystemExit(f"FAILED: {count - len(found)} of {count} requests were not answered")
    return found
