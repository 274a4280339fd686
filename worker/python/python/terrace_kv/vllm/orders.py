"""What the scheduler tells the workers in each step."""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata


@dataclass(frozen=True)
class Run:
    """Blocks of one group, by its place among the groups."""

    group: int
    keys: list[bytes]
    block_ids: list[int]


@dataclass(frozen=True)
class Load:
    """Blocks of a request that are to be filled from the store, all or none of them of use."""

    request_id: str
    runs: list[Run]
    in_step: bool
    """Whether the step that it is ordered in waits for it. Else the request waits, beside all steps until its end."""


@dataclass(frozen=True)
class Save:
    """Full blocks that may be stored once this step has run."""

    run: Run
    parent: bytes | None


@dataclass
class Orders(KVConnectorMetadata):
    """All of it. ``taken`` are blocks that get a new owner in this step: nobody reads them for an older save any more.
    ``resets`` counts how often the cache was reset."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    taken: set[int] = field(default_factory=set)
    resets: int = 0
