"""SGLang's storage backend with SGLang's own factory and fault injector, over a pool on the CPU. Skipped where there
is no SGLang."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon, wait_for

# What others deprecate while they are imported is not ours.
warnings.simplefilter("default")
torch = pytest.importorskip("torch", reason="torch is not installed: the SGLang backend is not tested here")
pytest.importorskip("sglang", reason="SGLang is not installed: its backend is not tested here")

from sglang.srt.environ import envs  # noqa: E402
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, HiCacheStorageExtraInfo  # noqa: E402
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory  # noqa: E402
from sglang.srt.mem_cache.utils import get_hash_str  # noqa: E402
from test_events import Router  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")
PAGE = 16
PAGES = 40
LAYERS, WIDTH = 3, 32


class Pool:
    """A host pool of K and V. ``page_first``: a page is one piece of each; ``layer_first``: it is scattered."""

    def __init__(self, layout: str = "page_first", dtype: Any = torch.bfloat16, page: int = PAGE) -> None:
        self.layout, self.dtype, self.page_size = layout, dtype, page
        # Two halves, K and V: tokens of a page lie together, layer by layer.
        self.kv_buffer = torch.zeros((2, PAGES, page, LAYERS, WIDTH), dtype=dtype)

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        if self.layout != "page_first":
            raise ValueError(f"Unsupported layout: {self.layout}")
        pages = [int(index) // self.page_size for index in indices[:: self.page_size]]
        addresses = [self.kv_buffer[half, page].data_ptr() for page in pages for half in range(2)]
        length = self.page_size * LAYERS * WIDTH * self.dtype.itemsize
        return addresses, [length] * len(addresses)

    def get_data_page(self, index: Any, flat: bool = True) -> Any:
        return self.kv_buffer[:, int(index) // self.page_size].flatten()

    def get_dummy_flat_data_page(self) -> Any:
        return torch.zeros(2 * self.page_size * LAYERS * WIDTH, dtype=self.dtype)

    def set_from_flat_data_page(self, index: Any, page: Any) -> None:
        self.kv_buffer[:, int(index) // self.page_size] = page.reshape(2, self.page_size, LAYERS, WIDTH)

    def fill(self, seed: int) -> Any:
        torch.manual_seed(seed)
        self.kv_buffer.copy_(torch.randn(self.kv_buffer.shape))
        return self.kv_buffer.clone()


def backend(socket: Path, pool: Pool, **changes: Any) -> Any:
    """As SGLang makes it, from its configuration."""
    extra = {
        "backend_name": "terrace",
        "module_path": "terrace_kv.sglang",
        "class_name": "TerraceStore",
        "interface_v1": 1,
        "socket": str(socket),
        **changes.pop("extra", {}),
    }
    fields = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": False,
        "is_page_first_layout": True,
        "model_name": "model",
        **changes,
    }
    config = HiCacheStorageConfig(extra_config=extra, **fields)
    made = StorageBackendFactory.create_backend("dynamic", config, pool)
    made.register_mem_pool_host(pool)
    return made


def names(count: int, start: int = 0) -> list[str]:
    return [f"{index:064x}" for index in range(start, start + count)]


def indices(first: int, count: int) -> Any:
    return torch.arange(first * PAGE, (first + count) * PAGE)


@pytest.mark.parametrize("layout", ["page_first", "layer_first"])
def test_pages_come_back(daemon: Daemon, layout: str) -> None:
    """Pages come back at other places, or with a gap taken for a hit."""
    pool = Pool(layout)
    there = pool.fill(1)
    store = backend(daemon.socket, pool)
    assert store.batch_set_v1(names(10), indices(0, 10), HiCacheStorageExtraInfo(prefix_keys=names(2, start=90)))
    assert store.batch_exists(names(12)) == 10
    assert store.batch_exists([*names(3), *names(1, start=70), *names(3, start=3)]) == 3
    assert store.exists(names(1)[0])
    other = Pool(layout)
    again = backend(daemon.socket, other)
    asked = [*names(3), *names(1, start=70), *names(6, start=3)]
    assert again.batch_get_v1(asked, indices(20, 10)) == [True] * 3 + [False] + [True] * 6
    assert torch.equal(other.kv_buffer[:, 20:23], there[:, 0:3])
    assert torch.equal(other.kv_buffer[:, 24:30], there[:, 3:9])
    assert not other.kv_buffer[:, :20].any()
    assert not other.kv_buffer[:, 23].any()
    daemon.expect_leases(0)


def test_flat_pages(daemon: Daemon) -> None:
    """The interface of single pages: the same blocks, seen from the other side."""
    pool = Pool()
    there = pool.fill(1)
    store = backend(daemon.socket, pool)
    pages = [pool.get_data_page(index * PAGE) for index in range(3)]
    assert store.batch_set(names(3), pages)
    assert store.set(names(4)[3], pages[0])
    found = store.batch_get(names(5), [pool.get_dummy_flat_data_page() for _ in range(5)])
    assert [page is not None for page in found] == [True] * 4 + [False]
    assert torch.equal(found[1], there[:, 1].flatten())
    assert torch.equal(store.get(names(1)[0], pool.get_dummy_flat_data_page()), pages[0])
    assert store.get(names(1, start=9)[0], pool.get_dummy_flat_data_page()) is None


def test_routers_find_pages_by_their_tokens(daemon: Daemon) -> None:
    """Pages that are kept under another name than SGLang's hash of their tokens would be nobody's to a router: what the
    backend stores is found by tokens alone."""
    tokens = list(range(3 * PAGE))
    hashes: list[str] = []
    for start in range(0, len(tokens), PAGE):
        hashes.append(get_hash_str(tokens[start : start + PAGE], hashes[-1] if hashes else None))
    store = backend(daemon.socket, Pool())
    assert all(store.batch_set_v1(hashes[:2], indices(0, 2)))
    assert all(store.batch_set_v1([f"{hashes[2]}_draft"], indices(2, 1)))
    router = Router(grpc=daemon.grpc)
    try:
        asked = {"tokens": tokens, "block_size": PAGE}
        wait_for(lambda: router.post("/check_blocks", asked) == (200, {"ranges": [[0, 2]]}), "two pages")
    finally:
        router.stop()


@pytest.mark.parametrize(
    "change",
    [{"model_name": "other"}, {"tp_rank": 1, "tp_size": 2}, {"pp_size": 2}],
)
def test_servers_that_differ_share_nothing(daemon: Daemon, change: dict[str, Any]) -> None:
    """Another model, rank or number of stages finds the pages."""
    backend(daemon.socket, Pool()).batch_set_v1(names(3), indices(0, 3))
    assert backend(daemon.socket, Pool()).batch_exists(names(3)) == 3
    assert backend(daemon.socket, Pool(), **change).batch_exists(names(3)) == 0


def test_one_writer_of_equal_ranks(daemon: Daemon) -> None:
    """With MLA all ranks have the same bytes: one writes, all read."""
    first, second = (backend(daemon.socket, Pool(), is_mla_model=True, tp_size=2, tp_rank=rank) for rank in range(2))
    assert second.batch_set_v1(names(3), indices(0, 3)) == [True] * 3
    assert first.batch_exists(names(3)) == 0
    first.batch_set_v1(names(3), indices(0, 3))
    assert second.batch_exists(names(3)) == 3


def test_under_injected_faults(daemon: Daemon) -> None:
    """SGLang's own injector fails and delays calls: what is answered as loaded must be right."""
    if not hasattr(envs, "SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY"):
        pytest.skip("this SGLang has no injector of faults (there is one from 0.5.23 on)")
    pool = Pool()
    there = pool.fill(1)
    with (
        envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY.override(0.005),
        envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE.override(0.3),
    ):
        store = backend(daemon.socket, pool)
    other = Pool()
    with (
        envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY.override(0.005),
        envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE.override(0.3),
    ):
        reader = backend(daemon.socket, other)
    assert type(store).__name__ == "HiCacheStorageFailureInjector"
    loaded = 0
    for turn in range(60):
        page = turn % 20
        store.batch_set_v1(names(1, start=page), indices(page, 1))
        other.kv_buffer.zero_()
        if reader.batch_get_v1(names(1, start=page), indices(page, 1)) == [True]:
            loaded += 1
            assert torch.equal(other.kv_buffer[:, page], there[:, page])
    assert 0 < loaded < 60
