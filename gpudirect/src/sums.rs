//! Checksums of blocks where they lie on a device.
//!
//! Promises: the same number as the host computes over the same bytes. Whoever
//! asks waits, for as long as the device does: ask on a thread that may.

use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use terrace_core::{BlockId, ByteCount, Checksum, Checksummer, IoClass};

use crate::device::{Device, DeviceKind, Lane};
use crate::error::DeviceError;
use crate::host_bytes::HostBytes;
use crate::kernels::{Cuda, KernelBytes, KernelError, KernelQueue, Summer};
use crate::span::{DeviceBytes, Direction, Piece, Span};

/// What is summed at once where the host does it.
const PIECE_BYTES: u64 = 64 << 10;
/// Longest wait for a copy of one block, and between two looks at it.
const COPY_WITHIN: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_micros(20);

/// Sums what lies on one device.
#[derive(Debug)]
pub struct Sums(How);

#[derive(Debug)]
enum How {
    /// The stand-in's memory is the host's.
    InPlace,
    /// By kernels on the device.
    Kernels { queue: Arc<dyn KernelQueue>, summer: Summer },
    /// By the processor, over a copy: the device runs none of our kernels.
    Copied { device: Arc<dyn Device>, why: KernelError },
}

impl Sums {
    /// Prepares the device. May compile kernels, which takes seconds.
    ///
    /// # Errors
    /// [`DeviceError::Lost`]. A device that cannot run our kernels is served by copies.
    pub fn open(device: &Arc<dyn Device>) -> Result<Self, DeviceError> {
        let info = device.info();
        match info.kind {
            DeviceKind::HostOnly => Ok(Self(How::InPlace)),
            DeviceKind::Cuda => match by_kernels(info.ordinal) {
                Ok(how) => Ok(Self(how)),
                Err(KernelError::Device(error)) if error.is_lost() => Err(error),
                Err(why) => Ok(Self(How::Copied { device: Arc::clone(device), why })),
            },
        }
    }

    /// What sums, for logs.
    pub fn describe(&self) -> String {
        match &self.0 {
            How::InPlace => "in place, on the processor".to_owned(),
            How::Kernels { queue, .. } => queue.describe(),
            How::Copied { why, .. } => format!("on the processor, over copies ({why})"),
        }
    }

    /// The checksum of a payload as it is now. Work that other streams still do on it is not waited for.
    ///
    /// # Errors
    /// What the device says.
    pub fn checksum(
        &self,
        payload: &DeviceBytes,
        block: BlockId,
        generation: u64,
    ) -> Result<Checksum, DeviceError> {
        let length = payload.bytes();
        match &self.0 {
            How::InPlace => in_place(payload, block, generation),
            How::Copied { device, .. } => over_a_copy(&**device, payload, block, generation),
            How::Kernels { queue, summer } => {
                let count = usize::try_from(length.get())
                    .map_err(|_| DeviceError::BadJob { detail: "too long a payload" })?;
                // SAFETY: `DeviceBytes` was checked against its chunk, which it keeps, mapped on this device.
                let bytes = unsafe { KernelBytes::new(payload.address(), count, Arc::new(payload.clone())) };
                let whole = count.is_multiple_of(8) && payload.address().is_multiple_of(8);
                if whole {
                    let sums = summer.checksums(&[(block, bytes)], generation).map_err(from_kernel)?;
                    return sums.first().copied().ok_or(DeviceError::BadJob { detail: "no payload" });
                }
                // The kernel adds words. What has none comes to the host.
                let mut copy = vec![0; count];
                queue.read(&bytes, &mut copy).map_err(from_kernel)?;
                let mut summer = Checksummer::new(block, length, generation);
                summer.update(&copy);
                Ok(summer.finish())
            }
        }
    }
}

fn by_kernels(ordinal: u32) -> Result<How, KernelError> {
    let queue: Arc<dyn KernelQueue> = Arc::new(Cuda::open(ordinal)?);
    let summer = Summer::new(Arc::clone(&queue))?;
    Ok(How::Kernels { queue, summer })
}

fn over_a_copy(
    device: &dyn Device,
    payload: &DeviceBytes,
    block: BlockId,
    generation: u64,
) -> Result<Checksum, DeviceError> {
    let memory = HostBytes::anonymous(payload.bytes())
        .map_err(|error| DeviceError::Driver { call: "mmap", detail: error.to_string() })?;
    let piece = Piece::new(Span::Device(payload.clone()), Span::Host(memory.clone()))?;
    let lane = Lane { direction: Direction::DeviceToHost, class: IoClass::PrefillFetch };
    let mut mark = device.start(lane, Arc::new([piece]))?;
    let began = Instant::now();
    while !mark.ended()? {
        if began.elapsed() > COPY_WITHIN {
            return Err(DeviceError::Hung { call: "a copy to be summed", within: COPY_WITHIN });
        }
        std::thread::sleep(LOOK);
    }
    sum_of(&memory, payload.bytes(), block, generation)
}

fn in_place(payload: &DeviceBytes, block: BlockId, generation: u64) -> Result<Checksum, DeviceError> {
    let address = usize::try_from(payload.address()).ok();
    let start = address.and_then(|address| NonNull::new(std::ptr::with_exposed_provenance_mut(address)));
    let length = usize::try_from(payload.bytes().get()).ok();
    let (Some(start), Some(length)) = (start, length) else {
        return Err(DeviceError::BadJob { detail: "a payload outside of memory" });
    };
    // SAFETY: a chunk of the stand-in is mapped, readable and writable, at its address for as long as it lives; the
    // payload was checked against it and keeps it. No reference to its bytes is made.
    let bytes = unsafe { HostBytes::from_raw(Arc::new(payload.clone()), start, length) };
    sum_of(&bytes, payload.bytes(), block, generation)
}

fn sum_of(
    bytes: &HostBytes,
    length: ByteCount,
    block: BlockId,
    generation: u64,
) -> Result<Checksum, DeviceError> {
    let mut summer = Checksummer::new(block, length, generation);
    let mut piece = vec![0; usize::try_from(PIECE_BYTES.min(length.get())).unwrap_or(0)];
    let mut at = 0;
    while at < length.get() {
        let part = bytes.part(at, ByteCount::new(PIECE_BYTES.min(length.get() - at)))?;
        let piece = &mut piece[..part.len()];
        part.copy_to(piece);
        summer.update(piece);
        at += part.len() as u64;
    }
    Ok(summer.finish())
}

fn from_kernel(error: KernelError) -> DeviceError {
    match error {
        KernelError::Device(error) => error,
        KernelError::NoNvrtc { .. }
        | KernelError::NoCompiler { .. }
        | KernelError::Refused { .. }
        | KernelError::TooOld { .. }
        | KernelError::BadJob { .. } => DeviceError::Unsupported { what: error.to_string() },
    }
}
