//! Device memory for the Hbm tier: what is there, and how bytes get in and out.
//!
//! Promises: compiles and runs on any machine; a machine without a driver is a
//! plain fact ([`HbmStatus::Off`]), never a panic; a copy keeps the memory that
//! it touches until the device has let go of it. Leaves to others: which block
//! goes where (the core), and what the bytes mean.

mod copies;
mod cuda;
mod device;
mod error;
mod files;
mod host_bytes;
mod host_only;
pub mod kernels;
mod name;
mod pinned;
mod span;
mod status;
mod sums;
mod told;
mod waited;

pub use copies::{Copies, CopyCounts, CopyLimits, Ends, Job, JobId, Refused};
pub use cuda::Cuda;
pub use device::{
    Chunk, ChunkMemory, Device, DeviceInfo, DeviceKind, Kept, Lane, Mark, Registered, Registration, Room,
};
pub use error::DeviceError;
pub use files::{
    FileChoice, FileJob, FileLimits, FileOperation, FileRate, FileRefused, Gds, GdsFile, GdsInfo, Prepared,
    Submission, log_to, measure_files,
};
pub use host_bytes::HostBytes;
pub use host_only::{Fault, HostOnly};
pub use name::{BadDeviceName, DeviceName};
pub use pinned::{Added, Pinned, SLICE_BYTES};
pub use span::{DeviceBytes, Direction, Piece, Span};
pub use status::{Gpu, HbmStatus, probe};
pub use sums::Sums;
pub use waited::{copy_in, copy_out};
