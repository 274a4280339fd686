"""The connector, in a vLLM that loses a block of every load: other bytes are where it should be, and vLLM is told."""

from typing import Any

from terrace_kv.vllm import TerraceConnector
from terrace_kv.vllm.worker import WorkerSide

__all__ = ["TerraceConnector"]

copy_whole = WorkerSide._copy_whole


def copy_but_one(self: WorkerSide, pieces: Any, run: Any, blocks: list[Any], threads: int) -> list[bool]:
    good = copy_whole(self, pieces, run, blocks, threads)
    lost = len(good) // 2
    good[lost] = False
    pieces.rows(run.block_ids[lost])[...] = 7
    return good


WorkerSide._copy_whole = copy_but_one  # type: ignore[method-assign]
