"""The connector's half in the scheduler: what of a prompt is there, and what may be stored.

It never waits for the daemon beyond a moment. A question is asked in the background; its answer is a lease, so that
what the scheduler then promises to load stays in memory until the workers have it.
"""

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from .._background import Background
from .._engine import Reading, Store, StoreSpace
from .layout import RankLayout
from .options import Options
from .orders import Load, Orders, Save

# An idle daemon answers within this time, and the request need not come back in another step.
GRACE_SECONDS = 0.002
# Beyond what slower tiers may take: then the daemon hangs.
PATIENCE_SECONDS = 1.0
QUESTIONS_MAX = 64


@dataclass
class Question:
    """Which of these keys are there? The answer holds them."""

    start: int
    keys: list[bytes]
    deadline: float
    used_start: int = 0
    blocks: int = 0
    holds: list[Reading] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    dropped: bool = False

    def answer(self, blocks: int, holds: list[Reading]) -> None:
        with self.lock:
            if not self.dropped:
                self.blocks, self.holds = blocks, holds
                holds = []
        for hold in holds:
            hold.close()
        self.done.set()

    def drop(self) -> None:
        """Gives back what was leased, or will be."""
        with self.lock:
            self.dropped = True
            holds, self.holds = self.holds, []
        for hold in holds:
            hold.close()


@dataclass
class Tracked:
    """A request that runs. ``loaded`` are positions that came from the store."""

    request: Any
    block_ids: list[int] = field(default_factory=list)
    saved: int = 0
    loaded: range = range(0)


class SchedulerSide:
    """Matches, leases, and writes the workers' orders."""

    def __init__(
        self, store: Store, options: Options, tokens_per_block: int, hash_tokens: int, logger: logging.Logger
    ) -> None:
        self.store = store
        self._options = options
        self._tokens = tokens_per_block
        # vLLM may hash finer than it allocates; the last hash inside a block names all of it.
        self._hashes_per_block = max(1, tokens_per_block // hash_tokens)
        self._logger = logger
        self._background = Background("terrace-match", threads=2)
        self._spaces: list[StoreSpace] = []
        self._questions: dict[str, Question] = {}
        self._tracked: dict[str, Tracked] = {}
        self._holds: dict[str, list[Reading]] = {}
        self._next = Orders()
        self._ended: list[Save] = []
        self._resets = 0

    def open(self, layouts: list[RankLayout], expected: int) -> None:
        """Takes the spaces of all ranks. Without one of them there is nothing to match."""
        reasons = {layout.reason for layout in layouts if layout.reason}
        if reasons or len(layouts) != expected:
            missing = f"{expected - len(layouts)} of {expected} workers told no layout"
            self._logger.warning("terrace stores nothing for this engine: %s", "; ".join(sorted(reasons)) or missing)
            return
        self._spaces = [StoreSpace(self.store, layout.manifest, self._cost()) for layout in layouts if layout.manifest]
        manifest = self._spaces[0].manifest
        self._logger.info(
            "terrace: blocks of %d tokens, %d bytes and %d spaces; layout %s",
            manifest.tokens_per_block,
            manifest.block_bytes,
            len(self._spaces),
            manifest.layout,
        )

    def _cost(self) -> tuple[float, float] | None:
        seconds = self._options.seconds_per_token * self._tokens
        return (seconds, 0.0) if seconds > 0 else None

    def _keys(self, request: Any, start: int, end: int) -> list[bytes]:
        step = self._hashes_per_block
        return [bytes(request.block_hashes[(index + 1) * step - 1]) for index in range(start, end)]

    def _full_blocks(self, request: Any, tokens: int) -> int:
        """Whole blocks of these tokens that have a name."""
        return min(tokens // self._tokens, len(request.block_hashes) // self._hashes_per_block)

    def match(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Tokens behind ``computed`` that can be loaded; ``None`` while nobody knows yet."""
        if not self._spaces or self._options.load == "off" or computed % self._tokens:
            return 0, False
        start = computed // self._tokens
        # One token of the prompt is always computed, or there are no logits.
        end = self._full_blocks(request, request.num_tokens - 1)
        if end - start < self._options.blocks_min:
            return 0, False
        question = self._questions.get(request.request_id)
        if question is not None and not question.start <= start <= question.start + len(question.keys):
            self._forget(request.request_id)
            question = None
        if question is None:
            if self.store.silent:
                return 0, False
            if len(self._questions) >= QUESTIONS_MAX:
                return None, False
            question = self._ask(request, start, end)
        question.used_start = start
        if not question.done.is_set():
            if time.monotonic() < question.deadline:
                return None, False
            self.store.counters.add("lookups_late")
            self.store.pause(PATIENCE_SECONDS)
            question.drop()
            question.done.set()
        blocks = min(question.start + question.blocks, end) - start
        if blocks < self._options.blocks_min:
            return 0, False
        return blocks * self._tokens, self._options.load == "async"

    def _ask(self, request: Any, start: int, end: int) -> Question:
        deadline = time.monotonic() + self._options.wait_seconds + PATIENCE_SECONDS
        question = Question(start, self._keys(request, start, end), deadline)
        self._questions[request.request_id] = question
        if self._background.submit(lambda: self._answer(question)):
            question.done.wait(GRACE_SECONDS)
        else:
            question.done.set()
        return question

    def _answer(self, question: Question) -> None:
        began = time.monotonic()
        counters = self.store.counters
        counters.add("lookups")
        holds: list[Reading] = []
        blocks = 0 if question.dropped else self.store.prefix(self._spaces, question.keys)
        if blocks >= self._options.blocks_min:
            for space in self._spaces:
                # Workers compare the bytes; here they are only kept.
                hold = space.read(question.keys[:blocks], wait=self._options.wait_seconds, verify=False)
                holds.append(hold)
                blocks = min(blocks, hold.prefix)
        counters.add("lookup_hits", blocks > 0)
        counters.add("lookup_seconds", time.monotonic() - began)
        question.answer(blocks, holds)

    def _forget(self, request_id: str) -> None:
        question = self._questions.pop(request_id, None)
        if question is not None:
            question.drop()

    def allocated(self, request: Any, block_ids: list[int], external_tokens: int) -> None:
        """A request got blocks; ``external_tokens`` of them are to be loaded."""
        tracked = self._tracked.setdefault(request.request_id, Tracked(request))
        tracked.block_ids = list(block_ids)
        self._next.taken.update(block_ids)
        question = self._questions.pop(request.request_id, None)
        if question is None:
            return
        if external_tokens == 0:
            question.drop()
            return
        start = question.used_start
        end = start + external_tokens // self._tokens
        keys = question.keys[start - question.start : end - question.start]
        self._next.loads.append(Load(request.request_id, keys, block_ids[start:end]))
        tracked.loaded = range(start, end)
        self._release(request.request_id)
        self._holds[request.request_id] = question.holds

    def orders(self, output: Any) -> Orders:
        """The workers' orders of this step."""
        steps: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            self._blocks_of(new.req_id, new.block_ids[0], replaced=True)
            steps[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for request_id, computed, added in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
        ):
            if added is not None:
                self._blocks_of(request_id, added[0], replaced=request_id in cached.resumed_req_ids)
            steps[request_id] = computed
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if tracked is not None and request_id in steps:
                self._save(tracked, steps[request_id] + scheduled)
        orders, self._next = self._next, Orders()
        orders.resets = self._resets
        # A request that ended gave its blocks back, perhaps to another one of this step.
        ended, self._ended = self._ended, []
        orders.saves += [save for save in ended if orders.taken.isdisjoint(save.block_ids)]
        return orders

    def _blocks_of(self, request_id: str, block_ids: list[int], *, replaced: bool) -> None:
        self._next.taken.update(block_ids)
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return
        if replaced:
            tracked.block_ids = list(block_ids)
        else:
            tracked.block_ids += block_ids

    def _save(self, tracked: Tracked, tokens: int) -> None:
        self._next.saves += self._saves(tracked, tokens)

    def _saves(self, tracked: Tracked, tokens: int) -> list[Save]:
        """What became full since the last time, without what came from the store."""
        request = tracked.request
        if not self._spaces or self._options.save == "off":
            return []
        if self._options.save == "prompt":
            tokens = min(tokens, request.num_prompt_tokens)
        start, end = tracked.saved, min(self._full_blocks(request, tokens), len(tracked.block_ids))
        tracked.saved = max(start, end)
        loaded = tracked.loaded
        runs = (
            [range(start, min(end, loaded.start)), range(max(start, loaded.stop), end)]
            if loaded
            else [range(start, end)]
        )
        saves = []
        for run in runs:
            if run:
                parent = self._keys(request, run.start - 1, run.start)[0] if run.start else None
                keys = self._keys(request, run.start, run.stop)
                saves.append(Save(keys, tracked.block_ids[run.start : run.stop], parent))
        return saves

    def finished(self, request: Any) -> None:
        """A request ended, or was aborted. Its blocks may belong to others soon."""
        self._forget(request.request_id)
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is not None and request.num_computed_tokens and request.request_id not in self._holds:
            self._ended += self._saves(tracked, request.num_computed_tokens)

    def transferred(self, output: Any) -> None:
        """Workers have loaded, or failed: nothing needs to be kept for them any more."""
        for request_id in output.finished_recving or ():
            self._release(request_id)
        failed = output.invalid_block_ids
        if failed:
            for tracked in self._tracked.values():
                if not failed.isdisjoint(tracked.block_ids):
                    # They are computed now, and may be stored again.
                    tracked.loaded = range(0)
                    tracked.saved = 0

    def _release(self, request_id: str) -> None:
        for hold in self._holds.pop(request_id, ()):
            hold.close()

    def release_started(self, orders: Orders) -> None:
        """With load "layers" nobody reports the end of a load: the lease goes with the next step."""
        kept = {load.request_id for load in orders.loads}
        for request_id in [request_id for request_id in self._holds if request_id not in kept]:
            self._release(request_id)

    def reset(self) -> bool:
        """Drops everything that is stored for this engine, for all engines that share it: its weights changed."""
        self._resets += 1
        for request_id in list(self._questions):
            self._forget(request_id)
        return all([space.clear() for space in self._spaces])

    def stop(self) -> None:
        self._background.stop(1.0)
        for request_id in list(self._questions):
            self._forget(request_id)
        for request_id in list(self._holds):
            self._release(request_id)
        self.store.close()
