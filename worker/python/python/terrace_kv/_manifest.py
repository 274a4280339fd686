"""What the bytes of a space are."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SpaceManifest:
    """Everything that makes KV bytes interchangeable.

    Two manifests that differ in any field name two spaces, and two spaces never share a block.
    """

    model: str
    """Model name, at most 256 bytes."""
    model_fingerprint: bytes
    """Revision fingerprint of the model, for example a BLAKE3 of its file; at most 64 bytes."""
    dtype: str
    """Element type of K and V: "f16", "bf16", "f32", "fp8_e4m3", ..."""
    layout: str
    """Name of the byte layout inside a block, for example "layer,kv,slot,head,dim"."""
    tokens_per_block: int
    """Tokens in one block."""
    block_bytes: int
    """Payload of one block in bytes; every block of the space has this length."""
    weights_generation: int = 1
    """Bumped when weights change under the same name."""
    kind: Literal["chain", "window", "state"] = "chain"
    """"chain": KV of tokens, valid after all blocks before it. "window": of a sliding-window group.
    "state": a recurrent state at a position."""
    group: int = 0
    """Layer group of a hybrid model; 0 where there is one group."""
    topology: str = "canonical"
    """Parallel topology, for example "tp4"."""
    rank: int = 0
    """Rank within the topology."""
    engine: str = "python"
    """Engine family that wrote the bytes."""
