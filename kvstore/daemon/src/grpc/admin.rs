//! AdminService: what operators ask.

use std::sync::Arc;

use tonic::{Request, Response, Status as Refused};

use terrace_core::{ByteCount, Core, FrameCounts, GpuView, Input, MIB, PinnedView, Scrub, TierViews};
use terrace_lane::manifest_to_wire;
use terrace_media::{DeviceFacts, MediaFacts};
use terrace_proto::v1::admin_service_server::AdminService;
use terrace_proto::v1::{self, InfoRequest, InfoResponse};

use crate::convert::{self, CallError};
use crate::grpc::verify;
use crate::metrics;
use crate::service::Service;
use crate::status::Status;

/// Leases that are listed when the caller names no limit.
const LEASES_DEFAULT: u32 = 1000;
/// Most leases that are listed.
const LEASES_MAX: u32 = 10_000;

/// Rate of a scrub that an operator starts when no rate is configured.
const SCRUB_NOW: ByteCount = ByteCount::new(64 * MIB);

type Answer<T> = Result<Response<T>, Refused>;

/// The service.
pub(crate) struct Admin {
    service: Arc<Service>,
    status: Arc<Status>,
}

impl Admin {
    pub(crate) fn new(service: Arc<Service>, status: Arc<Status>) -> Self {
        Self { service, status }
    }

    fn info(&self) -> InfoResponse {
        let engine = self.service.engine();
        let (tiers, sessions, leases, unpersisted, counters) = engine.view(|core| {
            let (sessions, leases) = (core.session_count(), core.lease_count());
            (core.tier_views(), sessions, leases, core.unpersisted(), *core.counters())
        });
        let facts = engine.media().facts();
        let counters = metrics::counted(&counters).map(|(name, _, value)| (name.to_owned(), value));
        InfoResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            incarnation: self.status.incarnation.into(),
            uptime_ms: millis(self.status.began.elapsed()),
            ready_ms: millis(self.status.ready()),
            tiers: self.tiers(&tiers, &facts),
            notes: self.notes(&facts),
            unpersisted_bytes: unpersisted.get(),
            sessions: count(sessions),
            leases: count(leases),
            degraded: engine.is_degraded(),
            counters: counters.into_iter().collect(),
            scan_done: self.status.scan_done(),
            data_dir: self.status.data_dir.display().to_string(),
        }
    }

    fn notes(&self, facts: &MediaFacts) -> Vec<String> {
        let mut notes = self.status.notes();
        for note in &facts.notes {
            if !notes.contains(note) {
                notes.push(note.clone());
            }
        }
        if facts.lingering.get() > 0 {
            notes.push(format!(
                "{} bytes of dropped chunks are still mapped by other processes; the pool grows again when they end",
                facts.lingering.get()
            ));
        }
        notes
    }

    fn gpu(&self, view: &GpuView) -> v1::TierInfo {
        let hbm = self.service.engine().hbm();
        let activity = hbm.activity(view.gpu).map(|now| v1::HbmActivity {
            copies_queued: now.copies.queued,
            copies_flying: now.copies.flying,
            copies_held: now.copies.held,
            copied_bytes_total: now.copies.done_bytes_total.get(),
            copies_failed_total: now.copies.failed_total,
            copies_late_total: now.copies.late_total,
            registered_bytes: now.registered.get(),
            device_chunks: now.chunks,
            direct_reads_total: now.direct_reads,
            direct_reads_fallen_back_total: now.fallen_back,
        });
        let lost = if view.usable { "" } else { "its blocks are misses; " };
        v1::TierInfo {
            tier: v1::Tier::Hbm.into(),
            device: hbm.name(view.gpu),
            on: view.usable,
            note: format!("{lost}{}", hbm.note(view.gpu)),
            capacity_bytes: view.memory.bytes_max.get(),
            populated_bytes: view.memory.bytes.get(),
            frames: Some(frames(&view.memory.frames)),
            sealed_bytes: view.memory.sealed_bytes.get(),
            stranded_bytes: view.memory.stranded_bytes.get(),
            chunks: view.memory.chunks,
            windows: view.memory.windows,
            device_number: view.gpu.get().into(),
            given_back_bytes: view.free.get(),
            hbm: convert::hbm_device(hbm, view.gpu),
            activity,
            ..Default::default()
        }
    }

    fn tiers(&self, views: &TierViews, facts: &MediaFacts) -> Vec<v1::TierInfo> {
        let hbm = v1::TierInfo { tier: v1::Tier::Hbm.into(), note: self.status.hbm(), ..Default::default() };
        let mut tiers: Vec<v1::TierInfo> = views.hbm.iter().map(|view| self.gpu(view)).collect();
        if tiers.is_empty() {
            tiers.push(hbm);
        }
        tiers.push(self.pinned(&views.pinned, facts));
        for (view, device) in views.devices.iter().zip(&facts.devices) {
            let capacity = u64::from(view.slots) * self.status.chunk_bytes.get();
            tiers.push(v1::TierInfo {
                tier: v1::Tier::Nvme.into(),
                device: device.path.display().to_string(),
                on: view.usable,
                note: device_note(view.usable, device, view.slots_unscanned),
                capacity_bytes: capacity,
                populated_bytes: capacity,
                frames: Some(frames(&view.frames)),
                sealed_bytes: view.sealed_bytes.get(),
                stranded_bytes: view.stranded_bytes.get(),
                chunks: view.slots_carved,
                windows: 0,
                backend: device.backend.clone(),
                self_test: device.self_test.iter().map(convert::device_rate).collect(),
                late_answers: device.late,
                ..Default::default()
            });
        }
        tiers
    }

    fn pinned(&self, view: &PinnedView, facts: &MediaFacts) -> v1::TierInfo {
        let pages: Vec<String> = facts
            .chunk_pages
            .iter()
            .filter(|(_, chunks)| *chunks > 0)
            .map(|(kind, chunks)| format!("{chunks} of {kind}"))
            .collect();
        let device =
            if pages.is_empty() { "memfd".to_owned() } else { format!("memfd, {}", pages.join(", ")) };
        let note = if view.bytes_max < self.status.pinned_bytes {
            format!(
                "the machine has memory for {} of {} bytes now; it grows when more is available",
                view.bytes_max.get(),
                self.status.pinned_bytes.get()
            )
        } else {
            "chunks are made when they are needed".to_owned()
        };
        v1::TierInfo {
            tier: v1::Tier::Pinned.into(),
            device,
            on: true,
            note,
            capacity_bytes: self.status.pinned_bytes.get(),
            populated_bytes: view.bytes.get(),
            frames: Some(frames(&view.frames)),
            sealed_bytes: view.sealed_bytes.get(),
            stranded_bytes: view.stranded_bytes.get(),
            chunks: view.chunks,
            windows: view.windows,
            ..Default::default()
        }
    }

    fn space(&self, view: &terrace_core::SpaceView) -> v1::SpaceInfo {
        let known = self.service.engine().spaces().one(view.space);
        v1::SpaceInfo {
            space_id: convert::space_bytes(view.space),
            tenant: known.as_ref().map(|known| known.tenant_name.clone()).unwrap_or_default(),
            manifest: known.map(|known| manifest_to_wire(&known.manifest)),
            generation: view.generation,
            pinned_blocks: view.blocks_pinned,
            nvme_blocks: view.blocks_nvme,
        }
    }
}

fn device_note(usable: bool, device: &DeviceFacts, unscanned: u32) -> String {
    if !device.condition.is_empty() {
        device.condition.clone()
    } else if !usable || !device.writable {
        format!(
            "{} errors; a failed sync makes a device read-only until the daemon starts again",
            device.errors
        )
    } else if unscanned > 0 {
        format!("{unscanned} slots are not scanned yet")
    } else {
        device.self_test_note.clone()
    }
}

fn frames(counts: &FrameCounts) -> v1::FrameCounts {
    v1::FrameCounts {
        capacity: counts.free + counts.filling + counts.sealed + counts.evicting + counts.quarantined,
        free: counts.free,
        filling: counts.filling,
        sealed: counts.sealed,
        pinned: counts.pinned,
        evicting: counts.evicting,
        quarantined: counts.quarantined,
    }
}

fn unknown_tenant(name: &str) -> Refused {
    Refused::not_found(format!("no tenant is called `{name}`"))
}

fn millis(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[tonic::async_trait]
impl AdminService for Admin {
    async fn info(&self, _request: Request<InfoRequest>) -> Answer<InfoResponse> {
        Ok(Response::new(Admin::info(self)))
    }

    async fn list_spaces(&self, _request: Request<v1::ListSpacesRequest>) -> Answer<v1::ListSpacesResponse> {
        let views = self.service.engine().view(Core::spaces);
        Ok(Response::new(v1::ListSpacesResponse {
            spaces: views.iter().map(|view| self.space(view)).collect(),
        }))
    }

    async fn list_leases(&self, request: Request<v1::ListLeasesRequest>) -> Answer<v1::ListLeasesResponse> {
        let limit = match request.get_ref().limit {
            0 => LEASES_DEFAULT,
            limit => limit.min(LEASES_MAX),
        };
        let (views, total) =
            self.service.engine().view(|core| (core.leases(limit as usize), core.lease_count()));
        let leases = views.into_iter().map(|view| {
            let (client, tenant) = self.service.register().name(view.session).unwrap_or_default();
            v1::LeaseInfo {
                lease: view.lease.get(),
                kind: if view.is_write { "write" } else { "read" }.to_owned(),
                client,
                tenant,
                blocks: view.blocks,
                held_ms: view.age.millis(),
                expires_ms: view.left.map_or(0, terrace_core::Micros::millis),
            }
        });
        Ok(Response::new(v1::ListLeasesResponse { leases: leases.collect(), total: count(total) }))
    }

    async fn stat_block(&self, request: Request<v1::StatBlockRequest>) -> Answer<v1::StatBlockResponse> {
        let block = convert::block_id(&request.get_ref().block_id)?;
        let view = self.service.engine().view(|core| core.stat(block));
        let engine = self.service.engine();
        let (facts, hbm) = (engine.media().facts(), engine.hbm());
        Ok(Response::new(view.map_or_else(Default::default, |view| verify::stat(&view, &facts, hbm))))
    }

    async fn verify_block(
        &self,
        request: Request<v1::VerifyBlockRequest>,
    ) -> Answer<v1::VerifyBlockResponse> {
        let block = convert::block_id(&request.get_ref().block_id)?;
        let engine = self.service.engine().clone();
        // Reads from disk and goes over every byte.
        let copies = tokio::task::spawn_blocking(move || verify::verify(&engine, block)).await;
        let copies = copies.map_err(|error| CallError::internal(&error.to_string()))?;
        Ok(Response::new(v1::VerifyBlockResponse { copies }))
    }

    async fn match_prefix(
        &self,
        request: Request<v1::MatchPrefixRequest>,
    ) -> Answer<v1::MatchPrefixResponse> {
        let request = request.into_inner();
        let tenant =
            self.service.tenants().named(&request.tenant).ok_or_else(|| unknown_tenant(&request.tenant))?;
        let space = convert::space_id(&request.space_id)?;
        let blocks = convert::blocks(&tenant.key, space, &request.keys, self.service.facts().blocks_max)?;
        let mut found = Vec::new();
        for block in blocks {
            let Some(view) = self.service.engine().view(|core| core.stat(block)) else { break };
            let tiers = convert::tiers(view.tiers);
            if tiers.is_empty() || view.space != space {
                break;
            }
            found.push(v1::PrefixBlock { block_id: convert::block_bytes(block), tiers });
        }
        Ok(Response::new(v1::MatchPrefixResponse { prefix_blocks: count(found.len()), blocks: found }))
    }

    async fn curve(&self, request: Request<v1::CurveRequest>) -> Answer<v1::CurveResponse> {
        let request = request.into_inner();
        let tier = convert::curve_tier(request.tier())?;
        let tenant = match request.tenant.as_str() {
            "" => None,
            name => Some(self.service.tenants().named(name).ok_or_else(|| unknown_tenant(name))?.id),
        };
        let mut curves = self.service.engine().view(Core::curves);
        curves.retain(|curve| curve.tenant == tenant && tier.is_none_or(|tier| tier == curve.tier));
        curves.sort_by_key(|curve| curve.tier);
        let curves = curves.iter().map(|curve| convert::curve_to_wire(curve, &request.tenant)).collect();
        Ok(Response::new(v1::CurveResponse { curves }))
    }

    async fn flush(&self, _request: Request<v1::FlushRequest>) -> Answer<v1::FlushResponse> {
        let tenant = self.service.tenants().all().next().map(|tenant| tenant.id);
        let tenant = tenant.ok_or_else(|| CallError::internal("a daemon without tenants"))?;
        let (blocks, failed) = self.service.engine().flush(tenant).await.map_err(CallError::from)?;
        Ok(Response::new(v1::FlushResponse { blocks, failed }))
    }

    async fn scrub(&self, request: Request<v1::ScrubRequest>) -> Answer<v1::ScrubResponse> {
        let engine = self.service.engine();
        let asked = request.into_inner();
        match asked.action() {
            v1::ScrubAction::Unspecified => {}
            v1::ScrubAction::Start => {
                let configured = engine.view(Core::scrub_view).bytes_per_second;
                let bytes_per_second = match (asked.bytes_per_second, configured.get()) {
                    (0, 0) => SCRUB_NOW,
                    (0, _) => configured,
                    (asked, _) => ByteCount::new(asked),
                };
                engine.submit(Input::Scrub(Scrub::Start { bytes_per_second }));
            }
            v1::ScrubAction::Stop => engine.submit(Input::Scrub(Scrub::Stop)),
        }
        let (view, counters) = engine.view(|core| (core.scrub_view(), *core.counters()));
        let (rate, done, all) = view.pass.unwrap_or_default();
        Ok(Response::new(v1::ScrubResponse {
            running: view.pass.is_some(),
            bytes_per_second: rate.get(),
            slots_done: done,
            slots: all,
            configured_bytes_per_second: view.bytes_per_second.get(),
            next_pass_ms: view.next_pass_in.map(terrace_core::Micros::millis),
            blocks: counters.scrub_blocks,
            bytes: counters.scrub_bytes,
            damaged: counters.scrub_damaged,
            unreadable: counters.scrub_unreadable,
            passes: counters.scrub_passes,
        }))
    }
}
