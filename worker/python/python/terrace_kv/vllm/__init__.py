"""vLLM uses Terrace: name one of these classes in ``--kv-transfer-config``, with this module as its path.

``TerraceConnector`` is a connector (``kv_connector_module_path``); ``TerraceTier`` a secondary tier of vLLM's own
offloading (``secondary_tiers``). Each is loaded when it is asked for, as not every vLLM has what both need.
"""

from typing import Any

__all__ = ["TerraceConnector", "TerraceTier"]


def __getattr__(name: str) -> Any:
    if name == "TerraceConnector":
        from .connector import TerraceConnector

        return TerraceConnector
    if name == "TerraceTier":
        from .tier import TerraceTier

        return TerraceTier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
