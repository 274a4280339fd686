//! Reading blocks in device memory.

use std::sync::Arc;

use terrace_core::{BlockId, ByteCount, Checksum};
use terrace_gpudirect::DeviceBytes;
use terrace_lane::fold;

use crate::device::{Granted, Where, place};
use crate::error::ClientError;
use crate::lease::{Frame, Lease, Outcome};
use crate::read::{BadBlock, ReadBlock, ReadLease, Stale};

/// Blocks pinned for reading, on a device where it had room in time. Dropping it, and every block taken out of it,
/// releases them.
#[derive(Debug)]
pub struct DeviceReadLease {
    /// One entry a key, in order.
    pub grants: Vec<Outcome<Leased>>,
    pub(crate) lease: Option<Arc<Lease>>,
}

/// A pinned block, where it is.
#[derive(Clone, Debug)]
pub enum Leased {
    /// In host memory: it did not come to the device in time, or this session may map none of it.
    Host(ReadBlock),
    /// On the device.
    Device(DeviceBlock),
}

impl Leased {
    /// Whether all bytes read until now were those of the granted block. See [`DeviceBlock::is_valid`].
    pub fn is_valid(&self) -> bool {
        match self {
            Self::Host(block) => block.is_valid(),
            Self::Device(block) => block.is_valid(),
        }
    }

    /// The block, if it is on the device.
    pub fn on_device(&self) -> Option<&DeviceBlock> {
        match self {
            Self::Host(_) => None,
            Self::Device(block) => Some(block),
        }
    }
}

impl DeviceReadLease {
    /// A guard of one block, wherever it is.
    pub(crate) fn block_of(frame: Frame, lease: Arc<Lease>) -> Result<Leased, ClientError> {
        Ok(match place(frame) {
            Where::Host(frame) => Leased::Host(ReadBlock::new(frame, lease)?),
            Where::Device(frame, mapping) => Leased::Device(DeviceBlock {
                granted: Granted::new(&frame, &mapping, lease)?,
                checksum: frame.checksum,
            }),
        })
    }

    /// The daemon's number of the lease; `None` when nothing was granted.
    pub fn id(&self) -> Option<u64> {
        self.lease.as_ref().map(|lease| lease.id())
    }

    /// Blocks granted from the first key on without a gap, wherever they are.
    pub fn prefix(&self) -> usize {
        self.grants.iter().take_while(|grant| grant.granted().is_some()).count()
    }

    /// Whether every granted block is still the granted one; see [`DeviceBlock::is_valid`].
    pub fn is_valid(&self) -> bool {
        self.grants.iter().filter_map(Outcome::granted).all(Leased::is_valid)
    }

    /// Ends the lease now and waits until the daemon knows. Blocks that were taken out of it are stale from then on,
    /// and no work on the device may use them any more.
    ///
    /// # Errors
    /// The session has ended; so has the lease.
    pub async fn release(self) -> Result<(), ClientError> {
        match &self.lease {
            Some(lease) => lease.release().await,
            None => Ok(()),
        }
    }
}

/// For whoever handles both kinds alike: all of its blocks are in host memory.
impl From<ReadLease> for DeviceReadLease {
    fn from(lease: ReadLease) -> Self {
        let ReadLease { grants, lease } = lease;
        Self { grants: grants.into_iter().map(|grant| grant.map(Leased::Host)).collect(), lease }
    }
}

/// A sealed block in device memory.
#[derive(Clone, Debug)]
pub struct DeviceBlock {
    granted: Granted,
    checksum: Checksum,
}

impl DeviceBlock {
    pub(crate) fn sealed(granted: Granted, checksum: Checksum) -> Self {
        Self { granted, checksum }
    }

    /// Identity of the block.
    pub fn id(&self) -> BlockId {
        self.granted.block
    }

    /// Checksum that was sealed.
    pub fn checksum(&self) -> Checksum {
        self.checksum
    }

    /// Generation of the space when it was leased: what its checksum is seeded with.
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

    /// The bytes in place. They stay mapped while this value or a clone of what it answers lives, but are the
    /// block's only while [`DeviceBlock::is_valid`] says so. To be read only: nothing but the caller sees to it.
    pub fn bytes(&self) -> &DeviceBytes {
        &self.granted.bytes
    }

    /// Whether all bytes read until now were those of the granted block. Ask when the work on the device that reads
    /// them has ended, before anything derived from them leaves; one load of shared memory.
    pub fn is_valid(&self) -> bool {
        self.granted.is_valid()
    }

    /// Copies the block to host memory, compares the copy with the sealed checksum, and waits for all that.
    ///
    /// # Errors
    /// What the device says; or the copy is not the block, with `target` anything.
    pub fn read_verified(&self, target: &mut [u8]) -> Result<(), ClientError> {
        self.granted.copy_out(target)?;
        if !self.is_valid() {
            return Err(BadBlock::from(Stale).into());
        }
        let found = fold::checksum(self.id(), self.generation(), target);
        if found != self.checksum {
            let (expected, found) = (self.checksum.get(), found.get());
            return Err(BadBlock::Checksum { expected, found }.into());
        }
        Ok(())
    }
}
