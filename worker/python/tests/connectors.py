"""Every connector behind the same few calls, for the cases that all of them must pass.

A block is a number, and has bytes that no other block has.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from conftest import BLOCK_BYTES, manifest, payload, wait_for
from terrace_kv._engine import Store, StoreSpace, Target

Numbers = Sequence[int]
Found = list[bytes | None]


def name(number: int) -> bytes:
    return number.to_bytes(32, "big")


class Connector(ABC):
    """One engine with its connector."""

    engine = ""
    """As ``terrace_kv._versions`` calls it; empty for the piece that all connectors share."""
    changes: ClassVar[dict[str, dict[str, Any]]] = {}
    """What makes an engine another one: its type, its block size, its topology, its tenant."""
    blocks_max = 16
    """Most blocks of one call."""
    block_bytes = BLOCK_BYTES

    def bytes_of(self, number: int) -> bytes:
        return payload(name(number), self.block_bytes)

    @abstractmethod
    def put(self, numbers: Numbers) -> None:
        """Stores; ends when nothing is under way any more, stored or not."""

    def ask(self, numbers: Numbers) -> bool:
        """Starts a look-up as the engine's scheduler does; whether this connector promises not to wait in it."""
        return False

    @abstractmethod
    def promise(self, numbers: Numbers) -> int:
        """Looks up; answers how many are there from the first on. What the engine holds then stays held."""

    @abstractmethod
    def redeem(self, numbers: Numbers) -> Found:
        """Loads what was promised, and holds nothing any more. ``None`` is what did not come."""

    def look_up(self, numbers: Numbers) -> int:
        found = self.promise(numbers)
        self.drop(numbers)
        return found

    def get(self, numbers: Numbers) -> Found:
        self.promise(numbers)
        return self.redeem(numbers)

    def drop(self, numbers: Numbers) -> None:
        """Gives back what a promise holds; where nothing is held, nothing."""
        return

    @abstractmethod
    def close(self) -> None:
        pass


class Shared(Connector):
    """The piece that all connectors share, alone."""

    changes: ClassVar = {
        "dtype": {"dtype": "bf16"},
        "block": {"tokens_per_block": 32},
        "topology": {"topology": "tp2"},
        "tenant": {"tenant": "stranger"},
    }

    def __init__(self, socket: Path, **changes: Any) -> None:
        tenant = changes.pop("tenant", "")
        self.store = Store(Target.of({"socket": str(socket), "tenant": tenant}, "test"))
        self.space = StoreSpace(self.store, manifest(**changes))

    def put(self, numbers: Numbers) -> None:
        def give(index: int, frame: Any) -> bool:
            memoryview(frame)[:] = self.bytes_of(numbers[index])
            return True

        self.space.put([name(number) for number in numbers], give)

    def promise(self, numbers: Numbers) -> int:
        return self.store.prefix([self.space], [name(number) for number in numbers])

    def redeem(self, numbers: Numbers) -> Found:
        found: Found = [None] * len(numbers)
        names = [name(number) for number in numbers]
        good = self.space.get(names, lambda index, block: found.__setitem__(index, bytes(block)), wait=5.0)
        return [value if fine else None for value, fine in zip(found, good, strict=True)]

    def close(self) -> None:
        self.store.close()


class Vllm(Connector):
    """The connector of vLLM: a scheduler's half and a worker's."""

    engine = "vllm"
    changes: ClassVar = {
        "dtype": {"cache_dtype": "fp8"},
        "block": {"tokens": 16},
        "topology": {"ranks": 2},
        "tenant": {"extra": {"tenant": "stranger"}},
    }

    def __init__(self, socket: Path, **changes: Any) -> None:
        import test_vllm

        self.tokens = changes.get("tokens", test_vllm.TOKENS)
        self.running: Any = test_vllm.Engine(socket, **changes)
        # As flat bytes: a block of a layer is a row.
        torch = test_vllm.torch
        self.rows = [cache.view(torch.uint8).numpy() for cache in self.running.caches.values()]
        self.block_bytes = sum(layer[0].size for layer in self.rows)
        self._requests = 0
        self._promised: dict[tuple[int, ...], tuple[Any, int]] = {}

    def _request(self, numbers: Numbers, more_tokens: int) -> Any:
        self._requests += 1
        request = self.running.request(f"r{self._requests}", len(numbers) * self.tokens + more_tokens)
        request.block_hashes = [name(number) for number in numbers]
        return request

    def put(self, numbers: Numbers) -> None:
        for row, number in enumerate(numbers):
            parts = np.split(np.frombuffer(self.bytes_of(number), np.uint8), len(self.rows))
            for layer, part in zip(self.rows, parts, strict=True):
                layer[row] = part.reshape(layer[row].shape)
        request, block_ids = self._request(numbers, 0), list(range(len(numbers)))
        self.running.save(request, block_ids)
        worker = self.running.worker._worker
        wait_for(lambda: not worker._save_blocks, "the saves' end")
        self.running.scheduler.request_finished_all_groups(request, (block_ids,))
        self.running.step()

    def ask(self, numbers: Numbers) -> bool:
        self.running.scheduler.get_num_new_matched_tokens(self._request(numbers, 1), 0)
        return True

    def promise(self, numbers: Numbers) -> int:
        request = self._request(numbers, 1)
        tokens = self.running.match(request)
        self._promised[tuple(numbers)] = (request, tokens)
        return int(tokens // self.tokens)

    def redeem(self, numbers: Numbers) -> Found:
        request, tokens = self._promised.pop(tuple(numbers))
        count = tokens // self.tokens
        first, failed = 30, set[int]()
        for layer in self.rows:
            layer[first:] = 0
        # The request computes its last token itself, in a block of its own.
        block_ids = list(range(first, first + len(numbers) + 1))
        if count:
            self.running.allocate(request, block_ids, tokens)
            failed = self.running.carry(request)
        self.running.scheduler.request_finished_all_groups(request, ([],))
        found: Found = [None] * len(numbers)
        for index in range(count):
            if first + index not in failed:
                found[index] = b"".join(layer[first + index].tobytes() for layer in self.rows)
        return found

    def drop(self, numbers: Numbers) -> None:
        request, _ = self._promised.pop(tuple(numbers))
        self.running.scheduler.request_finished_all_groups(request, ([],))

    def close(self) -> None:
        self.running.stop()


class VllmBeside(Vllm):
    """The same while another request runs."""

    def __init__(self, socket: Path, **changes: Any) -> None:
        super().__init__(socket, **changes)
        self.running.run_another()


class VllmTier(Connector):
    """The tier behind vLLM's offloading."""

    engine = "vllm"
    changes: ClassVar = {
        "dtype": {"dtype": "float16"},
        "block": {"tokens": 32},
        "topology": {"tp_size": 2},
        "tenant": {"tenant": "stranger"},
    }

    def __init__(self, socket: Path, **changes: Any) -> None:
        import test_vllm_tier

        self.side: Any = test_vllm_tier.Side(socket, **changes)
        self.block_bytes = test_vllm_tier.ROW
        self._key = test_vllm_tier.make_offload_key
        self._contexts: list[Any] = []

    def _keys(self, numbers: Numbers) -> list[Any]:
        return [self._key(name(number), 0) for number in numbers]

    def put(self, numbers: Numbers) -> None:
        for row, number in enumerate(numbers):
            self.side.rows[row] = np.frombuffer(self.bytes_of(number), np.uint8)
        self.side.move(self._keys(numbers), list(range(len(numbers))), load=False)

    def ask(self, numbers: Numbers) -> bool:
        context = self.side.request("asks")
        for key in self._keys(numbers):
            self.side.tier.lookup(key, context)
        self.side.tier.on_request_finished(context)
        return True

    def promise(self, numbers: Numbers) -> int:
        context = self.side.request(f"r{len(self._contexts)}")
        self._contexts.append(context)
        flags = self.side.lookup(self._keys(numbers), context)
        return (*flags, False).index(False)

    def redeem(self, numbers: Numbers) -> Found:
        first = 16
        self.side.rows[first:] = 0
        keys = self._keys(numbers)
        result = self.side.move(keys, list(range(first, first + len(numbers))), load=True)
        good = set(keys) if result.success else set(result.successful_keys or ())
        self.drop(numbers)
        return [self.side.rows[first + index].tobytes() if key in good else None for index, key in enumerate(keys)]

    def drop(self, numbers: Numbers) -> None:
        self.side.tier.on_request_finished(self._contexts.pop())

    def close(self) -> None:
        self.side.tier.shutdown()


class Sglang(Connector):
    """The storage backend of SGLang."""

    engine = "sglang"
    changes: ClassVar = {
        "dtype": {"dtype": "float16"},
        "block": {"page": 32},
        "topology": {"tp_size": 2},
        "tenant": {"extra": {"tenant": "stranger"}},
    }

    def __init__(self, socket: Path, **changes: Any) -> None:
        import test_sglang

        torch = test_sglang.torch
        dtype = getattr(torch, changes.pop("dtype", "bfloat16"))
        self.pool = test_sglang.Pool(dtype=dtype, page=changes.pop("page", test_sglang.PAGE))
        self.backend: Any = test_sglang.backend(socket, self.pool, **changes)
        # K and V of a page are two pieces of the block.
        self.pages = self.pool.kv_buffer.view(torch.uint8).numpy()
        self.block_bytes = 2 * self.pages[0, 0].size
        self._arange = torch.arange

    def _names(self, numbers: Numbers) -> list[str]:
        return [name(number).hex() for number in numbers]

    def _indices(self, first: int, count: int) -> Any:
        size = self.pool.page_size
        return self._arange(first * size, (first + count) * size)

    def put(self, numbers: Numbers) -> None:
        for page, number in enumerate(numbers):
            self.pages[:, page] = np.frombuffer(self.bytes_of(number), np.uint8).reshape(self.pages[:, page].shape)
        self.backend.batch_set_v1(self._names(numbers), self._indices(0, len(numbers)))

    def promise(self, numbers: Numbers) -> int:
        return int(self.backend.batch_exists(self._names(numbers)))

    def redeem(self, numbers: Numbers) -> Found:
        first = 20
        self.pages[:, first:] = 0
        good = self.backend.batch_get_v1(self._names(numbers), self._indices(first, len(numbers)))
        return [self.pages[:, first + index].tobytes() if fine else None for index, fine in enumerate(good)]

    def close(self) -> None:
        self.backend.close()


class Lmcache(Connector):
    """The second level of LMCache."""

    engine = "lmcache"
    changes: ClassVar = {
        "dtype": {"dtype": "int8"},
        "block": {"block_bytes": 2 * BLOCK_BYTES},
        "topology": {"kv_rank": 1},
        "tenant": {"tenant": "stranger"},
    }

    def __init__(self, socket: Path, **changes: Any) -> None:
        import test_lmcache

        self.parts = test_lmcache
        self.dtype = getattr(test_lmcache.torch, changes.pop("dtype", "uint8"))
        self.block_bytes = changes.pop("block_bytes", BLOCK_BYTES)
        self.kv_rank = changes.pop("kv_rank", 0)
        self.level = test_lmcache.adapter(socket, **changes)
        shape = test_lmcache.torch.Size([self.block_bytes])
        self.layout = {0: test_lmcache.MemoryLayoutDesc(shapes=[shape], dtypes=[self.dtype])}

    def _keys(self, numbers: Numbers) -> list[Any]:
        return [self.parts.names(1, start=number, kv_rank=self.kv_rank)[0] for number in numbers]

    def _objects(self, count: int) -> list[Any]:
        memory = self.parts.torch.zeros(count * self.block_bytes, dtype=self.parts.torch.uint8)
        values = self.parts.make_memory_objects(memory, count, self.block_bytes, 0)
        for value in values:
            value.metadata.dtype = self.dtype
        return values

    def put(self, numbers: Numbers) -> None:
        values = self._objects(len(numbers))
        for value, number in zip(values, numbers, strict=True):
            memoryview(value.byte_array).cast("B")[:] = self.bytes_of(number)
        self.parts.store(self.level, self._keys(numbers), values)

    def ask(self, numbers: Numbers) -> bool:
        # Nobody waits for it; what it locks stays locked until the level is closed.
        self.level.submit_lookup_and_lock_task(self._keys(numbers), self.layout)
        return True

    def promise(self, numbers: Numbers) -> int:
        found = self.parts.lookup(self.level, self._keys(numbers), self.layout)
        return sum(1 for place, index in enumerate(found) if place == index)

    def redeem(self, numbers: Numbers) -> Found:
        values = self._objects(len(numbers))
        found: Found = [None] * len(numbers)
        for index in self.parts.load(self.level, self._keys(numbers), values):
            found[index] = bytes(memoryview(values[index].byte_array).cast("B"))
        self.drop(numbers)
        return found

    def drop(self, numbers: Numbers) -> None:
        self.level.submit_unlock(self._keys(numbers))

    def close(self) -> None:
        self.level.close()


CONNECTORS: list[type[Connector]] = [Shared, Vllm, VllmBeside, VllmTier, Sglang, Lmcache]
