"""What the bytes of a block are: the spaces of one rank, and where their pieces lie in vLLM's tensors.

A block of Terrace is one block of vLLM over all layers of a group on this rank, layer after layer. Inside a layer its
bytes are opaque: they are copied whole, in the order in which they lie in memory. On CPUs an attention kernel packs K
as its instruction set likes it. So everything that may change the bytes is named in the layout.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorHandshakeMetadata

from .._manifest import SpaceManifest
from .._native import WriteBlock
from .._versions import installed
from .groups import Group

# Enough of a weights file to tell two of the same shape apart, and little enough to be read at every start.
_SAMPLE_BYTES = 64 << 10
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt")
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


@dataclass(frozen=True)
class RankLayout(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler: its space for each group that has layers here, or why it can serve none."""

    manifests: tuple[SpaceManifest | None, ...]
    reason: str = ""


def unsupported(vllm_config: Any, is_whole: bool) -> str:
    """Why blocks of this engine cannot be stored, whatever its groups are; empty if they can."""
    parallel = vllm_config.parallel_config
    if is_whole and not hasattr(KVConnectorBase_V1, "get_transfer_results"):
        return "the model has several KV-cache groups or windows, and this vLLM cannot be told that such a load failed"
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            return f"{name} is above 1"
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        return "the scales of the KV cache are computed at run time, so that no two engines have the same"
    return ""


def topology(vllm_config: Any) -> str:
    parallel = vllm_config.parallel_config
    return f"tp{parallel.tensor_parallel_size}pp{parallel.pipeline_parallel_size}"


def fingerprint(vllm_config: Any) -> bytes:
    """Names the weights: configuration, revision, and samples of the files if they lie in a folder."""
    model = vllm_config.model_config
    digest = hashlib.blake2b(digest_size=32)

    def add(what: object) -> None:
        text = str(what).encode()
        digest.update(len(text).to_bytes(8, "little") + text)

    hf_config = model.hf_config
    add(hf_config.to_json_string(use_diff=False) if hasattr(hf_config, "to_json_string") else hf_config)
    add(getattr(hf_config, "_commit_hash", None))
    for name in ("revision", "quantization", "dtype", "hf_overrides"):
        add(getattr(model, name, None))
    speculative = getattr(vllm_config, "speculative_config", None)
    add(getattr(speculative, "model", None))
    folder = Path(model.model)
    if not folder.is_dir():
        add(model.model)
        return digest.digest()
    for file in sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern)):
        length = file.stat().st_size
        add(f"{file.name} {length}")
        with file.open("rb") as weights:
            digest.update(weights.read(_SAMPLE_BYTES))
            weights.seek(max(0, length // 2))
            digest.update(weights.read(_SAMPLE_BYTES))
            weights.seek(max(0, length - _SAMPLE_BYTES))
            digest.update(weights.read(_SAMPLE_BYTES))
    return digest.digest()


class Pieces:
    """The registered tensors of a rank, as bytes: ``layers`` rows a block, each contiguous in memory."""

    def __init__(self, names: Sequence[str], caches: dict[str, torch.Tensor]) -> None:
        self.names = list(names)
        tensors = [caches[name] for name in self.names]
        self.is_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
        self.device = tensors[0].device
        self.lengths = [_dense_bytes(name, tensor) for name, tensor in zip(self.names, tensors, strict=True)]
        self.block_bytes = sum(self.lengths)
        self.dtype = tensors[0].dtype
        self.shapes = [_shape(tensor) for tensor in tensors]
        self.offsets = [sum(self.lengths[:index]) for index in range(len(self.lengths) + 1)]
        self._rows = [_as_bytes(tensor, length) for tensor, length in zip(tensors, self.lengths, strict=True)]
        self._stack = _stacked(tensors, self.lengths)

    @property
    def is_regular(self) -> bool:
        """Whether a block is one strided array of this process's memory."""
        return self.is_cpu and self._stack is not None

    def rows(self, block: int) -> Any:
        """All layers of a block as one array, where they are regular."""
        return self._stack[:, block]

    def fill(self, frame: Any, block: int) -> None:
        """Copies a block from the tensors into a frame."""
        if self.is_regular and isinstance(frame, WriteBlock):
            # One pass, which sums the bytes and maps the frame's pages at once.
            frame.fill(self.rows(block))
        else:
            self.copy(frame, block, into_frame=True)

    def copy(self, frame: Any, block: int, *, into_frame: bool, first: int = 0, last: int | None = None) -> None:
        """Copies layers ``first`` to ``last`` of a block from the tensors into the frame, or back."""
        last = len(self.lengths) if last is None else last
        flat = np.frombuffer(frame, np.uint8)[self.offsets[first] : self.offsets[last]]
        # A tensor of read-only memory is only read from here.
        host = flat if self.is_cpu else torch.from_numpy(flat.view() if flat.flags.writeable else flat.copy())
        if self._stack is not None:
            rows = self._stack[first:last, block]
            self._move(rows, host.reshape(last - first, self.lengths[0]), into_frame)
            return
        for layer in range(first, last):
            start = self.offsets[layer] - self.offsets[first]
            part = host[start : start + self.lengths[layer]]
            self._move(self._rows[layer][block], part, into_frame)

    def _move(self, rows: Any, host: Any, into_frame: bool) -> None:
        target, source = (host, rows) if into_frame else (rows, host)
        if self.is_cpu:
            np.copyto(target, source)
        else:
            target.copy_(source)


def _shape(tensor: torch.Tensor) -> str:
    one = tensor[0]
    return f"{'x'.join(map(str, one.shape))}/{','.join(map(str, one.stride()))}"


def _dense_bytes(name: str, tensor: torch.Tensor) -> int:
    """Bytes of one block of a layer, which must lie without a gap."""
    one = tensor[0]
    order = sorted(range(one.dim()), key=lambda dim: (-one.stride(dim), one.size(dim)))
    if not one.permute(order).is_contiguous():
        raise ValueError(f"a block of {name} does not lie in one piece: {tuple(tensor.shape)}, {tensor.stride()}")
    return one.numel() * one.element_size()


def _storage_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _as_bytes(tensor: torch.Tensor, length: int) -> Any:
    size = tensor.element_size()
    shape, stride = (tensor.shape[0], length), (tensor.stride(0) * size, 1)
    rows = _storage_bytes(tensor).as_strided(shape, stride, tensor.storage_offset() * size)
    return rows.numpy() if tensor.device.type == "cpu" else rows


def _stacked(tensors: list[torch.Tensor], lengths: list[int]) -> Any:
    """All layers as one strided array, if they lie in one allocation at equal distances: one copy a block."""
    first = tensors[0]
    size = first.element_size()
    starts = [tensor.storage_offset() * size for tensor in tensors]
    step = starts[1] - starts[0] if len(starts) > 1 else lengths[0]
    regular = (
        len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
        and len({tensor.stride(0) for tensor in tensors}) == 1
        and len(set(lengths)) == 1
        and step > 0
        and all(start == starts[0] + index * step for index, start in enumerate(starts))
    )
    if not regular:
        return None
    shape, stride = (len(tensors), first.shape[0], lengths[0]), (step, first.stride(0) * size, 1)
    stack = _storage_bytes(first).as_strided(shape, stride, starts[0])
    return stack.numpy() if first.device.type == "cpu" else stack


def _kernel(vllm_config: Any, pieces: Pieces) -> dict[str, str]:
    """What packs the bytes: the attention backend, and on CPUs what it chose its packing by."""
    layers = vllm_config.compilation_config.static_forward_context
    backends = {_backend(layers.get(name)) for name in pieces.names}
    found = {"backends": " ".join(sorted(backends)), "device": pieces.device.type}
    if pieces.is_cpu:
        found["isa"] = torch.backends.cpu.get_cpu_capability()
        amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
        found["amx"] = str(bool(amx and amx()))
    return found


def _backend(layer: Any) -> str:
    backend = getattr(layer, "attn_backend", None)
    return str(backend.get_name()) if hasattr(backend, "get_name") else "unknown"


def manifest(vllm_config: Any, group: Group, pieces: Pieces, named: str) -> SpaceManifest:
    """The space of a group on this rank. ``named`` is the operator's fingerprint of the weights, if there is one."""
    cache = vllm_config.cache_config
    what = {
        "vllm": installed("vllm") or "unknown",
        "layers": pieces.names,
        "shapes": pieces.shapes,
        "cache_dtype": str(cache.cache_dtype),
        "hash": str(cache.prefix_caching_hash_algo),
        **_kernel(vllm_config, pieces),
    }
    if not group.is_chain:
        what["window"] = f"{group.window},{group.chunk}"
    digest = hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()
    model = str(vllm_config.model_config.model)
    return SpaceManifest(
        model=model.encode()[-256:].decode(errors="ignore"),
        model_fingerprint=named.encode()[:64] if named else fingerprint(vllm_config),
        dtype=_DTYPES.get(pieces.dtype, str(cache.cache_dtype)),
        layout=f"vllm,layer,opaque,{digest}",
        tokens_per_block=group.tokens,
        block_bytes=pieces.block_bytes,
        kind="chain" if group.is_chain else "window",
        group=group.index,
        topology=topology(vllm_config),
        rank=int(vllm_config.parallel_config.rank),
        engine="vllm",
    )
