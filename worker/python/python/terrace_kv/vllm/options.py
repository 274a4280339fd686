"""What may be said in ``kv_connector_extra_config``, checked before anything starts."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from .._engine import Target

LOAD_MODES = ("async", "layers", "off")
SAVE_MODES = ("all", "prompt", "off")
_TARGET_OPTIONS = {"socket", "grpc", "tenant", "token", "answer_seconds"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The connector's settings."""

    load: Literal["async", "layers", "off"] = "async"
    """"async": a request waits beside the batch until its blocks are loaded; its own step does where it runs alone and
    they are few. "layers": its step starts at once, and each layer waits for its own blocks. "off": nothing is
    loaded."""
    save: Literal["all", "prompt", "off"] = "all"
    """Which blocks are stored: those of prompts and answers, those of prompts, or none."""
    blocks_min: int = 1
    """Hits of fewer blocks are computed again."""
    wait_seconds: float = 5.0
    """Longest wait of a request for blocks of slower tiers; then it is computed."""
    layers_per_group: int = 8
    """Layers that become usable together, with load "layers"."""
    save_blocks_max: int = 8192
    """Blocks that may wait to be stored; what comes on top is dropped and counted."""
    seconds_per_token: float = 0.0
    """What computing a token of a prompt costs. Only if above 0 may the daemon answer that computing is quicker."""
    model_fingerprint: str = ""
    """Names the weights, instead of what the connector reads from the model's files."""

    @classmethod
    def of(cls, extra: Mapping[str, Any], role: str | None) -> "Options":
        """From the engine's configuration and its role in the transfer of KV.

        Raises :class:`ValueError` for a name or a value that cannot be meant.
        """
        known = {field.name: field for field in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in extra.items():
            if name in _TARGET_OPTIONS:
                continue
            if name not in known:
                raise ValueError(
                    f"kv_connector_extra_config: `{name}` is unknown; "
                    f"known are {', '.join(sorted(_TARGET_OPTIONS | set(known)))}"
                )
            default = known[name].default
            try:
                values[name] = type(default)(value)
            except (TypeError, ValueError):
                raise ValueError(f"kv_connector_extra_config: `{name}` is {value!r}") from None
        for name, words in (("load", LOAD_MODES), ("save", SAVE_MODES)):
            if values.get(name, words[0]) not in words:
                raise ValueError(f"kv_connector_extra_config: `{name}` must be one of {', '.join(words)}")
        for name in ("blocks_min", "layers_per_group", "save_blocks_max"):
            if values.get(name, 1) < 1:
                raise ValueError(f"kv_connector_extra_config: `{name}` must be at least 1")
        for name in ("wait_seconds", "seconds_per_token"):
            if not values.get(name, 0.0) >= 0.0:
                raise ValueError(f"kv_connector_extra_config: `{name}` must not be negative")
        if role == "kv_producer":
            values["load"] = "off"
        elif role == "kv_consumer":
            values["save"] = "off"
        return cls(**values)


def target_of(extra: Mapping[str, Any], role: str) -> Target:
    """Where the daemon is, from the same configuration."""
    return Target.of(extra, f"vllm {role}")
