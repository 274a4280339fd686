//! Memory of one CUDA device, by the driver API, on one stream.
//!
//! The driver is loaded at run time. [`CudaMemory::open`] is the only way in,
//! and it checks for the library first, because a missing one would panic.

use std::sync::Arc;

use cudarc::driver::sys::{CUevent_flags, CUresult};
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DriverError, PinnedHostSlice};
use terrace_core::ByteCount;

use crate::memory::{Buffer, Chunk, DeviceError, DeviceMemory, Returned, Transfer, range};
use crate::status::driver_present;

/// One device and the stream that its copies run on.
#[derive(Debug)]
pub struct CudaMemory {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
}

/// Bytes on the device.
#[derive(Debug)]
pub struct CudaChunk {
    bytes: CudaSlice<u8>,
}

/// Page-locked host memory. `length` bytes are in use.
#[derive(Debug)]
pub struct CudaBuffer {
    pinned: PinnedHostSlice<u8>,
    start: *mut u8,
    length: usize,
}

// SAFETY: `start` points into `pinned`, which this buffer owns and which may move
// between threads itself; nothing else has the pointer.
unsafe impl Send for CudaBuffer {}

/// A copy on the stream.
#[derive(Debug)]
pub struct CudaTransfer {
    // Dropped before the event: its own drop waits for the stream's use of it.
    buffer: CudaBuffer,
    end: CudaEvent,
}

impl CudaMemory {
    /// Opens a device by its ordinal.
    ///
    /// # Errors
    /// [`DeviceError::NoDriver`], or what the driver says.
    pub fn open(ordinal: usize) -> Result<Self, DeviceError> {
        if !driver_present() {
            return Err(DeviceError::NoDriver);
        }
        let context = CudaContext::new(ordinal).map_err(|error| driver(error, 0))?;
        let stream = context.new_stream().map_err(|error| driver(error, 0))?;
        Ok(Self { context, stream })
    }

    /// Marks the end of what the stream has been given so far.
    fn mark(&self) -> Result<CudaEvent, DriverError> {
        self.stream.record_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC))
    }

    /// Ends a copy that was started: with an event, or by waiting where there can be none.
    fn started(
        &self,
        buffer: CudaBuffer,
        copied: Result<(), DriverError>,
    ) -> Result<CudaTransfer, Returned<CudaBuffer>> {
        let bytes = buffer.length as u64;
        match copied.and_then(|()| self.mark()) {
            Ok(end) => Ok(CudaTransfer { buffer, end }),
            Err(error) => {
                // The copy may have begun: the buffer goes back only when the
                // stream is idle, or when the context is broken for good.
                self.context.record_err(self.stream.synchronize());
                Err(Returned { buffer, error: driver(error, bytes) })
            }
        }
    }
}

fn driver(error: DriverError, bytes: u64) -> DeviceError {
    if error.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
        DeviceError::NoMemory { bytes }
    } else {
        DeviceError::Driver { detail: error.to_string() }
    }
}

fn length_of(bytes: ByteCount) -> Result<usize, DeviceError> {
    // The driver wants a length that fits isize, and not zero.
    isize::try_from(bytes.get())
        .ok()
        .and_then(|length| usize::try_from(length).ok())
        .filter(|length| *length > 0)
        .ok_or(DeviceError::NoMemory { bytes: bytes.get() })
}

impl DeviceMemory for CudaMemory {
    type Chunk = CudaChunk;
    type Buffer = CudaBuffer;
    type Transfer = CudaTransfer;

    fn allocate(&self, bytes: ByteCount) -> Result<CudaChunk, DeviceError> {
        let length = length_of(bytes)?;
        // SAFETY: the memory is unset; the trait says so, and `u8` has no bad bit pattern.
        let bytes = unsafe { self.stream.alloc::<u8>(length) }.map_err(|error| driver(error, bytes.get()))?;
        Ok(CudaChunk { bytes })
    }

    fn buffer(&self, bytes: ByteCount) -> Result<CudaBuffer, DeviceError> {
        let length = length_of(bytes)?;
        // No write-combining: checksums read this memory.
        // SAFETY: the memory is unset until the fill below, and nobody else has it.
        let mut pinned = unsafe { self.context.alloc_pinned_with_flags::<u8>(length, 0) }
            .map_err(|error| driver(error, bytes.get()))?;
        let filled = pinned.as_mut_slice().map_err(|error| driver(error, bytes.get()))?;
        filled.fill(0);
        let start = filled.as_mut_ptr();
        Ok(CudaBuffer { pinned, start, length })
    }

    fn copy_in(
        &self,
        source: CudaBuffer,
        target: &mut CudaChunk,
        offset: ByteCount,
    ) -> Result<CudaTransfer, Returned<CudaBuffer>> {
        let range = match range(target.length(), offset, source.length) {
            Ok(range) => range,
            Err(error) => return Err(Returned { buffer: source, error }),
        };
        let copied = self.stream.memcpy_htod(&source.pinned, &mut target.bytes.slice_mut(range));
        self.started(source, copied)
    }

    fn copy_out(
        &self,
        source: &CudaChunk,
        offset: ByteCount,
        mut target: CudaBuffer,
    ) -> Result<CudaTransfer, Returned<CudaBuffer>> {
        let range = match range(source.length(), offset, target.length) {
            Ok(range) => range,
            Err(error) => return Err(Returned { buffer: target, error }),
        };
        let copied = self.stream.memcpy_dtoh(&source.bytes.slice(range), &mut target.pinned);
        self.started(target, copied)
    }

    fn room(&self) -> Result<(ByteCount, ByteCount), DeviceError> {
        let (free, all) = self.context.mem_get_info().map_err(|error| driver(error, 0))?;
        Ok((ByteCount::new(free as u64), ByteCount::new(all as u64)))
    }
}

impl Chunk for CudaChunk {
    fn length(&self) -> ByteCount {
        ByteCount::new(self.bytes.len() as u64)
    }
}

impl Buffer for CudaBuffer {
    fn bytes(&self) -> &[u8] {
        // SAFETY: `start` is the first of `length` bytes that `pinned` owns and that
        // were filled at creation. The caller has the buffer, so no transfer has it:
        // a transfer gives it back only after its event.
        unsafe { std::slice::from_raw_parts(self.start, self.length) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.length) }
    }
}

impl Transfer for CudaTransfer {
    type Buffer = CudaBuffer;

    fn is_done(&self) -> Result<bool, DeviceError> {
        self.end.context().bind_to_thread().map_err(|error| driver(error, 0))?;
        self.end.try_is_complete().map_err(|error| driver(error, 0))
    }

    fn wait(self) -> Result<CudaBuffer, DeviceError> {
        self.end.synchronize().map_err(|error| driver(error, 0))?;
        Ok(self.buffer)
    }
}
