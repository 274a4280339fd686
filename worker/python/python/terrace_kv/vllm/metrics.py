"""What vLLM logs and exports about the connector: sums of an interval, one name each."""

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

NAMES = {
    "blocks_loaded": "Blocks that were loaded from Terrace.",
    "blocks_failed": "Blocks that Terrace had promised and could not serve; they were computed.",
    "blocks_stored": "Blocks that were stored in Terrace.",
    "blocks_dropped": "Blocks that were not stored, because too many waited or no daemon was there.",
    "saves_revoked": "Runs of blocks whose memory was needed before they were stored.",
    "load_seconds": "Seconds spent loading.",
    "save_seconds": "Seconds spent storing, beside the computation.",
    "lookups": "Prompts that Terrace was asked for.",
    "lookup_hits": "Prompts of which Terrace had a beginning.",
    "lookup_seconds": "Seconds from a question to its leased answer.",
    "lookups_late": "Questions that were given up.",
    "errors": "Calls that the daemon refused or did not answer.",
}


@dataclass
class TerraceStats(KVConnectorStats):
    """Sums by name."""

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, amount in other.data.items():
            self.data[name] = self.data.get(name, 0) + amount
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: round(amount, 6) for name, amount in sorted(self.data.items())}

    def is_empty(self) -> bool:
        return not any(self.data.values())


class TerraceProm(KVConnectorPromMetrics):
    """The same as counters of Prometheus, ``vllm:terrace_*``, by engine."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._counters = {
            name: self._counter_cls(name=f"vllm:terrace_{name}", documentation=text, labelnames=self._labelnames)
            for name, text in NAMES.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for name, amount in transfer_stats_data.items():
            if name in self._counters and amount > 0:
                self._counters[name].labels(*labels).inc(amount)
