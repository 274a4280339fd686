//! Host memory that the device reaches at full speed: the pool's mappings,
//! registered once, slice by slice.
//!
//! Promises: a slice that cannot be registered costs speed, never a start or a
//! copy; a registration lives until the last copy over it has ended. Leaves to
//! others: the memory itself, and on which thread registering takes its time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use terrace_core::{ByteCount, MIB};

use crate::device::{Device, Registered};
use crate::error::DeviceError;
use crate::host_bytes::HostBytes;
use crate::span::Piece;

/// Registering pins page by page and holds the driver's lock meanwhile: a slice
/// of small pages is done in some tens of milliseconds.
pub const SLICE_BYTES: ByteCount = ByteCount::new(64 * MIB);

/// What of the host's memory is registered with one device.
#[derive(Debug)]
pub struct Pinned {
    device: Arc<dyn Device>,
    slice_bytes: u64,
    // By address of the first byte. Slices do not overlap.
    slices: Mutex<BTreeMap<usize, Arc<Registered>>>,
}

/// What became of memory that was to be registered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Added {
    /// Bytes that the device reaches at full speed.
    pub registered: ByteCount,
    /// Bytes that are copied through the driver's own buffers.
    pub bounced: ByteCount,
    /// Why the first of those could not be registered.
    pub why: Option<DeviceError>,
}

impl Pinned {
    /// Nothing is registered yet. Slices are `slice_bytes` long ([`SLICE_BYTES`]), the last of a mapping shorter.
    ///
    /// # Panics
    /// If a slice would have no bytes.
    pub fn new(device: Arc<dyn Device>, slice_bytes: ByteCount) -> Self {
        assert!(slice_bytes.get() > 0, "a slice has bytes");
        Self { device, slice_bytes: slice_bytes.get(), slices: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<usize, Arc<Registered>>> {
        self.slices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a mapping. Blocks for as long as the driver takes, slice after
    /// slice; copies use each slice as soon as it is there.
    pub fn add(&self, memory: &HostBytes) -> Added {
        let mut added = Added::default();
        let length = memory.len() as u64;
        let mut offset = 0;
        while offset < length {
            let bytes = ByteCount::new(self.slice_bytes.min(length - offset));
            match memory.part(offset, bytes).and_then(|slice| self.device.register(slice)) {
                Ok(slice) => {
                    added.registered = ByteCount::new(added.registered.get() + bytes.get());
                    self.lock().insert(slice.bytes().address(), Arc::new(slice));
                }
                Err(error) => {
                    added.bounced = ByteCount::new(added.bounced.get() + bytes.get());
                    added.why.get_or_insert(error);
                }
            }
            offset += bytes.get();
        }
        added
    }

    /// Forgets a mapping that [`Self::add`] was given. Its registrations end now,
    /// or with the last copy over them.
    pub fn remove(&self, memory: &HostBytes) {
        let start = memory.address();
        let gone: Vec<_> = {
            let mut slices = self.lock();
            let keys: Vec<_> = slices.range(start..start + memory.len()).map(|(key, _)| *key).collect();
            keys.into_iter().filter_map(|key| slices.remove(&key)).collect()
        };
        // The driver's part, without the lock.
        drop(gone);
    }

    /// Bytes that are registered.
    pub fn registered(&self) -> ByteCount {
        ByteCount::new(self.lock().values().map(|slice| slice.bytes().len() as u64).sum())
    }

    /// The slice over `address`, or else how many bytes from there are in none.
    fn over(&self, address: usize) -> Result<Arc<Registered>, usize> {
        let slices = self.lock();
        let before = slices.range(..=address).next_back();
        if let Some((start, slice)) = before.filter(|(start, slice)| address < *start + slice.bytes().len()) {
            debug_assert!(*start <= address, "the last one that begins before");
            return Ok(Arc::clone(slice));
        }
        Err(slices.range(address..).next().map_or(usize::MAX, |(start, _)| *start - address))
    }

    /// Cuts copies where slices end, because the driver takes no copy over two
    /// registrations.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`] never happens for a piece that was checked before.
    pub(crate) fn cut(&self, pieces: Vec<Piece>) -> Result<Cut, DeviceError> {
        let mut cut = Cut { pieces: Vec::with_capacity(pieces.len()), slices: Vec::new(), bounces: false };
        for piece in pieces {
            let Some(host) = piece.host() else {
                cut.pieces.push(piece);
                continue;
            };
            let (start, length) = (host.address(), host.len());
            let mut at = 0;
            while at < length {
                let end = match self.over(start + at) {
                    Ok(slice) => {
                        let end = slice.bytes().address() + slice.bytes().len() - start;
                        cut.keep(slice);
                        end
                    }
                    Err(gap) => {
                        cut.bounces = true;
                        at.saturating_add(gap)
                    }
                };
                let bytes = end.min(length) - at;
                cut.pieces.push(piece.part(at as u64, ByteCount::new(bytes as u64))?);
                at += bytes;
            }
        }
        Ok(cut)
    }
}

/// Copies none of which goes over two slices, and the slices.
#[derive(Debug)]
pub(crate) struct Cut {
    pub(crate) pieces: Vec<Piece>,
    pub(crate) slices: Vec<Arc<Registered>>,
    /// Some host memory is not registered.
    pub(crate) bounces: bool,
}

impl Cut {
    /// Neighbours mostly lie in one slice.
    fn keep(&mut self, slice: Arc<Registered>) {
        if !self.slices.last().is_some_and(|last| Arc::ptr_eq(last, &slice)) {
            self.slices.push(slice);
        }
    }
}
