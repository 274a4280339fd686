"""SGLang's HiCache keeps its third level in Terrace: ``TerraceStore`` is a storage backend that SGLang loads by name.

``--enable-hierarchical-cache --hicache-storage-backend dynamic --hicache-storage-backend-extra-config
'{"backend_name": "terrace", "module_path": "terrace_kv.sglang", "class_name": "TerraceStore", "interface_v1": 1,
"socket": "/run/terrace/lane.sock"}'``

A page of SGLang is one block. Pages are copied between SGLang's host pool and the daemon's memory, without a buffer
between them where the pool's layout keeps a page in few pieces (``page_first``), else through one flat page.
"""

import hashlib
import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig, HiCacheStorageExtraInfo

from ._engine import Store, StoreSpace, Target
from ._manifest import SpaceManifest
from ._sglang_hits import ALL_PAGES, BLOCK_GROUPS, KV, fold, pool_name
from ._sglang_pages import Pages, fill, page_tokens, pieces
from ._versions import advice, installed, sglang_shard, sglang_writes

logger = logging.getLogger("sglang.terrace_kv")

WAIT_SECONDS = 5.0
"""Longest wait of a read for blocks of slower tiers."""
MAMBA = "mamba"
HASH = re.compile("[0-9a-f]{64}")


def _key(key: str) -> bytes:
    """SGLang's keys are hexadecimal hashes, some with a suffix; as bytes they fit into a name. A bare hash is that of
    the page's tokens, and stays what it is: by it a router tells others what is there."""
    if HASH.fullmatch(key):
        return bytes.fromhex(key)
    return hashlib.blake2b(key.encode(), digest_size=32).digest()


def _keys(keys: Sequence[str] | None) -> list[bytes]:
    return [_key(key) for key in keys or []]


class TerraceStore(HiCacheStorage):
    """SGLang's third level. Each host pool has a space; of several pools, a page counts if SGLang's rule for each pool
    says so (interface v2)."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any] | None = None) -> None:
        self._config = storage_config
        extra = storage_config.extra_config or {}
        if told := advice("sglang", installed("sglang")):
            logger.warning("terrace: %s", told)
        self._wait = float(extra.get("wait_seconds", WAIT_SECONDS))
        self._fingerprint = str(extra.get("model_fingerprint", "")).encode()[:64] or b"sglang"
        self._store = Store(Target.of(extra, "sglang"), logger)
        self._pools: dict[str, Pages] = {}
        # A server that starts without a daemon says so at once.
        self._store.session()

    # Pools.

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Takes the pool of K and V. Its type and layout make the space: SGLang's keys do not tell them apart."""
        super().register_mem_pool_host(mem_pool_host)
        self._pools[KV] = self._pages(mem_pool_host, KV)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Takes a further pool: states, windows, indexes. The pool of K and V comes this way too, a second time."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        name = pool_name(host_pool_name)
        if name != KV or KV not in self._pools:
            self._pools[name] = self._pages(host_pool, name)

    def _pages(self, pool: Any, name: str) -> Pages:
        zero_copy, lengths = pieces(pool)
        types = [str(getattr(pool, of, "")) for of in ("temporal_dtype", "conv_dtype")]
        described = f"{type(pool).__name__};{getattr(pool, 'layout', '')};{types};{lengths};{zero_copy}"
        digest = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()
        topology, rank = self._place(name)
        model = str(self._config.model_name)
        manifest = SpaceManifest(
            model=model.encode()[-256:].decode(errors="ignore"),
            model_fingerprint=self._fingerprint,
            dtype=str(getattr(pool, "dtype", "bytes")).removeprefix("torch."),
            layout=f"sglang,opaque,{digest}" if name == KV else f"sglang,{name},{digest}",
            tokens_per_block=page_tokens(pool),
            block_bytes=sum(lengths),
            topology=topology,
            rank=rank * self._config.pp_size + self._config.pp_rank,
            engine="sglang",
        )
        return Pages(self._store, StoreSpace(self._store, manifest), pool, zero_copy=zero_copy, wait=self._wait)

    def _place(self, name: str) -> tuple[str, int]:
        """Topology and rank. What a model keeps once for all ranks (MLA) is theirs together; Mamba's states are not."""
        config = self._config
        if config.is_mla_model and name != MAMBA:
            rank, parts = sglang_shard(config)
            return f"mla,dcp{parts},pp{config.pp_size}", rank
        rank = config.tp_rank * config.attn_cp_size + config.attn_cp_rank
        return f"tp{config.tp_size},pp{config.pp_size},cp{config.attn_cp_size}", rank

    @staticmethod
    def _parent(extra_info: HiCacheStorageExtraInfo | None) -> bytes | None:
        before = extra_info.prefix_keys if extra_info is not None else None
        return _key(before[-1]) if before else None

    # Several pools.

    def batch_exists_v2(self, keys: list[str], pool_transfers: list[Any] | None = None, extra_info: Any = None) -> Any:
        there = {KV: self._present(KV, keys)}
        for transfer in pool_transfers or []:
            name = pool_name(transfer.name)
            there[name] = self._present(name, (transfer.keys or []) if transfer.hit_policy == BLOCK_GROUPS else keys)
        return fold(there, pool_transfers or [])

    def _present(self, name: str, keys: list[str]) -> list[bool]:
        pages = self._pools.get(name)
        return [False] * len(keys) if pages is None else self._store.present([pages.space], _keys(keys))

    def batch_get_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        return {transfer.name: self._get(transfer) for transfer in transfers}

    def _get(self, transfer: Any) -> list[bool]:
        keys, pages = _keys(transfer.keys), self._pools.get(pool_name(transfer.name))
        return [False] * len(keys) if pages is None else pages.get(keys, transfer.host_indices)

    def batch_set_v2(
        self, transfers: list[Any], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        return {transfer.name: self._set(transfer, extra_info) for transfer in transfers}

    def _set(self, transfer: Any, extra_info: HiCacheStorageExtraInfo | None) -> list[bool]:
        name, keys = pool_name(transfer.name), _keys(transfer.keys)
        if name != MAMBA and not sglang_writes(self._config):
            return [True] * len(keys)
        pages = self._pools.get(name)
        # The last pages of a chain alone have no parent there.
        parent = self._parent(extra_info) if transfer.hit_policy == ALL_PAGES else None
        return [False] * len(keys) if pages is None else pages.put(keys, transfer.host_indices, parent)

    # Pages of the pool of K and V.

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        if not sglang_writes(self._config):
            return [True] * len(keys)
        pages = self._pools.get(KV)
        return [False] * len(keys) if pages is None else pages.put(_keys(keys), host_indices, self._parent(extra_info))

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        pages = self._pools.get(KV)
        return [False] * len(keys) if pages is None else pages.get(_keys(keys), host_indices)

    # Flat pages.

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        pages = self._pools.get(KV)
        if pages is None or target_locations is None:
            return [None] * len(keys)
        good = pages.read(_keys(keys), target_locations)
        return [target if fine else None for target, fine in zip(target_locations, good, strict=True)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return self.batch_set([key], [value])

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        if not sglang_writes(self._config):
            return True
        pages = self._pools.get(KV)
        if pages is None or values is None:
            return False
        return all(pages.space.put(_keys(keys), lambda index, frame: fill(frame, values[index]), wait=self._wait))

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        pages = self._pools.get(KV)
        return 0 if pages is None else self._store.prefix([pages.space], _keys(keys))

    def clear(self) -> None:
        for pages in self._pools.values():
            pages.space.clear()

    def close(self) -> None:
        self._store.close()
