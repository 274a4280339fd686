"""LMCache keeps its second level in Terrace: ``TerraceL2`` is a plugin of LMCache's MP server.

``--l2-adapter '{"type": "plugin", "module_path": "terrace_kv.lmcache", "class_name": "TerraceL2",
"adapter_params": {"socket": "/run/terrace/lane.sock"}}'``

An object of LMCache is one block. Its space is the model of its key with the object's types and shapes, so that
servers which differ in one of them share nothing; rank, group and salt are part of its name. What LMCache locks is
leased: it stays in memory until it is unlocked, or the server's process ends.
"""

import functools
import hashlib
import os
import threading
from collections.abc import Callable
from typing import Any

from lmcache.lmcache_native import Bitmap
from lmcache.logging import init_logger
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface

from ._background import Background
from ._engine import Store, StoreSpace, Target
from ._manifest import SpaceManifest
from ._native import Block, WriteBlock
from ._versions import advice, installed

logger = init_logger("lmcache.terrace_kv")

WAIT_SECONDS = 5.0
"""Longest wait of a lookup for blocks of slower tiers."""
LOCKS_MAX = 65536
COPY_THREADS = 2
"""Threads that copy the blocks of one load."""

# Types, shapes and length of an object.
Kind = tuple[str, int]


class Finished:
    """Results of one sort of task, with the descriptor that says that there are new ones."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._results: dict[int, Any] = {}

    def add(self, task: int, result: Any) -> None:
        with self._lock:
            self._results[task] = result
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)

    def pop(self, task: int) -> Any:
        with self._lock:
            return self._results.pop(task, None)

    def pop_all(self) -> dict[int, Any]:
        with self._lock:
            results, self._results = self._results, {}
        return results

    def close(self) -> None:
        with self._lock:
            fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


@functools.lru_cache(1024)
def _kind(dtypes: tuple[Any, ...], shapes: tuple[Any, ...], length: int) -> Kind:
    types = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return f"{','.join(types)};{[tuple(shape) for shape in shapes]}", length


def _kind_of(item: Any) -> Kind:
    described = item.metadata
    dtypes = getattr(described, "dtypes", None) or [item.get_dtype()]
    shapes = getattr(described, "shapes", None) or [item.get_shape()]
    return _kind(tuple(dtypes), tuple(shapes), item.get_size())


def _kind_of_layout(layout: Any) -> Kind:
    lengths = [dtype.itemsize * shape.numel() for dtype, shape in zip(layout.dtypes, layout.shapes, strict=True)]
    return _kind(tuple(layout.dtypes), tuple(layout.shapes), sum(lengths))


def _length(part: bytes) -> bytes:
    return len(part).to_bytes(4, "little")


def _name(key: Any) -> bytes:
    chunk = key.chunk_hash
    rank, group, salt = b"%d" % key.kv_rank, b"%d" % key.object_group_id, key.cache_salt.encode()
    # Of whatever length the hash is, nothing else ends like it.
    parts = (chunk, _length(rank), rank, _length(group), group, _length(salt), salt, _length(chunk))
    return hashlib.blake2b(b"".join(parts), digest_size=32).digest()


class TerraceL2(L2AdapterInterface):
    """LMCache's second level."""

    def __init__(self, params: dict[str, Any] | None = None, **_: Any) -> None:
        super().__init__()
        params = params or {}
        if told := advice("lmcache", installed("lmcache")):
            logger.warning("terrace: %s", told)
        self._fingerprint = str(params.get("fingerprint", "")).encode()[:64] or b"lmcache"
        self._wait = float(params.get("wait_seconds", WAIT_SECONDS))
        self._copy_threads = max(1, int(params.get("copy_threads", COPY_THREADS)))
        self._store = Store(Target.of(params, "lmcache"), logger)
        self._lock = threading.Lock()
        self._spaces: dict[tuple[str, Kind], StoreSpace] = {}
        self._kinds: dict[str, list[Kind]] = {}
        self._locked: dict[Any, list[Block]] = {}
        self._tasks = 0
        self._stored, self._looked_up, self._loaded = Finished(), Finished(), Finished()
        self._writers = Background("terrace-l2-store", threads=1)
        self._readers = Background("terrace-l2-load", threads=2)
        # A server that starts without a daemon says so at once.
        self._store.session()

    def get_store_event_fd(self) -> int:
        return self._stored.fd

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._looked_up.fd

    def get_load_event_fd(self) -> int:
        return self._loaded.fd

    def _start(self, background: Background, work: Callable[[int], None], refused: Callable[[int], None]) -> int:
        with self._lock:
            self._tasks += 1
            task = self._tasks
        if not background.submit(lambda: work(task)):
            refused(task)
        return task

    def _space(self, model: str, kind: Kind) -> StoreSpace:
        with self._lock:
            space = self._spaces.get((model, kind))
            if space is None:
                described, length = kind
                layout = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()
                manifest = SpaceManifest(
                    model=model.encode()[-256:].decode(errors="ignore"),
                    model_fingerprint=self._fingerprint,
                    dtype=described.split(";")[0].split(",")[0][:16] or "bytes",
                    layout=f"lmcache,opaque,{layout}",
                    # LMCache names chunks, and says nothing of their tokens.
                    tokens_per_block=1,
                    block_bytes=length,
                    topology="named",
                    engine="lmcache",
                )
                space = self._spaces[model, kind] = StoreSpace(self._store, manifest)
                self._kinds.setdefault(model, []).append(kind)
            return space

    # Store.

    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int:
        return self._start(
            self._writers,
            lambda task: self._put(task, list(keys), list(objects)),
            lambda task: self._stored.add(task, L2StoreResult(False, 0)),
        )

    def _put(self, task: int, keys: list[Any], objects: list[Any]) -> None:
        fine, sizes = False, [0] * len(keys)
        try:
            stored: list[bool] = []
            for (model, kind), indexes in self._grouped(keys, [_kind_of(item) for item in objects]).items():

                def give(at: int, frame: Any, indexes: list[int] = indexes) -> bool:
                    source = objects[indexes[at]].byte_array
                    if isinstance(frame, WriteBlock):
                        frame.fill(source)
                    else:
                        frame[:] = memoryview(source).cast("B")
                    return True

                stored += self._space(model, kind).put([_name(keys[index]) for index in indexes], give, wait=self._wait)
                for index in indexes:
                    sizes[index] = kind[1]
            fine = all(stored)
        finally:
            # Told before anybody can ask for the usage; a task that failed in any way is told too.
            if fine:
                self._notify_keys_stored(keys, sizes)
            self._stored.add(task, L2StoreResult(fine, sum(sizes)))

    def _grouped(self, keys: list[Any], kinds: list[Kind]) -> dict[tuple[str, Kind], list[int]]:
        groups: dict[tuple[str, Kind], list[int]] = {}
        for index, (key, kind) in enumerate(zip(keys, kinds, strict=True)):
            groups.setdefault((key.model_name, kind), []).append(index)
        return groups

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        return self._stored.pop_all()

    # Lookup.

    def submit_lookup_and_lock_task(self, keys: list[Any], group_layout_descs: dict[int, Any]) -> int:
        layouts = dict(group_layout_descs or {})
        return self._start(
            self._readers,
            lambda task: self._lock_keys(task, list(keys), layouts),
            lambda task: self._looked_up.add(task, Bitmap(len(keys))),
        )

    def _lock_keys(self, task: int, keys: list[Any], layouts: dict[int, Any]) -> None:
        found = Bitmap(len(keys))
        try:
            models: dict[str, list[int]] = {}
            for index, key in enumerate(keys):
                models.setdefault(key.model_name, []).append(index)
            for model, indexes in models.items():
                for space in self._candidates(model, layouts):
                    missing = [index for index in indexes if not found.test(index)]
                    self._lock_in(space, keys, missing, found)
        finally:
            self._looked_up.add(task, found)
        # What is locked is loaded soon; until then nobody waits for this.
        with self._lock:
            held = [self._locked.get(key) for key in keys]
            blocks = [blocks[-1] for blocks in held if blocks]
        self._store.map_ahead(blocks)

    def _candidates(self, model: str, layouts: dict[int, Any]) -> list[StoreSpace]:
        """Where objects of this model may be: as the caller describes them, and as they were seen here."""
        described = [_kind_of_layout(layout) for layout in layouts.values()]
        with self._lock:
            kinds = [kind for kind in described if kind[1] > 0] + self._kinds.get(model, [])
        return [self._space(model, kind) for kind in dict.fromkeys(kinds)]

    def _lock_in(self, space: StoreSpace, keys: list[Any], indexes: list[int], found: Any) -> None:
        names = [_name(keys[index]) for index in indexes]
        there = [
            (index, name)
            for index, name, present in zip(indexes, names, self._store.present([space], names), strict=True)
            if present
        ]
        # Each block keeps the lease for itself; the bytes are compared when they are loaded.
        reading = space.read([name for _, name in there], wait=self._wait, verify=False)
        with self._lock:
            for (index, _), block in zip(there, reading.blocks, strict=True):
                if block is not None and len(self._locked) < LOCKS_MAX:
                    self._locked.setdefault(keys[index], []).append(block)
                    found.set(index)

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        return self._looked_up.pop(task_id)

    def submit_unlock(self, keys: list[Any]) -> None:
        with self._lock:
            for key in keys:
                held = self._locked.get(key)
                if held:
                    held.pop()
                if not held:
                    self._locked.pop(key, None)

    # Load.

    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> int:
        return self._start(
            self._readers,
            lambda task: self._get(task, list(keys), list(objects)),
            lambda task: self._loaded.add(task, Bitmap(len(keys))),
        )

    def _get(self, task: int, keys: list[Any], objects: list[Any]) -> None:
        loaded = Bitmap(len(keys))
        fine: list[int] = []
        try:
            with self._lock:
                held = [self._locked.get(key) for key in keys]
                locked = [(index, blocks[-1]) for index, blocks in enumerate(held) if blocks]
            fine = self._copy(locked, objects) if locked else []
            done = set(fine)
            rest = [index for index in range(len(keys)) if index not in done]
            if rest:
                kinds = [_kind_of(objects[index]) for index in rest]
                for (model, kind), places in self._grouped([keys[index] for index in rest], kinds).items():
                    wanted = [rest[place] for place in places]
                    fine += self._get_unlocked(self._space(model, kind), keys, objects, wanted)
            for index in fine:
                loaded.set(index)
        finally:
            self._loaded.add(task, loaded)
        self._notify_keys_accessed([keys[index] for index in fine])

    def _get_unlocked(self, space: StoreSpace, keys: list[Any], objects: list[Any], indexes: list[int]) -> list[int]:
        with space.read([_name(keys[index]) for index in indexes], wait=self._wait, verify=False) as reading:
            pairs = zip(indexes, reading.blocks, strict=True)
            return self._copy([(index, block) for index, block in pairs if block is not None], objects)

    def _copy(self, found: list[tuple[int, Block]], objects: list[Any]) -> list[int]:
        """Copies blocks into the objects at their places; answers those places whose copies are good."""
        targets = [objects[index].byte_array for index, _ in found]
        good = self._store.copy_out([block for _, block in found], targets, self._copy_threads)
        return [index for (index, _), fine in zip(found, good, strict=True) if fine]

    def query_load_result(self, task_id: int) -> Bitmap | None:
        return self._loaded.pop(task_id)

    def report_status(self) -> dict[str, Any]:
        with self._lock:
            locked = sum(map(len, self._locked.values()))
        return {
            "is_healthy": self._store.session() is not None,
            "type": type(self).__name__,
            "daemon": str(self._store.target),
            "locked_object_count": locked,
        }

    def close(self) -> None:
        self._writers.stop(5.0)
        self._readers.stop(5.0)
        with self._lock:
            self._locked.clear()
        self._store.close()
        for finished in (self._stored, self._looked_up, self._loaded):
            finished.close()
