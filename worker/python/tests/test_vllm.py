"""The vLLM connector's halves with vLLM's own classes and tensors, without a model. Skipped where there is no vLLM."""

import itertools
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import PATIENCE, Daemon, wait_for

# What others deprecate while they are imported is not ours.
warnings.simplefilter("default")
torch = pytest.importorskip("torch", reason="torch is not installed: the vLLM connector is not tested here")
pytest.importorskip("vllm", reason="vLLM is not installed: its connector is not tested here (make test-vllm does)")

from terrace_kv._engine import StoreSpace  # noqa: E402
from terrace_kv.vllm import scheduler, worker  # noqa: E402
from terrace_kv.vllm.connector import TerraceConnector  # noqa: E402
from terrace_kv.vllm.layout import Pieces  # noqa: E402
from terrace_kv.vllm.options import Options  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole, supports_hma  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
)

pytestmark = pytest.mark.filterwarnings("default")
LAYERS = [f"model.layers.{index}.attn" for index in range(6)]
TOKENS = 32
BLOCKS = 64


def spec(tokens: int = TOKENS) -> Any:
    return FullAttentionSpec(block_size=tokens, num_kv_heads=2, head_size=16, dtype=torch.bfloat16)


def cache_config(tokens: int = TOKENS) -> KVCacheConfig:
    groups = [KVCacheGroupSpec(LAYERS, spec(tokens))]
    return KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups)


def vllm_config(socket: Path, rank: int = 0, **changes: Any) -> Any:
    """What the connector reads of vLLM's configuration."""
    extra = {"socket": str(socket), **changes.pop("extra", {})}
    transfer = SimpleNamespace(
        kv_connector_extra_config=extra,
        kv_role=changes.pop("role", "kv_both"),
        kv_load_failure_policy="recompute",
        is_kv_producer=True,
    )
    parallel = SimpleNamespace(tensor_parallel_size=changes.pop("ranks", 1), pipeline_parallel_size=1, rank=rank)
    cache = SimpleNamespace(
        block_size=changes.pop("tokens", TOKENS), cache_dtype="auto", prefix_caching_hash_algo="sha256_cbor"
    )
    for name in ("cache_dtype",):
        setattr(cache, name, changes.pop(name, getattr(cache, name)))
    model = SimpleNamespace(model=changes.pop("model", "some/model"), hf_config="config", revision=None)
    assert not changes
    return SimpleNamespace(
        kv_transfer_config=transfer,
        parallel_config=parallel,
        cache_config=cache,
        model_config=model,
        compilation_config=SimpleNamespace(static_forward_context={}),
        speculative_config=None,
    )


def tensors(stacked: bool = True, tokens: int = TOKENS) -> dict[str, Any]:
    """Caches as vLLM has them: all layers in one allocation, or each in its own; (blocks, heads, tokens, 2 x size)."""
    shape = (BLOCKS, 2, tokens, 32)
    if stacked:
        whole = torch.zeros((len(LAYERS), *shape), dtype=torch.bfloat16)
        return {name: whole[index] for index, name in enumerate(LAYERS)}
    return {name: torch.zeros(shape, dtype=torch.bfloat16) for name in LAYERS}


class Engine:
    """A scheduler's and one worker's connector, and the steps that vLLM takes them through."""

    def __init__(self, socket: Path, **changes: Any) -> None:
        tokens = changes.get("tokens", TOKENS)
        config = vllm_config(socket, **changes)
        self.scheduler = TerraceConnector(config, KVConnectorRole.SCHEDULER, cache_config(tokens=tokens))
        self.worker = TerraceConnector(config, KVConnectorRole.WORKER, cache_config(tokens=tokens))
        self.caches = tensors(tokens=tokens)
        self.worker.register_kv_caches(self.caches)
        self.scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): self.worker.get_handshake_metadata()})  # type: ignore[dict-item]
        self.sums: dict[str, float] = {}
        self.beside: set[str] = set()

    def run_another(self) -> None:
        """From here on a request is never alone: what it loads it waits for beside the steps of others."""
        self.allocate(self.request("another", TOKENS - 1), [BLOCKS - 1], 0)

    def request(self, name: str, tokens: int, salt: str = "") -> Any:
        hashes = [f"{salt}:{index}".encode() for index in range(tokens // TOKENS)]
        return SimpleNamespace(
            request_id=name,
            num_tokens=tokens,
            num_prompt_tokens=tokens,
            num_computed_tokens=0,
            block_hashes=hashes,
        )

    def match(self, request: Any, computed: int = 0) -> int:
        found: list[int] = []

        def answered() -> bool:
            tokens, is_beside = self.scheduler.get_num_new_matched_tokens(request, computed)
            if is_beside:
                self.beside.add(request.request_id)
            found.append(-1 if tokens is None else tokens)
            return tokens is not None

        wait_for(answered, "an answer")
        return found[-1]

    def allocate(self, request: Any, block_ids: list[int], external: int) -> None:
        blocks = SimpleNamespace(get_block_ids=lambda: (block_ids,))
        self.scheduler.update_state_after_alloc(request, blocks, external)

    def step(
        self, request: Any = None, block_ids: tuple[int, ...] = (), scheduled: int = 0
    ) -> tuple[set[str], set[int]]:
        """One step of the engine; answers loads that ended and blocks that failed."""
        new = SimpleNamespace(
            req_id=getattr(request, "request_id", ""), block_ids=(list(block_ids),), num_computed_tokens=0
        )
        if request is not None:
            new.num_computed_tokens = request.num_computed_tokens
            request.num_computed_tokens += scheduled
        cached = SimpleNamespace(req_ids=[], num_computed_tokens=[], new_block_ids=[], resumed_req_ids=set())
        output = SimpleNamespace(
            scheduled_new_reqs=[new] if request is not None else [],
            scheduled_cached_reqs=cached,
            num_scheduled_tokens={new.req_id: scheduled} if request is not None else {},
        )
        return self.take(output)

    def continued(self, request: Any, added: list[int], scheduled: int, *, resumed: bool = False) -> None:
        """A further step of a request that has run before; resumed, what is added are all of its blocks."""
        name = request.request_id
        cached = SimpleNamespace(
            req_ids=[name],
            num_computed_tokens=[request.num_computed_tokens],
            new_block_ids=[(added,)],
            resumed_req_ids={name} if resumed else set(),
        )
        request.num_computed_tokens += scheduled
        self.take(
            SimpleNamespace(scheduled_new_reqs=[], scheduled_cached_reqs=cached, num_scheduled_tokens={name: scheduled})
        )

    def take(self, output: Any) -> tuple[set[str], set[int]]:
        """The scheduler's orders of a step, carried out by the worker."""
        orders = self.scheduler.build_connector_meta(output)
        self.worker.handle_preemptions(orders)
        self.worker.bind_connector_metadata(orders)
        self.worker.start_load_kv(None)
        for name in LAYERS:
            self.worker.wait_for_layer_load(name)
        self.worker.wait_for_save()
        finished = self.worker.get_finished(set())[1] or set()
        failed = self.worker.get_block_ids_with_load_errors()
        self.worker.clear_connector_metadata()
        self.scheduler.update_connector_output(
            SimpleNamespace(finished_recving=finished, invalid_block_ids=failed)  # type: ignore[arg-type]
        )
        stats = self.worker.get_kv_connector_stats()
        for key, amount in (stats.data if stats else {}).items():
            self.sums[key] = self.sums.get(key, 0) + amount
        return finished, failed

    def until(self, name: str, amount: float) -> None:
        def reached() -> bool:
            self.step()
            return self.sums.get(name, 0) >= amount

        wait_for(reached, f"{name} {amount}: {self.sums}")

    def fill(self, block_ids: list[int], seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        for cache in self.caches.values():
            cache[block_ids] = torch.randn_like(cache[block_ids])
        return {name: cache[block_ids].clone() for name, cache in self.caches.items()}

    def load(self, request: Any, block_ids: list[int]) -> set[int]:
        """Allocates and loads what was matched; answers what failed."""
        tokens = self.match(request)
        assert tokens
        self.allocate(request, block_ids, tokens)
        return self.carry(request)

    def carry(self, request: Any) -> set[int]:
        """Steps until its load has ended, the first if that waits for it; answers which blocks failed."""
        failed: set[int] = set()

        def ended() -> bool:
            finished, bad = self.step()
            failed.update(bad)
            assert finished <= self.beside
            return request.request_id not in self.beside or request.request_id in finished

        wait_for(ended, "the load's end")
        return failed

    def save(self, request: Any, block_ids: list[int]) -> None:
        self.allocate(request, block_ids, 0)
        self.step(request, tuple(block_ids), request.num_tokens)

    def stop(self) -> None:
        self.worker.shutdown()
        self.scheduler.shutdown()


@pytest.fixture
def engine(daemon: Daemon) -> Any:
    running = Engine(daemon.socket)
    yield running
    running.stop()


def test_what_one_engine_saves_another_loads(engine: Engine, daemon: Daemon) -> None:
    """Blocks come back at other places, or with another's bytes: every layer is compared."""
    request = engine.request("a", 10 * TOKENS + 5)
    there = engine.fill(list(range(10)), seed=1)
    engine.save(request, list(range(11)))
    engine.until("blocks_stored", 10)
    other = Engine(daemon.socket)
    again = other.request("b", 10 * TOKENS + 5)
    assert other.load(again, [*range(40, 50), 3]) == set()
    # That step may still be running while the next one is ordered.
    other.step()
    daemon.expect_leases(1)
    other.step()
    daemon.expect_leases(0)
    for name, cache in other.caches.items():
        assert torch.equal(cache[40:50], there[name])
        assert not cache[0:40].any()
    other.stop()
    # One token at least is computed: of ten full blocks, nine may be loaded.
    assert engine.match(engine.request("c", 10 * TOKENS)) == 9 * TOKENS
    assert engine.match(engine.request("d", 10 * TOKENS), 4 * TOKENS) == 5 * TOKENS
    engine.scheduler.request_finished_all_groups(engine.request("c", 10 * TOKENS), ([],))
    engine.scheduler.request_finished_all_groups(engine.request("d", 10 * TOKENS), ([],))
    daemon.expect_leases(0)


@pytest.mark.parametrize("stacked", [True, False])
def test_pieces_of_a_block(stacked: bool) -> None:
    """Layers in one allocation are copied in one go, others one by one: both must be the same bytes, group by group."""
    caches = tensors(stacked)
    for index, cache in enumerate(caches.values()):
        cache[:] = index + torch.arange(BLOCKS).reshape(-1, 1, 1, 1)
    pieces = Pieces(LAYERS, caches)
    frame = bytearray(pieces.block_bytes)
    pieces.copy(frame, 7, into_frame=True)
    assert bytes(frame) == b"".join(caches[name][7].contiguous().view(torch.uint8).numpy().tobytes() for name in LAYERS)
    pieces.copy(bytes(frame), 9, into_frame=False, first=0, last=4)
    assert all(torch.equal(caches[name][9], caches[name][7]) == (index < 4) for index, name in enumerate(LAYERS))
    pieces.copy(frame, 9, into_frame=False, first=4)
    assert all(torch.equal(caches[name][9], caches[name][7]) for name in LAYERS)


def test_a_block_with_gaps_is_refused() -> None:
    whole = torch.zeros((BLOCKS, 2, TOKENS, 64), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="one piece"):
        Pieces(LAYERS[:1], {LAYERS[0]: whole[..., :32]})


def test_memory_that_is_taken_is_not_stored(engine: Engine, daemon: Daemon) -> None:
    """Blocks get a new owner while they are being stored: what was not copied by then must never be stored."""
    worker = engine.worker._worker
    assert worker is not None
    gate = threading.Event()
    worker._savers.submit(lambda: (gate.wait(PATIENCE), None)[1])
    request = engine.request("a", 4 * TOKENS)
    engine.fill([0, 1, 2, 3], seed=1)
    engine.save(request, [0, 1, 2, 3])
    engine.scheduler.request_finished_all_groups(request, ([0, 1, 2, 3],))
    taker = engine.request("b", 2 * TOKENS, salt="other")
    engine.allocate(taker, [2, 3], 0)
    engine.step(taker, (2, 3), 0)
    engine.fill([2, 3], seed=2)
    gate.set()
    engine.until("saves_revoked", 1)
    worker._savers.stop(PATIENCE)
    assert engine.match(engine.request("c", 5 * TOKENS)) == 0


def test_a_block_that_is_lost_is_reported(engine: Engine, daemon: Daemon) -> None:
    """The daemon dies between promise and load: the request ends its wait, and its blocks are named."""
    request = engine.request("a", 6 * TOKENS)
    engine.fill(list(range(6)), seed=1)
    engine.save(request, list(range(6)))
    engine.until("blocks_stored", 6)
    again = engine.request("b", 6 * TOKENS)
    tokens = engine.match(again)
    assert tokens == 5 * TOKENS
    engine.allocate(again, list(range(20, 26)), tokens)
    daemon.process.kill()
    daemon.process.wait()
    assert engine.carry(again) == set(range(20, 25))
    assert engine.match(engine.request("c", 6 * TOKENS)) == 0, "no hit that cannot be served"


def test_a_lease_ends_during_a_load(folder: Path, wire: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon takes the leases back while blocks are copied: the request ends its wait, and its blocks are named."""
    short = Daemon(folder, wire, "[limits]\nlease_hold_max_ms = 200")
    engine = Engine(short.socket)
    worker, tries = engine.worker._worker, itertools.count()
    assert worker is not None

    def stored() -> bool:
        # On a busy machine a lease may end before its blocks are sealed.
        engine.save(engine.request(f"a{next(tries)}", 4 * TOKENS), list(range(4)))
        wait_for(lambda: not worker._save_blocks, "the save's end")
        engine.step()
        return engine.sums.get("blocks_stored", 0) >= 4

    wait_for(stored, "the blocks")
    copy, slow = worker.store.copy_out, []

    def copy_late(blocks: Any, targets: Any, threads: int = 1) -> list[bool]:
        good = copy(blocks, targets, threads)
        slow.append(good)
        short.expect_leases(0)
        return good

    monkeypatch.setattr(worker.store, "copy_out", copy_late)
    assert engine.load(engine.request("b", 5 * TOKENS), list(range(20, 25))) == set(range(20, 24))
    assert slow == [[True] * 4], "the copies themselves were good"
    engine.stop()
    short.kill()


def test_layers_wait_for_their_own_blocks(daemon: Daemon) -> None:
    """With load "layers" a step starts at once: when a layer may run, its bytes are there."""
    engine = Engine(daemon.socket, extra={"load": "layers", "layers_per_group": 2})
    there = engine.fill(list(range(4)), seed=1)
    engine.save(engine.request("a", 4 * TOKENS + 1), list(range(5)))
    engine.until("blocks_stored", 4)
    again = engine.request("b", 4 * TOKENS + 1)
    tokens, is_async = 0, True

    def answered() -> bool:
        nonlocal tokens, is_async
        found, is_async = engine.scheduler.get_num_new_matched_tokens(again, 0)
        tokens = found or 0
        return found is not None

    wait_for(answered, "an answer")
    assert (tokens, is_async) == (4 * TOKENS, False)
    engine.allocate(again, list(range(30, 35)), tokens)
    assert engine.step() == (set(), set()), "nobody waits for the end of such a load"
    for name, cache in engine.caches.items():
        assert torch.equal(cache[30:34], there[name])
    engine.scheduler.request_finished_all_groups(again, ([],))
    daemon.expect_leases(0)
    engine.stop()


def test_what_a_step_waits_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that runs alone waits in its step, unless there is much to copy; no other does."""
    there = engine.fill(list(range(4)), seed=1)
    stored = engine.request("a", 4 * TOKENS + 1)
    engine.save(stored, list(range(5)))
    engine.until("blocks_stored", 4)
    engine.scheduler.request_finished_all_groups(stored, ([],))

    def is_beside(request: Any) -> bool:
        assert engine.match(request) == 4 * TOKENS
        return request.request_id in engine.beside

    alone = engine.request("alone", 4 * TOKENS + 1)
    assert not is_beside(alone)
    engine.allocate(alone, list(range(30, 35)), 4 * TOKENS)
    assert engine.step() == (set(), set()), "nobody hears of the end of such a load"
    for name, cache in engine.caches.items():
        assert torch.equal(cache[30:34], there[name])
    second = engine.request("second", 4 * TOKENS + 1)
    assert is_beside(second)
    for request in (second, alone):
        engine.scheduler.request_finished_all_groups(request, ([],))
    block = engine.worker._worker._parts[0].pieces.block_bytes  # type: ignore[union-attr]
    for room, expected in ((4 * block, False), (4 * block - 1, True)):
        monkeypatch.setattr(scheduler, "IN_STEP_BYTES_MAX", room)
        large = engine.request(f"large {room}", 4 * TOKENS + 1)
        assert is_beside(large) is expected
        engine.scheduler.request_finished_all_groups(large, ([],))


def test_a_step_does_not_wait_for_a_daemon_that_hangs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks are lost then, and whatever the daemon answers later is not written into them any more."""
    monkeypatch.setattr(worker, "IN_STEP_SECONDS", 0.1)
    side = engine.worker._worker
    assert side is not None
    engine.fill(list(range(4)), seed=1)
    stored = engine.request("a", 4 * TOKENS + 1)
    engine.save(stored, list(range(5)))
    engine.until("blocks_stored", 4)
    engine.scheduler.request_finished_all_groups(stored, ([],))
    read, answers, answered = StoreSpace.read, threading.Event(), threading.Event()

    def read_late(space: StoreSpace, *arguments: Any, **options: Any) -> Any:
        if threading.current_thread().name.startswith("terrace-load"):
            answers.wait(PATIENCE)
            answered.set()
        return read(space, *arguments, **options)

    monkeypatch.setattr(StoreSpace, "read", read_late)
    assert engine.load(engine.request("b", 4 * TOKENS + 1), list(range(30, 35))) == set(range(30, 34))
    assert not answered.is_set()
    computed = engine.fill(list(range(30, 34)), seed=2)
    answers.set()
    side._loaders.stop(PATIENCE)
    assert answered.is_set()
    for name, cache in engine.caches.items():
        assert torch.equal(cache[30:34], computed[name])
    assert engine.step() == (set(), set()), "what failed is told once"


@pytest.mark.parametrize("change", [{"model": "other/model"}, {"ranks": 2, "rank": 1}])
def test_engines_that_differ_share_nothing(daemon: Daemon, change: dict[str, Any]) -> None:
    """Another model or rank finds the blocks."""
    one, two = TerraceConnector, KVConnectorRole.WORKER
    spaces = []
    for changes in ({}, change):
        connector = one(vllm_config(daemon.socket, **changes), two, cache_config())
        connector.register_kv_caches(tensors())
        layout = connector.get_handshake_metadata()
        assert layout is not None
        spaces += layout.manifests  # type: ignore[attr-defined]
        connector.shutdown()
    assert None not in spaces
    assert spaces[0] != spaces[1]


def test_models_that_are_not_supported_run_without(daemon: Daemon) -> None:
    """A model with recurrent states: the engine starts, and nothing is matched or stored."""
    config = vllm_config(daemon.socket)
    state = MambaSpec(block_size=TOKENS, shapes=((2, 2),), dtypes=(torch.float32,))
    groups = [KVCacheGroupSpec(LAYERS, spec()), KVCacheGroupSpec(["states"], state)]
    caches = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups)
    scheduler = TerraceConnector(config, KVConnectorRole.SCHEDULER, caches)
    worker = TerraceConnector(config, KVConnectorRole.WORKER, caches)
    worker.register_kv_caches(tensors())
    scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): worker.get_handshake_metadata()})  # type: ignore[dict-item]
    request = SimpleNamespace(request_id="a", num_tokens=999, block_hashes=[b"x"] * 31)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    assert supports_hma(scheduler)


def test_every_rank_must_hold_a_block(daemon: Daemon) -> None:
    """Two ranks, and one of them has stored: half a block is a hit."""
    configs = [vllm_config(daemon.socket, rank=rank, ranks=2) for rank in range(2)]
    scheduler = TerraceConnector(configs[0], KVConnectorRole.SCHEDULER, cache_config())
    engine = Engine(daemon.socket, ranks=2)
    other = TerraceConnector(configs[1], KVConnectorRole.WORKER, cache_config())
    other.register_kv_caches(tensors())
    layouts = {(0, 0): engine.worker.get_handshake_metadata(), (0, 1): other.get_handshake_metadata()}
    engine.scheduler.set_xfer_handshake_metadata_pp_aware(layouts)  # type: ignore[arg-type]
    engine.save(engine.request("a", 4 * TOKENS), list(range(4)))
    engine.until("blocks_stored", 4)
    assert engine.match(engine.request("b", 5 * TOKENS)) == 0
    for part in (scheduler, other):
        part.shutdown()
    engine.stop()


def test_reset_drops_what_is_stored(engine: Engine) -> None:
    """Weights changed under the same name: nothing old may be loaded, and storing works again."""
    engine.save(engine.request("a", 4 * TOKENS), list(range(4)))
    engine.until("blocks_stored", 4)
    assert engine.scheduler.reset_cache() is True
    engine.step()
    assert engine.match(engine.request("b", 5 * TOKENS)) == 0
    engine.save(engine.request("c", 4 * TOKENS), list(range(4)))
    engine.until("blocks_stored", 8)


@pytest.mark.parametrize(
    "extra", [{"lode": "async"}, {"load": "sometimes"}, {"blocks_min": 0}, {"wait_seconds": -1}, {"blocks_min": "x"}]
)
def test_options_that_cannot_be_meant(extra: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="kv_connector_extra_config"):
        Options.of(extra, "kv_both")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor: there is nothing to be bound to")
def test_threads_are_not_bound_to_the_computation(daemon: Daemon) -> None:
    """vLLM binds the thread that starts us to the processors that compute: saves and loads take them away there."""
    script = f"""
import os, threading
from pathlib import Path
all_of_them = os.sched_getaffinity(os.getppid())
os.sched_setaffinity(0, {{min(all_of_them)}})
import test_vllm
engine = test_vllm.Engine({str(daemon.socket)!r})
ours = [thread for thread in threading.enumerate() if thread.name.startswith(("terrace-save", "terrace-load"))]
assert len(ours) == 2, ours
assert all(os.sched_getaffinity(thread.native_id) == all_of_them for thread in ours)
named = [task.parent.name for task in Path("/proc/self/task").glob("*/comm") if "terrace" in task.read_text()]
assert len(named) >= 2, "the client has threads too"
assert all(os.sched_getaffinity(int(task)) == all_of_them for task in named)
assert os.sched_getaffinity(0) == {{min(all_of_them)}}, "the computation stays where it was"
engine.stop()
"""
    # Importing vLLM alone takes a minute on a busy machine.
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent, timeout=5 * PATIENCE)
