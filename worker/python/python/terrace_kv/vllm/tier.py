"""``TerraceTier``: Terrace behind vLLM's own offloading, which moves KV between GPU and its region in host memory.

``--kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config":
{"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": N, "secondary_tiers": [{"type": "TerraceTier",
"module_path": "terrace_kv.vllm", "socket": "/run/terrace/lane.sock"}]}}'``

A chunk of vLLM is one block. All methods run in the scheduler and wait for nothing: lookups, loads and stores are done
on threads. What a lookup found is leased until the request that asked has ended.
"""

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import LookupResult, Medium, ReqContext, RequestOffloadingContext
from vllm.v1.kv_offload.file_mapper import FileMapper
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from .._background import Background
from .._engine import Store, StoreSpace, Target
from .._manifest import SpaceManifest
from .._native import Block, WriteBlock
from .._versions import advice, installed, vllm_job_result, vllm_tier_arguments

logger = init_logger("vllm.terrace_kv")

WAIT_SECONDS = 5.0
ANSWERS_MAX = 65536


class Asked:
    """What is known of a chunk, and who wants to know."""

    def __init__(self) -> None:
        self.requests: set[str] = set()
        self.result: LookupResult = LookupResult.RETRY
        # Keeps the lease of a hit.
        self.block: Block | None = None


class TerraceTier(SecondaryTierManager):
    """A secondary tier of vLLM."""

    medium: ClassVar[Medium | None] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        *,
        wait_seconds: float = WAIT_SECONDS,
        model_fingerprint: str = "",
        **where: Any,
    ) -> None:
        more = vllm_tier_arguments(SecondaryTierManager, backpressure_detector)
        super().__init__(offloading_spec, primary_kv_view, tier_type, *more)
        if told := advice("vllm", installed("vllm")):
            logger.warning("terrace: %s", told)
        assert primary_kv_view.strides is not None
        self._chunk_bytes = primary_kv_view.strides[0]
        self._rows = np.frombuffer(primary_kv_view.cast("B"), np.uint8).reshape(-1, self._chunk_bytes)
        self._wait = wait_seconds
        store = Store(Target.of(where, "vllm tier"), logger)
        self._space = StoreSpace(store, manifest(offloading_spec, self._chunk_bytes, model_fingerprint))
        self._lock = threading.Condition()
        self._asked: dict[bytes, Asked] = {}
        self._keys_of: dict[str, set[bytes]] = {}
        self._new: list[bytes] = []
        self._finished: list[JobResult] = []
        self._running = 0
        self._lookups = Background("terrace-tier-lookup")
        self._transfers = Background("terrace-tier", threads=2)
        store.session()

    # Lookups.

    def lookup(self, key: bytes, req_context: ReqContext) -> LookupResult:
        """RETRY until the answer is there; asked in one batch at the end of the step."""
        with self._lock:
            asked = self._asked.get(key)
            if asked is None:
                if len(self._asked) >= ANSWERS_MAX or self._space.store.silent:
                    return LookupResult.MISS
                asked = self._asked[key] = Asked()
                self._new.append(key)
            asked.requests.add(req_context.req_id)
            self._keys_of.setdefault(req_context.req_id, set()).add(key)
            return asked.result

    def on_schedule_end(self, context: Any) -> None:
        with self._lock:
            new, self._new = self._new, []
        if new and not self._lookups.submit(lambda: self._answer(new)):
            self._set(new, [None] * len(new))

    def _answer(self, keys: list[bytes]) -> None:
        blocks: list[Block | None] = [None] * len(keys)
        try:
            there = self._space.store.present([self._space], keys)
            wanted = [index for index, present in enumerate(there) if present]
            # Each block keeps the lease for itself.
            reading = self._space.read([keys[index] for index in wanted], wait=self._wait, verify=False)
            for index, block in zip(wanted, reading.blocks, strict=True):
                blocks[index] = block
        finally:
            self._set(keys, blocks)

    def _set(self, keys: list[bytes], blocks: list[Block | None]) -> None:
        with self._lock:
            for key, block in zip(keys, blocks, strict=True):
                asked = self._asked.get(key)
                if asked is not None:
                    asked.block = block
                    asked.result = LookupResult.MISS if block is None else LookupResult.HIT

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        with self._lock:
            for key in self._keys_of.pop(req_context.req_id, ()):
                asked = self._asked.get(key)
                if asked is not None:
                    asked.requests.discard(req_context.req_id)
                    if not asked.requests:
                        del self._asked[key]

    # Transfers.

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._submit(job_metadata, self._put)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._submit(job_metadata, self._get)

    def _submit(self, job: TransferJob, work: Callable[[list[bytes], list[int]], list[bool]]) -> None:
        keys, rows = [bytes(key) for key in job.keys], [int(row) for row in job.chunk_ids]
        with self._lock:
            self._running += 1

        def run() -> None:
            began, good = time.monotonic(), [False] * len(keys)
            try:
                good = work(keys, rows)
            finally:
                self._end(job, keys, good, time.monotonic() - began)

        if not self._transfers.submit(run):
            self._end(job, keys, [False] * len(keys), 0.0)

    def _end(self, job: TransferJob, keys: list[bytes], good: list[bool], seconds: float) -> None:
        loaded = [key for key, fine in zip(keys, good, strict=True) if fine]
        partly = loaded if job.is_promotion and not all(good) else None
        moved = len(loaded) * self._chunk_bytes
        with self._lock:
            for key, fine in zip(keys, good, strict=True):
                asked = self._asked.get(key)
                if asked is not None and job.is_promotion and not fine:
                    # Not promised again to those who still ask.
                    asked.result, asked.block = LookupResult.MISS, None
            self._finished.append(vllm_job_result(JobResult, job.job_id, all(good), partly, seconds, moved))
            self._running -= 1
            self._lock.notify_all()

    def _put(self, keys: list[bytes], rows: list[int]) -> list[bool]:
        def give(index: int, frame: Any) -> bool:
            if isinstance(frame, WriteBlock):
                frame.fill(self._rows[rows[index]])
            else:
                np.frombuffer(frame, np.uint8)[:] = self._rows[rows[index]]
            return True

        return self._space.put(keys, give, wait=self._wait)

    def _get(self, keys: list[bytes], rows: list[int]) -> list[bool]:
        def take(index: int, block: Block) -> None:
            np.copyto(self._rows[rows[index]], np.frombuffer(block, np.uint8))

        return self._space.get(keys, take, wait=self._wait)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        with self._lock:
            finished, self._finished = self._finished, []
        return finished

    def has_pending_work(self) -> bool:
        with self._lock:
            return bool(self._new) or self._running > 0

    def touch(self, keys: Iterable[bytes], req_context: ReqContext) -> None:
        """Nothing: a lease counts as use."""

    def drain_jobs(self) -> None:
        with self._lock:
            self._lock.wait_for(lambda: self._running == 0)

    def shutdown(self) -> None:
        self._lookups.stop(1.0)
        self._transfers.stop(5.0)
        with self._lock:
            self._asked.clear()
        self._space.store.close()


def manifest(offloading_spec: Any, chunk_bytes: int, fingerprint: str) -> SpaceManifest:
    """The space of an engine's chunks: everything that vLLM's own file tier keeps apart by folders, and its version."""
    config = offloading_spec.config
    chunk = offloading_spec.blocks_per_chunk
    folder = FileMapper.from_offloading_spec(root_dir="", offloading_spec=offloading_spec, blocks_per_file=chunk)
    name = Path(folder.get_config_file_path()).parent.name
    parallel = config.parallel
    model = str(config.model.name)
    return SpaceManifest(
        model=model.encode()[-256:].decode(errors="ignore"),
        model_fingerprint=fingerprint.encode()[:64] or b"vllm",
        dtype=str(config.model.dtype),
        layout=f"vllm-tier,{installed('vllm')},{name[-12:]}",
        tokens_per_block=config.groups[0].tokens_per_block * chunk,
        block_bytes=chunk_bytes,
        topology=f"tp{parallel.tp_size}pp{parallel.pp_size}",
        engine="vllm-tier",
    )
