"""Requests at a fixed rate, and prompts that never repeat: what a server with Terrace does beside a plain one."""

import statistics
import threading
import time
from dataclasses import dataclass

from figures import figure, say
from processes import Vllm
from prompts import prompt

NEVER_TOKENS, NEVER_ANSWER = 64, 16
# So many prompts to one server, and then to the next. After its last step vLLM's processes go on looking for the next
# one for a second, on all processors of a small machine: that much later another server has them.
TURN, IDLE_SECONDS = 8, 1.3
# At most so much slower than plain vLLM, on prompts that never repeat.
SLOWDOWN_MAX = 0.02
SHARED_TOKENS, OWN_TOKENS, ANSWER = 600, 26, 2
BUSY = 0.7
PILOTS = 5


@dataclass
class Answered:
    """One request of a load: seconds to its first token, and to its end, from its arrival or that of the first one."""

    first: float
    ended: float


def never_repeats(terrace: list[Vllm], plain: list[Vllm], count: int) -> None:
    """Prompts that nobody asks twice, each to every server, a few to one and then to the next: what does the connector
    cost? Servers with Terrace have a space each, so that what one stores is new to the others, too.

    Two processes of one kind differ, each in the same direction for as long as it lives. So there are several of each
    kind, and what two plain ones differ by is printed beside the cost."""
    servers = [*plain, *terrace]
    rows: list[list[Answered]] = [[] for _ in servers]
    for turn, start in enumerate(range(0, count, TURN)):
        first = turn % len(servers)
        order = [*range(first, len(servers)), *range(first)]
        for place in order if turn // len(servers) % 2 else order[::-1]:
            time.sleep(IDLE_SECONDS)
            # What a server does for the first time, or after a pause, does not count.
            servers[place].ask(prompt(30_000 + turn, NEVER_TOKENS), tokens=NEVER_ANSWER)
            for index in range(start, min(start + TURN, count)):
                began = time.monotonic()
                seconds, _ = servers[place].ask(prompt(20_000 + index, NEVER_TOKENS), tokens=NEVER_ANSWER)
                rows[place].append(Answered(seconds, time.monotonic() - began))
    firsts = [[row.first for row in answers] for answers in rows]
    whole = [[row.ended for row in answers] for answers in rows]
    _compare("vllm_never_repeats", firsts[len(plain) :], firsts[: len(plain)])
    _compare("vllm_never_repeats_all", whole[len(plain) :], whole[: len(plain)])


def _compare(name: str, ours: list[list[float]], theirs: list[list[float]]) -> None:
    """The slowdown is that of the median prompt, each beside itself: what disturbs the machine disturbs one of them."""

    def slower(some: list[list[float]], others: list[list[float]]) -> float:
        pairs = zip(zip(*some, strict=True), zip(*others, strict=True), strict=True)
        return statistics.median(statistics.fmean(a) / statistics.fmean(b) for a, b in pairs) - 1

    for server, seconds in enumerate(theirs):
        figure(f"{name}_plain_{server}", statistics.median(seconds), "s")
    for server, seconds in enumerate(ours):
        figure(f"{name}_{server}", statistics.median(seconds), "s")
    figure(f"{name}_plain_apart", 100 * abs(slower(theirs[:1], theirs[1:2])), "percent")
    cost = 1 + slower(ours, theirs)
    figure(f"{name}_slower", cost, "ratio", limit=1.0, bar=1 / (1 + SLOWDOWN_MAX), higher_is_better=False)


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
