"""SGLang's interface of several host pools (v2), beside SGLang's own file backend. Skipped where there is no SGLang."""

import random
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Daemon

# What others deprecate while they are imported is not ours.
warnings.simplefilter("default")
torch = pytest.importorskip("torch", reason="torch is not installed: the SGLang backend is not tested here")
pytest.importorskip("sglang", reason="SGLang is not installed: its backend is not tested here")

from sglang.srt.environ import envs  # noqa: E402
from sglang.srt.mem_cache import hicache_storage  # noqa: E402
from sglang.srt.mem_cache.hicache_storage import (  # noqa: E402
    HiCacheFile,
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
)
from test_sglang import PAGE, Pool, backend, indices, names  # noqa: E402

if not hasattr(hicache_storage, "PoolTransfer"):
    pytest.skip("this SGLang has no interface of several pools", allow_module_level=True)
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")
STATES, STATE = 24, 100


class States:
    """A host pool of states, one a page, which can only be asked for flat pages."""

    page_size, layout, dtype = 1, "layer_first", torch.uint8

    def __init__(self) -> None:
        self.states = torch.zeros((STATES, STATE), dtype=torch.uint8)

    def get_page_buffer_meta(self, _indices: Any) -> Any:
        raise ValueError("requires page_first layout")

    def get_data_page(self, index: int, flat: bool = True) -> Any:
        return self.states[index].clone()

    def get_dummy_flat_data_page(self) -> Any:
        return torch.zeros(STATE, dtype=torch.uint8)

    def set_from_flat_data_page(self, index: int, page: Any) -> None:
        self.states[index] = page


def server(socket: Path, **changes: Any) -> SimpleNamespace:
    """A server with K and V, an index beside them and Mamba's states, as its controller registers them."""
    pools = SimpleNamespace(kv=Pool(), indexer=Pool(dtype=torch.uint8), mamba=States())
    store = backend(socket, pools.kv, **changes)
    for name in ("kv", "indexer", "mamba"):
        store.register_mem_host_pool_v2(getattr(pools, name), PoolName(name))
    if hasattr(HiCacheStorage, "on_host_pools_registered"):
        # Controllers tell from 0.5.23 on.
        store.on_host_pools_registered()
    pools.store = store
    return pools


def every(first: int, count: int, keys: list[str]) -> list[PoolTransfer]:
    """All pages of K, V and the index, and the states of the last two."""
    states = torch.arange(first, first + 2)
    return [
        PoolTransfer(name=PoolName.KV, host_indices=indices(first, count), keys=keys),
        PoolTransfer(name=PoolName.INDEXER, host_indices=indices(first, count), keys=keys),
        PoolTransfer(name=PoolName.MAMBA, host_indices=states, keys=keys[-2:], hit_policy=PoolHitPolicy.TRAILING_PAGES),
    ]


def fill(pools: SimpleNamespace, seed: int = 1) -> None:
    pools.kv.fill(seed)
    pools.indexer.kv_buffer.copy_(torch.randint(0, 255, pools.indexer.kv_buffer.shape))
    pools.mamba.states.copy_(torch.randint(1, 255, pools.mamba.states.shape))


def test_pages_of_all_pools_come_back(daemon: Daemon) -> None:
    """Pools have the same keys: pages of one come back in another, or at the places of other pages."""
    one, two = server(daemon.socket), server(daemon.socket)
    fill(one)
    found = one.store.batch_set_v2(every(0, 6, names(6)), HiCacheStorageExtraInfo(prefix_keys=names(2, start=90)))
    assert found == {PoolName.KV: [True] * 6, PoolName.INDEXER: [True] * 6, PoolName.MAMBA: [True] * 2}
    asked = every(10, 6, names(6))
    result = two.store.batch_exists_v2(names(8), asked[1:])
    assert (result.kv_hit_pages, result.extra_pool_hit_pages) == (6, {"kv": 6, PoolName.INDEXER: 6, PoolName.MAMBA: 6})
    assert two.store.batch_get_v2(asked) == found
    assert torch.equal(two.kv.kv_buffer[:, 10:16], one.kv.kv_buffer[:, :6])
    assert torch.equal(two.indexer.kv_buffer[:, 10:16], one.indexer.kv_buffer[:, :6])
    assert torch.equal(two.mamba.states[10:12], one.mamba.states[:2])
    assert not two.mamba.states[:10].any()
    assert two.store.batch_exists(names(8)) == 6, "pages of K and V are the same by both interfaces"
    two.store.clear()
    assert two.store.batch_exists_v2(names(8), asked[1:]).kv_hit_pages == 0
    daemon.expect_leases(0)


def test_what_does_not_fit_is_not_loaded(daemon: Daemon) -> None:
    """Indices of another number of pages, no indices, or a pool that nobody registered: no page, and no exception."""
    one = server(daemon.socket)
    fill(one)
    assert one.store.batch_set_v2(every(0, 4, names(4)))
    short = PoolTransfer(name=PoolName.KV, host_indices=indices(0, 3), keys=names(4))
    none = PoolTransfer(name=PoolName.INDEXER, keys=names(4))
    unknown = PoolTransfer(name=PoolName.SWA, host_indices=indices(0, 4), keys=names(4))
    for call in (one.store.batch_get_v2, one.store.batch_set_v2):
        assert call([short, none, unknown]) == dict.fromkeys((PoolName.KV, PoolName.INDEXER, PoolName.SWA), [False] * 4)
    assert one.store.batch_exists_v2(names(4), [unknown]).kv_hit_pages == 0, "a pool without a page gates"
    assert one.store.batch_get_v2([PoolTransfer(name=PoolName.KV, host_indices=indices(0, 0))]) == {PoolName.KV: []}


def test_states_belong_to_one_rank(daemon: Daemon) -> None:
    """With MLA the ranks share K, V and the index, which one writes; each has states of its own."""
    ranks = [server(daemon.socket, is_mla_model=True, tp_size=2, tp_rank=rank) for rank in range(2)]
    for rank, pools in enumerate(ranks):
        fill(pools, seed=rank)
    ranks[1].store.batch_set_v2(every(0, 4, names(4)))
    assert ranks[0].store.batch_exists_v2(names(4)).kv_hit_pages == 0, "rank 1 writes no pages of all"
    ranks[0].store.batch_set_v2(every(0, 4, names(4)))
    there = [pools.mamba.states[:2].clone() for pools in ranks]
    for pools, states in zip(ranks, there, strict=True):
        assert pools.store.batch_get_v2(every(10, 4, names(4)))[PoolName.MAMBA] == [True] * 2
        assert torch.equal(pools.mamba.states[10:12], states)
    assert torch.equal(ranks[1].kv.kv_buffer[:, 10:14], ranks[0].kv.kv_buffer[:, :4])


def test_hits_are_those_of_sglangs_file_backend(daemon: Daemon, folder: Path) -> None:
    """A gap in a pool is passed over, or a state in the middle counts: both backends are asked about the same pages."""
    one = server(daemon.socket)
    fill(one)
    config = HiCacheStorageConfig(
        tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, is_mla_model=False,
        enable_storage_metrics=False, is_page_first_layout=True, model_name="model",
    )  # fmt: skip
    chance, lengths = random.Random(7), set()
    for turn in range(25):
        theirs = HiCacheFile(config, str(folder / f"file{turn}"))
        keys = names(8, start=100 * turn)
        for name in ("kv", "indexer", "mamba"):
            theirs.register_mem_host_pool_v2(getattr(one, name), PoolName(name))
            kept = [at for at in range(8) if chance.random() < 0.8]
            tokens = 1 if name == "mamba" else PAGE
            places = torch.cat([torch.arange(at * tokens, (at + 1) * tokens) for at in kept])
            transfer = PoolTransfer(name=PoolName(name), host_indices=places, keys=[keys[at] for at in kept])
            for store in (one.store, theirs):
                assert store.batch_set_v2([transfer]) == {transfer.name: [True] * len(kept)}
        asked = [
            PoolTransfer(name=PoolName.INDEXER),
            PoolTransfer(name=PoolName.MAMBA, keys=keys[: 1 + turn % 3], hit_policy=PoolHitPolicy.TRAILING_PAGES),
        ]
        ours, file = (store.batch_exists_v2(keys, asked) for store in (one.store, theirs))
        restorable = getattr(file, "restorable_prefix_pages", None)
        if restorable is None:
            # Before 0.5.23 it takes the least of what each pool reaches, where another pool need not have a state.
            assert ours.kv_hit_pages <= file.kv_hit_pages, turn
        else:
            assert (ours.kv_hit_pages, ours.restorable_prefix_pages) == (file.kv_hit_pages, restorable), turn
        if file.kv_hit_pages:
            assert ours.extra_pool_hit_pages == file.extra_pool_hit_pages, turn
        lengths.add(ours.kv_hit_pages)
    assert len(lengths) > 3, "prefixes of many lengths were asked for"


def test_groups_of_pages_gate_nothing(daemon: Daemon) -> None:
    """Groups say how far they reach, by whole groups; an incomplete one neither counts nor keeps K and V back."""
    if not hasattr(PoolHitPolicy, "BLOCK_GROUPS"):
        pytest.skip("this SGLang has no groups of pages")
    one = server(daemon.socket)
    fill(one)
    one.store.batch_set_v2(every(0, 8, names(8))[:1])
    grouped = PoolTransfer(name=PoolName.INDEXER, host_indices=indices(0, 3), keys=names(3, start=50))
    one.store.batch_set_v2([grouped])
    asked = PoolTransfer(
        name=PoolName.INDEXER,
        keys=names(4, start=50),
        hit_policy=PoolHitPolicy.BLOCK_GROUPS,
        block_pages=4,
        group_pages=2,
    )
    result = one.store.batch_exists_v2(names(8), [asked])
    assert result.kv_hit_pages == 8
    assert result.extra_pool_hit_pages == {"kv": 8, PoolName.INDEXER: 4}


def test_pools_under_injected_faults(daemon: Daemon) -> None:
    """SGLang's own injector fails and delays calls: what is answered as loaded must be right, in every pool."""
    if not hasattr(envs, "SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY"):
        pytest.skip("this SGLang has no injector of faults (there is one from 0.5.23 on)")
    with (
        envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY.override(0.005),
        envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE.override(0.3),
    ):
        one, two = server(daemon.socket), server(daemon.socket)
    assert type(one.store).__name__ == "HiCacheStorageFailureInjector"
    fill(one)
    loaded = 0
    for turn in range(60):
        page = turn % 12
        one.store.batch_set_v2(every(page, 2, names(2, start=page * 10)))
        for buffer in (two.kv.kv_buffer, two.indexer.kv_buffer, two.mamba.states):
            buffer.zero_()
        found = two.store.batch_get_v2(every(page, 2, names(2, start=page * 10)))
        for at in range(2):
            if found.get(PoolName.KV, [False] * 2)[at]:
                loaded += 1
                assert torch.equal(two.kv.kv_buffer[:, page + at], one.kv.kv_buffer[:, page + at])
            if found.get(PoolName.MAMBA, [False] * 2)[at]:
                assert torch.equal(two.mamba.states[page + at], one.mamba.states[page + at])
    assert 0 < loaded < 120
