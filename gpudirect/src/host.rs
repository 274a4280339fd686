//! The stand-in: host memory behind the same trait, for machines without a
//! device. Copies are done when they are started.

use terrace_core::ByteCount;

use crate::memory::{Buffer, Chunk, DeviceError, DeviceMemory, Returned, Transfer, range};

/// Host memory that behaves like a device of `capacity` bytes.
#[derive(Debug)]
pub struct HostMemory {
    capacity: ByteCount,
    used: std::sync::Arc<std::sync::Mutex<u64>>,
}

/// Bytes of the stand-in.
#[derive(Debug)]
pub struct HostChunk {
    bytes: Vec<u8>,
    used: std::sync::Arc<std::sync::Mutex<u64>>,
}

/// A plain host buffer.
#[derive(Debug)]
pub struct HostBuffer(Vec<u8>);

/// A copy that is done already.
#[derive(Debug)]
pub struct HostTransfer(HostBuffer);

impl HostMemory {
    /// A device of this size.
    pub fn new(capacity: ByteCount) -> Self {
        Self { capacity, used: std::sync::Arc::default() }
    }
}

fn locked(used: &std::sync::Mutex<u64>) -> std::sync::MutexGuard<'_, u64> {
    used.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl DeviceMemory for HostMemory {
    type Chunk = HostChunk;
    type Buffer = HostBuffer;
    type Transfer = HostTransfer;

    fn allocate(&self, bytes: ByteCount) -> Result<HostChunk, DeviceError> {
        let full = DeviceError::NoMemory { bytes: bytes.get() };
        let length = usize::try_from(bytes.get()).map_err(|_| full.clone())?;
        let mut used = locked(&self.used);
        let after = used.checked_add(bytes.get()).filter(|after| *after <= self.capacity.get());
        *used = after.ok_or(full)?;
        Ok(HostChunk { bytes: vec![0; length], used: self.used.clone() })
    }

    fn buffer(&self, bytes: ByteCount) -> Result<HostBuffer, DeviceError> {
        let length =
            usize::try_from(bytes.get()).map_err(|_| DeviceError::NoMemory { bytes: bytes.get() })?;
        Ok(HostBuffer(vec![0; length]))
    }

    fn copy_in(
        &self,
        source: HostBuffer,
        target: &mut HostChunk,
        offset: ByteCount,
    ) -> Result<HostTransfer, Returned<HostBuffer>> {
        match range(target.length(), offset, source.0.len()) {
            Ok(range) => {
                target.bytes[range].copy_from_slice(&source.0);
                Ok(HostTransfer(source))
            }
            Err(error) => Err(Returned { buffer: source, error }),
        }
    }

    fn copy_out(
        &self,
        source: &HostChunk,
        offset: ByteCount,
        mut target: HostBuffer,
    ) -> Result<HostTransfer, Returned<HostBuffer>> {
        match range(source.length(), offset, target.0.len()) {
            Ok(range) => {
                target.0.copy_from_slice(&source.bytes[range]);
                Ok(HostTransfer(target))
            }
            Err(error) => Err(Returned { buffer: target, error }),
        }
    }

    fn room(&self) -> Result<(ByteCount, ByteCount), DeviceError> {
        let used = *locked(&self.used);
        Ok((ByteCount::new(self.capacity.get() - used), self.capacity))
    }
}

impl Chunk for HostChunk {
    fn length(&self) -> ByteCount {
        ByteCount::new(self.bytes.len() as u64)
    }
}

impl Drop for HostChunk {
    fn drop(&mut self) {
        *locked(&self.used) -= self.bytes.len() as u64;
    }
}

impl Buffer for HostBuffer {
    fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Transfer for HostTransfer {
    type Buffer = HostBuffer;

    fn is_done(&self) -> Result<bool, DeviceError> {
        Ok(true)
    }

    fn wait(self) -> Result<HostBuffer, DeviceError> {
        Ok(self.0)
    }
}
