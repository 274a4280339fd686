"""KV-cache groups: layers of one kind of attention, which have a block table of their own.

What a hit needs differs by kind: every block before its end, or those that the next token can see.
"""

import math
from dataclasses import dataclass
from typing import Any

_CHAINS = {"FullAttentionSpec"}
_WINDOWS = {"SlidingWindowSpec", "ChunkedLocalAttentionSpec"}
# Made of them, but they keep other blocks than their kind says, or none of a prompt.
_OTHERS = {"RSWASpec", "SinkFullAttentionSpec", "HiddenStateCacheSpec"}
NULL_BLOCK = 0
"""vLLM's block for positions that nobody reads any more. It is everybody's: neither stored nor written."""


@dataclass(frozen=True)
class Group:
    """One group, by its place in vLLM's block tables."""

    index: int
    layers: tuple[str, ...]
    tokens: int
    """Tokens of a block."""
    window: int = 0
    """How many tokens back the next token sees; 0 for all."""
    chunk: int = 0
    """Or: tokens see back to the last multiple of this."""

    @property
    def is_chain(self) -> bool:
        return not self.window and not self.chunk

    def first_needed(self, computed: int) -> int:
        """The first block that is read when so many tokens are there and the next one is computed."""
        if self.window:
            return int(max(0, computed - self.window) // self.tokens)
        return computed // self.chunk * self.chunk // self.tokens if self.chunk else 0


@dataclass(frozen=True)
class Plan:
    """The groups of an engine, or why their blocks cannot be stored."""

    groups: tuple[Group, ...]
    reason: str = ""
    hash_tokens: int = 1
    """Tokens of one of vLLM's hashes. It may hash finer than it allocates."""

    @property
    def step(self) -> int:
        """Tokens by which a hit grows: whole blocks of every group."""
        return math.lcm(*(group.tokens for group in self.groups))

    @property
    def is_whole(self) -> bool:
        """Whether a load of which one block failed is of no use at all: a shorter hit needs blocks that were not
        loaded, and vLLM can go on from the failed block only where one block table has everything."""
        return len(self.groups) > 1 or any(not group.is_chain for group in self.groups)


def plan(kv_cache_config: Any) -> Plan:
    """Reads vLLM's configuration of its cache."""
    groups: list[Group] = []
    for index, described in enumerate(kv_cache_config.kv_cache_groups):
        group = _group(index, described)
        if isinstance(group, str):
            return Plan((), group)
        groups.append(group)
    if not groups:
        return Plan((), "there is no KV cache")
    sizes = {group.tokens for group in groups}
    hash_tokens = getattr(kv_cache_config, "hash_block_size", None) or (min(sizes) if len(sizes) == 1 else 0)
    if not hash_tokens or any(size % hash_tokens for size in sizes):
        return Plan((), f"blocks of {sorted(sizes)} tokens have hashes of {hash_tokens or 'unknown many'}")
    return Plan(tuple(groups), hash_tokens=hash_tokens)


def _group(index: int, described: Any) -> Group | str:
    """The group, or why it is none of ours."""
    spec = described.kv_cache_spec
    layers = list(getattr(spec, "kv_cache_specs", {}).values()) or [spec]
    kinds = [{cls.__name__ for cls in type(layer).__mro__} for layer in layers]
    known = [kind for kind in (_CHAINS, _WINDOWS) if all(names & kind and not names & _OTHERS for names in kinds)]
    own_table = not getattr(described, "host_resident", False) and getattr(described, "enable_kv_transfer", True)
    if not known or not own_table or not all(getattr(layer, "prefix_cacheable", True) for layer in layers):
        return f"the KV cache has a group of {type(layers[0]).__name__}; full attention and windows are supported"
    names, tokens = tuple(described.layer_names), int(spec.block_size)
    if known[0] is _CHAINS:
        return Group(index, names, tokens)
    windows = {(_window(layer), int(getattr(layer, "attention_chunk_size", None) or 0)) for layer in layers}
    if len(windows) != 1:
        return "layers of one KV-cache group have windows that differ"
    window, chunk = windows.pop()
    return Group(index, names, tokens, window, chunk)


def _window(spec: Any) -> int:
    """The token itself is part of its window. Some are kept longer than they are seen."""
    length = int(getattr(spec, "sliding_window", None) or 0)
    return max(1, length - 1 + int(getattr(spec, "extra_retained_tokens", 0))) if length else 0
