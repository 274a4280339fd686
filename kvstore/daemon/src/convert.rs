//! Between the wire and the core: the one place where outside values are
//! checked, and where outcomes get their wire form.
//!
//! Promises: a value that passes here satisfies every limit that the core does
//! not check itself; nothing here panics or allocates by an outside number.

use bytes::Bytes;

use terrace_core::{
    BlockId, ByteCount, Checksum, ComputeCost, CurvePoint, CurveTier, CurveView, Durability, Event, GPUS_MAX,
    GpuId, Grant, LeaseId, Limit, MatchMode, Memory, Micros, MissReason, Notice, Purpose, Refusal, Residence,
    SealOutcome, SpaceId, TenantKey,
};
use terrace_lane::BadManifestWire;
use terrace_media::SelfTestLine;
use terrace_proto::{KEY_BYTES_MAX, v1};
use tonic::{Code, Status};

use crate::hbm::Hbm;

const BLOCK_ID_BYTES: usize = size_of::<BlockId>();

/// A request that is not answered as asked. `code` is a gRPC status code on both transports.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct CallError {
    /// What kind.
    pub code: Code,
    /// What was wrong, and what to do.
    pub message: String,
}

impl CallError {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, message)
    }

    pub(crate) fn gone() -> Self {
        Self::new(Code::Unavailable, "the session has ended; connect again")
    }

    /// The daemon's parts disagree about a protocol: our fault, never the caller's.
    pub(crate) fn internal(what: &str) -> Self {
        tracing::error!(what, "internal disagreement");
        Self::new(Code::Internal, format!("internal error: {what}"))
    }
}

impl From<CallError> for Status {
    fn from(error: CallError) -> Self {
        Self::new(error.code, error.message)
    }
}

impl From<&CallError> for v1::LaneError {
    fn from(error: &CallError) -> Self {
        Self { code: u32::try_from(i32::from(error.code)).unwrap_or(2), message: error.message.clone() }
    }
}

impl From<Refusal> for CallError {
    fn from(refusal: Refusal) -> Self {
        let code = match refusal {
            Refusal::UnknownSession => Code::Unauthenticated,
            Refusal::UnknownSpace | Refusal::UnknownGpu { .. } | Refusal::ChunkGone { .. } => Code::NotFound,
            Refusal::TooManyBlocks { .. }
            | Refusal::WrongKind { .. }
            | Refusal::BadIndex { .. }
            | Refusal::IndexTwice { .. }
            | Refusal::WrongLength { .. }
            | Refusal::RepeatDiffers { .. }
            | Refusal::BlockTooLarge { .. } => Code::InvalidArgument,
            Refusal::EarlierIncarnation { .. }
            | Refusal::NotYourLease { .. }
            | Refusal::Cleared
            | Refusal::NotRecorded
            | Refusal::WindowBusy { .. } => Code::FailedPrecondition,
            Refusal::NotYourChunk { .. } => Code::PermissionDenied,
            Refusal::Degraded => Code::Unavailable,
        };
        Self::new(code, refusal.to_string())
    }
}

impl From<Limit> for CallError {
    fn from(limit: Limit) -> Self {
        let what = match limit {
            Limit::Blocks => "`limits.blocks`: the table of blocks is full",
            Limit::Spaces => "`limits.spaces`: too many spaces are known",
            Limit::Sessions => "`limits.sessions`: too many sessions are open",
            Limit::Leases => "`limits.leases_per_session`: release leases first",
            Limit::LeasesOfTenant => {
                "`limits.leases_per_tenant`: the tenant's sessions must release leases first"
            }
            Limit::LeasedBytes => {
                "`limits.leased_bytes_per_tenant`: release leases or hand windows back first"
            }
            Limit::LeasedBytesOfSession => {
                "`limits.leased_bytes_per_session`: release leases or hand windows back first"
            }
            Limit::Memory => {
                "no memory for a chunk: the daemon's log says what the system refused (open files: `ulimit -Hn`; \
                 memory of the machine)"
            }
            Limit::Pool => {
                "`pinned_bytes`: every chunk of the pool is in use, and each session that writes fills one a space; \
                 raise it, or release leases and hand windows back"
            }
            Limit::RequestsWaiting => "`limits.requests_waiting`: too many requests wait",
            Limit::RequestsWaitingOfSession => {
                "`limits.requests_waiting_per_session`: too many requests of this session wait"
            }
            Limit::RequestsWaitingOfTenant => {
                "`limits.requests_waiting_per_tenant`: too many requests of this tenant wait"
            }
        };
        Self::new(Code::ResourceExhausted, format!("throttled by {what}; back off and ask again"))
    }
}

impl From<BadManifestWire> for CallError {
    fn from(bad: BadManifestWire) -> Self {
        Self::invalid(bad.to_string())
    }
}

/// A declared cost from the wire, validated.
pub(crate) fn compute_cost(wire: v1::ComputeCost) -> Result<ComputeCost, CallError> {
    let v1::ComputeCost { first_seconds, slope_seconds } = wire;
    let valid = |seconds: f64| (0.0..=1e6).contains(&seconds);
    if !valid(first_seconds) || !valid(slope_seconds) || first_seconds == 0.0 {
        return Err(CallError::invalid(format!(
            "compute_cost: first_seconds {first_seconds} must be above 0 and slope_seconds {slope_seconds} at least 0, both at most 1,000,000"
        )));
    }
    Ok(ComputeCost { first_seconds, slope_seconds })
}

/// Block ids of `keys` in `space`.
pub(crate) fn blocks(
    key: &TenantKey,
    space: SpaceId,
    keys: &[impl AsRef<[u8]>],
    limit: u32,
) -> Result<Vec<BlockId>, CallError> {
    expect_at_most(limit, keys.len(), "keys")?;
    let lengths = || keys.iter().map(|key| key.as_ref().len());
    if let Some((index, found)) =
        lengths().enumerate().find(|&(_, found)| found == 0 || found > KEY_BYTES_MAX)
    {
        return Err(CallError::invalid(format!(
            "key {index} has {found} bytes; a key has 1 to {KEY_BYTES_MAX}"
        )));
    }
    Ok(terrace_lane::block_ids(key, space, keys))
}

/// Refuses a request that names more than the limit.
pub(crate) fn expect_at_most(limit: u32, found: usize, what: &str) -> Result<(), CallError> {
    if found > limit as usize {
        let detail = format!("{found} {what} in one request; the limit is {limit}; split the request");
        return Err(CallError::invalid(detail));
    }
    Ok(())
}

/// Blocks that are named by their ids.
pub(crate) fn named_blocks(ids: &[u8], limit: u32) -> Result<Vec<BlockId>, CallError> {
    let (ids, rest) = ids.as_chunks::<16>();
    if !rest.is_empty() {
        return Err(CallError::invalid("block_ids ends within an id; each has 16 bytes"));
    }
    expect_at_most(limit, ids.len(), "blocks")?;
    Ok(ids.iter().map(|id| BlockId::from_bytes(*id)).collect())
}

/// The block before the first one, if it is named.
pub(crate) fn parent(key: &TenantKey, space: SpaceId, bytes: &[u8]) -> Result<Option<BlockId>, CallError> {
    if bytes.len() > KEY_BYTES_MAX {
        return Err(CallError::invalid(format!(
            "parent_key has {} bytes; a key has 1 to {KEY_BYTES_MAX}",
            bytes.len()
        )));
    }
    Ok((!bytes.is_empty()).then(|| key.block_id(space, bytes)))
}

pub(crate) fn block_id(bytes: &[u8]) -> Result<BlockId, CallError> {
    sixteen("block_id", bytes).map(BlockId::from_bytes)
}

pub(crate) fn space_id(bytes: &[u8]) -> Result<SpaceId, CallError> {
    sixteen("space_id", bytes).map(SpaceId::from_bytes)
}

fn sixteen(field: &str, bytes: &[u8]) -> Result<[u8; 16], CallError> {
    bytes.try_into().map_err(|_| CallError::invalid(format!("{field} has {} bytes; it has 16", bytes.len())))
}

/// Time to live; 0 leaves it to the daemon.
pub(crate) fn ttl(ms: u64) -> Option<Micros> {
    (ms > 0).then(|| Micros::from_millis(ms))
}

pub(crate) fn match_mode(mode: v1::MatchMode) -> MatchMode {
    match mode {
        v1::MatchMode::Unspecified | v1::MatchMode::Prefix => MatchMode::Prefix,
        v1::MatchMode::Set => MatchMode::Set,
    }
}

pub(crate) fn durability(durability: v1::Durability) -> Durability {
    match durability {
        v1::Durability::Unspecified => Durability::Readable,
        v1::Durability::Durable => Durability::Durable,
    }
}

/// Who waits for a lease.
pub(crate) fn purpose(purpose: v1::LeasePurpose) -> Purpose {
    match purpose {
        v1::LeasePurpose::Unspecified | v1::LeasePurpose::Prefill => Purpose::Prefill,
        v1::LeasePurpose::Decode => Purpose::Decode,
    }
}

/// One figure of a device's self-test.
pub(crate) fn device_rate(line: &SelfTestLine) -> v1::DeviceRate {
    v1::DeviceRate {
        operation: line.operation.to_owned(),
        bytes: line.bytes,
        depth: line.depth,
        bytes_per_second: line.bytes_per_second,
        latency_us: line.latency_us,
    }
}

/// Where blocks may be asked for. Whether there is such a device is the core's to say.
pub(crate) fn want(tier: v1::Tier, device: u32) -> Result<Memory, CallError> {
    match tier {
        v1::Tier::Unspecified | v1::Tier::Pinned => Ok(Memory::Pinned),
        v1::Tier::Hbm => gpu(device).map(Memory::Hbm),
        v1::Tier::Nvme | v1::Tier::Remote => Err(CallError::new(
            Code::Unimplemented,
            format!("blocks are leased in TIER_PINNED or TIER_HBM; {} cannot be leased", tier.as_str_name()),
        )),
    }
}

/// A device of Hbm as clients are told of it; `None` where it is not configured, or was never there.
pub(crate) fn hbm_device(hbm: &Hbm, gpu: GpuId) -> Option<v1::HbmDevice> {
    let info = hbm.info(gpu)?;
    Some(v1::HbmDevice {
        number: gpu.get().into(),
        kind: info.kind.label().to_owned(),
        uuid: Bytes::copy_from_slice(&info.uuid),
        name: info.name.clone(),
        bytes: hbm.bytes(gpu).get(),
    })
}

/// A device of Hbm by its number.
pub(crate) fn gpu(device: u32) -> Result<GpuId, CallError> {
    u16::try_from(device)
        .ok()
        .filter(|number| *number < GPUS_MAX)
        .map(GpuId::new)
        .ok_or_else(|| CallError::invalid(format!("device {device}: a node has fewer than {GPUS_MAX}")))
}

/// A memory as tier and device.
pub(crate) fn memory(memory: Memory) -> (v1::Tier, u32) {
    match memory {
        Memory::Pinned => (v1::Tier::Pinned, 0),
        Memory::Hbm(gpu) => (v1::Tier::Hbm, gpu.get().into()),
    }
}

/// The fastest tier of a residence, and the devices of Hbm.
pub(crate) fn fastest(there: Residence) -> (v1::Tier, Vec<u32>) {
    let devices: Vec<u32> = there.hbm.iter().map(|gpu| gpu.get().into()).collect();
    let tier = if !devices.is_empty() {
        v1::Tier::Hbm
    } else if there.pinned {
        v1::Tier::Pinned
    } else {
        v1::Tier::Nvme
    };
    (tier, devices)
}

pub(crate) fn seal_blocks(blocks: &[v1::SealBlock]) -> Vec<(u32, ByteCount, Checksum)> {
    blocks
        .iter()
        .map(|block| (block.index, ByteCount::new(block.length), Checksum::new(block.checksum)))
        .collect()
}

pub(crate) fn seal_outcome(outcome: SealOutcome) -> v1::SealOutcome {
    match outcome {
        SealOutcome::Sealed => v1::SealOutcome::Sealed,
        SealOutcome::Already => v1::SealOutcome::Already,
        SealOutcome::Conflict => v1::SealOutcome::Conflict,
        SealOutcome::Lost => v1::SealOutcome::Lost,
        SealOutcome::NotDurable => v1::SealOutcome::NotDurable,
    }
}

pub(crate) fn miss_reason(reason: MissReason) -> v1::MissReason {
    match reason {
        MissReason::Unknown => v1::MissReason::Unknown,
        MissReason::Filling => v1::MissReason::Filling,
        MissReason::Checksum => v1::MissReason::Checksum,
        MissReason::Device => v1::MissReason::Device,
        MissReason::CheaperToRecompute => v1::MissReason::CheaperToRecompute,
    }
}

/// The outcome of a grant, and the reason of a miss.
pub(crate) fn outcome(grant: &Grant) -> (v1::GrantOutcome, v1::MissReason) {
    let reason = v1::MissReason::Unspecified;
    match grant {
        Grant::Granted { .. } => (v1::GrantOutcome::Granted, reason),
        Grant::Promoting => (v1::GrantOutcome::Promoting, reason),
        Grant::Missing(missing) => (v1::GrantOutcome::Missing, miss_reason(*missing)),
        Grant::Throttled => (v1::GrantOutcome::Throttled, reason),
        Grant::Exists => (v1::GrantOutcome::Exists, reason),
    }
}

/// The blocks of a lease. Their identities share one piece of memory.
pub(crate) fn grants(grants: &[Grant]) -> Vec<v1::BlockGrant> {
    let mut ids = Vec::with_capacity(grants.len() * BLOCK_ID_BYTES);
    for grant in grants {
        if let Grant::Granted { block, .. } = grant {
            ids.extend_from_slice(&block.to_bytes());
        }
    }
    let mut ids = Bytes::from(ids);
    grants.iter().map(|one| grant(one, &mut ids)).collect()
}

/// `ids` begins with the identity of this block, if it is granted.
fn grant(grant: &Grant, ids: &mut Bytes) -> v1::BlockGrant {
    let (outcome, reason) = outcome(grant);
    let bare = v1::BlockGrant { outcome: outcome.into(), reason: reason.into(), ..Default::default() };
    match grant {
        Grant::Granted { block: _, frame, fence, offset, length, checksum, memory: place } => {
            v1::BlockGrant {
                chunk: frame.chunk.get(),
                frame: frame.index,
                offset: *offset,
                fence: fence.get(),
                length: length.get(),
                checksum: checksum.map_or(0, Checksum::get),
                block_id: ids.split_to(BLOCK_ID_BYTES),
                tier: memory(*place).0.into(),
                device: memory(*place).1,
                ..bare
            }
        }
        Grant::Promoting | Grant::Missing(_) | Grant::Throttled | Grant::Exists => bare,
    }
}

pub(crate) fn block_bytes(block: BlockId) -> Bytes {
    Bytes::copy_from_slice(&block.to_bytes())
}

pub(crate) fn space_bytes(space: SpaceId) -> Bytes {
    Bytes::copy_from_slice(&space.to_bytes())
}

/// The tier whose curves are asked for; `None` is every tier.
///
/// # Errors
/// A tier that has no curve.
pub(crate) fn curve_tier(tier: v1::Tier) -> Result<Option<CurveTier>, CallError> {
    match tier {
        v1::Tier::Unspecified => Ok(None),
        v1::Tier::Pinned => Ok(Some(CurveTier::Pinned)),
        v1::Tier::Nvme => Ok(Some(CurveTier::Nvme)),
        v1::Tier::Hbm | v1::Tier::Remote => Err(CallError::invalid("only Pinned and Nvme have curves")),
    }
}

/// A curve, with the tenant's name as it was asked for.
pub(crate) fn curve_to_wire(curve: &CurveView, tenant: &str) -> v1::TierCurve {
    let tier = match curve.tier {
        CurveTier::Pinned => v1::Tier::Pinned,
        CurveTier::Nvme => v1::Tier::Nvme,
    };
    let point = |point: &CurvePoint| v1::CurvePoint {
        capacity_bytes: point.capacity.get(),
        token_hit_ratio: point.token_ratio,
        saved_seconds_ratio: point.saved_ratio,
        saved_seconds: point.saved_seconds,
    };
    v1::TierCurve {
        tier: tier.into(),
        tenant: tenant.to_owned(),
        capacity_bytes: curve.capacity.get(),
        sample_rate: curve.sample_rate,
        references: curve.references,
        points: curve.points.iter().map(point).collect(),
    }
}

/// Tiers of a residence, fastest first.
pub(crate) fn tiers(residence: Residence) -> Vec<i32> {
    let mut tiers = Vec::with_capacity(3);
    if !residence.hbm.is_empty() {
        tiers.push(v1::Tier::Hbm.into());
    }
    if residence.pinned {
        tiers.push(v1::Tier::Pinned.into());
    }
    if residence.nvme {
        tiers.push(v1::Tier::Nvme.into());
    }
    tiers
}

pub(crate) fn event(event: &Event) -> v1::BlockEvent {
    let (kind, space) = match event {
        Event::Sealed { space, .. } => (v1::BlockEventKind::Sealed, space),
        Event::Moved { space, .. } => (v1::BlockEventKind::Moved, space),
        Event::Evicted { space, .. } => (v1::BlockEventKind::Evicted, space),
        Event::Cleared { space } => (v1::BlockEventKind::Cleared, space),
    };
    let mut wire = v1::BlockEvent { kind: kind.into(), space_id: space_bytes(*space), ..Default::default() };
    match event {
        Event::Sealed { block, parent, length, tiers: residence, .. } => {
            wire.block_id = block_bytes(*block);
            wire.parent_id = parent.map(block_bytes).unwrap_or_default();
            wire.length = length.get();
            wire.tiers = tiers(*residence);
        }
        Event::Moved { block, tiers: residence, .. } => {
            wire.block_id = block_bytes(*block);
            wire.tiers = tiers(*residence);
        }
        Event::Evicted { block, .. } => wire.block_id = block_bytes(*block),
        Event::Cleared { .. } => {}
    }
    wire
}

/// A notice for the wire. `handle` finds the session's handle of a space.
pub(crate) fn notice(notice: &Notice, handle: impl Fn(SpaceId) -> u32) -> v1::SessionResponse {
    use v1::session_response::Notice as Wire;
    let wire = match notice {
        Notice::LeaseRevoked { lease, reason } => {
            Wire::Revoked(v1::LeaseRevoked { lease: lease.get(), reason: (*reason).to_owned() })
        }
        Notice::WindowRecalled { chunk } => Wire::Recalled(v1::WindowRecalled { chunk: chunk.get() }),
        Notice::WindowOpened { chunk, space } => {
            Wire::Window(v1::WindowOpened { chunk: chunk.get(), space: handle(*space) })
        }
        Notice::ChunkDropped { chunk } => Wire::Dropped(v1::ChunkDropped { chunk: chunk.get() }),
        Notice::SealRejected { space, block } => Wire::Rejected(v1::SealRejected {
            space: handle(*space),
            block_id: block_bytes(*block),
            reason: "the bytes in the frame do not match the checksum that was sealed; write the block again"
                .to_owned(),
        }),
    };
    v1::SessionResponse { notice: Some(wire) }
}

pub(crate) fn leases(raw: &[u64]) -> Vec<LeaseId> {
    raw.iter().map(|lease| LeaseId::new(*lease)).collect()
}

#[cfg(test)]
mod tests {
    use terrace_lane::manifest_from_wire;

    use super::*;

    fn wire() -> v1::SpaceManifest {
        v1::SpaceManifest {
            model: "m".into(),
            dtype: "f16".into(),
            layout: "l".into(),
            tokens_per_block: 16,
            block_bytes: 4096,
            kind: v1::SpaceKind::Chain.into(),
            topology: "canonical".into(),
            engine: "terrace".into(),
            ..Default::default()
        }
    }

    /// A manifest that says too little must be refused by the name of the field.
    #[test]
    fn bad_manifests_are_refused() {
        for (bad, field) in [
            (v1::SpaceManifest { kind: 0, ..wire() }, "kind"),
            (v1::SpaceManifest { kind: 77, ..wire() }, "kind"),
            (v1::SpaceManifest { block_bytes: 0, ..wire() }, "block_bytes"),
            (v1::SpaceManifest { block_bytes: u64::MAX, ..wire() }, "block_bytes"),
            (v1::SpaceManifest { tokens_per_block: 0, ..wire() }, "tokens_per_block"),
            (v1::SpaceManifest { model: String::new(), ..wire() }, "model"),
            (v1::SpaceManifest { layout: "x".repeat(257), ..wire() }, "layout"),
        ] {
            let refused = CallError::from(manifest_from_wire(&bad).unwrap_err());
            assert_eq!(refused.code, Code::InvalidArgument);
            assert!(refused.message.contains(field), "{}", refused.message);
        }
    }

    /// A key of no bytes or of 65 must not become a block id; nor may one request name too many.
    #[test]
    fn keys_have_limits() {
        let key = TenantKey::from_bytes([7; 32]);
        let space = SpaceId::from_bytes([1; 16]);
        let ids = |keys: &[Bytes]| blocks(&key, space, keys, 2);
        assert_eq!(ids(&[Bytes::from(vec![0; 64])]).unwrap().len(), 1);
        for bad in [vec![], vec![0; 65]] {
            let refused = ids(&[Bytes::from(bad)]).unwrap_err();
            assert!(refused.message.contains("1 to 64"), "{}", refused.message);
        }
        let refused = ids(&vec![Bytes::from_static(b"k"); 3]).unwrap_err();
        assert!(refused.message.contains("the limit is 2"), "{}", refused.message);
        assert!(parent(&key, space, &[0; 65]).is_err());
        assert_eq!(parent(&key, space, &[]).unwrap(), None);
    }
}
