//! What the daemon shows on `/metrics`.
//!
//! Counters of calls live here. Everything that the core or media count is
//! copied when the page is asked for, so that there is one place that counts.

mod hbm;

use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGaugeVec,
    Opts, Registry, TextEncoder,
};
use tonic::Code;

use terrace_core::{Counters, FrameCounts, IoClass};

use crate::connections::Counts;
use crate::engine::Engine;
use crate::health;

/// Buckets of calls that are answered from memory: 10 us to 3 s.
const CALL_BUCKETS: [f64; 12] =
    [0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0];

/// Durations and refusals of calls.
pub struct CallMetrics {
    lease_seconds: HistogramVec,
    seal_seconds: Histogram,
    refused: IntCounterVec,
    read_bytes: IntCounter,
    write_bytes: IntCounter,
    open: IntGaugeVec,
    not_let_in: IntCounterVec,
    given_up: IntCounterVec,
}

impl Default for CallMetrics {
    fn default() -> Self {
        const VALID: &str = "names and labels are valid";
        let lease = HistogramOpts::new(
            "terrace_lease_seconds",
            "Time to answer a lease, without the socket; waits for promotions included.",
        );
        let seal = HistogramOpts::new("terrace_seal_seconds", "Time to answer a seal, without the socket.");
        let refused = Opts::new(
            "terrace_calls_refused_total",
            "Calls and sessions that were refused, over gRPC and the socket, by gRPC status.",
        );
        let open = Opts::new("terrace_connections", "Open TCP connections, by listener.");
        let not_let_in = "TCP connections that were closed at once, for `limits.connections` were open.";
        let not_let_in = Opts::new("terrace_connections_refused_total", not_let_in);
        let given_up = "TCP connections that were closed because their peer said nothing.";
        let given_up = Opts::new("terrace_connections_silent_total", given_up);
        Self {
            lease_seconds: HistogramVec::new(lease.buckets(CALL_BUCKETS.to_vec()), &["kind"]).expect(VALID),
            seal_seconds: Histogram::with_opts(seal.buckets(CALL_BUCKETS.to_vec())).expect(VALID),
            refused: IntCounterVec::new(refused, &["code"]).expect(VALID),
            read_bytes: IntCounter::new(
                "terrace_stream_read_bytes_total",
                "Payload bytes sent by Read streams.",
            )
            .expect(VALID),
            write_bytes: IntCounter::new(
                "terrace_stream_write_bytes_total",
                "Payload bytes received by Write streams.",
            )
            .expect(VALID),
            open: IntGaugeVec::new(open, &["listener"]).expect(VALID),
            not_let_in: IntCounterVec::new(not_let_in, &["listener"]).expect(VALID),
            given_up: IntCounterVec::new(given_up, &["listener"]).expect(VALID),
        }
    }
}

impl CallMetrics {
    pub(crate) fn leased(&self, kind: &str, took: Duration) {
        self.lease_seconds.with_label_values(&[kind]).observe(took.as_secs_f64());
    }

    pub(crate) fn sealed(&self, took: Duration) {
        self.seal_seconds.observe(took.as_secs_f64());
    }

    pub(crate) fn refused(&self, code: Code) {
        self.refused.with_label_values(&[&format!("{code:?}")]).inc();
    }

    pub(crate) fn streamed_out(&self, bytes: usize) {
        self.read_bytes.inc_by(bytes as u64);
    }

    pub(crate) fn streamed_in(&self, bytes: usize) {
        self.write_bytes.inc_by(bytes as u64);
    }

    /// What connections of a listener are counted by.
    pub(crate) fn connections(&self, listener: &str) -> Counts {
        Counts {
            open: self.open.with_label_values(&[listener]),
            refused: self.not_let_in.with_label_values(&[listener]),
            given_up: self.given_up.with_label_values(&[listener]),
        }
    }

    fn collectors(&self) -> [Box<dyn Collector>; 8] {
        [
            Box::new(self.lease_seconds.clone()),
            Box::new(self.seal_seconds.clone()),
            Box::new(self.refused.clone()),
            Box::new(self.read_bytes.clone()),
            Box::new(self.write_bytes.clone()),
            Box::new(self.open.clone()),
            Box::new(self.not_let_in.clone()),
            Box::new(self.given_up.clone()),
        ]
    }
}

/// The page of `/metrics`.
///
/// # Errors
/// Two metrics of one name, which a test rules out.
pub(crate) fn page(engine: &Engine, calls: &CallMetrics) -> Result<String, prometheus::Error> {
    let registry = Registry::new();
    for collector in calls.collectors() {
        registry.register(collector)?;
    }
    registry.register(Box::new(engine.rates().seconds.clone()))?;
    registry.register(Box::new(engine.rates().faults.clone()))?;
    levels(&registry, engine)?;
    let counters = engine.view(|core| *core.counters());
    for (name, help, value) in counted(&counters) {
        count(&registry, name, help, value)?;
    }
    devices(&registry, engine)?;
    let mut text = Vec::new();
    TextEncoder::new().encode(&registry.gather(), &mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn levels(registry: &Registry, engine: &Engine) -> Result<(), prometheus::Error> {
    let (tiers, sessions, leases, unpersisted, waiting, running, blocks, writes) = engine.view(|core| {
        (
            core.tier_views(),
            core.session_count(),
            core.lease_count(),
            core.unpersisted().get(),
            core.waiting_count(),
            core.operation_count(),
            core.block_count(),
            core.writes_waiting(),
        )
    });
    let frames =
        GaugeVec::new(Opts::new("terrace_frames", "Frames, by tier and state."), &["tier", "state"])?;
    frames_of(&frames, "pinned", &tiers.pinned.frames);
    let mut nvme = FrameCounts::default();
    let (mut nvme_sealed, mut nvme_stranded) = (0, 0);
    for device in &tiers.devices {
        add(&mut nvme, &device.frames);
        nvme_sealed += device.sealed_bytes.get();
        nvme_stranded += device.stranded_bytes.get();
    }
    frames_of(&frames, "nvme", &nvme);
    let mut hbm = FrameCounts::default();
    tiers.hbm.iter().for_each(|device| add(&mut hbm, &device.memory.frames));
    frames_of(&frames, "hbm", &hbm);
    hbm::devices(registry, engine, &tiers.hbm)?;
    registry.register(Box::new(frames))?;
    let sealed =
        GaugeVec::new(Opts::new("terrace_sealed_bytes", "Payload bytes of sealed blocks."), &["tier"])?;
    sealed.with_label_values(&["pinned"]).set(float(tiers.pinned.sealed_bytes.get()));
    sealed.with_label_values(&["nvme"]).set(float(nvme_sealed));
    registry.register(Box::new(sealed))?;
    let stranded = GaugeVec::new(
        Opts::new("terrace_stranded_bytes", "Bytes of chunks that no frame covers."),
        &["tier"],
    )?;
    stranded.with_label_values(&["pinned"]).set(float(tiers.pinned.stranded_bytes.get()));
    stranded.with_label_values(&["nvme"]).set(float(nvme_stranded));
    registry.register(Box::new(stranded))?;
    for (name, help, value) in [
        ("terrace_pinned_bytes", "Bytes of Pinned chunks that exist.", tiers.pinned.bytes.get()),
        ("terrace_pinned_limit_bytes", "Bytes that Pinned chunks may take.", tiers.pinned.bytes_max.get()),
        ("terrace_chunks", "Pinned chunks, windows included.", tiers.pinned.chunks.into()),
        ("terrace_windows", "Pinned chunks that a session may write.", tiers.pinned.windows.into()),
        ("terrace_sessions", "Open sessions.", sessions as u64),
        ("terrace_leases", "Live leases.", leases as u64),
        ("terrace_unpersisted_bytes", "Payload bytes that a crash would lose now.", unpersisted),
        ("terrace_requests_waiting", "Requests that wait for an operation.", waiting as u64),
        ("terrace_operations", "Slow operations in flight.", running as u64),
        ("terrace_blocks", "Entries of the residency table.", blocks.into()),
        ("terrace_writes_waiting", "Copies to Nvme that are not begun.", writes as u64),
    ] {
        gauge(registry, name, help, value)?;
    }
    Ok(())
}

/// Adds the frames of one device to those of others.
pub(crate) fn add(sum: &mut FrameCounts, more: &FrameCounts) {
    sum.free += more.free;
    sum.filling += more.filling;
    sum.sealed += more.sealed;
    sum.evicting += more.evicting;
    sum.quarantined += more.quarantined;
    sum.pinned += more.pinned;
}

fn frames_of(frames: &GaugeVec, tier: &str, counts: &FrameCounts) {
    for (state, value) in [
        ("free", counts.free),
        ("filling", counts.filling),
        ("sealed", counts.sealed),
        ("evicting", counts.evicting),
        ("quarantined", counts.quarantined),
    ] {
        frames.with_label_values(&[tier, state]).set(float(value));
    }
}

fn devices(registry: &Registry, engine: &Engine) -> Result<(), prometheus::Error> {
    let facts = engine.media().facts();
    let counter = |name: &str, help: &str| IntCounterVec::new(Opts::new(name, help), &["device"]);
    let read = counter("terrace_device_read_bytes_total", "Bytes read from a device.")?;
    let written = counter("terrace_device_write_bytes_total", "Bytes written to a device.")?;
    let errors = counter("terrace_device_errors_total", "Device I/Os that failed.")?;
    let usable =
        Opts::new("terrace_device_usable", "1 while a device is given work; 0: its blocks are misses.");
    let usable = GaugeVec::new(usable, &["device"])?;
    let queued = GaugeVec::new(Opts::new("terrace_device_queue", "I/Os that wait or run."), &["device"])?;
    let late = counter("terrace_device_late_total", "I/Os answered after their wait had been ended.")?;
    let waiting = Opts::new("terrace_device_waiting", "I/Os that wait for their device, by class.");
    let waiting = GaugeVec::new(waiting, &["device", "class"])?;
    for (number, device) in facts.devices.iter().enumerate() {
        let number = number.to_string();
        let label = [number.as_str()];
        read.with_label_values(&label).inc_by(device.read_bytes);
        written.with_label_values(&label).inc_by(device.write_bytes);
        errors.with_label_values(&label).inc_by(device.errors);
        usable.with_label_values(&label).set(float(device.usable.into()));
        queued.with_label_values(&label).set(float(device.queued));
        late.with_label_values(&label).inc_by(device.late);
        for (class, waits) in IoClass::ALL.iter().zip(device.waiting) {
            waiting.with_label_values(&[&number, class.label()]).set(float(waits));
        }
    }
    registry.register(Box::new(read))?;
    registry.register(Box::new(written))?;
    registry.register(Box::new(errors))?;
    registry.register(Box::new(usable))?;
    registry.register(Box::new(queued))?;
    registry.register(Box::new(late))?;
    registry.register(Box::new(waiting))?;
    gauge(
        registry,
        "terrace_catalog_usable",
        "1 while the catalog takes writes.",
        facts.catalog_usable.into(),
    )?;
    let degraded = "What is out now: devices, and the catalog while it takes no writes. /healthz names it.";
    gauge(registry, "terrace_degraded", degraded, health::troubles(engine).len() as u64)?;
    gauge(registry, "terrace_ready_bytes", "Memory made ahead for chunks.", facts.ready.get())?;
    let preparing = "1 while more memory is to be made ahead.";
    gauge(registry, "terrace_preparing", preparing, facts.preparing.into())?;
    let lingering = facts.lingering.get();
    gauge(registry, "terrace_lingering_bytes", "Dropped chunks that other processes still map.", lingering)
}

fn gauge(registry: &Registry, name: &str, help: &str, value: u64) -> Result<(), prometheus::Error> {
    let gauge = Gauge::new(name, help)?;
    gauge.set(float(value));
    registry.register(Box::new(gauge))
}

fn count(registry: &Registry, name: &str, help: &str, value: u64) -> Result<(), prometheus::Error> {
    let counter = IntCounter::new(name, help)?;
    counter.inc_by(value);
    registry.register(Box::new(counter))
}

/// The core's counters with their metric names, for the page and for `info`.
pub(crate) fn counted(counters: &Counters) -> [(&'static str, &'static str, u64); 39] {
    let c = counters;
    [
        (
            "terrace_hits_total",
            "Blocks of read leases granted at once, and blocks that clients found by themselves.",
            c.hits,
        ),
        ("terrace_hits_nvme_total", "Blocks of read leases that had to be fetched.", c.hits_nvme),
        ("terrace_misses_total", "Blocks of read leases that no tier had.", c.misses),
        ("terrace_admissions_refused_total", "Blocks not worth a write to Nvme.", c.admissions_refused),
        ("terrace_cheaper_to_recompute_total", "Blocks not loaded for that reason.", c.cheaper_to_recompute),
        ("terrace_seals_total", "Blocks published.", c.seals),
        ("terrace_seals_repeated_total", "Seals with the bytes that were there.", c.seals_repeated),
        ("terrace_seal_conflicts_total", "Seals with other bytes than were there.", c.seal_conflicts),
        ("terrace_evictions_pinned_total", "Blocks evicted from Pinned.", c.evictions_pinned),
        ("terrace_evictions_nvme_total", "Blocks evicted from Nvme.", c.evictions_nvme),
        ("terrace_evictions_hbm_total", "Blocks evicted from Hbm.", c.evictions_hbm),
        ("terrace_promotions_hbm_total", "Blocks brought to a device of Hbm.", c.promotions_hbm),
        ("terrace_demotions_hbm_total", "Blocks copied from Hbm to Pinned.", c.demotions_hbm),
        ("terrace_promotions_total", "Blocks brought from Nvme to Pinned.", c.promotions),
        ("terrace_demotions_total", "Blocks written early to free memory.", c.demotions),
        ("terrace_persisted_total", "Blocks made durable.", c.persisted),
        ("terrace_copies_total", "Blocks moved between chunks.", c.copies),
        ("terrace_checksum_failures_total", "Copies that failed their checksum.", c.checksum_failures),
        ("terrace_device_faults_total", "Operations that a device failed.", c.device_faults),
        ("terrace_commit_faults_total", "Commits that the catalog failed.", c.commit_faults),
        ("terrace_memory_faults_total", "Chunks that could not be created.", c.memory_faults),
        ("terrace_writes_without_room_total", "Writes put off for want of a frame.", c.writes_without_room),
        ("terrace_throttled_total", "Requests turned away by a limit.", c.throttled),
        ("terrace_leases_expired_total", "Leases ended by their deadline.", c.leases_expired),
        ("terrace_leases_revoked_total", "Leases held too long, and ended.", c.leases_revoked),
        ("terrace_windows_recalled_total", "Windows asked back.", c.windows_recalled),
        ("terrace_windows_adopted_total", "Windows kept as chunks.", c.windows_adopted),
        ("terrace_windows_replaced_total", "Windows not handed back, or not wholly.", c.windows_replaced),
        ("terrace_intakes_total", "Blocks copied from isolated writers.", c.intakes),
        ("terrace_chunks_retired_total", "Chunks emptied for other use.", c.chunks_retired),
        ("terrace_restored_total", "Blocks found on devices and indexed.", c.restored),
        ("terrace_restore_refused_total", "Blocks found on devices and left alone.", c.restore_refused),
        ("terrace_circles_cut_total", "Circles of parents found in the catalog.", c.circles_cut),
        ("terrace_clears_total", "Spaces cleared.", c.clears),
        ("terrace_scrub_blocks_total", "Copies read again and found whole.", c.scrub_blocks),
        ("terrace_scrub_bytes_total", "Payload bytes read again and found whole.", c.scrub_bytes),
        ("terrace_scrub_damaged_total", "Copies found damaged by a scrub, and dropped.", c.scrub_damaged),
        ("terrace_scrub_unreadable_total", "Copies that a scrub could not read.", c.scrub_unreadable),
        ("terrace_scrub_passes_total", "Scrubs that came to their end.", c.scrub_passes),
    ]
}

/// Exact below 2^53.
#[allow(clippy::cast_precision_loss, reason = "Prometheus has no other number than f64")]
fn float(value: u64) -> f64 {
    value as f64
}
