//! What the Hbm tier needs of a device: chunks, host buffers, and copies between
//! them that run while the caller does something else.

use terrace_core::ByteCount;

/// Memory of one device. Copies of one `DeviceMemory` run in the order in which
/// they were started, so a copy out sees every copy in that was started before.
pub trait DeviceMemory: Send + Sync {
    /// Bytes on the device.
    type Chunk: Chunk;
    /// Host memory that the device can reach at full speed.
    type Buffer: Buffer;
    /// A copy under way.
    type Transfer: Transfer<Buffer = Self::Buffer>;

    /// Takes a chunk. Its bytes are undefined. Freed when it is dropped, after
    /// every copy that was started on it.
    ///
    /// # Errors
    /// [`DeviceError::NoMemory`], or what the driver says.
    fn allocate(&self, bytes: ByteCount) -> Result<Self::Chunk, DeviceError>;

    /// Takes a host buffer of zeros.
    ///
    /// # Errors
    /// [`DeviceError::NoMemory`], or what the driver says.
    fn buffer(&self, bytes: ByteCount) -> Result<Self::Buffer, DeviceError>;

    /// Starts copying all of `source` into `target` at `offset`, and does not wait.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`] or what the driver says; the buffer comes back.
    fn copy_in(
        &self,
        source: Self::Buffer,
        target: &mut Self::Chunk,
        offset: ByteCount,
    ) -> Result<Self::Transfer, Returned<Self::Buffer>>;

    /// Starts filling all of `target` from `source` at `offset`, and does not wait.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`] or what the driver says; the buffer comes back.
    fn copy_out(
        &self,
        source: &Self::Chunk,
        offset: ByteCount,
        target: Self::Buffer,
    ) -> Result<Self::Transfer, Returned<Self::Buffer>>;

    /// Bytes free on the device now, and bytes in all.
    ///
    /// # Errors
    /// What the driver says.
    fn room(&self) -> Result<(ByteCount, ByteCount), DeviceError>;
}

/// Bytes on the device.
pub trait Chunk: Send {
    /// Its length.
    fn length(&self) -> ByteCount;
}

/// Host memory that nobody else uses: no transfer has it.
pub trait Buffer: Send {
    /// What it holds.
    fn bytes(&self) -> &[u8];
    /// To be filled.
    fn bytes_mut(&mut self) -> &mut [u8];
}

/// A copy under way. It owns the host buffer. Dropping it waits for the copy.
pub trait Transfer: Send {
    /// The buffer's type.
    type Buffer;

    /// Whether [`Transfer::wait`] would return at once.
    ///
    /// # Errors
    /// What the driver says; the copy has failed.
    fn is_done(&self) -> Result<bool, DeviceError>;

    /// Waits for the end and gives the buffer back.
    ///
    /// # Errors
    /// What the driver says. What the copy covered must not be used.
    fn wait(self) -> Result<Self::Buffer, DeviceError>;
}

/// A copy that was not started, and the buffer it would have used.
#[derive(Debug)]
pub struct Returned<B> {
    /// The caller's buffer, untouched.
    pub buffer: B,
    /// Why.
    pub error: DeviceError,
}

/// What can go wrong on a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// There is no driver on this machine.
    #[error("no CUDA driver on this machine; install one, or leave the Hbm tier off")]
    NoDriver,
    /// The device is full.
    #[error("no device memory for {bytes} bytes; free chunks first")]
    NoMemory {
        /// What was asked for.
        bytes: u64,
    },
    /// A copy that would leave the chunk.
    #[error("bytes {offset} to {end} are outside a chunk of {length} bytes")]
    OutOfBounds {
        /// First byte.
        offset: u64,
        /// Byte after the last; `u64::MAX` if that overflows.
        end: u64,
        /// Length of the chunk.
        length: u64,
    },
    /// Anything else that the driver says. What was under way must not be used.
    #[error("CUDA driver: {detail}; the device must be reopened")]
    Driver {
        /// The driver's name for it.
        detail: String,
    },
}

/// The range of a copy, checked against the chunk.
pub(crate) fn range(
    length: ByteCount,
    offset: ByteCount,
    bytes: usize,
) -> Result<std::ops::Range<usize>, DeviceError> {
    let end = u64::try_from(bytes).ok().and_then(|bytes| offset.get().checked_add(bytes));
    let outside =
        DeviceError::OutOfBounds { offset: offset.get(), end: end.unwrap_or(u64::MAX), length: length.get() };
    let end = end.filter(|end| *end <= length.get()).ok_or_else(|| outside.clone())?;
    match (usize::try_from(offset.get()), usize::try_from(end)) {
        (Ok(start), Ok(end)) => Ok(start..end),
        (Err(_), _) | (_, Err(_)) => Err(outside),
    }
}
