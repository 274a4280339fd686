//! One session with one daemon, over whichever transport reaches it.

use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::available_parallelism;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::task::AbortHandle;

use terrace_core::{ClientId, ComputeCost, SpaceManifest};
use terrace_lane::{COPY_THREADS_MAX, manifest_to_wire};
use terrace_proto::v1;
use terrace_proto::v1::lane_request::Op;
use terrace_proto::v1::lane_response::Result as Answer;

use crate::chunks::Chunks;
use crate::convert::{keys_to_wire, parent_to_wire, purpose_to_wire};
use crate::error::ClientError;
use crate::get::is_past_the_cache;
use crate::grpc::GrpcLink;
use crate::keeper::{Keeper, return_one};
use crate::keyed::{Keys, Named};
use crate::lane::{LaneLink, Opened};
use crate::lease::{Wanted, lease, lease_seen};
use crate::places::Places;
use crate::read::{ReadBlock, ReadLease, ReadOptions};
use crate::space::Space;
use crate::status::Status;
use crate::stream::{EventStream, SnapshotStream};
use crate::write::{WriteBlock, WriteLease, WriteOptions};

/// How to reach a daemon, and as whom.
#[derive(Clone, Default)]
pub struct Target {
    /// Path of the lane socket: the quick way, on the daemon's own node.
    pub socket: Option<PathBuf>,
    /// gRPC address, `http://host:port` or `host:port`. Used when there is no
    /// socket or nobody answers on it, and for event streams.
    pub grpc: Option<String>,
    /// Tenant to act for; empty means "default".
    pub tenant: String,
    /// Secret of the tenant; empty where the daemon asks for none.
    pub token: String,
    /// What operators see, for example "prefill-0 pid 4711"; at most 128 bytes.
    pub client_name: String,
    /// How long a daemon that says nothing is waited for, beyond what a call allows it to wait; then a call fails
    /// with [`ClientError::NoAnswer`]. `None` means a minute. Whoever can do without the daemon sets it low.
    pub answer_within: Option<Duration>,
    /// Threads that copy what one [`Session::get`] or [`Session::write`] over the socket moves, the caller's among them: one
    /// thread gets a part only of what a machine's memory gives. Others take part from 4 MiB a call on, and from 256 KiB on where
    /// calls follow each other. `None` means as many as the process may run on, at most 4; at most 8 are used. Those that help are
    /// shared by all sessions of a process, and stay awake for 50 us after a call.
    pub copy_threads: Option<NonZero<usize>>,
}

impl Target {
    const COPY_THREADS: usize = 4;
    const ANSWER_WITHIN: Duration = Duration::from_secs(60);
    const HELLO_WITHIN: Duration = Duration::from_secs(10);

    pub(crate) fn answer_within(&self) -> Duration {
        self.answer_within.unwrap_or(Self::ANSWER_WITHIN)
    }

    fn copy_threads(&self) -> usize {
        let may_run = || available_parallelism().map_or(1, NonZero::get).min(Self::COPY_THREADS);
        self.copy_threads.map_or_else(may_run, NonZero::get).min(COPY_THREADS_MAX)
    }

    /// For all of a session's beginning.
    pub(crate) fn hello_within(&self) -> Duration {
        self.answer_within().min(Self::HELLO_WITHIN)
    }
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target")
            .field("socket", &self.socket)
            .field("grpc", &self.grpc)
            .field("tenant", &self.tenant)
            .field("client_name", &self.client_name)
            .field("answer_within", &self.answer_within)
            .field("copy_threads", &self.copy_threads)
            .finish_non_exhaustive()
    }
}

/// How a session moves bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// The Unix socket: blocks are mapped.
    Lane,
    /// gRPC: blocks are copied.
    Grpc,
}

/// A session. Clones are the same session; it ends when the last clone and the
/// last guard are gone. Made and used inside a tokio runtime.
#[derive(Clone, Debug)]
pub struct Session {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    number: u64,
    incarnation: u64,
    pub(crate) blocks_max: usize,
    pub(crate) takes_block_ids: bool,
    pub(crate) copy_threads: usize,
    pub(crate) devices: Vec<v1::HbmDevice>,
    pub(crate) backend: Backend,
    target: Target,
    // A lane session opens a gRPC one beside itself when it first streams events.
    beside: Mutex<Option<Arc<GrpcLink>>>,
}

#[derive(Debug)]
pub(crate) enum Backend {
    Lane(Arc<LaneSession>),
    Grpc(Arc<GrpcLink>),
}

/// What a lane session's guards need.
#[derive(Debug)]
pub(crate) struct LaneSession {
    pub(crate) link: Arc<LaneLink>,
    pub(crate) keeper: Arc<Keeper>,
    pub(crate) chunks: Arc<Chunks>,
    pub(crate) places: Arc<Places>,
    pub(crate) status: Arc<Status>,
    /// How to reach the daemon again.
    pub(crate) way: Way,
    tasks: Vec<AbortHandle>,
}

/// How a lane session was opened.
#[derive(Clone, Debug)]
pub(crate) struct Way {
    pub(crate) path: PathBuf,
    pub(crate) target: Target,
    /// What the daemon knows this session's connections by.
    pub(crate) client: ClientId,
    pub(crate) incarnation: u64,
    /// Held by who asks again over another connection: each ends the one before it.
    pub(crate) turn: Arc<Mutex<()>>,
    /// The session was closed on this side: nothing is asked again.
    pub(crate) ended: Arc<AtomicBool>,
}

impl Drop for LaneSession {
    fn drop(&mut self) {
        self.link.close();
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl LaneSession {
    pub(crate) fn start(opened: Opened, status: Arc<Status>, way: Way) -> Arc<Self> {
        let Opened { link, reader, facts } = opened;
        let keeper = Arc::new(Keeper::new());
        let chunks = Arc::new(Chunks::new());
        let places = Arc::new(Places::new(blocks_max(&facts)));
        let reading = Arc::clone(&link).run_reader(reader, Arc::clone(&keeper), Arc::clone(&chunks));
        let keeping = Arc::clone(&keeper).run(Arc::clone(&link), Arc::clone(&chunks), Arc::clone(&places));
        let tasks = vec![
            tokio::spawn(reading).abort_handle(),
            tokio::spawn(keeping).abort_handle(),
            tokio::spawn(Arc::clone(&link).run_writer()).abort_handle(),
        ];
        Arc::new(Self { link, keeper, chunks, places, status, way, tasks })
    }
}

/// Asks and takes the answer of the same name.
macro_rules! call {
    ($session:expr, $name:ident, $request:expr) => {
        match $session.call(Op::$name($request)).await? {
            Answer::$name(answer) => answer,
            _ => return Err(ClientError::Protocol { detail: "an answer to another question" }),
        }
    };
}

pub(crate) use call;

impl Session {
    /// Opens a session: over the socket if one is named and somebody answers on
    /// it, else over gRPC.
    ///
    /// # Errors
    /// Nobody answers, or the daemon refuses the tenant.
    pub async fn connect(target: &Target) -> Result<Self, ClientError> {
        static NEXT_NUMBER: AtomicU64 = AtomicU64::new(1);
        let number = NEXT_NUMBER.fetch_add(1, Ordering::Relaxed);
        let mut failed = ClientError::NoTarget;
        if let Some(path) = &target.socket {
            let status = Arc::new(Status::new());
            let client = random_id()?;
            match LaneLink::open(path, target, client, Arc::clone(&status)).await {
                Ok(opened) => {
                    let facts = opened.facts.clone();
                    let way = Way {
                        path: path.clone(),
                        target: target.clone(),
                        client,
                        incarnation: facts.incarnation,
                        turn: Arc::default(),
                        ended: Arc::default(),
                    };
                    let backend = Backend::Lane(LaneSession::start(opened, status, way));
                    return Ok(Self::new(number, target, &facts, backend));
                }
                Err(error @ (ClientError::Unreachable { .. } | ClientError::Disconnected)) => {
                    tracing::debug!(%error, "no lane");
                    failed = error;
                }
                Err(error) => return Err(error),
            }
        }
        let Some(address) = &target.grpc else {
            return Err(failed);
        };
        let (link, facts) = GrpcLink::open(address, target).await?;
        Ok(Self::new(number, target, &facts, Backend::Grpc(link)))
    }

    fn new(number: u64, target: &Target, facts: &v1::SessionOpened, backend: Backend) -> Self {
        Self {
            inner: Arc::new(Inner {
                number,
                incarnation: facts.incarnation,
                blocks_max: blocks_max(facts),
                takes_block_ids: facts.takes_block_ids,
                copy_threads: target.copy_threads(),
                devices: facts.devices.clone(),
                backend,
                target: target.clone(),
                beside: Mutex::new(None),
            }),
        }
    }

    /// Life of the daemon.
    pub fn incarnation(&self) -> u64 {
        self.inner.incarnation
    }

    /// Most blocks in one request.
    pub fn blocks_max(&self) -> usize {
        self.inner.blocks_max
    }

    /// How it reaches the daemon.
    pub fn transport(&self) -> Transport {
        match &self.inner.backend {
            Backend::Lane(_) => Transport::Lane,
            Backend::Grpc(_) => Transport::Grpc,
        }
    }

    /// Whether the session has ended: every guard is stale and every call fails.
    pub fn is_closed(&self) -> bool {
        self.status().is_closed()
    }

    /// Returns when the session has ended. Cancel-safe.
    pub async fn closed(&self) {
        self.status().closed().await;
    }

    /// Ends the session now, for all clones and guards.
    pub fn close(&self) {
        match &self.inner.backend {
            Backend::Lane(lane) => {
                lane.way.ended.store(true, Ordering::Release);
                lane.link.close();
            }
            Backend::Grpc(link) => link.close(),
        }
    }

    fn status(&self) -> &Arc<Status> {
        match &self.inner.backend {
            Backend::Lane(lane) => &lane.status,
            Backend::Grpc(link) => link.status(),
        }
    }

    pub(crate) fn request_id(&self) -> u64 {
        match &self.inner.backend {
            Backend::Lane(lane) => lane.keeper.request_id(),
            Backend::Grpc(link) => link.request_id(),
        }
    }

    pub(crate) async fn call(&self, op: Op) -> Result<Answer, ClientError> {
        match &self.inner.backend {
            Backend::Lane(lane) => Ok(lane.link.call(op).await?.answer),
            Backend::Grpc(link) => link.call(op).await,
        }
    }

    pub(crate) fn keys<K: AsRef<[u8]>>(
        &self,
        space: &Space,
        keys: &[K],
    ) -> Result<Vec<bytes::Bytes>, ClientError> {
        if space.session != self.inner.number {
            return Err(ClientError::ForeignSpace);
        }
        keys_to_wire(keys, self.inner.blocks_max)
    }

    /// The same for a lease.
    pub(crate) fn named(
        &self,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
        kind: v1::LeaseKind,
    ) -> Result<Named, ClientError> {
        if space.session != self.inner.number {
            return Err(ClientError::ForeignSpace);
        }
        if kind == v1::LeaseKind::Read && self.inner.takes_block_ids {
            return Named::blocks(space, keys, self.inner.blocks_max);
        }
        Keys::of(keys, self.inner.blocks_max).map(Named::Keys)
    }

    /// Whether the space was opened by this session.
    pub(crate) fn owns(&self, space: &Space) -> bool {
        space.session == self.inner.number
    }

    pub(crate) fn lane(&self, call: &'static str) -> Result<&Arc<LaneSession>, ClientError> {
        match &self.inner.backend {
            Backend::Lane(lane) => Ok(lane),
            Backend::Grpc(_) => Err(ClientError::NeedsLane { call }),
        }
    }

    /// Opens a space. Opening the same one again is cheap, and shows its current generation.
    ///
    /// # Errors
    /// The daemon refuses the manifest, or the session has ended.
    pub async fn open_space(&self, manifest: &SpaceManifest) -> Result<Space, ClientError> {
        self.open(manifest, None).await
    }

    /// Opens a space and says what computing one of its blocks costs. The daemon
    /// calibrates it by what it sees, weighs by it what to keep, and only then
    /// answers a lease that computing again is quicker than loading.
    ///
    /// # Errors
    /// The daemon refuses the manifest or the cost, or the session has ended.
    pub async fn open_space_with_cost(
        &self,
        manifest: &SpaceManifest,
        cost: ComputeCost,
    ) -> Result<Space, ClientError> {
        self.open(manifest, Some(cost)).await
    }

    async fn open(&self, manifest: &SpaceManifest, cost: Option<ComputeCost>) -> Result<Space, ClientError> {
        let compute_cost = cost.map(|cost| v1::ComputeCost {
            first_seconds: cost.first_seconds,
            slope_seconds: cost.slope_seconds,
        });
        let request = v1::OpenSpaceRequest { manifest: Some(manifest_to_wire(manifest)), compute_cost };
        let answer = call!(self, OpenSpace, request);
        Space::new(self.inner.number, manifest, &answer)
    }

    /// What a read lease asks for, on a device of the daemon's or in host memory.
    pub(crate) fn to_read<'a>(
        &self,
        space: &'a Space,
        keys: &[impl AsRef<[u8]>],
        options: ReadOptions,
        device: Option<u32>,
    ) -> Result<Wanted<'a>, ClientError> {
        Ok(Wanted {
            space,
            kind: v1::LeaseKind::Read,
            keys: self.named(space, keys, v1::LeaseKind::Read)?,
            parent: bytes::Bytes::new(),
            ttl: options.ttl,
            wait: options.wait,
            purpose: purpose_to_wire(options.purpose),
            device,
            alone: false,
        })
    }

    /// The same of a write lease.
    pub(crate) fn to_write<'a>(
        &self,
        space: &'a Space,
        keys: &[impl AsRef<[u8]>],
        parent: Option<&[u8]>,
        options: WriteOptions,
        device: Option<u32>,
    ) -> Result<Wanted<'a>, ClientError> {
        Ok(Wanted {
            space,
            kind: v1::LeaseKind::Write,
            keys: self.named(space, keys, v1::LeaseKind::Write)?,
            parent: parent_to_wire(parent)?,
            ttl: options.ttl,
            wait: options.wait,
            purpose: v1::LeasePurpose::Unspecified,
            device,
            alone: false,
        })
    }

    /// Pins blocks for reading in place. When cancelled, what was granted is released.
    ///
    /// # Errors
    /// [`ClientError::NeedsLane`] over gRPC; bad keys; the session has ended.
    pub async fn lease_read(
        &self,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
        options: ReadOptions,
    ) -> Result<ReadLease, ClientError> {
        let lane = self.lane("lease_read")?;
        let wanted = self.to_read(space, keys, options, None)?;
        let (lease, grants) = lease_seen(lane, wanted, ReadBlock::leased).await?;
        Ok(ReadLease { grants, lease })
    }

    /// Reserves frames for blocks, each the child of the one before it, the
    /// first of `parent`. When cancelled, what was granted is released.
    ///
    /// # Errors
    /// [`ClientError::NeedsLane`] over gRPC; bad keys; the session has ended.
    pub async fn lease_write(
        &self,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
        parent: Option<&[u8]>,
        options: WriteOptions,
    ) -> Result<WriteLease, ClientError> {
        let lane = self.lane("lease_write")?;
        let wanted = self.to_write(space, keys, parent, options, None)?;
        let (lease, grants) = lease(lane, wanted, WriteBlock::new).await?;
        let mut lease = WriteLease { lease, grants };
        if is_past_the_cache(space, keys.len()) {
            lease.go_past_the_cache();
        }
        Ok(lease)
    }

    /// Hands back every window that nobody writes into, so that its blocks can
    /// be persisted without a copy; answers how many the daemon took. Windows
    /// that are full or idle go back by themselves. Over gRPC there are none.
    ///
    /// # Errors
    /// The session has ended.
    pub async fn flush_windows(&self) -> Result<u32, ClientError> {
        let Backend::Lane(lane) = &self.inner.backend else {
            return Ok(0);
        };
        let mut taken = 0;
        for chunk in lane.chunks.idle_windows() {
            if return_one(&lane.link, &lane.chunks, chunk).await? {
                taken += 1;
            }
        }
        Ok(taken)
    }

    /// Streams what happens to the tenant's blocks: from now on, or from a
    /// sequence number of this daemon's life on.
    ///
    /// # Errors
    /// [`ClientError::NeedsGrpc`] if the target has no gRPC address; the session has ended.
    pub async fn watch(&self, from_sequence: Option<u64>) -> Result<EventStream, ClientError> {
        let link = self.streaming("watch").await?;
        link.watch(from_sequence.unwrap_or(0), self.inner.incarnation, Arc::clone(self.status())).await
    }

    /// Streams everything the tenant holds at one sequence number.
    ///
    /// # Errors
    /// As [`Session::watch`].
    pub async fn snapshot(&self) -> Result<SnapshotStream, ClientError> {
        self.streaming("snapshot").await?.snapshot(Arc::clone(self.status())).await
    }

    async fn streaming(&self, call: &'static str) -> Result<Arc<GrpcLink>, ClientError> {
        if let Backend::Grpc(link) = &self.inner.backend {
            return Ok(Arc::clone(link));
        }
        let target = &self.inner.target;
        let address = target.grpc.as_ref().ok_or(ClientError::NeedsGrpc { call })?;
        let mut beside = self.inner.beside.lock().await;
        if let Some(link) = beside.as_ref().filter(|link| !link.status().is_closed()) {
            return Ok(Arc::clone(link));
        }
        let (link, facts) = GrpcLink::open(address, target).await?;
        if facts.incarnation != self.inner.incarnation {
            return Err(ClientError::Disconnected);
        }
        *beside = Some(Arc::clone(&link));
        Ok(link)
    }
}

/// Most blocks in one request.
fn blocks_max(facts: &v1::SessionOpened) -> usize {
    let most = usize::try_from(facts.blocks_max).unwrap_or(usize::MAX);
    most.clamp(1, terrace_proto::BLOCKS_PER_REQUEST_MAX)
}

fn random_id() -> Result<ClientId, ClientError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| ClientError::NoRandom { detail: error.to_string() })?;
    Ok(ClientId::from_bytes(bytes))
}
