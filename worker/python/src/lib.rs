//! The native half of the Python package `terrace_kv`.
//!
//! It wraps the Rust client: blocks become objects of the buffer protocol, calls
//! either block with the interpreter released or answer with asyncio futures.
//! Promises: no view of a block outlives its lease or its mapping; a forked
//! child gets an error, never the parent's session.
//! Leaves to others: what Python alone does well (`python/terrace_kv/`).

mod arguments;
mod block;
mod copies;
mod device;
mod dlpack;
mod errors;
mod lease;
mod on_device;
mod owned;
mod results;
mod runtime;
mod session;
mod space;
mod span;
mod stream;

/// The module `terrace_kv._native`; the package's stubs describe it.
#[pyo3::pymodule(name = "_native")]
mod native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::block::{Block, WriteBlock};
    #[pymodule_export]
    use crate::copies::{copy_blocks, map_blocks};
    #[pymodule_export]
    use crate::device::{Device, DeviceBlock, DeviceChunk, open_device};
    #[pymodule_export]
    use crate::lease::{AsyncReadLease, AsyncWriteLease, ReadLease, WriteLease};
    #[pymodule_export]
    use crate::on_device::{AsyncDeviceReadLease, AsyncDeviceWriteLease, DeviceReadLease, DeviceWriteLease};
    #[pymodule_export]
    use crate::results::{BlockMatch, Event, Events, Match, Prefetched, SnapshotPart};
    #[pymodule_export]
    use crate::runtime::stop;
    #[pymodule_export]
    use crate::session::{AsyncSession, Session, connect, connect_async};
    #[pymodule_export]
    use crate::space::{Space, chain_keys};
    #[pymodule_export]
    use crate::stream::{AsyncStream, Stream};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::errors::load(module.py())
    }
}
