"""The connector's half in a worker: moves blocks between vLLM's tensors and the store, beside the computation."""

import logging
import threading
import time
from typing import Any

import torch

from .._background import Background
from .._engine import Store, StoreSpace
from .layout import Pieces, RankLayout, manifest
from .options import Options
from .orders import Load, Orders, Save


class Saving:
    """Blocks on their way into the store. Whoever takes their memory revokes it first."""

    def __init__(self, save: Save, pieces: Pieces, event: Any) -> None:
        self.save = save
        self.block_ids = frozenset(save.block_ids)
        self._pieces = pieces
        self._event = event
        self._lock = threading.Lock()
        self._revoked = False

    def give(self, index: int, frame: Any) -> bool:
        with self._lock:
            if self._revoked:
                return False
            if self._event is not None:
                self._event.synchronize()
                self._event = None
            self._pieces.copy(frame, self.save.block_ids[index], into_frame=True)
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

    def finish(self) -> None:
        for group in self.groups:
            group.set()


class WorkerSide:
    """Carries out the scheduler's orders."""

    def __init__(self, store: Store, options: Options, logger: logging.Logger) -> None:
        self.store = store
        self._options = options
        self._logger = logger
        self._pieces: Pieces | None = None
        self._space: StoreSpace | None = None
        self._savers = Background("terrace-save", threads=1)
        self._loaders = Background("terrace-load", threads=1)
        self._lock = threading.Lock()
        self._savings: set[Saving] = set()
        self._save_blocks = 0
        self._finished: set[str] = set()
        self._failed: set[int] = set()
        self._loadings: list[Loading] = []
        self._resets = 0

    def register(self, vllm_config: Any, group: Any, caches: dict[str, torch.Tensor]) -> RankLayout:
        """Takes the tensors of the KV cache; answers the space that their blocks live in."""
        try:
            pieces = Pieces([name for name in group.layer_names if name in caches], caches)
            named = self._options.model_fingerprint
            space = manifest(vllm_config, group.kv_cache_spec.block_size, pieces, named)
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            return RankLayout(None, f"{type(error).__name__}: {error}")
        self._pieces = pieces
        self._space = StoreSpace(self.store, space)
        # The daemon is looked for now, so that a log says at once whether it is there.
        self.store.session()
        return RankLayout(space)

    def guard(self, orders: Orders) -> None:
        """Before anything is overwritten: ends saves whose blocks have a new owner, or whose weights are gone."""
        with self._lock:
            reset, self._resets = orders.resets != self._resets, orders.resets
            ended = [saving for saving in self._savings if reset or not orders.taken.isdisjoint(saving.block_ids)]
        for saving in ended:
            saving.revoke()
            self.store.counters.add("saves_revoked")
        if reset and self._space is not None:
            self._space.forget()

    def start_loads(self, orders: Orders) -> None:
        pieces = self._pieces
        groups = -(-len(pieces.names) // self._options.layers_per_group) if pieces is not None else 1
        for load in orders.loads:
            loading = Loading(load, groups)
            if self._options.load == "layers":
                self._loadings.append(loading)
            if pieces is None or not self._loaders.submit(lambda loading=loading: self._load(loading)):
                self._loaded(loading, [False] * len(load.keys))

    def _load(self, loading: Loading) -> None:
        began = time.monotonic()
        good = [False] * len(loading.load.keys)
        try:
            if self._pieces is not None and self._space is not None:
                with self._space.read(loading.load.keys, wait=self._options.wait_seconds) as reading:
                    self._copy(loading, reading.blocks)
                    self._synchronize()
                    good = reading.good()
        finally:
            self._loaded(loading, good)
        self.store.counters.add("load_seconds", time.monotonic() - began)

    def _copy(self, loading: Loading, blocks: list[Any]) -> None:
        pieces = self._pieces
        assert pieces is not None, "loads start after the tensors were registered"
        layers = len(pieces.names)
        size = self._options.layers_per_group if self._options.load == "layers" else layers
        found = [
            (frame, block) for frame, block in zip(blocks, loading.load.block_ids, strict=True) if frame is not None
        ]
        for group, first in enumerate(range(0, layers, size)):
            last = min(first + size, layers)
            for frame, block in found:
                if frame.valid:
                    pieces.copy(frame, block, into_frame=False, first=first, last=last)
            loading.groups[group].set()

    def _synchronize(self) -> None:
        if self._pieces is not None and not self._pieces.is_cpu:
            torch.cuda.current_stream(self._pieces.device).synchronize()

    def _loaded(self, loading: Loading, good: list[bool]) -> None:
        pairs = list(zip(loading.load.block_ids, good, strict=True))
        with self._lock:
            # Errors first: whoever sees the end of a load sees what failed in it.
            self._failed.update(block for block, fine in pairs if not fine)
            if self._options.load == "async":
                self._finished.add(loading.load.request_id)
        loading.finish()
        self.store.counters.add("blocks_loaded", sum(good))
        self.store.counters.add("blocks_failed", len(good) - sum(good))

    def wait_for_layer(self, name: str) -> None:
        """With load "layers": until the blocks of this layer are there, or are known to be lost."""
        if not self._loadings or self._pieces is None:
            return
        group = self._pieces.names.index(name) // self._options.layers_per_group
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
        pieces = self._pieces
        if pieces is None or not orders.saves:
            return
        event = None
        if not pieces.is_cpu:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(pieces.device))
        for save in orders.saves:
            saving = Saving(save, pieces, event)
            with self._lock:
                room = self._save_blocks + len(save.keys) <= self._options.save_blocks_max and not self.store.silent
                if room:
                    self._savings.add(saving)
                    self._save_blocks += len(save.keys)
            if not room:
                self.store.counters.add("blocks_dropped", len(save.keys))
            elif not self._savers.submit(lambda saving=saving: self._save(saving)):
                self._saved(saving)

    def _save(self, saving: Saving) -> None:
        began = time.monotonic()
        try:
            if self._space is not None:
                self._space.put(saving.save.keys, saving.give, parent=saving.save.parent)
        finally:
            self._saved(saving)
        self.store.counters.add("save_seconds", time.monotonic() - began)

    def _saved(self, saving: Saving) -> None:
        with self._lock:
            self._savings.discard(saving)
            self._save_blocks -= len(saving.save.keys)

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

    def stop(self) -> None:
        """What is being stored may end; then the session does."""
        self._loaders.stop(1.0)
        self._savers.stop(2.0)
        self.store.close()
