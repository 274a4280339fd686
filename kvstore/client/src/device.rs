//! Blocks in device memory that the daemon owns.
//!
//! A session is told which device of this process a device of the daemon is; then it
//! leases blocks there as it does in host memory. A chunk is mapped once, by the
//! descriptor that the device's driver exports; nothing is copied. What does not come
//! to the device in time is granted in host memory instead, so grants say which.
//!
//! Nothing keeps a process from storing into device memory that it has mapped to read.
//! Work on a device goes on when a call returns: end it before asking whether a block
//! was valid, before sealing, and before letting go of a guard.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use terrace_core::{BlockId, ByteCount, Checksum, Fence};
use terrace_gpudirect::{Chunk, Device, DeviceBytes, DeviceError, Sums, copy_out};
use terrace_lane::{Access, FenceMapping};
use terrace_proto::v1::lane_request::Op;
use terrace_proto::v1::lane_response::Result as Answer;
use terrace_proto::v1::{self, HbmDevice, Shrink, Tier};

use crate::chunks::Mapped;
use crate::device_read::DeviceReadLease;
use crate::device_write::DeviceWriteLease;
use crate::error::ClientError;
use crate::lease::{Frame, Lease, lease, millis};
use crate::questions::Prefetched;
use crate::read::ReadOptions;
use crate::session::Session;
use crate::space::Space;
use crate::write::WriteOptions;

/// A block of a few MiB takes less than a millisecond: past this the device hangs.
pub(crate) const COPY_WITHIN: Duration = Duration::from_secs(10);

impl Session {
    /// Devices whose memory the daemon owns. Ordinals of one device differ between processes, its uuid does not.
    pub fn devices(&self) -> &[HbmDevice] {
        &self.inner.devices
    }

    /// Gives the session a device of this process, and answers the daemon's number of it. Blocks can be leased there
    /// from then on. Giving it again changes nothing.
    ///
    /// # Errors
    /// [`ClientError::OtherDevice`] if the daemon owns no memory of it; [`ClientError::NeedsLane`] over gRPC.
    pub fn add_device(&self, device: Arc<dyn Device>) -> Result<u32, ClientError> {
        let lane = self.lane("add_device")?;
        let info = device.info();
        let same = |known: &&HbmDevice| known.uuid[..] == info.uuid[..] && known.kind == info.kind.label();
        let number = match self.devices().iter().find(same) {
            Some(known) => known.number,
            None => return Err(ClientError::OtherDevice { name: info.name.clone() }),
        };
        lane.chunks.add_device(number, device);
        Ok(number)
    }

    /// As [`Session::lease_read`], in the memory of the daemon's device `number`, which the session was given. What does not come there within
    /// `options.wait` is granted in host memory, if it is there. When cancelled, what was granted is released.
    ///
    /// # Errors
    /// [`ClientError::UnknownDevice`], or as [`Session::lease_read`].
    pub async fn lease_read_on(
        &self,
        number: u32,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
        options: ReadOptions,
    ) -> Result<DeviceReadLease, ClientError> {
        let lane = self.lane("lease_read_on")?;
        lane.chunks.device(number)?;
        let wanted = self.to_read(space, keys, options, Some(number))?;
        let (lease, grants) = lease(lane, wanted, DeviceReadLease::block_of).await?;
        Ok(DeviceReadLease { grants, lease })
    }

    /// As [`Session::lease_write`], in the memory of the daemon's device `number`; in host memory where the device
    /// gives none. When cancelled, what was granted is released.
    ///
    /// # Errors
    /// [`ClientError::UnknownDevice`], or as [`Session::lease_write`].
    pub async fn lease_write_on(
        &self,
        number: u32,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
        parent: Option<&[u8]>,
        options: WriteOptions,
    ) -> Result<DeviceWriteLease, ClientError> {
        let lane = self.lane("lease_write_on")?;
        lane.chunks.device(number)?;
        let wanted = self.to_write(space, keys, parent, options, Some(number))?;
        let (lease, grants) = lease(lane, wanted, DeviceWriteLease::block_of).await?;
        Ok(DeviceWriteLease { lease, grants })
    }

    /// Starts bringing blocks to the daemon's device `number`, and does not wait for them.
    ///
    /// # Errors
    /// Bad keys, or the session has ended.
    pub async fn prefetch_on(
        &self,
        number: u32,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
    ) -> Result<Prefetched, ClientError> {
        let request = v1::PrefetchRequest {
            space: space.handle,
            keys: self.keys(space, keys)?,
            want_tier: Tier::Hbm.into(),
            want_device: number,
        };
        match self.call(Op::Prefetch(request)).await? {
            Answer::Prefetch(answer) => Ok(Prefetched { started: answer.started, resident: answer.resident }),
            _ => Err(ClientError::Protocol { detail: "an answer to another question" }),
        }
    }

    /// Says how many bytes of the daemon's device `number` the engine of this process needs in all, in place of what
    /// this session said before; zero gives everything back. Waits at most `wait` until they are free, and answers
    /// how many the daemon leaves free now, to all engines that asked. It holds until the session ends.
    ///
    /// # Errors
    /// [`ClientError::NeedsLane`] over gRPC; the daemon has no such device; the session has ended.
    pub async fn shrink(
        &self,
        number: u32,
        bytes: ByteCount,
        wait: Duration,
    ) -> Result<ByteCount, ClientError> {
        let lane = self.lane("shrink")?;
        let request = Shrink { device: number, bytes: bytes.get(), wait_ms: millis(wait) };
        match lane.link.call_within(Op::Shrink(request), wait).await?.answer {
            Answer::Shrunk(answer) => Ok(ByteCount::new(answer.free_bytes)),
            _ => Err(ClientError::Protocol { detail: "a device was to shrink" }),
        }
    }
}

/// A device of this process that the session was given.
#[derive(Debug)]
pub(crate) struct Own {
    pub(crate) device: Arc<dyn Device>,
    sums: OnceLock<Result<Sums, DeviceError>>,
}

impl Own {
    pub(crate) fn new(device: Arc<dyn Device>) -> Self {
        Self { device, sums: OnceLock::new() }
    }

    /// What sums blocks there. Takes up to a second the first time.
    pub(crate) fn sums(&self) -> Result<&Sums, DeviceError> {
        self.sums.get_or_init(|| Sums::open(&self.device)).as_ref().map_err(Clone::clone)
    }
}

/// A chunk of device memory that the daemon owns, mapped here.
#[derive(Debug)]
pub(crate) struct DeviceMapping {
    // Before the device that it is of.
    chunk: Arc<Chunk>,
    pub(crate) own: Arc<Own>,
    pub(crate) number: u32,
    fences: FenceMapping,
    writable: AtomicBool,
}

impl DeviceMapping {
    /// May take as long as the driver does.
    pub(crate) fn map(
        own: Arc<Own>,
        number: u32,
        data: OwnedFd,
        bytes: ByteCount,
        fences: FenceMapping,
        access: Access,
    ) -> Result<Arc<Self>, ClientError> {
        let chunk = own.device.import(data, bytes)?;
        let writable = AtomicBool::new(access == Access::Write);
        Ok(Arc::new(Self { chunk, own, number, fences, writable }))
    }

    /// Whether this session may store into its frames.
    pub(crate) fn is_writable(&self) -> bool {
        self.writable.load(Ordering::Acquire)
    }

    /// This session stores no more. Nothing but its word keeps it from it.
    pub(crate) fn drop_write(&self) {
        self.writable.store(false, Ordering::Release);
    }
}

/// One frame on a device, as it was granted.
#[derive(Clone, Debug)]
pub(crate) struct Granted {
    pub(crate) bytes: DeviceBytes,
    pub(crate) mapping: Arc<DeviceMapping>,
    pub(crate) frame: u32,
    fence: Fence,
    pub(crate) block: BlockId,
    pub(crate) generation: u64,
    lease: Arc<Lease>,
}

impl Granted {
    pub(crate) fn new(
        frame: &Frame,
        mapping: &Arc<DeviceMapping>,
        lease: Arc<Lease>,
    ) -> Result<Self, ClientError> {
        let bytes = DeviceBytes::new(Arc::clone(&mapping.chunk), frame.offset, frame.length)
            .map_err(|_| ClientError::Protocol { detail: "a frame outside its chunk" })?;
        Ok(Self {
            bytes,
            mapping: Arc::clone(mapping),
            frame: frame.frame,
            fence: frame.fence,
            block: frame.block,
            generation: frame.generation,
            lease,
        })
    }

    pub(crate) fn is_valid(&self) -> bool {
        // What was read before must not be read after the fence.
        std::sync::atomic::fence(Ordering::Acquire);
        self.mapping.fences.fence(self.frame) == Some(self.fence) && self.lease.is_usable()
    }

    /// The checksum of what is there now, where it lies.
    pub(crate) fn sum(&self) -> Result<Checksum, DeviceError> {
        self.mapping.own.sums()?.checksum(&self.bytes, self.block, self.generation)
    }

    pub(crate) fn copy_out(&self, target: &mut [u8]) -> Result<(), DeviceError> {
        copy_out(self.mapping.own.device.as_ref(), &self.bytes, target, COPY_WITHIN)
    }
}

/// Which of the two a granted frame is.
pub(crate) enum Where {
    Host(Frame),
    Device(Frame, Arc<DeviceMapping>),
}

pub(crate) fn place(frame: Frame) -> Where {
    match &frame.mapping {
        Mapped::Host(_) => Where::Host(frame),
        Mapped::Device(mapping) => {
            let mapping = Arc::clone(mapping);
            Where::Device(frame, mapping)
        }
    }
}
