//! What the shell says of the devices of the Hbm tier.

use crate::ids::GpuSet;
use crate::units::ByteCount;

/// One device of the Hbm tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuConfig {
    /// Most memory in its chunks, windows and replaced windows included.
    pub bytes: ByteCount,
    /// What the engines beside it cannot make it give back.
    pub bytes_min: ByteCount,
    /// Whether a read can go from a device of Nvme into its frames.
    pub reads: HbmReads,
    /// Devices from which it copies without a way through the host.
    pub peers: GpuSet,
    /// Copies to and from it at one time.
    pub copies_in_flight: u32,
}

/// How blocks come from Nvme to Hbm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HbmReads {
    /// By one read straight into the frame.
    Direct,
    /// By a frame in Pinned.
    ThroughPinned,
}
