//! Device memory for the Hbm tier: what is there, and how bytes get in and out.
//!
//! Promises: compiles and runs on any machine; a machine without a driver is a
//! plain fact ([`HbmStatus::Off`]), never a panic; a transfer owns its host
//! buffer until the device has let go of it. Leaves to others: which block goes
//! where (the core), and what the bytes mean.

mod cuda;
mod host;
pub mod kernels;
mod memory;
mod status;

pub use cuda::{CudaBuffer, CudaChunk, CudaMemory, CudaTransfer};
pub use host::{HostBuffer, HostChunk, HostMemory, HostTransfer};
pub use memory::{Buffer, Chunk, DeviceError, DeviceMemory, Returned, Transfer};
pub use status::{Gpu, HbmStatus, probe};
