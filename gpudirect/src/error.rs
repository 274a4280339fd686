//! What can go wrong on a device, named for what a caller can do about it.

use std::time::Duration;

/// One enum for everything that a device, its copies and its files may answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// There is no driver on this machine, or what is there is none.
    #[error("no CUDA driver ({detail}); install one, or leave the Hbm tier off")]
    NoDriver {
        /// What was missing.
        detail: String,
    },
    /// The driver is older than what we call.
    #[error("the CUDA driver offers {found}, and {needed} is needed; install a newer driver")]
    DriverTooOld {
        /// For example "CUDA 11.4", or "no cuMemCreate".
        found: String,
        /// For example "CUDA 12.0".
        needed: String,
    },
    /// The driver has no such device.
    #[error("no device {ordinal}: the driver finds {count}")]
    NoDevice {
        /// What was asked for.
        ordinal: u32,
        /// Devices that there are.
        count: u32,
    },
    /// The device cannot do what the tier needs.
    #[error("the device cannot do this: {what}")]
    Unsupported {
        /// What it lacks.
        what: String,
    },
    /// The device, or a limit of ours, is full.
    #[error("no device memory for {bytes} bytes; free chunks first")]
    NoMemory {
        /// What was asked for.
        bytes: u64,
    },
    /// A range that would leave its chunk or buffer.
    #[error("bytes {offset} to {end} are outside a range of {length} bytes")]
    OutOfBounds {
        /// First byte.
        offset: u64,
        /// Byte after the last; `u64::MAX` if that overflows.
        end: u64,
        /// Length of what it should lie in.
        length: u64,
    },
    /// A job that no device could run: unequal lengths, two directions, nothing to do.
    #[error("not a job for a device: {detail}")]
    BadJob {
        /// Why.
        detail: &'static str,
    },
    /// A descriptor that is not device memory of the named length.
    #[error("this descriptor cannot be mapped as device memory: {detail}")]
    BadDescriptor {
        /// What the driver or the kernel says.
        detail: String,
    },
    /// A chunk or a slice that somebody still uses.
    #[error("still in use by {users} others; wait for copies and leases to end")]
    InUse {
        /// References apart from the caller's.
        users: u64,
    },
    /// A bounded queue is full. Nothing was started.
    #[error("too much is under way ({limit}); try again later")]
    Throttled {
        /// Name of the limit.
        limit: &'static str,
    },
    /// The deadline passed. The device may still be at it: the memory stays held until it ends.
    #[error("no answer within {0:?}")]
    Late(Duration),
    /// A call of the driver did not come back in time. Its thread is left behind.
    #[error("{call} did not come back within {within:?}; the driver or the device hangs")]
    Hung {
        /// What was called.
        call: &'static str,
        /// How long it was waited for.
        within: Duration,
    },
    /// The device is gone. All that was on it is lost; it must be opened anew, by a new process at worst.
    #[error("the device is lost: {detail}")]
    Lost {
        /// The driver's name for it.
        detail: String,
    },
    /// Anything else that a driver says. What the call covered must not be used.
    #[error("{call} failed: {detail}")]
    Driver {
        /// What was called.
        call: &'static str,
        /// The driver's name for the failure.
        detail: String,
    },
}

impl DeviceError {
    /// Whether every further call would fail too.
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Lost { .. })
    }
}
