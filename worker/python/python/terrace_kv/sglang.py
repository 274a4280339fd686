"""SGLang's HiCache keeps its third level in Terrace: ``TerraceStore`` is a storage backend that SGLang loads by name.

``--enable-hierarchical-cache --hicache-storage-backend dynamic --hicache-storage-backend-extra-config
'{"backend_name": "terrace", "module_path": "terrace_kv.sglang", "class_name": "TerraceStore", "interface_v1": 1,
"socket": "/run/terrace/lane.sock"}'``

A page of SGLang is one block. Pages are copied between SGLang's host pool and the daemon's memory, without a buffer
between them where the pool's layout keeps a page in few pieces (``page_first``), else through one flat page.
"""

import ctypes
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig, HiCacheStorageExtraInfo

from ._engine import Store, StoreSpace, Target
from ._manifest import SpaceManifest
from ._native import Block, WriteBlock
from ._versions import advice, installed, sglang_shard, sglang_writes

logger = logging.getLogger("sglang.terrace_kv")

WAIT_SECONDS = 5.0
"""Longest wait of a read for blocks of slower tiers."""


def _key(key: str) -> bytes:
    """SGLang's keys are hexadecimal hashes, some with a suffix; as bytes they fit into a name."""
    return hashlib.blake2b(key.encode(), digest_size=32).digest()


def _bytes_at(address: int, length: int) -> np.ndarray[Any, Any]:
    return np.frombuffer((ctypes.c_uint8 * length).from_address(address), np.uint8)


class TerraceStore(HiCacheStorage):
    """SGLang's third level."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any] | None = None) -> None:
        self._config = storage_config
        extra = storage_config.extra_config or {}
        if told := advice("sglang", installed("sglang")):
            logger.warning("terrace: %s", told)
        self._wait = float(extra.get("wait_seconds", WAIT_SECONDS))
        self._fingerprint = str(extra.get("model_fingerprint", "")).encode()[:64] or b"sglang"
        self._store = Store(Target.of(extra, "sglang"), logger)
        self._space: StoreSpace | None = None
        self._zero_copy = False
        # A server that starts without a daemon says so at once.
        self._store.session()

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Takes the pool. Its type and layout make the space: SGLang's keys do not tell them apart."""
        super().register_mem_pool_host(mem_pool_host)
        self._zero_copy, lengths = self._pieces(mem_pool_host)
        config = self._config
        described = f"{type(mem_pool_host).__name__};{getattr(mem_pool_host, 'layout', '')};{lengths};{self._zero_copy}"
        digest = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()
        if config.is_mla_model:
            rank, parts = sglang_shard(config)
            topology = f"mla,dcp{parts},pp{config.pp_size}"
        else:
            topology = f"tp{config.tp_size},pp{config.pp_size},cp{config.attn_cp_size}"
            rank = config.tp_rank * config.attn_cp_size + config.attn_cp_rank
        model = str(config.model_name)
        manifest = SpaceManifest(
            model=model.encode()[-256:].decode(errors="ignore"),
            model_fingerprint=self._fingerprint,
            dtype=str(mem_pool_host.dtype).removeprefix("torch."),
            layout=f"sglang,opaque,{digest}",
            tokens_per_block=mem_pool_host.page_size,
            block_bytes=sum(lengths),
            topology=topology,
            rank=rank * config.pp_size + config.pp_rank,
            engine="sglang",
        )
        self._space = StoreSpace(self._store, manifest)

    @staticmethod
    def _pieces(pool: Any) -> tuple[bool, list[int]]:
        """Whether a page lies in addressable pieces, and their lengths."""
        try:
            _, lengths = pool.get_page_buffer_meta(torch.arange(pool.page_size))
        except (ValueError, NotImplementedError, AssertionError):
            page = pool.get_dummy_flat_data_page()
            return False, [page.numel() * page.element_size()]
        return True, [int(length) for length in lengths]

    def _arrays(self, host_indices: Any, pages: int) -> list[list[np.ndarray[Any, Any]]]:
        """The pieces of each page, where they lie."""
        addresses, lengths = self.mem_pool_host.get_page_buffer_meta(host_indices)
        each = len(addresses) // pages
        arrays = [_bytes_at(int(at), int(length)) for at, length in zip(addresses, lengths, strict=True)]
        return [arrays[start : start + each] for start in range(0, len(arrays), each)]

    # Pages of the host pool.

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        if not sglang_writes(self._config):
            return [True] * len(keys)
        return self._put(keys, self._giver(host_indices, len(keys)), self._parent(extra_info))

    def _giver(self, host_indices: Any, pages: int) -> Callable[[int, Any], bool]:
        if not self._zero_copy:
            size, pool = self.mem_pool_host.page_size, self.mem_pool_host
            return lambda index, frame: _fill(frame, pool.get_data_page(host_indices[index * size], flat=True))
        arrays = self._arrays(host_indices, pages)

        def give(index: int, frame: WriteBlock | bytearray) -> bool:
            target, offset = np.frombuffer(frame, np.uint8), 0
            for piece in arrays[index]:
                target[offset : offset + piece.size] = piece
                offset += piece.size
            return True

        return give

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        if self._space is None:
            return [False] * len(keys)
        if not self._zero_copy:
            size, pool = self.mem_pool_host.page_size, self.mem_pool_host
            pages = self.batch_get(keys, [pool.get_dummy_flat_data_page() for _ in keys])
            for index, page in enumerate(pages):
                if page is not None:
                    pool.set_from_flat_data_page(host_indices[index * size], page)
            return [page is not None for page in pages]
        arrays = self._arrays(host_indices, len(keys))

        def take(index: int, block: Block) -> None:
            source, offset = np.frombuffer(block, np.uint8), 0
            for piece in arrays[index]:
                piece[:] = source[offset : offset + piece.size]
                offset += piece.size

        return self._space.get([_key(key) for key in keys], take, wait=self._wait)

    @staticmethod
    def _parent(extra_info: HiCacheStorageExtraInfo | None) -> bytes | None:
        before = extra_info.prefix_keys if extra_info is not None else None
        return _key(before[-1]) if before else None

    def _put(self, keys: Sequence[str], give: Callable[[int, Any], bool], parent: bytes | None) -> list[bool]:
        if self._space is None:
            return [False] * len(keys)
        return self._space.put([_key(key) for key in keys], give, parent=parent, wait=self._wait)

    # Flat pages.

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        if self._space is None or target_locations is None:
            return [None] * len(keys)
        with self._space.read([_key(key) for key in keys], wait=self._wait, verify=False) as reading:
            pairs = zip(reading.blocks, target_locations, strict=True)
            found = [(index, block, target) for index, (block, target) in enumerate(pairs) if block is not None]
            good = self._store.copy_out([block for _, block, _ in found], [_flat(target) for *_, target in found])
        pages: list[torch.Tensor | None] = [None] * len(keys)
        for (index, _, target), fine in zip(found, good, strict=True):
            pages[index] = target if fine else None
        return pages

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return self.batch_set([key], [value])

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        if not sglang_writes(self._config):
            return True
        if values is None:
            return False
        return all(self._put(keys, lambda index, frame: _fill(frame, values[index]), None))

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        if self._space is None:
            return 0
        return self._store.prefix([self._space], [_key(key) for key in keys])

    def clear(self) -> None:
        if self._space is not None:
            self._space.clear()

    def close(self) -> None:
        self._store.close()


def _flat(page: torch.Tensor) -> np.ndarray[Any, Any]:
    return page.contiguous().view(torch.uint8).reshape(-1).numpy()


def _fill(frame: Any, page: torch.Tensor) -> bool:
    np.frombuffer(frame, np.uint8)[:] = _flat(page)
    return True
