"""The tier behind vLLM's offloading, made by vLLM's own factory over plain memory. Skipped where there is no vLLM."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Daemon, wait_for

# What others deprecate while they are imported is not ours.
warnings.simplefilter("default")
pytest.importorskip("torch", reason="torch is not installed: the vLLM tier is not tested here")
pytest.importorskip("vllm", reason="vLLM is not installed: its tier is not tested here")

from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key  # noqa: E402
from vllm.v1.kv_offload.config import (  # noqa: E402
    OffloadingCacheConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
)
from vllm.v1.kv_offload.tiering.base import TransferJob  # noqa: E402
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")
ROW = 8192
ROWS = 32


class Side:
    """A tier with its region, and the calls that vLLM's manager makes in a step."""

    def __init__(self, socket: Path, *, tp_size: int = 1, dtype: str = "bfloat16", **where: Any) -> None:
        tokens = where.pop("tokens", 16)
        self.region = bytearray(ROW * ROWS)
        self.rows = np.frombuffer(self.region, np.uint8).reshape(ROWS, ROW)
        parallel = SimpleNamespace(
            tp_size=tp_size, pp_size=1, pcp_size=1, dcp_size=1, rank=0, is_parallelism_agnostic=False
        )
        config = SimpleNamespace(
            groups=(OffloadingGroupConfig(tokens_per_block=tokens, layer_names=("a", "b"), group_id=0),),
            model=OffloadingModelConfig(name="model", dtype=dtype),
            cache=OffloadingCacheConfig(tokens_per_hash=tokens, blocks_per_chunk=2),
            parallel=parallel,
            replicated_layout=False,
            canonical_layout=False,
            kv_cache_layout=None,
        )
        spec = SimpleNamespace(config=config, blocks_per_chunk=2)
        view = memoryview(self.region).cast("B", (ROWS, ROW))
        named = {"type": "TerraceTier", "module_path": "terrace_kv.vllm", "socket": str(socket), **where}
        self.tier: Any = SecondaryTierFactory.create_secondary_tier(named, view, spec)  # type: ignore[arg-type]
        self._jobs = 0

    def request(self, name: str = "r") -> ReqContext:
        context = ReqContext(req_id=name)
        self.tier.on_new_request(context)
        return context

    def lookup(self, keys: list[bytes], context: ReqContext) -> list[bool]:
        def known() -> list[Any]:
            found = [self.tier.lookup(key, context) for key in keys]
            self.tier.on_schedule_end(None)
            return found if LookupResult.RETRY not in found else []

        return [result is LookupResult.HIT for result in wait_for(known, "all answers")]

    def move(self, keys: list[bytes], rows: list[int], *, load: bool) -> Any:
        self._jobs += 1
        job = TransferJob(self._jobs, keys, np.array(rows), load, ReqContext(req_id="r"))  # type: ignore[arg-type]
        (self.tier.submit_load if load else self.tier.submit_store)(job)
        self.tier.drain_jobs()
        (result,) = self.tier.get_finished_jobs()
        assert result.job_id == self._jobs
        return result

    def fill(self, seed: int) -> Any:
        self.rows[:] = np.random.default_rng(seed).integers(0, 256, self.rows.shape, np.uint8)
        return self.rows.copy()


def names(count: int, group: int = 0) -> list[bytes]:
    return [make_offload_key(index.to_bytes(32, "big"), group) for index in range(count)]


@pytest.fixture
def side(daemon: Daemon) -> Any:
    made = Side(daemon.socket)
    yield made
    made.tier.shutdown()


def test_store_lookup_load(side: Side, daemon: Daemon) -> None:
    """Chunks come back in other slots of another process's region, or another group finds them."""
    there = side.fill(1)
    assert side.move(names(8), list(range(8)), load=False).success
    other = Side(daemon.socket)
    context = other.request()
    assert other.lookup([*names(8), *names(2, group=1)], context) == [True] * 8 + [False] * 2
    assert daemon.pinned() >= 8, "what was promised is leased"
    result = other.move(names(8), list(range(20, 28)), load=True)
    # vLLM asks for the bytes from 0.31 on.
    assert (result.success, getattr(result, "transfer_bytes", 8 * ROW)) == (True, 8 * ROW)
    assert np.array_equal(other.rows[20:28], there[:8])
    assert not other.rows[:20].any()
    other.tier.on_request_finished(context)
    daemon.expect_leases(0)
    other.tier.shutdown()


def test_a_part_that_is_lost_is_named(side: Side) -> None:
    """One chunk of a load is gone: what came is named, and the slot of the other is not told to be good."""
    there = side.fill(1)
    side.move(names(3), [0, 1, 2], load=False)
    side.rows[:] = 0
    asked = [*names(3), names(9)[8]]
    result = side.move(asked, [10, 11, 12, 13], load=True)
    assert not result.success
    assert list(result.successful_keys) == names(3)
    assert np.array_equal(side.rows[10:13], there[:3])


def test_lookups_wait_for_nothing(side: Side) -> None:
    """The scheduler would stand still: the first answer is RETRY, and asking again in the same step is one question."""
    context = side.request()
    assert {side.tier.lookup(key, context) for key in names(5) * 2} == {LookupResult.RETRY}
    assert side.tier.has_pending_work()
    assert side.lookup(names(5), context) == [False] * 5
    side.tier.on_request_finished(context)
    assert not side.tier._asked


@pytest.mark.parametrize("change", [{"tp_size": 2}, {"model_fingerprint": "2"}])
def test_engines_that_differ_share_nothing(side: Side, daemon: Daemon, change: dict[str, Any]) -> None:
    side.move(names(3), [0, 1, 2], load=False)
    other = Side(daemon.socket, **change)
    assert other.lookup(names(3), other.request()) == [False] * 3
    other.tier.shutdown()
