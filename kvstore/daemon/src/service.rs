//! What a session may ask, the same for every transport: wire messages in, wire
//! messages out, the core in between.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::mpsc;
use tonic::Code;

use terrace_core::{
    BlockId, ByteCount, ChunkId, ClientId, GPUS_MAX, GpuId, Grant, Input, LeaseId, Limit, MapAccess, Memory,
    Micros, Notice, Purpose, Reply, Request, Residence, SpaceId, SpaceManifest,
};
use terrace_lane::manifest_from_wire;
use terrace_media::ChunkMemory;
use terrace_proto::v1;

use crate::config::Edges;
use crate::convert::{self, CallError};
use crate::engine::{Engine, Gone};
use crate::hbm::HbmChunk;
use crate::lane::encode;
use crate::metrics::CallMetrics;
use crate::session::{OpenSpace, Register, Session};
use crate::spaces::{Full, Learned, frame_bytes};
use crate::tenant::{Peer, Tenants};

/// Most spaces of a bundle.
const BUNDLE_MAX: usize = 64;

/// Answers requests of sessions.
pub struct Service {
    engine: Arc<Engine>,
    tenants: Tenants,
    register: Arc<Register>,
    facts: Facts,
    metrics: CallMetrics,
}

/// What sessions are told, and what bounds them.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Life of the daemon.
    pub incarnation: u32,
    /// Most blocks in one request.
    pub blocks_max: u32,
    /// Longest time to live of a lease.
    pub ttl_max: Micros,
    /// Path of the lane socket.
    pub lane_socket: String,
    /// Limits of the shell.
    pub edges: Edges,
}

/// A lease as the core granted it.
pub(crate) struct Leased {
    pub(crate) lease: Option<LeaseId>,
    pub(crate) grants: Vec<Grant>,
}

/// What the core said to a lease, and the space's generation.
pub(crate) struct LeaseAnswer {
    reply: Arc<Reply>,
    generation: u64,
}

impl LeaseAnswer {
    /// What was granted, or why nothing was.
    pub(crate) fn leased(&self) -> Result<encode::Leased<'_>, CallError> {
        let generation = self.generation;
        match &*self.reply {
            Reply::Leased { lease, ttl, blocks } => {
                Ok(encode::Leased { lease: *lease, ttl: *ttl, generation, grants: blocks })
            }
            Reply::Throttled(limit) => Err((*limit).into()),
            Reply::Refused(refusal) => Err((*refusal).into()),
            other => Err(CallError::internal(&format!("reply {other:?} to a lease"))),
        }
    }
}

impl From<Gone> for CallError {
    fn from(_: Gone) -> Self {
        Self::gone()
    }
}

/// Turns a reply into its expected variant, or into the error that it is.
macro_rules! expect {
    ($reply:expr, $pattern:pat => $value:expr) => {
        match $reply {
            $pattern => Ok($value),
            Reply::Throttled(limit) => Err(CallError::from(limit)),
            Reply::Refused(refusal) => Err(CallError::from(refusal)),
            other => Err(CallError::internal(&format!("reply {other:?} to {}", stringify!($pattern)))),
        }
    };
}

impl Service {
    /// A service on an engine.
    pub fn new(engine: Arc<Engine>, tenants: Tenants, facts: Facts) -> Arc<Self> {
        Arc::new(Self { engine, tenants, register: Arc::default(), facts, metrics: CallMetrics::default() })
    }

    /// The engine below.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// Who may open sessions.
    pub fn tenants(&self) -> &Tenants {
        &self.tenants
    }

    /// Names of open sessions.
    pub fn register(&self) -> &Register {
        &self.register
    }

    /// What sessions are told.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Counts and durations of calls.
    pub fn metrics(&self) -> &CallMetrics {
        &self.metrics
    }

    /// Opens a session.
    ///
    /// # Errors
    /// Unknown tenant, wrong token, or too many sessions.
    pub fn open(
        &self,
        tenant: &str,
        token: &str,
        client: &str,
        peer: Peer,
    ) -> Result<(Arc<Session>, mpsc::Receiver<Notice>), CallError> {
        let tenant = self
            .tenants
            .admit(tenant, token, peer)
            .map_err(|denied| CallError::new(Code::Unauthenticated, denied.to_string()))?;
        let locality = tenant.locality(peer);
        let (id, notices) = self.engine.open_session(tenant.id, locality)?;
        let spaces_max = self.facts.edges.spaces_per_session;
        let (engine, register) = (self.engine.clone(), self.register.clone());
        Ok((Session::new(id, tenant.clone(), client, locality, spaces_max, engine, register), notices))
    }

    /// Lets a session that was opened just now answer repeats of what its client asked by another one, which ends.
    pub fn resume(&self, session: &Session, client: ClientId) {
        self.engine.resume_session(session.id, client);
    }

    /// The first message of a session.
    pub fn opened(&self, token: [u8; 16]) -> v1::SessionResponse {
        let opened = v1::SessionOpened {
            session: Bytes::copy_from_slice(&token),
            incarnation: self.facts.incarnation.into(),
            blocks_max: self.facts.blocks_max,
            ttl_ms_max: self.facts.ttl_max.millis(),
            lane_socket: self.facts.lane_socket.clone(),
            devices: self.devices(),
            takes_block_ids: true,
        };
        v1::SessionResponse { notice: Some(v1::session_response::Notice::Opened(opened)) }
    }

    fn devices(&self) -> Vec<v1::HbmDevice> {
        (0..GPUS_MAX).map(GpuId::new).filter_map(|gpu| self.hbm_device(gpu)).collect()
    }

    async fn ask(&self, session: &Session, op: Request) -> Result<Reply, CallError> {
        // Copied here at most, and not by the core: it may be remembered for repeats.
        Ok(Arc::unwrap_or_clone(self.engine.ask(session.id, op).await?))
    }

    fn blocks(
        &self,
        session: &Session,
        space: u32,
        keys: &[impl AsRef<[u8]>],
        ids: &[u8],
    ) -> Result<(OpenSpace, Vec<BlockId>), CallError> {
        let open = session.space(space)?;
        if !ids.is_empty() {
            if !keys.is_empty() {
                return Err(CallError::invalid("both keys and block_ids; name the blocks by one of them"));
            }
            // The core grants no other tenant's, whatever they are.
            return Ok((open, convert::named_blocks(ids, self.facts.blocks_max)?));
        }
        let blocks = convert::blocks(&session.tenant.key, open.space, keys, self.facts.blocks_max)?;
        Ok((open, blocks))
    }

    pub(crate) async fn open_space(
        &self,
        session: &Session,
        request: v1::OpenSpaceRequest,
    ) -> Result<v1::OpenSpaceResponse, CallError> {
        let wire = request.manifest.ok_or_else(|| CallError::invalid("manifest is missing"))?;
        let manifest = manifest_from_wire(&wire)?;
        let tenant = &session.tenant;
        let space = manifest.space_id(tenant.id);
        let generation = match self.engine.spaces().one(space) {
            Some(known) => known.generation,
            None => self.first_opened(session, space, &manifest).await?,
        };
        let block_bytes = manifest.block_bytes;
        let (tenant_id, block_tokens) = (tenant.id, manifest.tokens_per_block);
        self.engine.submit(Input::SpaceKnown {
            space,
            tenant: tenant_id,
            block_bytes,
            block_tokens,
            generation,
        });
        // A space found on disk is kept beyond the limit; the core takes so many and no more.
        if !self.engine.view(|core| core.knows_space(space)) {
            return Err(Limit::Spaces.into());
        }
        if let Some(cost) = request.compute_cost {
            self.engine.submit(Input::SpaceCost { space, cost: convert::compute_cost(cost)? });
        }
        let handle = session.open_space(OpenSpace { space, block_bytes })?;
        Ok(v1::OpenSpaceResponse {
            space: handle,
            space_id: convert::space_bytes(space),
            frame_bytes: frame_bytes(block_bytes).get(),
            generation,
            tenant_id: Bytes::copy_from_slice(&tenant.id.to_bytes()),
            tenant_key: Bytes::copy_from_slice(&tenant.key.to_bytes()),
        })
    }

    /// A space that this node did not know. It goes into the catalog before its
    /// first block can go to a device. If that fails the space still works: the
    /// degraded state tells of the catalog, and the record is written when it is repaired.
    async fn first_opened(
        &self,
        session: &Session,
        space: SpaceId,
        manifest: &SpaceManifest,
    ) -> Result<u64, CallError> {
        let tenant = session.tenant.clone();
        let (engine, manifest) = (self.engine.clone(), manifest.clone());
        let opened = tokio::task::spawn_blocking(move || {
            let floor = engine.media().lowest_generation(tenant.id, space).max(1);
            let learned = engine.spaces().open(space, tenant.id, &tenant.name, &manifest, floor)?;
            if let (Learned::Now(_), Some(record)) = (learned, engine.spaces().record(space))
                && let Err(error) = engine.media().put_space(record)
            {
                tracing::warn!(%space, %error, "the space is not in the catalog yet");
                engine.catalog_failed();
            }
            Ok(match learned {
                Learned::Before(generation) | Learned::Now(generation) => generation,
            })
        });
        match opened.await {
            Ok(opened) => opened.map_err(|Full| CallError::from(Limit::Spaces)),
            Err(error) => Err(CallError::internal(&format!("opening a space: {error}"))),
        }
    }

    pub(crate) async fn exists(
        &self,
        session: &Session,
        request: v1::ExistsRequest,
    ) -> Result<v1::ExistsResponse, CallError> {
        self.exists_of(session, &request, &request.keys).await
    }

    /// As [`Self::exists`], with the keys apart.
    pub(crate) async fn exists_of(
        &self,
        session: &Session,
        request: &v1::ExistsRequest,
        keys: &[impl AsRef<[u8]>],
    ) -> Result<v1::ExistsResponse, CallError> {
        let ids = &request.block_ids;
        let found = self.residences(session, &request.spaces, (keys, ids), request.mode()).await?;
        let mut present = vec![0u8; found.len().div_ceil(8)];
        for (index, _) in found.iter().enumerate().filter(|(_, place)| place.is_some()) {
            present[index / 8] |= 1 << (index % 8);
        }
        Ok(v1::ExistsResponse { prefix_blocks: prefix(&found), present: present.into() })
    }

    pub(crate) async fn matched(
        &self,
        session: &Session,
        request: v1::MatchRequest,
    ) -> Result<v1::MatchResponse, CallError> {
        let mode = request.mode();
        let mut found = self.residences(session, &request.spaces, (&request.keys, &[]), mode).await?;
        let prefix_blocks = prefix(&found);
        if convert::match_mode(mode) == terrace_core::MatchMode::Prefix {
            found.truncate(prefix_blocks as usize);
        }
        let mut bytes = 0;
        for space in &request.spaces {
            bytes += session.space(*space)?.block_bytes.get();
        }
        let fetch = self.engine.rates().read_estimate(ByteCount::new(bytes)).get();
        let memory = convert::want(request.want_tier(), request.want_device)?;
        // Blocks are fetched one after the other, so each waits for those before it.
        let mut queued = 0u64;
        let mut blocks = Vec::with_capacity(found.len());
        for place in found {
            let Some(there) = place else {
                blocks.push(v1::BlockMatch::default());
                continue;
            };
            if !there.is_in_memory() {
                queued = queued.saturating_add(fetch);
            }
            if !there.is_in(memory) && (memory != Memory::Pinned || there.is_in_memory()) {
                queued = queued.saturating_add(self.crossing(session, &request.spaces, there, memory)?);
            }
            let (tier, devices) = convert::fastest(there);
            let fetch_us = if there.is_in(memory) { 0 } else { queued };
            let holder = String::new();
            blocks.push(v1::BlockMatch { present: true, tier: tier.into(), holder, fetch_us, devices });
        }
        Ok(v1::MatchResponse { prefix_blocks, blocks })
    }

    /// Microseconds from memory to memory of one position of a bundle, devices of Nvme apart.
    fn crossing(
        &self,
        session: &Session,
        spaces: &[u32],
        there: Residence,
        memory: Memory,
    ) -> Result<u64, CallError> {
        let there = Residence { pinned: there.pinned || !there.is_in_memory(), ..there };
        let mut us = 0;
        for space in spaces {
            let space = session.space(*space)?.space;
            us += self.engine.view(|core| core.fetch_time(space, there, memory)).get();
        }
        Ok(us)
    }

    /// For each position, the slowest residence over all spaces of the bundle.
    async fn residences(
        &self,
        session: &Session,
        spaces: &[u32],
        (keys, ids): (&[impl AsRef<[u8]>], &[u8]),
        mode: v1::MatchMode,
    ) -> Result<Vec<Option<Residence>>, CallError> {
        if !ids.is_empty() && spaces.len() > 1 {
            return Err(CallError::invalid(
                "block_ids name blocks of one space; name those of a bundle by keys",
            ));
        }
        if spaces.is_empty() || spaces.len() > BUNDLE_MAX {
            return Err(CallError::invalid(format!(
                "{} spaces; a bundle has 1 to {BUNDLE_MAX}",
                spaces.len()
            )));
        }
        if keys.len().saturating_mul(spaces.len()) > self.facts.blocks_max as usize {
            return Err(CallError::invalid(format!(
                "{} keys in {} spaces; the limit is {} blocks; split the request",
                keys.len(),
                spaces.len(),
                self.facts.blocks_max
            )));
        }
        let mode = convert::match_mode(mode);
        let mut all: Option<Vec<Option<Residence>>> = None;
        for space in spaces {
            let limit = all.as_ref().map_or(keys.len(), Vec::len);
            let (_, blocks) = self.blocks(session, *space, &keys[..limit], ids)?;
            let reply = self.ask(session, Request::Match { blocks, mode }).await?;
            let found = expect!(reply, Reply::Matched { blocks } => blocks)?;
            all = Some(match all {
                None => found,
                Some(before) => before.into_iter().zip(found).map(|(one, other)| both(one, other)).collect(),
            });
        }
        Ok(all.unwrap_or_default())
    }

    pub(crate) async fn lease(
        &self,
        session: &Session,
        request: v1::LeaseRequest,
    ) -> Result<v1::LeaseResponse, CallError> {
        let answer = self.lease_of(session, &request, &request.keys).await?;
        let leased = answer.leased()?;
        Ok(v1::LeaseResponse {
            lease: leased.lease.map_or(0, LeaseId::get),
            ttl_ms: leased.ttl.millis(),
            blocks: convert::grants(leased.grants),
            generation: leased.generation,
            ..Default::default()
        })
    }

    /// As [`Self::lease`], with the keys apart, and not yet a message.
    pub(crate) async fn lease_of(
        &self,
        session: &Session,
        request: &v1::LeaseRequest,
        keys: &[impl AsRef<[u8]>],
    ) -> Result<LeaseAnswer, CallError> {
        let began = Instant::now();
        let want = convert::want(request.want_tier(), request.want_device)?;
        let is_read = request.kind() == v1::LeaseKind::Read;
        if !is_read && !request.block_ids.is_empty() {
            return Err(CallError::invalid("block_ids are for reading; name blocks to write by their keys"));
        }
        let (open, blocks) = self.blocks(session, request.space, keys, &request.block_ids)?;
        let ttl = convert::ttl(request.ttl_ms);
        let (op, kind) = match request.kind() {
            v1::LeaseKind::Read => {
                let purpose = convert::purpose(request.purpose());
                let op = self.lease_read_op(Some(request.request_id), blocks, ttl, request.wait_ms, purpose);
                (wanting(op, want), "read")
            }
            v1::LeaseKind::Write => {
                let parent = convert::parent(&session.tenant.key, open.space, &request.parent_key)?;
                let repeat = Some(request.request_id);
                (Request::LeaseWrite { repeat, space: open.space, blocks, parent, ttl, want }, "write")
            }
            v1::LeaseKind::Unspecified => {
                return Err(CallError::invalid("lease kind is not set; say READ or WRITE"));
            }
        };
        // It is remembered for repeats, and its grants are not copied.
        let reply = self.engine.ask(session.id, op).await?;
        if matches!(*reply, Reply::Leased { .. }) {
            self.metrics.leased(kind, began.elapsed());
        }
        // Somebody may have cleared it since this session opened it. What is granted here is not older: it would have
        // been cleared too.
        let generation = self.engine.spaces().generation(open.space);
        let generation = generation.ok_or_else(|| CallError::internal("an open space is unknown"))?;
        Ok(LeaseAnswer { reply, generation })
    }

    /// A read lease, asked for now.
    pub(crate) fn lease_read_op(
        &self,
        repeat: Option<u64>,
        blocks: Vec<BlockId>,
        ttl: Option<Micros>,
        wait_ms: u64,
        purpose: Purpose,
    ) -> Request {
        let wait = Micros::from_millis(wait_ms).min(self.facts.edges.wait_max);
        let answer_by = self.engine.now().after(wait);
        Request::LeaseRead { repeat, blocks, ttl, answer_by, purpose, want: Memory::Pinned }
    }

    pub(crate) async fn leased(&self, session: &Session, op: Request) -> Result<Leased, CallError> {
        let reply = self.ask(session, op).await?;
        expect!(reply, Reply::Leased { lease, ttl: _, blocks } => Leased { lease, grants: blocks })
    }

    pub(crate) async fn seal(
        &self,
        session: &Session,
        request: v1::SealRequest,
    ) -> Result<v1::SealResponse, CallError> {
        let began = Instant::now();
        convert::expect_at_most(self.facts.blocks_max, request.blocks.len(), "blocks")?;
        let durability = convert::durability(request.durability());
        let op = Request::Seal {
            repeat: Some(request.request_id),
            lease: LeaseId::new(request.lease),
            blocks: convert::seal_blocks(&request.blocks),
            durability,
        };
        let outcomes = self.sealed(session, op).await?;
        self.metrics.sealed(began.elapsed());
        Ok(v1::SealResponse { outcomes })
    }

    pub(crate) async fn sealed(&self, session: &Session, op: Request) -> Result<Vec<i32>, CallError> {
        let reply = self.ask(session, op).await?;
        let outcomes = expect!(reply, Reply::Sealed { outcomes } => outcomes)?;
        Ok(outcomes.into_iter().map(|outcome| convert::seal_outcome(outcome).into()).collect())
    }

    pub(crate) async fn renew(
        &self,
        session: &Session,
        request: v1::RenewRequest,
    ) -> Result<v1::RenewResponse, CallError> {
        let op = Request::Renew { lease: LeaseId::new(request.lease), ttl: convert::ttl(request.ttl_ms) };
        let reply = self.ask(session, op).await?;
        expect!(reply, Reply::Renewed { ttl } => v1::RenewResponse { ttl_ms: ttl.millis() })
    }

    pub(crate) async fn release(
        &self,
        session: &Session,
        request: v1::ReleaseRequest,
    ) -> Result<v1::ReleaseResponse, CallError> {
        let op = Request::Release { leases: convert::leases(&request.leases) };
        let reply = self.ask(session, op).await?;
        expect!(reply, Reply::Released { count } => v1::ReleaseResponse { released: count })
    }

    pub(crate) async fn abort(
        &self,
        session: &Session,
        request: v1::AbortRequest,
    ) -> Result<v1::AbortResponse, CallError> {
        let op = Request::Abort { lease: LeaseId::new(request.lease), indexes: request.indexes };
        let reply = self.ask(session, op).await?;
        expect!(reply, Reply::Aborted { count } => v1::AbortResponse { aborted: count })
    }

    pub(crate) async fn touch(
        &self,
        session: &Session,
        request: v1::TouchRequest,
    ) -> Result<v1::TouchResponse, CallError> {
        let (_, blocks) = self.blocks(session, request.space, &request.keys, &[])?;
        let reads = request.reads;
        if !reads.is_empty() && reads.len() != blocks.len() {
            return Err(CallError::invalid(format!(
                "{} counts of reads for {} keys; send one for each key, or none",
                reads.len(),
                blocks.len()
            )));
        }
        let reply = self.ask(session, Request::Touch { blocks, reads }).await?;
        expect!(reply, Reply::Touched { count } => v1::TouchResponse { touched: count })
    }

    pub(crate) async fn prefetch(
        &self,
        session: &Session,
        request: v1::PrefetchRequest,
    ) -> Result<v1::PrefetchResponse, CallError> {
        let want = convert::want(request.want_tier(), request.want_device)?;
        let (_, blocks) = self.blocks(session, request.space, &request.keys, &[])?;
        let reply = self.ask(session, Request::Prefetch { blocks, want }).await?;
        expect!(reply, Reply::Prefetched { started, resident } => v1::PrefetchResponse { started, resident })
    }

    pub(crate) async fn shrink(
        &self,
        session: &Session,
        request: v1::Shrink,
    ) -> Result<v1::Shrunk, CallError> {
        let gpu = convert::gpu(request.device)?;
        let wait = Micros::from_millis(request.wait_ms).min(self.facts.edges.wait_max);
        let answer_by = self.engine.now().after(wait);
        let op = Request::Shrink { gpu, bytes: ByteCount::new(request.bytes), answer_by };
        let reply = self.ask(session, op).await?;
        expect!(reply, Reply::Shrunk { free } => v1::Shrunk { free_bytes: free.get() })
    }

    pub(crate) async fn retain(
        &self,
        session: &Session,
        request: v1::RetainRequest,
    ) -> Result<v1::RetainResponse, CallError> {
        let priority =
            u8::try_from(request.priority).ok().filter(|priority| *priority <= 100).ok_or_else(|| {
                CallError::invalid(format!("priority {} is outside 0 to 100", request.priority))
            })?;
        let (_, blocks) = self.blocks(session, request.space, &request.keys, &[])?;
        let op = Request::Retain { blocks, ttl: Micros::from_millis(request.ttl_ms), priority };
        let reply = self.ask(session, op).await?;
        expect!(reply, Reply::Retained { count } => v1::RetainResponse { retained: count })
    }

    pub(crate) async fn clear(
        &self,
        session: &Session,
        request: v1::ClearRequest,
    ) -> Result<v1::ClearResponse, CallError> {
        let open = session.space(request.space)?;
        let engine = &self.engine;
        // Before anything is dropped. A repeat of one that was done is answered whatever there is.
        if !engine.view(|core| core.remembers(session.id, request.request_id))
            && let Some(obstacle) = engine.media().clear_obstacle(session.tenant.id, open.space)
        {
            return Err(CallError::new(
                Code::FailedPrecondition,
                format!("the space was not cleared: {obstacle}"),
            ));
        }
        let op = Request::Clear { repeat: Some(request.request_id), space: open.space };
        let reply = self.ask(session, op).await?;
        expect!(reply, Reply::Cleared { generation, blocks } => v1::ClearResponse { generation, blocks })
    }

    pub(crate) async fn return_window(
        &self,
        session: &Session,
        request: v1::ReturnWindow,
    ) -> Result<v1::WindowReturned, CallError> {
        let reply = self.ask(session, Request::ReturnWindow { chunk: ChunkId::new(request.chunk) }).await?;
        expect!(reply, Reply::WindowReturned { blocks } => v1::WindowReturned { blocks })
    }

    /// A chunk that the session may map, and how.
    pub(crate) async fn map_chunk(
        &self,
        session: &Session,
        request: v1::MapChunk,
    ) -> Result<(Shared, MapAccess), CallError> {
        let chunk = ChunkId::new(request.chunk);
        let reply = self.ask(session, Request::MapChunk { chunk }).await?;
        let access = expect!(reply, Reply::MayMap { access, .. } => access)?;
        // Whoever drops it from here on tells this session.
        let shared = match self.engine.hbm().chunk(chunk) {
            Some(chunk) => Some(Shared::Hbm(chunk)),
            None => self.engine.chunk(chunk).map(Shared::Pinned),
        };
        // It may have been dropped since: its leases then ended before.
        let gone = || CallError::new(Code::NotFound, format!("chunk {chunk} is gone; lease again"));
        Ok((shared.ok_or_else(gone)?, access))
    }

    /// A device of Hbm, as clients are told of it.
    pub(crate) fn hbm_device(&self, gpu: GpuId) -> Option<v1::HbmDevice> {
        convert::hbm_device(self.engine.hbm(), gpu)
    }
}

/// Memory that a session may map.
pub(crate) enum Shared {
    Pinned(Arc<ChunkMemory>),
    Hbm(Arc<HbmChunk>),
}

/// A read lease, wanted in a certain memory.
fn wanting(op: Request, memory: Memory) -> Request {
    match op {
        Request::LeaseRead { repeat, blocks, ttl, answer_by, purpose, want: _ } => {
            Request::LeaseRead { repeat, blocks, ttl, answer_by, purpose, want: memory }
        }
        other => other,
    }
}

/// Present in both, and in the slower of the two places.
fn both(one: Option<Residence>, other: Option<Residence>) -> Option<Residence> {
    let (one, other) = (one?, other?);
    let hbm = one.hbm.both(other.hbm);
    Some(Residence { pinned: one.pinned && other.pinned, nvme: one.nvme || other.nvme, hbm })
}

fn prefix(found: &[Option<Residence>]) -> u32 {
    let count = found.iter().take_while(|place| place.is_some()).count();
    u32::try_from(count).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bundle whose one half is on disk and whose other half is missing must not count as a hit in memory.
    #[test]
    fn a_bundle_is_as_slow_as_its_slowest_space() {
        let memory = Some(Residence { pinned: true, ..Residence::default() });
        let disk = Some(Residence { nvme: true, ..Residence::default() });
        assert_eq!(both(memory, memory), memory);
        assert_eq!(both(memory, disk), disk);
        assert_eq!(both(memory, None), None);
        assert_eq!(prefix(&[memory, disk, None, memory]), 2);
    }
}
