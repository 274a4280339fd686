//! The cache as a worker sees it: something that may be there.
//!
//! Every call answers within a deadline, and `None` or less than was asked for is
//! always an answer: the worker then computes. Nothing here fails a request.

use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use terrace_client::{
    ClientError, Connector, DeviceReadLease, DeviceWriteLease, Durability, Leased, Outcome, ReadOptions,
    Reserved, SealOutcome, Session, Space, Target, WriteOptions,
};
use terrace_core::{Purpose, SpaceManifest};
use terrace_gpudirect::kernels::KernelBytes;
use tokio::time::timeout;

use crate::kernels::leased::{read_leased, write_leased};
use crate::kernels::memory::{ReadBytes, WriteBytes};
use crate::service::args::WorkerArgs;
use crate::service::device::StoreDevice;

// How long a prompt waits for blocks to come from NVMe. A block of SmolLM2 takes
// well under a millisecond to load and 50 to compute.
const PROMOTE_WAIT: Duration = Duration::from_secs(2);

// How long a chunk waits for frames before it is computed in private memory.
const FRAMES_WAIT: Duration = Duration::from_millis(500);

// A request does not wait longer for a daemon that is away: it may be on its way
// back, but computing may be quicker.
const ATTACH_WAIT: Duration = Duration::from_millis(500);

// Past this the daemon is taken for gone, whatever its socket says.
const CALL_MAX: Duration = Duration::from_secs(5);

/// The connection to the daemon, made anew when it ends.
#[derive(Clone)]
pub(crate) struct Store {
    inner: Option<Arc<Inner>>,
}

struct Inner {
    connector: Connector,
    manifest: SpaceManifest,
    purpose: Purpose,
    device: Option<Arc<StoreDevice>>,
    current: Mutex<Option<Attached>>,
}

impl Store {
    /// Connects lazily. Without a socket there is no store.
    ///
    /// # Errors
    /// If the manifest is refused.
    pub(crate) fn new(
        args: &WorkerArgs,
        manifest: &SpaceManifest,
        purpose: Purpose,
        device: Option<Arc<StoreDevice>>,
    ) -> anyhow::Result<Self> {
        manifest.validate()?;
        let Some(socket) = args.socket.clone() else {
            tracing::warn!("no --socket: every prompt is computed");
            return Ok(Self { inner: None });
        };
        let target = Target {
            socket: Some(socket),
            grpc: None,
            tenant: args.tenant.clone(),
            token: args.token.clone(),
            client_name: format!("{} pid {}", args.name, std::process::id()),
            answer_within: None,
            copy_threads: None,
        };
        let inner = Inner {
            connector: Connector::new(target),
            manifest: manifest.clone(),
            purpose,
            device,
            current: Mutex::new(None),
        };
        Ok(Self { inner: Some(Arc::new(inner)) })
    }

    /// The session and the space, if the daemon is there.
    pub(crate) async fn attach(&self) -> Option<Attached> {
        let inner = self.inner.as_ref()?;
        if let Some(attached) = inner.current().filter(|attached| !attached.session.is_closed()) {
            return Some(attached);
        }
        match timeout(ATTACH_WAIT, inner.open()).await {
            Ok(Ok(attached)) => Some(attached),
            Ok(Err(error)) => {
                tracing::debug!(%error, "no store; computing");
                None
            }
            Err(_) => {
                tracing::debug!("no store in time; computing");
                None
            }
        }
    }

    /// Hands windows back, so that what was sealed is adopted and persisted.
    pub(crate) async fn close(&self) {
        let Some(attached) = self.inner.as_ref().and_then(|inner| inner.current()) else { return };
        if let Ok(Err(error)) = timeout(CALL_MAX, attached.session.flush_windows()).await {
            tracing::debug!(%error, "windows were not handed back; the daemon replaces them");
        }
    }
}

impl Inner {
    fn current(&self) -> Option<Attached> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn open(&self) -> Result<Attached, ClientError> {
        let session = self.connector.session().await?;
        let space = session.open_space(&self.manifest).await?;
        let device = match &self.device {
            None => None,
            Some(device) => match session.add_device(Arc::clone(&device.memory)) {
                Ok(number) => Some(OnDevice { number, device: Arc::clone(device) }),
                Err(error @ ClientError::OtherDevice { .. }) => {
                    tracing::info!(%error, "blocks lie in host memory");
                    None
                }
                Err(error) => return Err(error),
            },
        };
        let attached = Attached { session, space: Arc::new(space), purpose: self.purpose, device };
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Some(attached.clone());
        Ok(attached)
    }
}

/// A session with the space opened in it.
#[derive(Clone)]
pub(crate) struct Attached {
    session: Session,
    space: Arc<Space>,
    purpose: Purpose,
    device: Option<OnDevice>,
}

/// The device that computes, in this session.
#[derive(Clone)]
struct OnDevice {
    /// The daemon's number of it.
    number: u32,
    device: Arc<StoreDevice>,
}

/// Memory of a block, where it is.
pub(crate) enum Place<B> {
    Host(B),
    Device(KernelBytes),
}

/// A leased prefix.
pub(crate) struct PrefixLease {
    blocks: Vec<Leased>,
    device: Option<OnDevice>,
}

impl PrefixLease {
    /// The blocks' bytes, in order.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = Place<ReadBytes>> + '_ {
        self.blocks.iter().map_while(|block| match block {
            Leased::Host(block) => read_leased(block).map(Place::Host),
            Leased::Device(block) => self.device.as_ref()?.device.read(block).map(Place::Device),
        })
    }

    /// Whether everything that was read from them until now was right.
    pub(crate) fn is_valid(&self) -> bool {
        self.blocks.iter().all(Leased::is_valid)
    }
}

/// Leased frames to be filled. The lease lives as long as any of their bytes.
#[derive(Clone)]
pub(crate) struct WriteFrames {
    lease: Arc<tokio::sync::Mutex<DeviceWriteLease>>,
    device: Option<OnDevice>,
}

impl WriteFrames {
    /// Whether both are of one lease.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.lease, &other.lease)
    }

    /// The bytes of the frame at `index`, if it was granted. To be taken once.
    pub(crate) async fn take(&self, index: usize) -> Option<Place<WriteBytes>> {
        let lease = self.lease.lock().await;
        let owner: Arc<dyn Any + Send + Sync> = Arc::new(self.clone());
        match lease.block(u32::try_from(index).ok()?)? {
            Reserved::Host(block) => write_leased(block, owner).map(Place::Host),
            Reserved::Device(block) => self.device.as_ref()?.device.write(block, owner).map(Place::Device),
        }
    }

    /// Fills the frame at `index`, if it was granted.
    pub(crate) async fn fill(&self, index: u32, bytes: &[u8]) -> bool {
        let mut lease = self.lease.lock().await;
        let filled = match lease.block_mut(index) {
            None => return false,
            Some(Reserved::Host(block)) => block.write(bytes),
            Some(Reserved::Device(block)) => block.write(bytes),
        };
        filled.inspect_err(|error| tracing::debug!(%error, "a frame was not filled")).is_ok()
    }
}

impl Attached {
    /// Leases the longest prefix of `keys` that is there in time.
    pub(crate) async fn lease_prefix(&self, keys: &[[u8; 16]]) -> Option<PrefixLease> {
        let options = ReadOptions { ttl: None, wait: PROMOTE_WAIT, purpose: self.purpose };
        let (session, space) = (&self.session, &self.space);
        let lease = async {
            match &self.device {
                None => session.lease_read(space, keys, options).await.map(DeviceReadLease::from),
                Some(on) => session.lease_read_on(on.number, space, keys, options).await,
            }
        };
        let DeviceReadLease { grants, .. } = said(timeout(CALL_MAX, lease).await)?;
        let blocks: Vec<Leased> = grants.into_iter().map_while(Outcome::into_granted).collect();
        (!blocks.is_empty()).then(|| PrefixLease { blocks, device: self.device.clone() })
    }

    /// Leases frames for blocks. Some of them may be had, or none.
    pub(crate) async fn lease_write(
        &self,
        keys: &[[u8; 16]],
        parent: Option<[u8; 16]>,
    ) -> Option<WriteFrames> {
        let options = WriteOptions { ttl: None, wait: FRAMES_WAIT };
        let parent = parent.as_ref().map(<[u8; 16]>::as_slice);
        let (session, space) = (&self.session, &self.space);
        let lease = async {
            match &self.device {
                None => session.lease_write(space, keys, parent, options).await.map(DeviceWriteLease::from),
                Some(on) => session.lease_write_on(on.number, space, keys, parent, options).await,
            }
        };
        let lease = said(timeout(CALL_MAX, lease).await)?;
        lease.id()?;
        let lease = Arc::new(tokio::sync::Mutex::new(lease));
        Some(WriteFrames { lease, device: self.device.clone() })
    }

    /// Publishes filled frames of one lease, and returns guards to go on reading
    /// them, which also say whether the store kept them.
    pub(crate) async fn seal(&self, frames: &WriteFrames, indexes: &[usize]) -> (usize, Vec<Leased>) {
        let indexes: Vec<u32> = indexes.iter().filter_map(|index| u32::try_from(*index).ok()).collect();
        let mut lease = frames.lease.lock().await;
        let outcomes =
            said(timeout(CALL_MAX, lease.seal(&indexes, Durability::Readable)).await).unwrap_or_default();
        let sealed = outcomes.iter().filter(|outcome| **outcome == SealOutcome::Sealed).count();
        if outcomes.contains(&SealOutcome::Conflict) {
            tracing::error!("a block was sealed before with other bytes: this model is not deterministic");
        }
        (sealed, indexes.iter().filter_map(|index| lease.reader(*index)).collect())
    }
}

/// A call's result, with anything else said once.
fn said<T>(answer: Result<Result<T, ClientError>, tokio::time::error::Elapsed>) -> Option<T> {
    match answer {
        Ok(Ok(value)) => Some(value),
        Ok(Err(error)) => {
            tracing::debug!(%error, "the store gave nothing; computing");
            None
        }
        Err(_) => {
            tracing::warn!("the daemon did not answer in {} s; computing", CALL_MAX.as_secs());
            None
        }
    }
}
