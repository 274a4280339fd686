//! Filling frames in device memory, and publishing them.

use std::sync::Arc;

use terrace_core::{BlockId, ByteCount, Checksum, Durability, SealOutcome};
use terrace_gpudirect::{DeviceBytes, DeviceError, copy_in};

use crate::chunks::WriterToken;
use crate::device::{COPY_WITHIN, Granted, Where, place};
use crate::device_read::{DeviceBlock, Leased};
use crate::error::ClientError;
use crate::lease::{Frame, Lease};
use crate::write::{Fill, WriteBlock, WriteLease, Writer};

/// Frames reserved for writing, on a device where it has room. Dropping it gives back what is not sealed, and unpins
/// what is: no work on the device may store into its frames any more then, nor when they are sealed or given back.
pub type DeviceWriteLease = WriteLease<Reserved>;

/// A frame to fill, where it is.
#[derive(Debug)]
pub enum Reserved {
    /// In host memory: the device has no room, or this session may map none of it.
    Host(Box<WriteBlock>),
    /// On the device.
    Device(DeviceWriteBlock),
}

impl Reserved {
    /// The frame, if it is on the device.
    pub fn on_device(&self) -> Option<&DeviceWriteBlock> {
        match self {
            Self::Host(_) => None,
            Self::Device(block) => Some(block),
        }
    }
}

/// The right to store into a frame, where it is.
#[derive(Debug)]
pub struct ReservedWriter(There);

#[derive(Debug)]
enum There {
    Host(Writer),
    Device(Arc<WriterToken>),
}

impl Fill for Reserved {
    type Writer = ReservedWriter;
    type Reader = Leased;

    fn length(&self) -> ByteCount {
        match self {
            Self::Host(block) => block.length(),
            Self::Device(block) => block.length(),
        }
    }

    fn is_writable(&self) -> bool {
        match self {
            Self::Host(block) => block.is_writable(),
            Self::Device(block) => block.is_writable(),
        }
    }

    fn stop(&mut self) -> Option<ReservedWriter> {
        match self {
            Self::Host(block) => block.stop().map(There::Host),
            Self::Device(block) => block.writer.take().map(There::Device),
        }
        .map(ReservedWriter)
    }

    fn go_on(&mut self, writer: ReservedWriter) {
        match (self, writer.0) {
            (Self::Host(block), There::Host(writer)) => block.go_on(writer),
            (Self::Device(block), There::Device(writer)) => block.writer = Some(writer),
            (Self::Host(_), There::Device(_)) | (Self::Device(_), There::Host(_)) => {
                unreachable!("a block has its own writer back")
            }
        }
    }

    fn sealed(&mut self, checksum: Checksum) {
        match self {
            Self::Host(block) => block.sealed(checksum),
            Self::Device(block) => block.sealed = Some(checksum),
        }
    }

    fn reader(&self) -> Option<Leased> {
        match self {
            Self::Host(block) => block.reader().map(Leased::Host),
            Self::Device(block) => {
                Some(Leased::Device(DeviceBlock::sealed(block.granted.clone(), block.sealed?)))
            }
        }
    }
}

impl DeviceWriteLease {
    /// A guard of one frame, wherever it is.
    pub(crate) fn block_of(frame: Frame, lease: Arc<Lease>) -> Result<Reserved, ClientError> {
        Ok(match place(frame) {
            Where::Host(frame) => Reserved::Host(Box::new(WriteBlock::new(frame, lease)?)),
            Where::Device(frame, mapping) => {
                let granted = Granted::new(&frame, &mapping, lease)?;
                let none = ClientError::Protocol { detail: "a frame to write without its window" };
                let writer = Some(frame.writer.ok_or(none)?);
                Reserved::Device(DeviceWriteBlock { granted, sealed: None, writer })
            }
        })
    }

    /// As [`crate::WriteLease::seal`]. What lies on the device is summed there, by a kernel on a GPU; the first time,
    /// that is compiled, which takes up to a second. All work that stores into the blocks has ended.
    ///
    /// # Errors
    /// As [`crate::WriteLease::seal`], or what the device says: then nothing was sealed.
    pub async fn seal(
        &mut self,
        indexes: &[u32],
        durability: Durability,
    ) -> Result<Vec<SealOutcome>, ClientError> {
        let mut blocks = Vec::with_capacity(indexes.len());
        let mut there = Vec::new();
        for index in indexes {
            match self.writable(*index)? {
                Reserved::Host(block) => blocks.push((*index, block.seal_value().1)),
                Reserved::Device(block) => there.push((*index, block.granted.clone())),
            }
        }
        if !there.is_empty() {
            // A device is waited for, and must not have the runtime's time.
            let summing = tokio::task::spawn_blocking(move || {
                there.into_iter().map(|(index, granted)| Ok((index, granted.sum()?))).collect::<Vec<_>>()
            });
            let sums = summing.await.map_err(|_| ClientError::Disconnected)?;
            blocks.extend(sums.into_iter().collect::<Result<Vec<_>, DeviceError>>()?);
        }
        self.seal_with(&blocks, durability).await
    }
}

/// For whoever handles both kinds alike: all of its frames are in host memory.
impl From<WriteLease> for DeviceWriteLease {
    fn from(lease: WriteLease) -> Self {
        let WriteLease { lease, grants } = lease;
        let reserved = |block| Reserved::Host(Box::new(block));
        Self { lease, grants: grants.into_iter().map(|grant| grant.map(reserved)).collect() }
    }
}

/// A frame of this session's window on a device, to be filled with one block.
#[derive(Debug)]
pub struct DeviceWriteBlock {
    // Before the writer: the lease ends before its window goes back.
    granted: Granted,
    sealed: Option<Checksum>,
    // Present while stores are allowed.
    writer: Option<Arc<WriterToken>>,
}

impl DeviceWriteBlock {
    /// Identity of the block.
    pub fn id(&self) -> BlockId {
        self.granted.block
    }

    /// What its checksum is seeded with.
    pub fn generation(&self) -> u64 {
        self.granted.generation
    }

    /// Payload length.
    pub fn length(&self) -> ByteCount {
        self.granted.bytes.bytes()
    }

    /// The daemon's number of the device.
    pub fn device(&self) -> u32 {
        self.granted.mapping.number
    }

    /// The frame, to compute in. Storing is allowed until the block is sealed, aborted or dropped, and until its
    /// lease is: nothing but the caller sees to it.
    pub fn bytes(&self) -> &DeviceBytes {
        &self.granted.bytes
    }

    /// Whether the frame is still ours: its lease has not ended, its fence has not moved. Ask before sealing, when
    /// the work that stores has ended.
    pub fn is_valid(&self) -> bool {
        self.granted.is_valid()
    }

    /// Whether stores are allowed: not sealed, not aborted.
    pub fn is_writable(&self) -> bool {
        self.writer.is_some()
    }

    /// Fills the whole block from host memory, and waits for the copy.
    ///
    /// # Errors
    /// A payload that is not one block long, a block that was sealed or aborted, or what the device says.
    pub fn write(&mut self, payload: &[u8]) -> Result<(), ClientError> {
        let (found, expected) = (payload.len() as u64, self.length().get());
        if found != expected {
            return Err(ClientError::WrongLength { index: 0, found, expected });
        }
        if self.writer.is_none() {
            return Err(ClientError::NotWritable { index: self.granted.frame });
        }
        Ok(copy_in(self.granted.mapping.own.device.as_ref(), payload, &self.granted.bytes, COPY_WITHIN)?)
    }
}
