"""Pages of one of SGLang's host pools as blocks of one space, copied where they lie if the pool says where that is."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ._engine import Store, StoreSpace
from ._native import Block, WriteBlock


def pieces(pool: Any) -> tuple[bool, list[int]]:
    """Whether a page of a pool lies in addressable pieces, and their lengths."""
    try:
        _, lengths = pool.get_page_buffer_meta(torch.arange(page_tokens(pool)))
    except (AttributeError, ValueError, NotImplementedError, AssertionError):
        page = pool.get_dummy_flat_data_page()
        return False, [page.numel() * page.element_size()]
    return True, [int(length) for length in lengths]


def page_tokens(pool: Any) -> int:
    """Host indices of one page; pools of states have one."""
    return getattr(pool, "page_size", 1) or 1


class Pages:
    """A host pool with the space of its pages."""

    def __init__(self, store: Store, space: StoreSpace, pool: Any, *, zero_copy: bool, wait: float) -> None:
        self.space = space
        self._store = store
        self._pool = pool
        self._zero_copy = zero_copy
        self._wait = wait

    def fits(self, keys: Sequence[bytes], indices: Any) -> bool:
        """Whether there are pages, and the indices are those of as many."""
        return bool(keys) and indices is not None and indices.numel() == len(keys) * page_tokens(self._pool)

    def put(self, keys: Sequence[bytes], indices: Any, parent: bytes | None) -> list[bool]:
        """Stores the pages at these indices; answers which are there now."""
        if not self.fits(keys, indices):
            return [False] * len(keys)
        return self.space.put(keys, self._giver(indices, len(keys)), parent=parent, wait=self._wait)

    def get(self, keys: Sequence[bytes], indices: Any) -> list[bool]:
        """Loads pages to these indices; answers which are right."""
        if not self.fits(keys, indices):
            return [False] * len(keys)
        if not self._zero_copy:
            return self._get_flat(keys, indices)
        arrays = self._arrays(indices, len(keys))

        def take(index: int, block: Block) -> None:
            source, offset = np.frombuffer(block, np.uint8), 0
            for piece in arrays[index]:
                piece[:] = source[offset : offset + piece.size]
                offset += piece.size

        return self.space.get(keys, take, wait=self._wait)

    def read(self, keys: Sequence[bytes], targets: Sequence[torch.Tensor]) -> list[bool]:
        """Loads pages into flat tensors, and compares what was copied; answers which are right."""
        with self.space.read(keys, wait=self._wait, verify=False) as reading:
            found = [index for index, block in enumerate(reading.blocks) if block is not None]
            blocks = [block for block in reading.blocks if block is not None]
            copied = self._store.copy_out(blocks, [flat(targets[index]) for index in found])
        good = [False] * len(keys)
        for index, fine in zip(found, copied, strict=True):
            good[index] = fine
        return good

    def _get_flat(self, keys: Sequence[bytes], indices: Any) -> list[bool]:
        pages = [self._pool.get_dummy_flat_data_page() for _ in keys]
        good = self.read(keys, pages)
        for index, (page, fine) in enumerate(zip(pages, good, strict=True)):
            if fine:
                self._pool.set_from_flat_data_page(self._first(indices, index), page)
        return good

    def _giver(self, indices: Any, pages: int) -> Callable[[int, Any], bool]:
        if not self._zero_copy:
            return lambda index, frame: fill(frame, self._pool.get_data_page(self._first(indices, index), flat=True))
        arrays = self._arrays(indices, pages)

        def give(index: int, frame: WriteBlock | bytearray) -> bool:
            target, offset = np.frombuffer(frame, np.uint8), 0
            for piece in arrays[index]:
                target[offset : offset + piece.size] = piece
                offset += piece.size
            return True

        return give

    def _first(self, indices: Any, page: int) -> int:
        return int(indices[page * page_tokens(self._pool)])

    def _arrays(self, indices: Any, pages: int) -> list[list[np.ndarray[Any, Any]]]:
        """The pieces of each page, where they lie."""
        addresses, lengths = self._pool.get_page_buffer_meta(indices)
        each = len(addresses) // pages
        arrays = [_bytes_at(int(at), int(length)) for at, length in zip(addresses, lengths, strict=True)]
        return [arrays[start : start + each] for start in range(0, len(arrays), each)]


def _bytes_at(address: int, length: int) -> np.ndarray[Any, Any]:
    return np.frombuffer((ctypes.c_uint8 * length).from_address(address), np.uint8)


def flat(page: torch.Tensor) -> np.ndarray[Any, Any]:
    """The bytes of a contiguous page, in place; of another a copy."""
    return page.contiguous().view(torch.uint8).reshape(-1).numpy()


def fill(frame: Any, page: torch.Tensor) -> bool:
    """Copies a page into a frame."""
    if isinstance(frame, WriteBlock):
        frame.fill(flat(page))
    else:
        np.frombuffer(frame, np.uint8)[:] = flat(page)
    return True
