"""The connector's half in the scheduler: what of a prompt is there, and what may be stored.

It never waits for the daemon beyond a moment. A question is asked in the background; its answer is a lease, so that
what the scheduler then promises to load stays in memory until the workers have it.
"""

import itertools
import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._background import Background
from .._engine import Reading, Store, StoreSpace
from .groups import NULL_BLOCK, Group, Plan
from .layout import RankLayout
from .options import Options
from .orders import Load, Orders, Run, Save
from .questions import Question, Shelf, look_up, needed

# An idle daemon answers within this time, and the request need not come back in another step.
GRACE_SECONDS = 0.002
# While no other request runs nobody waits with it, and each empty step costs more than a late answer.
GRACE_ALONE_SECONDS = 0.05
# Beyond what slower tiers may take: then the daemon hangs.
PATIENCE_SECONDS = 1.0
QUESTIONS_MAX = 64
# A request that runs alone has so much copied in its own step, some milliseconds: to wait beside takes two empty ones.
# Whoever comes meanwhile waits as long.
IN_STEP_BYTES_MAX = 64 << 20
# A step that vLLM has ordered may run while the next one is being ordered already.
STEPS_AT_ONCE = 2

Tables = Sequence[Sequence[int]]
"""Block ids of a request, by vLLM's groups."""


@dataclass
class Table:
    """Blocks of a request in one group. ``loaded`` are positions that came from the store."""

    block_ids: list[int] = field(default_factory=list)
    saved: int = 0
    loaded: range = range(0)

    def computed_again(self) -> None:
        """A load failed: what it promised is computed, and may be stored."""
        self.loaded, self.saved = range(0), 0


@dataclass
class Tracked:
    """A request that runs."""

    request: Any
    tables: list[Table]


class SchedulerSide:
    """Matches, leases, and writes the workers' orders."""

    def __init__(self, store: Store, options: Options, plan: Plan, logger: logging.Logger) -> None:
        self.store = store
        self._options = options
        self._groups = plan.groups
        self._is_whole = plan.is_whole
        self._hash_tokens = plan.hash_tokens
        self._step = plan.step
        self._logger = logger
        self._background = Background("terrace-match", threads=2)
        self._shelves: list[Shelf] = []
        self._questions: dict[str, Question] = {}
        self._tracked: dict[str, Tracked] = {}
        self._holds: dict[str, list[Reading]] = {}
        # Of loads in the latest steps, by request: nobody reports their end.
        self._step_holds: deque[dict[str, list[Reading]]] = deque({} for _ in range(STEPS_AT_ONCE))
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
        self._shelves = [self._shelf(group, layouts) for group in self._groups]
        for shelf in self._shelves:
            manifest = shelf.spaces[0].manifest
            self._logger.info(
                "terrace: blocks of %d tokens, %d bytes and %d spaces; layout %s",
                manifest.tokens_per_block,
                manifest.block_bytes,
                len(shelf.spaces),
                manifest.layout,
            )

    def _shelf(self, group: Group, layouts: list[RankLayout]) -> Shelf:
        seconds = self._options.seconds_per_token * group.tokens
        cost = (seconds, 0.0) if seconds > 0 else None
        manifests = [layout.manifests[group.index] for layout in layouts]
        return Shelf(group, [StoreSpace(self.store, manifest, cost) for manifest in manifests if manifest is not None])

    def _keys(self, request: Any, group: Group, blocks: range) -> list[bytes]:
        """The last hash inside a block names all of it."""
        each = group.tokens // self._hash_tokens
        return [bytes(request.block_hashes[(index + 1) * each - 1]) for index in blocks]

    def _named(self, request: Any, tokens: int) -> int:
        """How many of these tokens have hashes."""
        return min(tokens, len(request.block_hashes) * self._hash_tokens)

    def match(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Tokens behind ``computed`` that can be loaded; ``None`` while nobody knows yet."""
        if not self._shelves or self._options.load == "off" or computed % self._step:
            return 0, False
        # One token of the prompt is always computed, or there are no logits.
        end = self._named(request, request.num_tokens - 1) // self._step * self._step
        least = self._options.blocks_min * self._step
        if end - computed < least:
            return 0, False
        question = self._questions.get(request.request_id)
        if question is not None and not question.start <= computed <= question.end:
            self._forget(request.request_id)
            question = None
        if question is None:
            if self.store.silent:
                return 0, False
            if len(self._questions) >= QUESTIONS_MAX:
                return None, False
            question = self._ask(request, computed, end)
        question.used_start = computed
        if not question.done.is_set():
            if time.monotonic() < question.deadline:
                return None, False
            self.store.counters.add("lookups_late")
            self.store.pause(PATIENCE_SECONDS)
            question.drop()
            question.done.set()
        tokens = min(question.answer_end, end) - computed
        if tokens < least:
            return 0, False
        question.in_step = self._is_in_step(tokens)
        return tokens, not question.in_step

    def _is_in_step(self, tokens: int) -> bool:
        """Whether the request's first step waits until so many tokens are loaded, which are pinned by now."""
        if self._options.load == "layers":
            return True
        # A step that runs cannot be told that its load failed as a whole.
        if self._tracked or self._is_whole:
            return False
        ranks = [shelf.spaces[0].manifest.block_bytes * (tokens // shelf.group.tokens) for shelf in self._shelves]
        return sum(ranks) <= IN_STEP_BYTES_MAX

    def _ask(self, request: Any, start: int, end: int) -> Question:
        deadline = time.monotonic() + self._options.wait_seconds + PATIENCE_SECONDS
        keys = [self._keys(request, group, range(start // group.tokens, end // group.tokens)) for group in self._groups]
        question = Question(start, end, keys, deadline)
        self._questions[request.request_id] = question
        late = time.monotonic() + (GRACE_SECONDS if self._tracked else GRACE_ALONE_SECONDS)
        if self._is_absent(question, late - time.monotonic()):
            question.answer(start, [])
        elif self._background.submit(lambda: self._answer(question)):
            question.done.wait(max(0.0, late - time.monotonic()))
        else:
            question.done.set()
        return question

    def _is_absent(self, question: Question, within: float) -> bool:
        """Whether the daemon says at once that there is nothing: most prompts are new, and asking beside the scheduler
        takes it longer than the answer."""
        for place, shelf in enumerate(self._shelves):
            if shelf.group.is_chain:
                began = time.monotonic()
                found = self.store.prefix_now(shelf.spaces, question.keys[place], within)
                if found is None:
                    return False
                question.prefixes[place] = found
                if found * shelf.group.tokens >= self._options.blocks_min * self._step:
                    return False
                self.store.counters.add("lookups")
                self.store.counters.add("lookup_seconds", time.monotonic() - began)
                return True
        return False

    def _answer(self, question: Question) -> None:
        began = time.monotonic()
        counters = self.store.counters
        counters.add("lookups")
        end, holds = question.start, list[Reading]()
        if not question.dropped:
            options, step = self._options, self._step
            least, wait = options.blocks_min * step, options.wait_seconds
            end, holds = look_up(self.store, self._shelves, question, step=step, least=least, wait=wait)
        counters.add("lookup_hits", end > question.start)
        counters.add("lookup_seconds", time.monotonic() - began)
        question.answer(end, holds)

    def _forget(self, request_id: str) -> None:
        question = self._questions.pop(request_id, None)
        if question is not None:
            question.drop()

    def allocated(self, request: Any, block_ids: Tables, external_tokens: int) -> None:
        """A request got blocks; ``external_tokens`` of them are to be loaded."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            tracked = self._tracked[request.request_id] = Tracked(request, [Table() for _ in self._groups])
        self._take(tracked, block_ids, replaced=True)
        question = self._questions.pop(request.request_id, None)
        if question is None:
            return
        if external_tokens == 0:
            question.drop()
            return
        start, end = question.used_start, question.used_start + external_tokens
        runs = []
        for place, (group, table) in enumerate(zip(self._groups, tracked.tables, strict=True)):
            blocks = needed(group, start, end)
            keys = question.keys_of(place, group, blocks)
            table.loaded = blocks
            if blocks:
                runs.append(Run(place, keys, table.block_ids[blocks.start : blocks.stop]))
        self._next.loads.append(Load(request.request_id, runs, question.in_step))
        self._release(request.request_id)
        self._holds[request.request_id] = question.holds

    def _take(self, tracked: Tracked | None, block_ids: Tables, *, replaced: bool) -> None:
        """Blocks have a new owner: this request, if it is one of ours."""
        for group in self._groups:
            self._next.taken.update(block_ids[group.index])
        if tracked is None:
            return
        for group, table in zip(self._groups, tracked.tables, strict=True):
            added = block_ids[group.index]
            table.block_ids = [*added] if replaced else [*table.block_ids, *added]

    def orders(self, output: Any) -> Orders:
        """The workers' orders of this step."""
        steps: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            self._take(self._tracked.get(new.req_id), new.block_ids, replaced=True)
            steps[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for request_id, computed, added in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
        ):
            if added is not None:
                replaced = request_id in cached.resumed_req_ids
                self._take(self._tracked.get(request_id), added, replaced=replaced)
            steps[request_id] = computed
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if tracked is not None and request_id in steps:
                self._next.saves += self._saves(tracked, steps[request_id] + scheduled)
        orders, self._next = self._next, Orders()
        names = [load.request_id for load in orders.loads if load.in_step]
        self._step_holds.append({name: self._holds.pop(name, []) for name in names})
        _close(itertools.chain(*self._step_holds.popleft().values()))
        orders.resets = self._resets
        # A request that ended gave its blocks back, perhaps to another one of this step.
        ended, self._ended = self._ended, []
        orders.saves += [save for save in ended if orders.taken.isdisjoint(save.run.block_ids)]
        return orders

    def _saves(self, tracked: Tracked, tokens: int) -> list[Save]:
        """What became full since the last time, without what came from the store."""
        if not self._shelves or self._options.save == "off":
            return []
        request = tracked.request
        if self._options.save == "prompt":
            tokens = min(tokens, request.num_prompt_tokens)
        tokens = self._named(request, tokens)
        saves = []
        for place, (group, table) in enumerate(zip(self._groups, tracked.tables, strict=True)):
            start, end = table.saved, min(tokens // group.tokens, len(table.block_ids))
            table.saved = max(start, end)
            fresh = [
                block
                for block in range(start, end)
                if block not in table.loaded and (group.is_chain or table.block_ids[block] != NULL_BLOCK)
            ]
            for blocks in _runs(fresh):
                before = range(max(0, blocks.start - 1), blocks.start)
                parent = self._keys(request, group, before)
                block_ids = table.block_ids[blocks.start : blocks.stop]
                run = Run(place, self._keys(request, group, blocks), block_ids)
                saves.append(Save(run, parent[0] if parent else None))
        return saves

    def finished(self, request: Any) -> None:
        """A request ended, or was aborted. Its blocks may belong to others soon."""
        self._forget(request.request_id)
        for step in self._step_holds:
            _close(step.pop(request.request_id, ()))
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is not None and request.num_computed_tokens and request.request_id not in self._holds:
            self._ended += self._saves(tracked, request.num_computed_tokens)

    def transferred(self, output: Any) -> None:
        """Workers have loaded, or failed: nothing needs to be kept for them any more."""
        for request_id in output.finished_recving or ():
            self._release(request_id)
        lost = getattr(output, "failed_recving", None) or ()
        bad = output.invalid_block_ids or set()
        for request_id, tracked in self._tracked.items() if lost or bad else ():
            if request_id in lost or any(not bad.isdisjoint(table.block_ids) for table in tracked.tables):
                for table in tracked.tables:
                    table.computed_again()

    def _release(self, request_id: str) -> None:
        _close(self._holds.pop(request_id, ()))

    def reset(self) -> bool:
        """Drops everything that is stored for this engine, for all engines that share it: its weights changed."""
        self._resets += 1
        for request_id in list(self._questions):
            self._forget(request_id)
        return all([space.clear() for shelf in self._shelves for space in shelf.spaces])

    def stop(self) -> None:
        self._background.stop(1.0)
        for request_id in list(self._questions):
            self._forget(request_id)
        for holds in (self._holds, *self._step_holds):
            _close(itertools.chain(*holds.values()))
            holds.clear()
        self.store.close()


def _close(holds: Iterable[Reading]) -> None:
    for hold in holds:
        hold.close()


def _runs(blocks: Sequence[int]) -> list[range]:
    """Numbers in a row, as ranges."""
    runs: list[range] = []
    for block in blocks:
        if runs and runs[-1].stop == block:
            runs[-1] = range(runs[-1].start, block + 1)
        else:
            runs.append(range(block, block + 1))
    return runs
