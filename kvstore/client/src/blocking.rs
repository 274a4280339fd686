//! The same session for callers without a runtime. Never call it inside one.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

use terrace_core::{ByteCount, Durability, MatchMode, SealOutcome, SpaceManifest};
use terrace_gpudirect::Device;

use crate::device_read::DeviceReadLease;
use crate::device_write::DeviceWriteLease;
use crate::error::ClientError;
use crate::get::{BlockTarget, GetOptions};
use crate::lease::Outcome;
use crate::questions::{Match, Prefetched};
use crate::read::{ReadLease, ReadOptions};
use crate::session::Target;
use crate::space::Space;
use crate::write::{WriteLease, WriteOptions};

/// A [`crate::Session`] with a runtime of its own: one thread, which also renews
/// leases. Leases from it are the same guards; drop them before the last clone.
#[derive(Clone, Debug)]
pub struct Session {
    session: crate::Session,
    runtime: Arc<Runtime>,
}

impl Session {
    /// See [`crate::Session::connect`].
    ///
    /// # Errors
    /// As there; [`ClientError::Unreachable`] if no thread can be started.
    pub fn connect(target: &Target) -> Result<Self, ClientError> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("terrace-client")
            .enable_all()
            .build()
            .map_err(|error| ClientError::Unreachable {
                address: "the client's own runtime".to_owned(),
                detail: error.to_string(),
            })?;
        let session = runtime.block_on(crate::Session::connect(target))?;
        Ok(Self { session, runtime: Arc::new(runtime) })
    }

    /// The session itself, for calls that do not wait.
    pub fn session(&self) -> &crate::Session {
        &self.session
    }

    /// Runs any call of the session or its leases to its end.
    pub fn run<F: Future>(&self, call: F) -> F::Output {
        self.runtime.block_on(call)
    }

    /// See [`crate::Session::open_space`].
    ///
    /// # Errors
    /// As there.
    pub fn open_space(&self, manifest: &SpaceManifest) -> Result<Space, ClientError> {
        self.run(self.session.open_space(manifest))
    }

    /// See [`crate::Session::exists`].
    ///
    /// # Errors
    /// As there.
    pub fn exists(
        &self,
        spaces: &[&Space],
        keys: &[impl AsRef<[u8]>],
        mode: MatchMode,
    ) -> Result<(usize, Vec<bool>), ClientError> {
        self.run(self.session.exists(spaces, keys, mode))
    }

    /// See [`crate::Session::match_blocks`].
    ///
    /// # Errors
    /// As there.
    pub fn match_blocks(
        &self,
        spaces: &[&Space],
        keys: &[impl AsRef<[u8]>],
        mode: MatchMode,
    ) -> Result<Match, ClientError> {
        self.run(self.session.match_blocks(spaces, keys, mode))
    }

    /// See [`crate::Session::lease_read`].
    ///
    /// # Errors
    /// As there.
    pub fn lease_read(
        &self,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
        options: ReadOptions,
    ) -> Result<ReadLease, ClientError> {
        self.run(self.session.lease_read(space, keys, options))
    }

    /// See [`crate::Session::lease_write`].
    ///
    /// # Errors
    /// As there.
    pub fn lease_write(
        &self,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
        parent: Option<&[u8]>,
        options: WriteOptions,
    ) -> Result<WriteLease, ClientError> {
        self.run(self.session.lease_write(space, keys, parent, options))
    }

    /// See [`crate::Session::add_device`].
    ///
    /// # Errors
    /// As there.
    pub fn add_device(&self, device: Arc<dyn Device>) -> Result<u32, ClientError> {
        self.session.add_device(device)
    }

    /// See [`crate::Session::lease_read_on`].
    ///
    /// # Errors
    /// As there.
    pub fn lease_read_on(
        &self,
        device: u32,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
        options: ReadOptions,
    ) -> Result<DeviceReadLease, ClientError> {
        self.run(self.session.lease_read_on(device, space, keys, options))
    }

    /// See [`crate::Session::lease_write_on`].
    ///
    /// # Errors
    /// As there.
    pub fn lease_write_on(
        &self,
        device: u32,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
        parent: Option<&[u8]>,
        options: WriteOptions,
    ) -> Result<DeviceWriteLease, ClientError> {
        self.run(self.session.lease_write_on(device, space, keys, parent, options))
    }

    /// See [`crate::Session::shrink`].
    ///
    /// # Errors
    /// As there.
    pub fn shrink(&self, device: u32, bytes: ByteCount, wait: Duration) -> Result<ByteCount, ClientError> {
        self.run(self.session.shrink(device, bytes, wait))
    }

    /// See [`WriteLease::seal`].
    ///
    /// # Errors
    /// As there.
    pub fn seal(
        &self,
        lease: &mut WriteLease,
        indexes: &[u32],
        durability: Durability,
    ) -> Result<Vec<SealOutcome>, ClientError> {
        self.run(lease.seal(indexes, durability))
    }

    /// See [`crate::Session::read`].
    ///
    /// # Errors
    /// As there.
    pub fn read(
        &self,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
    ) -> Result<Vec<Option<Vec<u8>>>, ClientError> {
        self.run(self.session.read(space, keys))
    }

    /// See [`crate::Session::get`].
    ///
    /// # Errors
    /// As there.
    pub fn get(
        &self,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
        targets: &mut [impl BlockTarget],
        options: GetOptions,
    ) -> Result<Vec<Outcome<()>>, ClientError> {
        self.run(self.session.get(space, keys, targets, options))
    }

    /// See [`crate::Session::write`].
    ///
    /// # Errors
    /// As there.
    pub fn write(
        &self,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
        parent: Option<&[u8]>,
        payloads: &[impl AsRef<[u8]>],
        durability: Durability,
    ) -> Result<Vec<SealOutcome>, ClientError> {
        self.run(self.session.write(space, keys, parent, payloads, durability))
    }

    /// See [`crate::Session::touch`].
    ///
    /// # Errors
    /// As there.
    pub fn touch(&self, space: &Space, keys: &[impl AsRef<[u8]>]) -> Result<u32, ClientError> {
        self.run(self.session.touch(space, keys))
    }

    /// See [`crate::Session::prefetch`].
    ///
    /// # Errors
    /// As there.
    pub fn prefetch(&self, space: &Space, keys: &[impl AsRef<[u8]>]) -> Result<Prefetched, ClientError> {
        self.run(self.session.prefetch(space, keys))
    }

    /// See [`crate::Session::retain`].
    ///
    /// # Errors
    /// As there.
    pub fn retain(
        &self,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
        ttl: Duration,
        priority: u8,
    ) -> Result<u32, ClientError> {
        self.run(self.session.retain(space, keys, ttl, priority))
    }

    /// See [`crate::Session::clear`].
    ///
    /// # Errors
    /// As there.
    pub fn clear(&self, space: &Space) -> Result<u64, ClientError> {
        self.run(self.session.clear(space))
    }

    /// See [`crate::Session::flush_windows`].
    ///
    /// # Errors
    /// As there.
    pub fn flush_windows(&self) -> Result<u32, ClientError> {
        self.run(self.session.flush_windows())
    }
}
