"""``TerraceConnector``: vLLM's connector interface on one side, the scheduler's and the worker's half on the other."""

import os
from dataclasses import replace
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.logger import init_logger

from .._engine import Store
from .._versions import advice, installed
from .groups import plan
from .layout import RankLayout, unsupported
from .metrics import TerraceProm, TerraceStats
from .options import Options, target_of
from .orders import Orders
from .scheduler import SchedulerSide
from .worker import WorkerSide

logger = init_logger("vllm.terrace_kv")


class TerraceConnector(KVConnectorBase_V1, SupportsHMA):
    """Keeps the KV blocks of vLLM in Terrace. One object in the scheduler, one in each worker."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer = self._kv_transfer_config
        extra = transfer.kv_connector_extra_config
        options = Options.of(extra, transfer.kv_role)
        self._plan = plan(kv_cache_config)
        if self._plan.is_whole and options.load == "layers":
            # A step that runs already cannot be told that its load failed as a whole.
            options = replace(options, load="async")
        self._options = options
        self._reason = self._plan.reason or unsupported(vllm_config, self._plan.is_whole)
        self._layout = RankLayout((), self._reason or "the KV cache was never registered")
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        store = Store(target_of(extra, role.name.lower()), logger)
        if role is KVConnectorRole.WORKER:
            self._worker = WorkerSide(store, options, logger)
            return
        self._warn(transfer)
        self._scheduler = SchedulerSide(store, options, self._plan, logger)

    def _warn(self, transfer: Any) -> None:
        if told := advice("vllm", installed("vllm")):
            logger.warning("terrace: %s", told)
        if self._reason:
            logger.warning("terrace stores nothing for this engine: %s", self._reason)
        if getattr(transfer, "kv_load_failure_policy", "fail") != "recompute":
            logger.warning(
                "terrace: kv_load_failure_policy is not 'recompute': a block that is lost between its promise and its "
                "load, for example because terraced is killed then, fails the request instead of being computed"
            )
        algorithm = str(self._vllm_config.cache_config.prefix_caching_hash_algo)
        if algorithm.startswith("xxhash"):
            logger.warning("terrace: with %s other processes find nothing; use sha256 or sha256_cbor", algorithm)
        if os.environ.get("PYTHONHASHSEED") == "random":
            logger.warning("terrace: with PYTHONHASHSEED=random other processes find nothing")

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # Worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        assert self._worker is not None
        if not self._reason:
            self._layout = self._worker.register(self._vllm_config, self._plan, kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._layout

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert self._worker is not None
        if isinstance(kv_connector_metadata, Orders):
            self._worker.guard(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self.handle_preemptions(connector_metadata)

    def has_connector_metadata(self) -> bool:
        # vLLM asks before it tells of each layer: there is something to wait for only where layers wait.
        return self._options.load == "layers" and super().has_connector_metadata()

    def _orders(self) -> Orders:
        orders = self._connector_metadata
        return orders if isinstance(orders, Orders) else Orders()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        assert self._worker is not None
        self._worker.start_loads(self._orders())

    def wait_for_layer_load(self, layer_name: str) -> None:
        assert self._worker is not None
        self._worker.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: whole blocks over all layers are stored after the step, beside the next one."""

    def wait_for_save(self) -> None:
        assert self._worker is not None
        self._worker.end_step()
        self._worker.queue_saves(self._orders())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        assert self._worker is not None
        return None, self._worker.finished()

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        assert self._worker is not None
        results = super().get_transfer_results(finished_req_ids)
        # After those that ended: whoever is among them is here by now.
        results.failed_recving = self._worker.failed_requests()
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        assert self._worker is not None
        return self._worker.failed()

    def get_kv_connector_stats(self) -> TerraceStats | None:
        side = self._worker or self._scheduler
        assert side is not None
        sums = side.store.counters.take()
        return TerraceStats(data=sums) if sums else None

    def shutdown(self) -> None:
        for side in (self._worker, self._scheduler):
            if side is not None:
                side.stop()

    # Scheduler.

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        self.set_xfer_handshake_metadata_pp_aware({(0, rank): layout for rank, layout in metadata.items()})

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        assert self._scheduler is not None
        parallel = self._vllm_config.parallel_config
        layouts = [layout for _, layout in sorted(metadata.items()) if isinstance(layout, RankLayout)]
        self._scheduler.open(layouts, parallel.tensor_parallel_size * parallel.pipeline_parallel_size)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self._scheduler is not None
        if getattr(request, "skip_reading_prefix_cache", False):
            return 0, False
        return self._scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self._scheduler is not None
        self._scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        assert self._scheduler is not None
        return self._scheduler.orders(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        assert self._scheduler is not None
        self._scheduler.transferred(connector_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        self._scheduler.finished(request)
        # Blocks need not be kept: whoever takes them ends the saves that still read them.
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0] if block_ids else [])

    def reset_cache(self) -> bool | None:
        assert self._scheduler is not None
        return self._scheduler.reset()

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return extra_config.get("load") == "layers"

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> TerraceStats | None:
        return TerraceStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> TerraceProm:
        return TerraceProm(vllm_config, metric_types, labelnames, per_engine_labelvalues)
