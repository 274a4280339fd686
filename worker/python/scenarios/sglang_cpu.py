"""SGLang's server on a processor without a GPU: a platform of SGLang's own kind, for its ``SGLANG_PLATFORM``.

SGLang's wheel has kernels for GPUs only. What a server needs of them to keep pages in its hierarchical cache, the two
copies between a pool of layers and one of pages, is here for a processor; all else is SGLang's, unpatched.
"""

import ctypes
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


def activate() -> str:
    """Where SGLang finds the platform."""
    return f"{__name__}.Processor"


class Processor(CpuDeviceMixin, SRTPlatform):
    """The processor, as a platform of somebody else's."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def init_backend(self) -> None:
        from sglang.srt.mem_cache.pool_host import common, mha

        common.ALLOC_MEMORY_FUNCS["cpu"] = allocate
        mha.transfer_kv_all_layer_lf_pf = to_pages
        mha.transfer_kv_per_layer_pf_lf = to_layer


def allocate(dims: Any, *, dtype: Any, device: str, allocator: Any, **_: Any) -> Any:
    """Host memory that no driver has to know."""
    return allocator.allocate(dims, dtype=dtype, device=device)


def to_pages(
    *,
    src_k_layers: Any,
    dst_k: Any,
    src_v_layers: Any,
    dst_v: Any,
    src_indices: Any,
    dst_indices: Any,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
) -> None:
    """Tokens of all layers, each layer at an address of its own, into pages."""
    count = int(src_indices.max()) + 1
    assert dst_layout_dim == num_layers * item_size
    for addresses, target in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        pages = target.view(torch.uint8).view(-1, num_layers, item_size)
        for layer, address in enumerate(addresses.tolist()):
            memory = (ctypes.c_uint8 * (count * item_size)).from_address(address)
            tokens = torch.frombuffer(memory, dtype=torch.uint8).view(count, item_size)
            pages[dst_indices, layer] = tokens[src_indices]


def to_layer(
    *,
    src_k: Any,
    dst_k: Any,
    src_v: Any,
    dst_v: Any,
    src_indices: Any,
    dst_indices: Any,
    layer_id: int,
    item_size: int,
    src_layout_dim: int,
) -> None:
    """Tokens of pages into one layer."""
    for source, target in ((src_k, dst_k), (src_v, dst_v)):
        pages = source.view(torch.uint8).view(-1, src_layout_dim // item_size, item_size)
        target.view(torch.uint8).view(-1, item_size)[dst_indices] = pages[src_indices, layer_id]
