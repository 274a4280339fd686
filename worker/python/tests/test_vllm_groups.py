"""Models with several KV-cache groups or windows: the connector beside vLLM's own cache manager, which decides which
blocks a hit needs. Skipped where there is no vLLM."""

import itertools
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Daemon, wait_for

# What others deprecate while they are imported is not ours.
warnings.simplefilter("default")
torch = pytest.importorskip("torch", reason="torch is not installed: the vLLM connector is not tested here")
pytest.importorskip("vllm", reason="vLLM is not installed: its connector is not tested here (make test-vllm does)")

from terrace_kv._engine import StoreSpace  # noqa: E402
from terrace_kv.vllm.connector import TerraceConnector  # noqa: E402
from terrace_kv.vllm.groups import NULL_BLOCK, plan  # noqa: E402
from test_vllm import vllm_config  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.utils.hashing import sha256_cbor  # noqa: E402
from vllm.v1.core.kv_cache_manager import KVCacheManager  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")
BLOCKS = 120
WINDOW = 70
names = itertools.count()


def spec(kind: Any, tokens: int = 32, **more: Any) -> Any:
    return kind(block_size=tokens, num_kv_heads=2, head_size=16, dtype=torch.bfloat16, **more)


def caches(*specs: Any, hash_tokens: int | None = 32) -> KVCacheConfig:
    """Two layers for each group."""
    groups = [
        KVCacheGroupSpec([f"layers.{2 * index + half}.attn" for half in range(2)], one)
        for index, one in enumerate(specs)
    ]
    config = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups)
    # Told since vLLM 0.32.
    config.hash_block_size = hash_tokens
    return config


FULL = spec(FullAttentionSpec)
SLIDING = spec(SlidingWindowSpec, sliding_window=WINDOW)
HYBRIDS = {
    "full and window": caches(FULL, SLIDING),
    "window first, and two of them": caches(SLIDING, FULL, SLIDING),
    "blocks of two sizes": caches(spec(FullAttentionSpec, 64), SLIDING),
    "window alone": caches(SLIDING),
}


class Model:
    """vLLM's cache manager, the connector's two halves, and tensors in which every position has bytes of its own."""

    def __init__(self, socket: Any, config: KVCacheConfig, **changes: Any) -> None:
        self.config = config
        step = max(group.kv_cache_spec.block_size for group in config.kv_cache_groups)
        self.manager = KVCacheManager(
            config, 8192, scheduler_block_size=step, hash_block_size=config.hash_block_size, max_in_flight_tokens=8192
        )
        settings = vllm_config(socket, **changes)
        self.scheduler = TerraceConnector(settings, KVConnectorRole.SCHEDULER, config)
        self.worker = TerraceConnector(settings, KVConnectorRole.WORKER, config)
        self.tensors = {
            layer: torch.zeros((BLOCKS, 2, group.kv_cache_spec.block_size, 32), dtype=torch.bfloat16)
            for group in config.kv_cache_groups
            for layer in group.layer_names
        }
        self.worker.register_kv_caches(self.tensors)
        self.scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): self.worker.get_handshake_metadata()})  # type: ignore[dict-item]
        self.stored = 0.0

    def request(self, tokens: int, seed: int = 0) -> Request:
        hasher = get_request_block_hasher(self.config.hash_block_size, sha256_cbor)
        prompt = [(seed * 7919 + position) % 50_000 for position in range(tokens)]
        parameters = SamplingParams(max_tokens=1)
        parameters.update_from_generation_config({}, eos_token_id=0)
        return Request(f"r{next(names)}", prompt, parameters, None, block_hasher=hasher)

    def match(self, request: Request, computed: int = 0) -> int:
        found: list[int] = []

        def answered() -> bool:
            tokens, _ = self.scheduler.get_num_new_matched_tokens(request, computed)
            found.append(-1 if tokens is None else tokens)
            return tokens is not None

        wait_for(answered, "an answer")
        return found[-1]

    def value(self, layer: str, block: int) -> int:
        """What a layer has for a block of a prompt, by its place in the prompt. Never zero."""
        return 1 + (hash((layer, block)) % 120)

    def step(self, request: Request | None = None, scheduled: int = 0) -> tuple[set[str], set[str]]:
        """One step; answers the requests whose loads ended, and those of them that failed."""
        new = []
        if request is not None:
            tables = self.manager.get_block_ids(request.request_id)
            new = [SimpleNamespace(req_id=request.request_id, block_ids=tables, num_computed_tokens=0)]
            new[0].num_computed_tokens = request.num_computed_tokens
            request.num_computed_tokens += scheduled
        output = SimpleNamespace(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[], num_computed_tokens=[], new_block_ids=[], resumed_req_ids=set()
            ),
            num_scheduled_tokens={request.request_id: scheduled} if request is not None else {},
        )
        orders = self.scheduler.build_connector_meta(output)
        self.worker.bind_connector_metadata(orders)
        self.worker.start_load_kv(None)
        for layer in self.tensors:
            self.worker.wait_for_layer_load(layer)
        self.worker.wait_for_save()
        results = self.worker.get_transfer_results(set())
        assert not self.worker.get_block_ids_with_load_errors(), "vLLM ends itself when several groups report blocks"
        self.worker.clear_connector_metadata()
        self.scheduler.update_connector_output(
            SimpleNamespace(  # type: ignore[arg-type]
                finished_recving=results.finished_recving,
                failed_recving=results.failed_recving,
                invalid_block_ids=set(),
            )
        )
        stats = self.worker.get_kv_connector_stats()
        self.stored += stats.data.get("blocks_stored", 0) if stats else 0
        return results.finished_recving, results.failed_recving

    def compute(self, request: Request) -> None:
        """All of a prompt, from its first token on, and its blocks into the store."""
        assert self.manager.allocate_slots(request, request.num_tokens) is not None
        self.scheduler.update_state_after_alloc(request, self.manager.get_blocks(request.request_id), 0)
        for group, ids in zip(self.groups, self.manager.get_block_ids(request.request_id), strict=True):
            for layer in group.layer_names:
                for place, block in enumerate(ids):
                    self.tensors[layer][block] = self.value(layer, place)
        full = sum(request.num_tokens // group.kv_cache_spec.block_size for group in self.groups)
        self.step(request, request.num_tokens)

        def stored() -> bool:
            self.step()
            return self.stored >= full

        wait_for(stored, f"{full} blocks to be stored")

    @property
    def groups(self) -> list[Any]:
        return self.config.kv_cache_groups

    def load(self, request: Request, tokens: int) -> tuple[bool, Any]:
        """Gives the request blocks as vLLM's scheduler does; whether its load succeeded, and its block tables."""
        assert self.manager.allocate_slots(request, 0, num_external_computed_tokens=tokens, delay_cache_blocks=True)
        tables = self.manager.get_block_ids(request.request_id)
        self.scheduler.update_state_after_alloc(request, self.manager.get_blocks(request.request_id), tokens)
        failed: set[str] = set()

        def ended() -> bool:
            finished, bad = self.step()
            failed.update(bad)
            return request.request_id in finished

        wait_for(ended, "the load's end")
        return request.request_id not in failed, tables

    def check(self, tokens: int, tables: Any) -> int:
        """Everything that vLLM reads behind so many tokens is what was computed there; answers how many blocks."""
        checked = 0
        for group, ids in zip(self.groups, tables, strict=True):
            for place, block in enumerate(ids[: tokens // group.kv_cache_spec.block_size]):
                if block == NULL_BLOCK:
                    continue
                checked += 1
                for layer in group.layer_names:
                    expected = self.value(layer, place)
                    assert (self.tensors[layer][block] == expected).all(), f"{layer}: block {place}"
        for tensor in self.tensors.values():
            assert not tensor[NULL_BLOCK].any(), "vLLM's block for nothing was written"
        return checked

    def end(self, request: Request) -> None:
        self.scheduler.request_finished_all_groups(request, self.manager.get_block_ids(request.request_id))
        self.manager.free(request)

    def stop(self) -> None:
        self.worker.shutdown()
        self.scheduler.shutdown()


@pytest.fixture(autouse=True)
def seeded() -> None:
    init_none_hash(sha256_cbor)


@pytest.fixture
def pair(request: pytest.FixtureRequest, daemon: Daemon) -> Iterator[tuple[Model, Model]]:
    """Two engines with the same model."""
    models = Model(daemon.socket, request.param), Model(daemon.socket, request.param)
    yield models
    for model in models:
        model.stop()


every_hybrid = pytest.mark.parametrize("pair", HYBRIDS.values(), ids=HYBRIDS.keys(), indirect=True)


@every_hybrid
def test_what_one_engine_computes_another_loads(pair: tuple[Model, Model], daemon: Daemon) -> None:
    """Blocks of one group in the tensors of another, a window's in the place of those before it, or too few of them."""
    one, other = pair
    one.compute(one.request(320 + 5))
    again = other.request(320 + 5)
    assert other.match(again) == 320
    fine, tables = other.load(again, 320)
    assert fine
    window = -(-(WINDOW - 1) // 32)
    whole = [group for group in other.groups if isinstance(group.kv_cache_spec, FullAttentionSpec)]
    least = sum(320 // group.kv_cache_spec.block_size for group in whole)
    windows = len(other.groups) - len(whole)
    assert other.check(320, tables) == least + windows * window
    daemon.expect_leases(0)


@every_hybrid
def test_shorter_prompts_hit_as_well(pair: tuple[Model, Model]) -> None:
    """Only the windows at the end of what was computed are kept: a prompt that ends or branches before finds none."""
    one, other = pair
    one.compute(one.request(320))
    for tokens, expected in ((200, 192), (129, 128), (97, 64 if one.scheduler._plan.step == 64 else 96)):
        shorter = other.request(tokens)
        assert other.match(shorter) == expected
        fine, tables = other.load(shorter, expected)
        assert fine
        other.check(expected, tables)
        other.end(shorter)
    assert other.match(other.request(320, seed=1)) == 0


@pytest.mark.parametrize("pair", [HYBRIDS["full and window"]], indirect=True)
def test_a_hit_ends_behind_a_whole_window(pair: tuple[Model, Model], daemon: Daemon) -> None:
    """A block inside the last window is not there, though every block of the other group is: such a hit would make
    tokens attend to nothing."""
    one, other = pair
    prompt = one.request(320)
    one.compute(prompt)
    missing = 8
    part = other.worker._worker._parts[1]  # type: ignore[union-attr]
    hidden = bytes(prompt.block_hashes[missing])
    present = type(part.space.store).present  # type: ignore[union-attr]

    def without(self: Any, spaces: list[StoreSpace], keys: Any, mode: str = "set") -> list[bool]:
        found = present(self, spaces, keys, mode)
        is_window = spaces[0].manifest.kind == "window"
        return [flag and not (is_window and key == hidden) for flag, key in zip(found, keys, strict=True)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(part.space.store), "present", without)  # type: ignore[union-attr]
        # Blocks 7, 8 and 9 are in the window behind 320 tokens, 6 to 8 behind 288; 5 to 7 behind 256.
        assert other.match(other.request(325)) == 256


@every_hybrid
def test_a_lost_block_fails_the_request(pair: tuple[Model, Model], daemon: Daemon) -> None:
    """The daemon dies between promise and load: vLLM must not go on from the middle of such a load, and must not be
    told of blocks, which ends it."""
    one, other = pair
    one.compute(one.request(320))
    again = other.request(325)
    tokens = other.match(again)
    assert tokens == 320
    daemon.process.kill()
    daemon.process.wait()
    fine, _ = other.load(again, tokens)
    assert not fine
    assert other.match(other.request(325)) == 0


def test_what_came_from_the_store_is_not_stored_again(daemon: Daemon) -> None:
    """The blocks that a window no longer reaches are nobody's after a load: their place must not be stored."""
    config = HYBRIDS["full and window"]
    one, other = Model(daemon.socket, config), Model(daemon.socket, config)
    one.compute(one.request(320))
    again = other.request(420)
    tokens = other.match(again)
    assert tokens == 320
    fine, _ = other.load(again, tokens)
    assert fine
    other.manager.cache_blocks(again, tokens)
    again.num_computed_tokens = tokens
    assert other.manager.allocate_slots(again, 420 - tokens) is not None
    saves: list[Any] = []
    queue = other.worker._worker.queue_saves  # type: ignore[union-attr]
    other.worker._worker.queue_saves = lambda orders: (saves.extend(orders.saves), queue(orders))  # type: ignore[union-attr]
    other.scheduler.update_state_after_alloc(again, other.manager.get_blocks(again.request_id), 0)
    other.step(again, 420 - tokens)
    assert sorted((save.run.group, len(save.run.keys)) for save in saves) == [(0, 3), (1, 3)]
    assert all(NULL_BLOCK not in save.run.block_ids for save in saves)
    assert all(save.run.keys[0] == bytes(again.block_hashes[10]) for save in saves)
    one.stop()
    other.stop()


@pytest.mark.parametrize(
    "one",
    [SLIDING, spec(SlidingWindowSpec, sliding_window=32), spec(ChunkedLocalAttentionSpec, attention_chunk_size=96)],
)
def test_windows_are_those_of_vllm(one: Any) -> None:
    """The first block that is read is another than vLLM's own: one too late is a wrong answer."""
    config = caches(one)
    manager = KVCacheManager(config, 8192, scheduler_block_size=32, hash_block_size=32, max_in_flight_tokens=8192)
    theirs = manager.coordinator.single_type_managers[0]
    group = plan(config).groups[0]
    for computed in range(2048):
        assert group.first_needed(computed) == theirs.get_num_skipped_tokens(computed) // 32


def test_groups_that_are_not_supported() -> None:
    """A recurrent state is no block of tokens; hashes that do not fit blocks name others."""
    state = MambaSpec(block_size=64, shapes=((2, 2),), dtypes=(torch.float32,))
    assert "MambaSpec" in plan(caches(FULL, state)).reason
    assert "hashes of unknown many" in plan(caches(spec(FullAttentionSpec, 64), SLIDING, hash_tokens=None)).reason
    assert "hashes of 48" in plan(caches(FULL, hash_tokens=48)).reason
    assert "no KV cache" in plan(caches()).reason


def test_layers_mode_waits_for_whole_loads(daemon: Daemon) -> None:
    """A step that runs already cannot be told that its load failed: with several groups nothing is loaded under it."""
    model = Model(daemon.socket, HYBRIDS["full and window"], extra={"load": "layers"})
    model.compute(model.request(320))
    again = model.request(325, seed=0)
    wait_for(lambda: model.scheduler.get_num_new_matched_tokens(again, 0)[0] is not None, "an answer")
    assert model.scheduler.get_num_new_matched_tokens(again, 0) == (320, True)
    model.stop()
