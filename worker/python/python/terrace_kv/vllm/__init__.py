"""vLLM uses Terrace: name ``TerraceConnector`` in ``--kv-transfer-config``, with this module as its
``kv_connector_module_path``. It is loaded when it is asked for, so that this package can be looked at without vLLM."""

from typing import Any

__all__ = ["TerraceConnector"]


def __getattr__(name: str) -> Any:
    if name == "TerraceConnector":
        from .connector import TerraceConnector

        return TerraceConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
