//! One life of the daemon: start in the right order, serve, stop cleanly.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use terrace_core::{Config as CoreConfig, Input, Scrub, TenantId};
use terrace_lane::{LaneError, LaneServer};
use terrace_media::{CatalogState, DeviceConfig, Hooks, Media, MediaConfig, MediaError, OpenReport};

use crate::config::{Config, HbmDevice};
use crate::engine::{Completions, Engine};
use crate::events::EventLogs;
use crate::grpc::{self, BindError};
use crate::hbm::{Hbm, OpenDevice};
use crate::service::{Facts, Service};
use crate::signals::Signals;
use crate::spaces::Spaces;
use crate::status::Status;
use crate::tenant::{NodeSecret, SecretError, Tenants};
use crate::{http, lane, restore, upkeep};

/// Longest time that a clean stop spends on persisting.
const FLUSH_WITHIN: Duration = Duration::from_secs(10);
/// Longest time that a stop waits for connections.
const END_WITHIN: Duration = Duration::from_secs(3);
/// Bytes in flight on one device.
const DEVICE_BYTES_IN_FLIGHT: u64 = 16 << 20;
/// Frames that a full pool keeps free for blocks that are promoted or streamed in.
const FRAMES_READY_MIN: u32 = 32;
/// This part of the memory, in chunks and within limits, reclaiming keeps ready for windows.
const CHUNKS_READY_PART: u64 = 8;
const CHUNKS_READY: std::ops::RangeInclusive<u32> = 1..=4;

/// A daemon that serves.
pub struct Daemon {
    /// Where gRPC is served.
    pub grpc: SocketAddr,
    /// Where `/metrics` is served.
    pub metrics: SocketAddr,
    /// The lane socket.
    pub lane: PathBuf,
    /// This life.
    pub incarnation: u32,
    service: Arc<Service>,
    status: Arc<Status>,
    flush_as: TenantId,
    stop: watch::Sender<bool>,
    listeners: JoinSet<()>,
    chores: Vec<JoinHandle<()>>,
}

/// Why it does not start. Every message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data directory.
    #[error("cannot make data_dir {path}: {source}", path = path.display())]
    DataDir {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Devices or catalog.
    #[error(transparent)]
    Media(#[from] MediaError),
    /// The lane's threads.
    #[error(
        "cannot start threads for the lane socket: {0}; raise the limit of threads (ulimit -u, pids.max)"
    )]
    Threads(#[source] std::io::Error),
    /// The node's secret.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// A port.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The lane socket.
    #[error("configuration key `lane_socket`: {0}")]
    Lane(#[from] LaneError),
    /// A thread of ours panicked.
    #[error("internal error during start: {0}")]
    Panicked(#[from] tokio::task::JoinError),
}

struct Store {
    media: Media,
    hbm: Hbm,
    report: OpenReport,
    tenants: Tenants,
    completions: Completions,
}

impl Daemon {
    /// Starts, and returns when blocks are served. `hooks` is for tests of faults.
    ///
    /// # Errors
    /// What keeps it from starting; nothing is left behind.
    pub async fn start(config: Config, hooks: Hooks) -> Result<Self, StartError> {
        Self::start_on(config, hooks, Arc::new(|device: &HbmDevice| device.name.open(device.bytes))).await
    }

    /// The same with devices of Hbm that somebody else opens, for tests of faults.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_on(config: Config, hooks: Hooks, open: OpenDevice) -> Result<Self, StartError> {
        let began = Instant::now();
        // Planned faults are for the requests that a test makes, not for ours.
        let real_devices = hooks.wrap_device.is_none();
        let config = Arc::new(config);
        let store = tokio::task::spawn_blocking({
            let config = config.clone();
            move || open_store(&config, hooks, &open)
        });
        let Store { media, hbm, report, tenants, completions } = store.await??;
        let status = status(began, &config, &report);
        hbm.complaints().into_iter().for_each(|complaint| status.note(complaint));
        let spaces = Arc::new(Spaces::new(config.limits.spaces));
        let events = EventLogs::new(tenants.all().map(|tenant| tenant.id), config.edges.events_per_tenant);
        let core = core_config(&config, &hbm, report.incarnation);
        let device_slots = core.device_slots.clone();
        let engine = Engine::new(core, Arc::new(media), hbm, events, spaces, &completions);
        if !engine.media().facts().catalog_usable {
            engine.catalog_failed();
        }
        let restored = tokio::task::spawn_blocking({
            let engine = engine.clone();
            let incarnation = report.incarnation;
            move || (restore::from_catalog(&engine, &report, &device_slots), incarnation)
        });
        let (scan, incarnation) = restored.await?;
        let grpc_listener = grpc::bind(config.grpc_listen, "grpc_listen").await?;
        let metrics_listener = grpc::bind(config.metrics_listen, "metrics_listen").await?;
        let lane_server = LaneServer::bind(&config.lane_socket, config.lane_admits)?;
        let loops = lane::Loops::start().map_err(StartError::Threads)?;
        let flush_as =
            tenants.all().next().map_or_else(|| terrace_core::tenant_id("default"), |tenant| tenant.id);
        let service = Service::new(engine.clone(), tenants, facts(&config, incarnation));
        let address = |listener: &tokio::net::TcpListener, asked| listener.local_addr().unwrap_or(asked);
        let mut daemon = Self {
            grpc: address(&grpc_listener, config.grpc_listen),
            metrics: address(&metrics_listener, config.metrics_listen),
            lane: config.lane_socket.clone(),
            incarnation,
            service,
            status,
            flush_as,
            stop: watch::Sender::new(false),
            listeners: JoinSet::new(),
            chores: Vec::new(),
        };
        daemon.keep_up(&config, scan);
        daemon.listen(grpc_listener, metrics_listener, lane_server, loops);
        let ready = daemon.status.ready_now();
        if real_devices {
            daemon.engine().media().start_self_test();
        }
        tracing::info!(ready_ms = ready.as_millis(), metrics = %daemon.metrics, "{daemon}");
        Ok(daemon)
    }

    fn keep_up(&mut self, config: &Config, scan: bool) {
        let engine = self.service.engine().clone();
        let ticking = engine.clone();
        self.chores.push(tokio::spawn(async move { ticking.tick().await }));
        self.chores.push(tokio::spawn(upkeep::watch_memory(
            engine.clone(),
            config.pinned_bytes,
            config.chunk_bytes,
        )));
        let slots: Vec<u32> = config.devices.iter().map(|device| device.slots).collect();
        let repair = upkeep::repair_catalog(engine.clone(), self.status.clone(), slots.clone());
        self.chores.push(tokio::spawn(repair));
        let bytes_per_second = config.scrub_bytes_per_second;
        engine.submit(Input::Scrub(Scrub::Rate { bytes_per_second }));
        let status = self.status.clone();
        tokio::task::spawn_blocking(move || status.hbm_found(terrace_gpudirect::probe()));
        if scan {
            let status = self.status.clone();
            tokio::task::spawn_blocking(move || restore::scan_to_the_end(&engine, &status, &slots));
        }
    }

    fn listen(
        &mut self,
        grpc_listener: tokio::net::TcpListener,
        metrics_listener: tokio::net::TcpListener,
        lane_server: LaneServer,
        loops: lane::Loops,
    ) {
        let (service, status) = (self.service.clone(), self.status.clone());
        let stop = self.stop.subscribe();
        let signals = Signals::new(self.incarnation.into());
        self.listeners.spawn(lane::serve(lane_server, loops, service.clone(), stop.clone()));
        self.listeners.spawn({
            let (service, stop) = (service.clone(), stop.clone());
            async move {
                if let Err(error) = http::serve(metrics_listener, service, stop).await {
                    tracing::error!(%error, "metrics are not served any more");
                }
            }
        });
        self.listeners.spawn(async move {
            if let Err(error) = grpc::serve(grpc_listener, service, status, signals, stop).await {
                tracing::error!(%error, "gRPC is not served any more");
            }
        });
    }

    /// The engine, for tests that look inside.
    pub fn engine(&self) -> &Arc<Engine> {
        self.service.engine()
    }

    /// Persists what only memory holds, ends every session, and closes.
    pub async fn stop(mut self) {
        let deadline = Instant::now() + FLUSH_WITHIN;
        self.service.engine().media().stop_scan();
        // Once with the sessions' windows still there, and once with what was sealed meanwhile.
        self.flush(deadline).await;
        self.stop.send_replace(true);
        let ended = async { while self.listeners.join_next().await.is_some() {} };
        if tokio::time::timeout(END_WITHIN, ended).await.is_err() {
            tracing::warn!("some connections did not end in time; they are cut");
            self.listeners.shutdown().await;
        }
        self.flush(deadline).await;
        for chore in &self.chores {
            chore.abort();
        }
        for chore in self.chores.drain(..) {
            // It was cancelled just now.
            let _ = chore.await;
        }
        let engine = self.service.engine().clone();
        drop(self);
        close(engine).await;
    }

    async fn flush(&self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        match tokio::time::timeout(left, self.service.engine().flush(self.flush_as)).await {
            Ok(Ok((blocks, 0))) => tracing::info!(blocks, "everything sealed is persisted"),
            Ok(Ok((blocks, failed))) => tracing::warn!(blocks, failed, "some blocks could not be persisted"),
            Ok(Err(limit)) => tracing::warn!(?limit, "nothing could be flushed"),
            Err(_) => tracing::warn!("persisting took too long; what is left is lost"),
        }
    }
}

impl std::fmt::Display for Daemon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (grpc, lane, incarnation) = (self.grpc, self.lane.display(), self.incarnation);
        write!(f, "terraced ready: grpc {grpc}, lane {lane}, incarnation {incarnation}")
    }
}

/// Closes media when the last connection has let go of the engine.
async fn close(engine: Arc<Engine>) {
    let deadline = Instant::now() + END_WITHIN;
    let mut engine = engine;
    loop {
        match Arc::try_unwrap(engine) {
            Ok(alone) => {
                let closed = tokio::task::spawn_blocking(move || alone.into_media().map(Media::close)).await;
                return match closed {
                    Ok(Some(Ok(()))) => tracing::info!("closed cleanly"),
                    Ok(Some(Err(error))) => tracing::warn!(%error, "the clean end could not be recorded"),
                    Ok(None) => tracing::warn!("media is still in use; not closed"),
                    Err(error) => tracing::error!(%error, "closing panicked"),
                };
            }
            Err(shared) if Instant::now() < deadline => {
                engine = shared;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Err(shared) => {
                tracing::warn!(
                    "somebody still uses the engine; the next start finds an unclean end, which is safe"
                );
                // If the last user were a thread of media, media would wait for itself.
                std::mem::forget(shared);
                return;
            }
        }
    }
}

fn open_store(config: &Config, hooks: Hooks, open: &OpenDevice) -> Result<Store, StartError> {
    std::fs::create_dir_all(&config.data_dir)
        .map_err(|source| StartError::DataDir { path: config.data_dir.clone(), source })?;
    let secret = NodeSecret::open(&config.data_dir)?;
    let completions = Completions::default();
    let devices =
        config.devices.iter().map(|device| DeviceConfig { path: device.path.clone(), slots: device.slots });
    let media = MediaConfig {
        data_dir: config.data_dir.clone(),
        node: secret.node(),
        chunk_bytes: config.chunk_bytes,
        devices: devices.collect(),
        backend: config.io_backend,
        bytes_in_flight_max: terrace_core::ByteCount::new(DEVICE_BYTES_IN_FLIGHT),
        checkers: std::thread::available_parallelism()
            .map_or(2, |cores| u32::try_from(cores.get().min(4)).unwrap_or(4)),
        hooks,
    };
    let (media, report) = Media::open(media, completions.callback())?;
    let paths: Vec<PathBuf> = config.devices.iter().map(|device| device.path.clone()).collect();
    let hbm = Hbm::open(
        &config.hbm,
        (&config.data_dir, &paths),
        open,
        &completions.finish(),
        &completions.tell_lost(),
    );
    let tenants = Tenants::new(&config.tenants, &secret);
    Ok(Store { media, hbm, report, tenants, completions })
}

fn status(began: Instant, config: &Config, report: &OpenReport) -> Arc<Status> {
    let mut notes = config.notes.clone();
    match &report.catalog {
        CatalogState::Opened => {}
        CatalogState::New if report.scan_needed => {
            notes.push("there was no catalog; the header pages are scanned".to_owned());
        }
        CatalogState::New => notes.push("first start in this data directory".to_owned()),
        CatalogState::Damaged { reason, moved_to } => {
            tracing::warn!(reason, moved_to = %moved_to.display(), "the catalog was damaged and has been moved aside");
            notes.push(format!("the catalog was damaged ({reason}); it lies in {}", moved_to.display()));
        }
    }
    notes.extend(report.notes.iter().cloned());
    for note in &notes {
        tracing::info!("{note}");
    }
    Arc::new(Status::new(
        began,
        config.data_dir.clone(),
        report.incarnation,
        config.pinned_bytes,
        config.chunk_bytes,
        notes,
    ))
}

fn core_config(config: &Config, hbm: &Hbm, incarnation: u32) -> CoreConfig {
    let chunks = config.pinned_bytes.get() / config.chunk_bytes.get().max(1);
    CoreConfig {
        incarnation,
        pinned_bytes: config.pinned_bytes,
        chunk_bytes: config.chunk_bytes,
        device_slots: config.devices.iter().map(|device| device.slots).collect(),
        hbm: hbm.core_configs(),
        persist_delay: config.persist_delay,
        window_idle: config.window_idle,
        window_recall_max: config.window_recall_max,
        chunks_ready_min: u32::try_from(chunks / CHUNKS_READY_PART)
            .unwrap_or(u32::MAX)
            .clamp(*CHUNKS_READY.start(), *CHUNKS_READY.end()),
        frames_ready_min: FRAMES_READY_MIN,
        policy: config.policy,
        admission: config.admission,
        limits: config.limits.clone(),
    }
}

fn facts(config: &Config, incarnation: u32) -> Facts {
    Facts {
        incarnation,
        blocks_max: config.limits.blocks_per_request,
        ttl_max: config.limits.lease_ttl_max,
        lane_socket: config.lane_socket.display().to_string(),
        edges: config.edges.clone(),
    }
}
