//! What read and write leases have in common.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use tonic::Code;

use terrace_core::{BlockId, ByteCount, Checksum, Fence, MissReason};
use terrace_lane::{Access, Mapping, SharedBytes};
use terrace_proto::v1::lane_request::Op;
use terrace_proto::v1::lane_response::Result as Answer;
use terrace_proto::v1::{GrantOutcome, LeaseKind, LeasePurpose, LeaseRequest, LeaseResponse, Tier};

use crate::chunks::{Mapped, WriterToken};
use crate::convert::reason_from_wire;
use crate::error::ClientError;
use crate::grants::{Alike, Grant, Grants};
use crate::keeper::LeaseToken;
use crate::keyed::Named;
use crate::session::LaneSession;
use crate::space::Space;

/// What became of one block of a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome<B> {
    /// Pinned (read) or reserved (write).
    Granted(B),
    /// Being brought into memory, not in time. Lease again.
    Promoting,
    /// Not to be had.
    Missing(MissReason),
    /// Over a limit. Back off and lease again.
    Throttled,
    /// Write lease of a block that is sealed already: nothing to do.
    Exists,
}

impl<B> Outcome<B> {
    /// The same outcome with the block as something else.
    pub(crate) fn map<T>(self, convert: impl FnOnce(B) -> T) -> Outcome<T> {
        match self {
            Self::Granted(block) => Outcome::Granted(convert(block)),
            Self::Promoting => Outcome::Promoting,
            Self::Missing(reason) => Outcome::Missing(reason),
            Self::Throttled => Outcome::Throttled,
            Self::Exists => Outcome::Exists,
        }
    }

    /// The block, if it was granted.
    pub fn granted(&self) -> Option<&B> {
        match self {
            Self::Granted(block) => Some(block),
            Self::Promoting | Self::Missing(_) | Self::Throttled | Self::Exists => None,
        }
    }

    /// The block, if it was granted.
    pub fn granted_mut(&mut self) -> Option<&mut B> {
        match self {
            Self::Granted(block) => Some(block),
            Self::Promoting | Self::Missing(_) | Self::Throttled | Self::Exists => None,
        }
    }

    /// The block, if it was granted.
    pub fn into_granted(self) -> Option<B> {
        match self {
            Self::Granted(block) => Some(block),
            Self::Promoting | Self::Missing(_) | Self::Throttled | Self::Exists => None,
        }
    }
}

/// Whether the daemon or the caller has ended the lease.
#[derive(Debug, Default)]
pub(crate) struct LeaseState {
    ended: AtomicBool,
}

impl LeaseState {
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    pub(crate) fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}

/// A live lease. Every guard shares it; the last one to go releases it.
#[derive(Debug)]
pub(crate) struct Lease {
    token: LeaseToken,
    state: Arc<LeaseState>,
    session: Arc<LaneSession>,
    seen: Seen,
}

/// What a read lease in host memory shows: kept once for all its guards, which are many and short-lived.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    grants: Grants,
    generation: u64,
    /// Of each chunk in which a block was granted.
    mappings: Vec<(u64, Arc<Mapping>)>,
    /// One a grant, made when it is wanted, which is for all of them or, where blocks are only counted, for none.
    views: OnceLock<Vec<OnceLock<SharedBytes>>>,
}

impl Seen {
    /// A block that was granted, and the space's generation.
    #[inline]
    pub(crate) fn grant(&self, at: u32) -> (Grant, u64) {
        (self.grants.at(at as usize), self.generation)
    }

    /// Its identity.
    pub(crate) fn block(&self, at: u32) -> BlockId {
        self.grants.at(at as usize).block.expect("it was looked at when it was leased")
    }

    /// Its bytes.
    pub(crate) fn bytes(&self, at: u32) -> &SharedBytes {
        let at = at as usize;
        let views = || std::iter::repeat_with(OnceLock::new).take(self.grants.len()).collect();
        self.views.get_or_init(views)[at].get_or_init(|| {
            let grant = self.grants.at(at);
            let mapping = self.mappings.iter().find(|(chunk, _)| *chunk == grant.chunk);
            let view =
                mapping.and_then(|(_, mapping)| mapping.view(grant.offset, ByteCount::new(grant.length)));
            view.expect("it was looked at when it was leased")
        })
    }
}

impl Lease {
    pub(crate) fn id(&self) -> u64 {
        self.token.id()
    }

    pub(crate) fn is_usable(&self) -> bool {
        !self.state.is_ended() && !self.session.status.is_closed()
    }

    pub(crate) fn session(&self) -> &LaneSession {
        &self.session
    }

    pub(crate) fn seen(&self) -> &Seen {
        &self.seen
    }

    /// Ends it now for all its guards. The daemon is told with the next question, or in a moment.
    pub(crate) fn end_soon(&self) {
        self.state.end();
        self.token.released();
        self.session.keeper.release_soon(self.id());
    }

    /// Ends it now for all its guards, and waits until the daemon knows.
    pub(crate) async fn release(&self) -> Result<(), ClientError> {
        self.state.end();
        if self.session.keeper.forget(self.id()) {
            let known = self.session.keeper.release_awaited(&self.session.link, self.id()).await?;
            if known {
                self.token.released();
            }
        }
        Ok(())
    }
}

/// What to lease.
pub(crate) struct Wanted<'a> {
    pub(crate) space: &'a Space,
    pub(crate) kind: LeaseKind,
    pub(crate) keys: Named,
    pub(crate) parent: Bytes,
    pub(crate) ttl: Option<Duration>,
    pub(crate) wait: Duration,
    pub(crate) purpose: LeasePurpose,
    /// The daemon's number of the device whose memory is wanted; `None` is host memory.
    pub(crate) device: Option<u32>,
    /// The caller sees to it that nobody else of the session asks for frames to write: [`Chunks::turn`] is his.
    pub(crate) alone: bool,
}

/// One granted frame, mapped and checked.
pub(crate) struct Frame {
    pub(crate) mapping: Mapped,
    pub(crate) chunk: u64,
    pub(crate) frame: u32,
    pub(crate) offset: u64,
    pub(crate) fence: Fence,
    pub(crate) length: ByteCount,
    pub(crate) checksum: Checksum,
    pub(crate) block: BlockId,
    pub(crate) generation: u64,
    pub(crate) writer: Option<Arc<WriterToken>>,
}

/// A frame's mapping, which is in host memory.
pub(crate) fn in_host_memory(mapping: Mapped) -> Result<Arc<Mapping>, ClientError> {
    match mapping {
        Mapped::Host(mapping) => Ok(mapping),
        Mapped::Device(_) => Err(ClientError::Protocol { detail: "a frame on a device that nobody wanted" }),
    }
}

/// What the daemon said to a lease that it keeps from now on.
struct Answered {
    granted: LeaseResponse,
    grants: Grants,
    writers: Vec<Arc<WriterToken>>,
    held: Option<(LeaseToken, Arc<LeaseState>)>,
}

/// Asks for a lease, which is renewed from now on.
async fn ask(session: &Arc<LaneSession>, wanted: Wanted<'_>) -> Result<Answered, ClientError> {
    let ttl_ms = wanted.ttl.map_or(0, millis);
    let asked = wanted.keys.len();
    let processor = terrace_lane::processor().filter(|_| wanted.device.is_none());
    let request = LeaseRequest {
        request_id: session.keeper.request_id(),
        space: wanted.space.handle,
        kind: wanted.kind.into(),
        keys: Vec::new(),
        parent_key: wanted.parent,
        ttl_ms,
        want_tier: wanted.device.map_or(Tier::Unspecified, |_| Tier::Hbm).into(),
        wait_ms: millis(wanted.wait),
        purpose: wanted.purpose.into(),
        want_device: wanted.device.unwrap_or(0),
        packed: true,
        block_ids: Bytes::new(),
        processor: processor.map_or(0, |number| number + 1),
    };
    let in_turn = match wanted.kind {
        LeaseKind::Write if !wanted.alone => Some(session.chunks.turn.read().await),
        LeaseKind::Write | LeaseKind::Read | LeaseKind::Unspecified => None,
    };
    let ids = wanted.keys.ids();
    let mut delivered = session.link.call_keyed(Op::Lease(request), wanted.keys, &session.keeper).await?;
    drop(in_turn);
    let Answer::Lease(granted) = delivered.answer else {
        return Err(ClientError::Protocol { detail: "a lease was asked for" });
    };
    if delivered.grants.len() != asked {
        return Err(ClientError::Protocol { detail: "a lease that does not answer each key" });
    }
    if let Some(ids) = ids {
        delivered.grants.name(ids);
    }
    let held = delivered.lease.map(|token| {
        let state = Arc::new(LeaseState::default());
        let ttl = Duration::from_millis(granted.ttl_ms.max(1));
        session.keeper.keep(token.id(), Arc::clone(&state), ttl, ttl_ms);
        (token, state)
    });
    Ok(Answered { granted, grants: delivered.grants, writers: delivered.writers, held })
}

/// Maps each chunk in which a block was granted. One that the daemon has dropped since is no error for who reads: what was
/// granted there is a miss from here on, and goes with the lease.
async fn map_granted(
    session: &LaneSession,
    kind: LeaseKind,
    grants: &mut Grants,
) -> Result<Vec<(u64, Mapped)>, ClientError> {
    let access = if kind == LeaseKind::Write { Access::Write } else { Access::Read };
    let mut chunks: Vec<u64> = Vec::new();
    for Alike { first, .. } in grants.alike() {
        // The blocks of a lease are mostly neighbours.
        if first.outcome == GrantOutcome::Granted
            && chunks.last() != Some(&first.chunk)
            && !chunks.contains(&first.chunk)
        {
            chunks.push(first.chunk);
        }
    }
    let mut mappings = Vec::with_capacity(chunks.len());
    for chunk in chunks {
        match session.chunks.mapping(&session.link, chunk, access).await {
            Ok(mapping) => mappings.push((chunk, mapping)),
            Err(ClientError::Refused { code: Code::NotFound, .. }) if kind == LeaseKind::Read => {
                grants.lose(chunk);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(mappings)
}

/// Leases and maps what was granted.
///
/// `block` makes a guard of a frame.
pub(crate) async fn lease<B>(
    session: &Arc<LaneSession>,
    wanted: Wanted<'_>,
    block: fn(Frame, Arc<Lease>) -> Result<B, ClientError>,
) -> Result<(Option<Arc<Lease>>, Vec<Outcome<B>>), ClientError> {
    let (space, kind) = (wanted.space, wanted.kind);
    let Answered { granted, mut grants, writers, held } = ask(session, wanted).await?;
    let mappings = map_granted(session, kind, &mut grants).await?;
    if kind == LeaseKind::Write {
        mappings.iter().for_each(|(chunk, _)| session.chunks.is_window_of(*chunk, space.handle));
    }
    let lease = held.filter(|_| !mappings.is_empty()).map(|(token, state)| {
        Arc::new(Lease { token, state, session: Arc::clone(session), seen: Seen::default() })
    });
    let mut writers = writers.into_iter();
    let mut outcomes = Vec::with_capacity(grants.len());
    let mut last = mappings.first();
    for grant in grants.iter() {
        let granted_as = match outcome(&grant, kind)? {
            Outcome::Granted(()) => {
                let lease = lease.as_ref().ok_or(UNLEASED)?;
                if last.is_none_or(|(chunk, _)| *chunk != grant.chunk) {
                    last = mappings.iter().find(|(chunk, _)| *chunk == grant.chunk);
                }
                let (_, mapping) = last.expect("each chunk of a granted block was mapped");
                let frame = frame(mapping.clone(), space, granted.generation, &grant, writers.next())?;
                Outcome::Granted(block(frame, Arc::clone(lease))?)
            }
            other => other.map(|()| unreachable!("it was not granted")),
        };
        outcomes.push(granted_as);
    }
    Ok((lease, outcomes))
}

/// As [`lease`], for reading in host memory.
///
/// `block` makes the guard of a grant by its position.
pub(crate) async fn lease_seen<B>(
    session: &Arc<LaneSession>,
    wanted: Wanted<'_>,
    block: fn(u32, Arc<Lease>) -> B,
) -> Result<(Option<Arc<Lease>>, Vec<Outcome<B>>), ClientError> {
    let (space, kind) = (wanted.space, wanted.kind);
    let Answered { granted, mut grants, writers: _, held } = ask(session, wanted).await?;
    let mapped = map_granted(session, kind, &mut grants).await?;
    let mapped = mapped.into_iter().map(|(chunk, mapping)| Ok((chunk, in_host_memory(mapping)?)));
    let mappings: Vec<(u64, Arc<Mapping>)> = mapped.collect::<Result<_, ClientError>>()?;
    for Alike { first, offset_max, .. } in grants.alike() {
        if outcome(&first, kind)? != Outcome::Granted(()) {
            continue;
        }
        check(space, &first)?;
        let mapping = mappings.iter().find(|(chunk, _)| *chunk == first.chunk);
        if mapping.is_none_or(|(_, mapping)| !mapping.holds(offset_max, ByteCount::new(first.length))) {
            return Err(ClientError::Protocol { detail: "a frame outside its chunk" });
        }
    }
    // One behind the other into room for all: of hundreds of blocks, each vector that grows and each pass is felt.
    let mut blocks = Vec::with_capacity(grants.len());
    let Some((token, state)) = held.filter(|_| !mappings.is_empty()) else {
        for grant in grants.iter() {
            match outcome(&grant, kind)? {
                Outcome::Granted(()) => return Err(UNLEASED),
                other => blocks.push(other.map(|()| unreachable!("it was not granted"))),
            }
        }
        return Ok((None, blocks));
    };
    let seen = Seen { grants, generation: granted.generation, mappings, views: OnceLock::new() };
    let lease = Arc::new(Lease { token, state, session: Arc::clone(session), seen });
    let mut at = 0;
    for Alike { first, end, .. } in lease.seen.grants.alike() {
        let end = u32::try_from(end).expect("a request is for few blocks");
        match outcome(&first, kind)? {
            Outcome::Granted(()) => {
                blocks.extend((at..end).map(|at| Outcome::Granted(block(at, Arc::clone(&lease)))));
            }
            other => {
                let none = || other.clone().map(|()| unreachable!("it was not granted"));
                blocks.extend(std::iter::repeat_with(none).take((end - at) as usize));
            }
        }
        at = end;
    }
    Ok((Some(lease), blocks))
}

const UNLEASED: ClientError = ClientError::Protocol { detail: "a granted block without a lease" };

/// What became of a block of a lease of this kind.
fn outcome(grant: &Grant, kind: LeaseKind) -> Result<Outcome<()>, ClientError> {
    Ok(match grant.outcome {
        GrantOutcome::Unspecified => {
            return Err(ClientError::Protocol { detail: "a block of a lease without an outcome" });
        }
        GrantOutcome::Promoting => Outcome::Promoting,
        GrantOutcome::Missing => Outcome::Missing(reason_from_wire(grant.reason)),
        GrantOutcome::Throttled => Outcome::Throttled,
        GrantOutcome::Exists if kind == LeaseKind::Read => {
            return Err(ClientError::Protocol { detail: "a read lease answered as a write lease" });
        }
        GrantOutcome::Exists => Outcome::Exists,
        GrantOutcome::Granted => Outcome::Granted(()),
    })
}

/// What a granted frame must be.
fn check(space: &Space, grant: &Grant) -> Result<BlockId, ClientError> {
    if grant.length != space.block_bytes().get() {
        return Err(ClientError::Protocol { detail: "a frame that is not one block long" });
    }
    grant.block.ok_or(ClientError::Protocol { detail: "a block id that is not 16 bytes long" })
}

fn frame(
    mapping: Mapped,
    space: &Space,
    generation: u64,
    grant: &Grant,
    writer: Option<Arc<WriterToken>>,
) -> Result<Frame, ClientError> {
    let block = check(space, grant)?;
    Ok(Frame {
        mapping,
        chunk: grant.chunk,
        frame: grant.frame,
        offset: grant.offset,
        fence: Fence::new(grant.fence),
        length: ByteCount::new(grant.length),
        checksum: Checksum::new(grant.checksum),
        block,
        generation,
        writer,
    })
}

/// Whole milliseconds, at least 1 for anything above zero.
pub(crate) fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}
