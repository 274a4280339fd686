"""Which prefixes of a prompt SGLang can restore, by what each of its pools holds: SGLang's own rules, as its file
backend folds them. A prefix counts if every pool that gates has what it needs of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sglang.srt.mem_cache.hicache_storage import PoolTransferResult

KV = "kv"
ALL_PAGES, TRAILING_PAGES, BLOCK_GROUPS = "all_pages", "trailing_pages", "block_groups"


def pool_name(name: Any) -> str:
    """A pool's name as text; SGLang's enumeration of them is one of strings."""
    return str(getattr(name, "value", name))


def fold(there: Mapping[str, Sequence[bool]], transfers: Sequence[Any]) -> Any:
    """``there`` says for each pool which pages it holds; of groups of pages, which keys of the transfer."""
    pages = leading(there[KV])
    hits: dict[str, int] = {KV: pages} if pages else {}
    restorable = list(range(1, pages + 1))
    for transfer in transfers:
        found = there[pool_name(transfer.name)]
        if transfer.hit_policy == BLOCK_GROUPS:
            # It says how far its own groups reach, and keeps nothing else from being restored.
            if covered := _grouped(found, transfer):
                hits[transfer.name] = covered
            continue
        fine = _lengths(found, pages, transfer)
        if fine:
            hits[transfer.name] = max(fine)
        restorable = [length for length in restorable if length in fine]
    result = PoolTransferResult(restorable[-1] if restorable else 0, hits)
    # Older releases have one boundary and no set of them.
    if any(field.name == "restorable_prefix_pages" for field in dataclasses.fields(PoolTransferResult)):
        result.restorable_prefix_pages = restorable
    return result


def leading(found: Sequence[bool]) -> int:
    """How many pages from the first on are there."""
    return next((index for index, there in enumerate(found) if not there), len(found))


def _lengths(found: Sequence[bool], pages: int, transfer: Any) -> set[int]:
    """Lengths of prefixes for which one pool has what it needs."""
    if transfer.hit_policy == ALL_PAGES:
        return set(range(1, min(pages, leading(found)) + 1))
    if transfer.hit_policy != TRAILING_PAGES:
        raise ValueError(f"terrace does not know the hit policy {transfer.hit_policy}")
    trailing = max(1, len(transfer.keys or []))
    return {length for length in range(1, pages + 1) if all(found[max(0, length - trailing) : length])}


def _grouped(found: Sequence[bool], transfer: Any) -> int:
    """Pages that the leading whole groups of keys cover."""
    size = max(1, transfer.group_pages)
    return leading(found) // size * transfer.block_pages
