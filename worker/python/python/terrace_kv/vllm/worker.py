"""The connector's half in a worker: moves blocks between vLLM's tensors and the store, beside the computation."""

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch

from .._background import Background
from .._engine import Store, StoreSpace
from .groups import NULL_BLOCK, Group, Plan
from .layout import Pieces, RankLayout, manifest
from .options import Options
from .orders import Load, Orders, Run, Save
from .threads import unbound

SAVE_AFTER_SECONDS = 0.01
"""What a step made full is stored so much later: its tokens go out first. Else a request would wait for the processor
and the interpreter that its own blocks are being stored with."""


IN_STEP_SECONDS = 1.0
"""A step waits so long for blocks that were pinned when it was ordered. Then they are computed: the daemon hangs."""


def _none_of(load: Load) -> list[list[bool]]:
    """Of each run, which blocks were loaded: none."""
    return [[False] * len(run.keys) for run in load.runs]


@dataclass(frozen=True)
class Part:
    """A group's layers on this rank, and the space of their blocks."""

    pieces: Pieces
    space: StoreSpace


class Saving:
    """Blocks on their way into the store. Whoever takes their memory revokes it first."""

    def __init__(self, save: Save, pieces: Pieces, event: Any) -> None:
        self.save = save
        self.block_ids = frozenset(save.run.block_ids)
        self._pieces = pieces
        self._event = event
        self._due = time.monotonic() + SAVE_AFTER_SECONDS
        self._lock = threading.Lock()
        self._revoked = False

    def wait(self) -> None:
        """Until it may begin."""
        time.sleep(max(0.0, self._due - time.monotonic()))

    def give(self, index: int, frame: Any) -> bool:
        with self._lock:
            if self._revoked:
                return False
            if self._event is not None:
                self._event.synchronize()
                self._event = None
            self._pieces.fill(frame, self.save.run.block_ids[index])
            return True

    def revoke(self) -> None:
        """From here on nobody reads the blocks. Waits for the copy of one block at most."""
        with self._lock:
            self._revoked = True


class Loading:
    """Blocks of one request on their way out of the store. With layer groups, each group says when it is there."""

    def __init__(self, load: Load, groups: int) -> None:
        self.load = load
        self.groups = [threading.Event() for _ in range(groups)]
        self._lock = threading.Lock()
        self._begun = False
        self._revoked = False
        self.has_ended = False

    def begin(self) -> bool:
        """Whether the blocks are to be written, which then happens without a further wait."""
        with self._lock:
            self._begun = not self._revoked
            return self._begun

    def revoke(self) -> bool:
        """Nothing is written from here on, if nothing has been yet."""
        with self._lock:
            self._revoked = not self._begun
            return self._revoked

    def finish(self) -> None:
        for group in self.groups:
            group.set()


class WorkerSide:
    """Carries out the scheduler's orders."""

    def __init__(self, store: Store, options: Options, logger: logging.Logger) -> None:
        self.store = store
        self._options = options
        self._logger = logger
        self._parts: list[Part | None] = []
        self._is_whole = False
        self._savers = Background("terrace-save", threads=1)
        self._loaders = Background("terrace-load", threads=1)
        self._lock = threading.Lock()
        self._savings: set[Saving] = set()
        self._save_blocks = 0
        self._finished: set[str] = set()
        self._failed: set[int] = set()
        self._failed_requests: set[str] = set()
        self._loadings: list[Loading] = []
        self._resets = 0

    def register(self, vllm_config: Any, plan: Plan, caches: dict[str, torch.Tensor]) -> RankLayout:
        """Takes the tensors of the KV cache; answers the spaces that their blocks live in."""
        try:
            parts = [self._part(vllm_config, group, caches) for group in plan.groups]
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            return RankLayout((), f"{type(error).__name__}: {error}")
        self._parts, self._is_whole = parts, plan.is_whole
        with unbound():
            for background in (self._savers, self._loaders):
                background.start()
            # The daemon is looked for now, so that a log says at once whether it is there.
            self.store.session()
        return RankLayout(tuple(part.space.manifest if part is not None else None for part in parts))

    def _part(self, vllm_config: Any, group: Group, caches: dict[str, torch.Tensor]) -> Part | None:
        names = [name for name in group.layers if name in caches]
        if not names:
            return None
        pieces = Pieces(names, caches)
        space = manifest(vllm_config, group, pieces, self._options.model_fingerprint)
        return Part(pieces, StoreSpace(self.store, space))

    def guard(self, orders: Orders) -> None:
        """Before anything is overwritten: ends saves whose blocks have a new owner, or whose weights are gone."""
        with self._lock:
            reset, self._resets = orders.resets != self._resets, orders.resets
            ended = [saving for saving in self._savings if reset or not orders.taken.isdisjoint(saving.block_ids)]
        for saving in ended:
            saving.revoke()
            self.store.counters.add("saves_revoked")
        for part in self._parts:
            if reset and part is not None:
                part.space.forget()

    def start_loads(self, orders: Orders) -> None:
        awaited = []
        for load in orders.loads:
            loading = Loading(load, self._layer_groups())
            if self._options.load == "layers":
                self._loadings.append(loading)
            elif load.in_step:
                awaited.append(loading)
            if not self._parts or not self._loaders.submit(lambda loading=loading: self._load(loading)):
                self._loaded(loading, _none_of(load))
        until = time.monotonic() + IN_STEP_SECONDS
        for loading in awaited:
            ended = loading.groups[-1].wait(max(0.0, until - time.monotonic()))
            if not ended and loading.revoke():
                self._loaded(loading, _none_of(loading.load))
            loading.groups[-1].wait()

    def _layer_groups(self) -> int:
        """They matter only where a step waits for them; then there is one group."""
        part = self._parts[0] if self._parts and self._options.load == "layers" else None
        return -(-len(part.pieces.names) // self._options.layers_per_group) if part is not None else 1

    def _load(self, loading: Loading) -> None:
        began = time.monotonic()
        good = _none_of(loading.load)
        try:
            for place, run in enumerate(loading.load.runs):
                good[place] = self._load_run(loading, run)
                if not all(good[place]) and self._is_whole:
                    # All of it is computed then.
                    break
        finally:
            self._loaded(loading, good)
        self.store.counters.add("load_seconds", time.monotonic() - began)

    def _load_run(self, loading: Loading, run: Run) -> list[bool]:
        part = self._parts[run.group]
        if part is None:
            return [True] * len(run.keys)
        at_once = part.pieces.is_regular and self._options.load != "layers"
        # Bytes are compared before a layer uses them, or as they are copied.
        with part.space.read(run.keys, wait=self._options.wait_seconds, verify=not at_once) as reading:
            if not loading.begin():
                return [False] * len(run.keys)
            if at_once:
                same = self._copy_whole(part.pieces, run, reading.blocks, threads=2 if loading.load.in_step else 1)
                return [fine and still for fine, still in zip(same, reading.good(), strict=True)]
            self._copy(loading, part.pieces, run, reading.blocks)
            if not part.pieces.is_cpu:
                torch.cuda.current_stream(part.pieces.device).synchronize()
            return reading.good()

    def _copy_whole(self, pieces: Pieces, run: Run, blocks: list[Any], threads: int) -> list[bool]:
        """Copies and compares in one pass; answers which copies are good. Blocks that nobody reads are not copied."""
        good = [frame is not None for frame in blocks]
        wanted = [place for place, block in enumerate(run.block_ids) if good[place] and block != NULL_BLOCK]
        targets = [pieces.rows(run.block_ids[place]) for place in wanted]
        found = self.store.copy_out([blocks[place] for place in wanted], targets, threads)
        for place, fine in zip(wanted, found, strict=True):
            good[place] = fine
        return good

    def _copy(self, loading: Loading, pieces: Pieces, run: Run, blocks: list[Any]) -> None:
        layers = len(pieces.names)
        size = self._options.layers_per_group if self._options.load == "layers" else layers
        pairs = zip(blocks, run.block_ids, strict=True)
        found = [(frame, block) for frame, block in pairs if frame is not None and block != NULL_BLOCK]
        for group, first in enumerate(range(0, layers, size)):
            last = min(first + size, layers)
            for frame, block in found:
                if frame.valid:
                    pieces.copy(frame, block, into_frame=False, first=first, last=last)
            if self._options.load == "layers":
                loading.groups[group].set()

    def _loaded(self, loading: Loading, good: list[list[bool]]) -> None:
        runs = loading.load.runs
        pairs = [pair for run, fine in zip(runs, good, strict=True) for pair in zip(run.block_ids, fine, strict=True)]
        lost = [block for block, fine in pairs if not fine]
        with self._lock:
            if loading.has_ended:
                return
            loading.has_ended = True
            # Errors first: whoever sees the end of a load sees what failed in it.
            if not self._is_whole:
                self._failed.update(lost)
            elif lost:
                self._failed_requests.add(loading.load.request_id)
            if not loading.load.in_step:
                self._finished.add(loading.load.request_id)
        loading.finish()
        self.store.counters.add("blocks_loaded", len(pairs) - len(lost))
        self.store.counters.add("blocks_failed", len(lost))

    def wait_for_layer(self, name: str) -> None:
        """With load "layers": until the blocks of this layer are there, or are known to be lost."""
        part = self._parts[0] if self._loadings and self._parts else None
        if part is None:
            return
        group = part.pieces.names.index(name) // self._options.layers_per_group
        for loading in self._loadings:
            loading.groups[group].wait()

    def end_step(self) -> None:
        """All layers have run: what they waited for is over, and what failed is known."""
        for loading in self._loadings:
            for group in loading.groups:
                group.wait()
        self._loadings.clear()

    def queue_saves(self, orders: Orders) -> None:
        """Starts storing what this step made full. Waits for nothing."""
        parts = [(save, self._parts[save.run.group]) for save in orders.saves] if self._parts else []
        for save, part in parts:
            if part is None:
                continue
            event = None
            if not part.pieces.is_cpu:
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(part.pieces.device))
            saving, blocks = Saving(save, part.pieces, event), len(save.run.keys)
            with self._lock:
                room = self._save_blocks + blocks <= self._options.save_blocks_max and not self.store.silent
                if room:
                    self._savings.add(saving)
                    self._save_blocks += blocks
            if not room:
                self.store.counters.add("blocks_dropped", blocks)
            elif not self._savers.submit(lambda saving=saving, part=part: self._save(saving, part.space)):
                self._saved(saving)

    def _save(self, saving: Saving, space: StoreSpace) -> None:
        saving.wait()
        began, save = time.monotonic(), saving.save
        try:
            space.put(save.run.keys, saving.give, parent=save.parent)
        finally:
            self._saved(saving)
        self.store.counters.add("save_seconds", time.monotonic() - began)

    def _saved(self, saving: Saving) -> None:
        with self._lock:
            self._savings.discard(saving)
            self._save_blocks -= len(saving.save.run.keys)

    def finished(self) -> set[str]:
        """Requests whose loads ended, well or not, since the last call."""
        with self._lock:
            finished, self._finished = self._finished, set()
        return finished

    def failed(self) -> set[int]:
        """Blocks that were promised and could not be had, since the last call."""
        with self._lock:
            failed, self._failed = self._failed, set()
        return failed

    def failed_requests(self) -> set[str]:
        """The same as whole requests, where the rest of a load is of no use."""
        with self._lock:
            failed, self._failed_requests = self._failed_requests, set()
        return failed

    def stop(self) -> None:
        """What is being stored may end; then the session does."""
        self._loaders.stop(1.0)
        self._savers.stop(2.0)
        self.store.close()
