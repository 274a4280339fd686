"""Device memory as tensors: no copy, no copy of the lease, and no memory that goes while a tensor looks at it.

Here the device is host memory that stands in for one, asked for by name, so numpy and torch take it as a CPU's. What
consumers of a GPU read, the numbers in capsules and in ``__cuda_array_interface__``, is the same code.
"""

import ctypes
import gc
import multiprocessing
import os
import weakref
from multiprocessing import reduction
from multiprocessing.connection import Connection

import numpy as np
import pytest
import terrace_kv

MIB = 1 << 20


class Lease:
    """Stands for whatever grants a block."""


@pytest.fixture
def device() -> terrace_kv.Device:
    return terrace_kv.open_device("host-only")


def test_a_device_is_named_or_nothing(device: terrace_kv.Device) -> None:
    """A device that is not there is replaced silently, or ends the process."""
    assert device.kind == "host-only"
    assert "host" in device.name
    for name in ("", "cuda", "cuda:x", "gpu:0", "cpu"):
        with pytest.raises(terrace_kv.InvalidArgument):
            terrace_kv.open_device(name)
    try:
        terrace_kv.open_device("cuda:0")
    except terrace_kv.DeviceFailed as error:
        print(f"not tested on a GPU: {error}")
    with pytest.raises(terrace_kv.DeviceFailed):
        terrace_kv.open_device("cuda:4000")


def test_arrays_are_no_copies(device: terrace_kv.Device) -> None:
    """An array is a copy, begins elsewhere, or may be written though the block is sealed."""
    chunk = device.allocate(2 * MIB)
    writable = np.from_dlpack(chunk.block(4096, 64, readonly=False))
    assert writable.shape == (64,)
    assert writable.dtype == np.uint8
    writable[:] = np.arange(64, dtype=np.uint8)
    sealed = np.from_dlpack(chunk.block(4096, 64, dtype="float16", shape=(2, 4, 4)))
    assert (sealed.shape, sealed.dtype) == ((2, 4, 4), np.float16)
    assert not sealed.flags.writeable
    assert sealed.ctypes.data == writable.ctypes.data
    assert sealed.tobytes() == bytes(range(64))
    writable[3] = 200
    assert sealed.tobytes()[3] == 200, "both look at one place"


def test_torch_tensors_are_no_copies(device: terrace_kv.Device) -> None:
    """torch copies, or takes another type; bfloat16 and float8 are known to DLPack alone."""
    torch = pytest.importorskip("torch", reason="torch is not installed: its tensors were NOT tested")
    chunk = device.allocate(2 * MIB)
    lease = Lease()
    gone = weakref.ref(lease)
    raw = torch.from_dlpack(chunk.block(0, 4096, readonly=False))
    raw.copy_(torch.arange(4096, dtype=torch.int16).to(torch.uint8))
    tensor = torch.from_dlpack(chunk.block(0, 4096, dtype="bfloat16", shape=(2, 8, 128), lease=lease))
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.bfloat16, (2, 8, 128))
    assert tensor.data_ptr() == raw.data_ptr()
    eight = torch.from_dlpack(chunk.block(0, 256, dtype="float8_e4m3fn"))
    assert (eight.dtype, eight.data_ptr()) == (torch.float8_e4m3fn, raw.data_ptr())
    del lease, chunk
    gc.collect()
    assert gone() is not None, "the tensor keeps the lease"
    assert torch.equal(tensor.view(torch.uint8).flatten(), raw)
    del tensor
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("consume", ["array", "capsule", "renamed"])
def test_a_view_holds_the_lease(device: terrace_kv.Device, consume: str) -> None:
    """The lease or the mapping goes while something looks at the block, or stays for ever behind it: consumed, thrown
    away unused, and taken by a consumer that calls the deleter."""
    source = device.allocate(2 * MIB)
    descriptor = source.export()
    chunk = device.import_chunk(descriptor, source.nbytes)
    os.close(descriptor)
    assert device.imports == 1
    lease = Lease()
    gone = weakref.ref(lease)
    block = chunk.block(0, MIB, lease=lease)
    view: object = np.from_dlpack(block) if consume == "array" else block.__dlpack__(max_version=(1, 0))
    block.close()
    assert block.closed
    with pytest.raises(terrace_kv.ClosedError):
        block.__dlpack__(max_version=(1, 0))
    del block, chunk, lease
    gc.collect()
    assert gone() is not None
    assert device.imports == 1, "the memory is mapped while something looks at it"
    if consume == "array":
        assert isinstance(view, np.ndarray)
        assert not view.any()
    if consume == "renamed":
        use_as_a_consumer(view)
    del view
    gc.collect()
    assert gone() is None
    assert device.imports == 0


def use_as_a_consumer(capsule: object) -> None:
    """What a consumer in C does: rename the capsule, use the tensor, call its deleter."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    rename = ctypes.pythonapi.PyCapsule_SetName
    rename.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address = pointer(capsule, b"dltensor_versioned")
    assert rename(capsule, b"used_dltensor_versioned") == 0
    # version, context, deleter, flags, data, device, dimensions, type.
    words = (ctypes.c_uint64 * 8).from_address(address)
    major, minor = words[0] & 0xFFFFFFFF, words[0] >> 32
    assert (major, minor, words[3]) == (1, 0, 1), "version 1.0, read-only"
    assert words[5] == 1, "kDLCPU, device 0"
    assert words[6] & 0xFFFFFFFF == 1, "one dimension"
    assert words[6] >> 32 == 1 | 8 << 8 | 1 << 16, "uint8, one lane"
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(words[2])(address)


def test_what_cannot_be_lent_is_refused(device: terrace_kv.Device) -> None:
    """A consumer gets memory that is not the block's, or believes that it may write."""
    chunk = device.allocate(2 * MIB)
    length = chunk.nbytes
    for offset, nbytes, options in (
        (length, 1, {}),
        (length - 8, 16, {}),
        (0, 0, {}),
        (0, 10, {"dtype": "float32"}),
        (2, 8, {"dtype": "float32"}),
        (0, 16, {"dtype": "float32", "shape": (3,)}),
        (0, 16, {"dtype": "float32", "shape": (-2, -2)}),
        (0, 16, {"dtype": "complex64"}),
    ):
        with pytest.raises(terrace_kv.InvalidArgument):
            chunk.block(offset, nbytes, **options)
    block = chunk.block(0, 16)
    assert block.__dlpack_device__() == (1, 0)
    for options in (
        {},
        {"copy": True, "max_version": (1, 0)},
        {"dl_device": (2, 0)},
        {"stream": 1, "max_version": (1, 0)},
    ):
        with pytest.raises(BufferError):
            block.__dlpack__(**options)
    assert not hasattr(block, "__cuda_array_interface__"), "this is host memory"
    with pytest.raises(terrace_kv.InvalidArgument):
        device.import_chunk(0, length)
    with pytest.raises(OSError, match="descriptor"):
        device.import_chunk(-1, length)


def _lend(pipe: Connection) -> None:
    device = terrace_kv.open_device("host-only")
    chunk = device.allocate(2 * MIB)
    np.from_dlpack(chunk.block(0, 8, readonly=False))[:] = np.arange(8, dtype=np.uint8)
    descriptor = chunk.export()
    reduction.send_handle(pipe, descriptor, os.getppid())
    pipe.send(chunk.nbytes)
    pipe.recv()


def test_memory_of_another_process_outlives_it(device: terrace_kv.Device) -> None:
    """The lender dies while a tensor looks at its memory: the bytes must stay, and no fault follow."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    lender = context.Process(target=_lend, args=(there,))
    lender.start()
    descriptor = reduction.recv_handle(here)
    chunk = device.import_chunk(descriptor, here.recv())
    os.close(descriptor)
    array = np.from_dlpack(chunk.block(0, 8))
    lender.kill()
    lender.join()
    assert lender.exitcode == -9
    assert array.tobytes() == bytes(range(8))
