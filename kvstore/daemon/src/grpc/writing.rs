//! Write streams: bytes copied into leased frames, compared, and sealed.
//!
//! Promises: a block is sealed only when all its bytes are there and match the
//! checksum that the client computed; whatever ends the stream, its unsealed
//! frames are given back and its leases end; it ends when its writer stands still.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tonic::{Code, Status, Streaming};

use terrace_core::{
    BlockId, Checksum, Checksummer, Durability, Fence, FrameRef, Grant, Memory, Refusal, Request,
};
use terrace_lane::fold;
use terrace_proto::v1::{self, SealOutcome, write_request::Part};

use crate::convert::{self, CallError};
use crate::grpc::idle::in_time;
use crate::grpc::reading::HeldLease;
use crate::service::Service;
use crate::session::{OpenSpace, StreamGuard};

/// Longest time to wait for a frame when memory is full.
const FRAME_WITHIN: Duration = Duration::from_secs(30);
/// Pause between two tries.
const FRAME_AGAIN: Duration = Duration::from_millis(20);
/// Seals of one stream that wait to be durable.
const SEALS_MAX: usize = 64;

/// One stream.
pub(super) struct Write {
    service: Arc<Service>,
    open: OpenSpace,
    generation: u64,
    blocks: Vec<BlockId>,
    parent: Option<BlockId>,
    durability: Durability,
    outcomes: Vec<SealOutcome>,
    /// Blocks whose bytes are arriving, by position. At most `SEALS_MAX`.
    filling: BTreeMap<u32, Filling>,
    seals: FuturesUnordered<BoxFuture<'static, (u32, Result<SealOutcome, CallError>)>>,
    // Last, so that every lease above has been given back before the session may close.
    session: Arc<StreamGuard>,
}

/// A block whose bytes are arriving.
struct Filling {
    target: Target,
    arrived: u64,
    summer: Checksummer,
}

enum Target {
    /// A frame of ours.
    Frame { held: HeldLease, frame: FrameRef, fence: Fence },
    /// The block is sealed already: its bytes are only compared.
    Exists,
}

impl Write {
    pub(super) fn new(
        service: Arc<Service>,
        session: StreamGuard,
        header: v1::WriteHeader,
    ) -> Result<Self, CallError> {
        let open = session.space(header.space)?;
        let key = &session.tenant.key;
        let blocks = convert::blocks(key, open.space, &header.keys, service.facts().blocks_max)?;
        let parent = convert::parent(key, open.space, &header.parent_key)?;
        let generation = service
            .engine()
            .spaces()
            .generation(open.space)
            .ok_or_else(|| CallError::internal("an open space is unknown"))?;
        Ok(Self {
            outcomes: vec![SealOutcome::Lost; blocks.len()],
            durability: convert::durability(header.durability()),
            service,
            open,
            generation,
            blocks,
            parent,
            filling: BTreeMap::new(),
            seals: FuturesUnordered::new(),
            session: Arc::new(session),
        })
    }

    pub(super) async fn run(
        mut self,
        mut pieces: Streaming<v1::WriteRequest>,
    ) -> Result<v1::WriteResponse, Status> {
        let idle = self.service.facts().edges.stream_idle;
        while let Some(message) = in_time(idle, pieces.message()).await?? {
            let Some(Part::Piece(piece)) = message.part else {
                return Err(Status::invalid_argument(
                    "after the header, every message of a Write is a piece",
                ));
            };
            self.piece(&piece).await?;
        }
        if let Some((index, filling)) = self.filling.first_key_value() {
            return Err(Status::invalid_argument(format!(
                "block {index} ended after {} of its {} bytes; nothing of it was sealed",
                filling.arrived,
                self.open.block_bytes.get()
            )));
        }
        while !self.seals.is_empty() {
            self.one_seal().await?;
        }
        Ok(v1::WriteResponse { outcomes: self.outcomes.into_iter().map(i32::from).collect() })
    }

    async fn piece(&mut self, piece: &v1::WritePiece) -> Result<(), CallError> {
        let index = piece.index;
        let block = *self.blocks.get(index as usize).ok_or_else(|| {
            CallError::invalid(format!("piece of block {index}; the header names {} keys", self.blocks.len()))
        })?;
        if !self.filling.contains_key(&index) {
            if piece.offset != 0 {
                return Err(CallError::invalid(format!(
                    "the first piece of block {index} begins at {}; pieces come in order, from 0",
                    piece.offset
                )));
            }
            if self.filling.len() >= SEALS_MAX {
                return Err(CallError::invalid(format!(
                    "more than {SEALS_MAX} blocks are unfinished; finish some first"
                )));
            }
            let target = self.target(index, block).await?;
            let summer = Checksummer::new(block, self.open.block_bytes, self.generation);
            self.filling.insert(index, Filling { target, arrived: 0, summer });
        }
        let Some(filling) = self.filling.get_mut(&index) else {
            return Err(CallError::internal("a block in work is unknown"));
        };
        let whole = self.open.block_bytes.get();
        let end = filling.arrived.checked_add(piece.data.len() as u64).filter(|end| *end <= whole);
        let Some(end) = end.filter(|_| piece.offset == filling.arrived && !piece.data.is_empty()) else {
            return Err(CallError::invalid(format!(
                "a piece of block {index} has bytes {} to {}, expected are bytes from {} to at most {whole}",
                piece.offset,
                piece.offset.saturating_add(piece.data.len() as u64),
                filling.arrived
            )));
        };
        self.service.metrics().streamed_in(piece.data.len());
        fold::update(&mut filling.summer, &piece.data);
        if let Target::Frame { frame, fence, .. } = &filling.target {
            copy_in(&self.service, *frame, *fence, piece)?;
        }
        filling.arrived = end;
        if end == whole {
            let found = filling.summer.clone().finish();
            self.complete(index, block, piece.checksum.map(Checksum::new), found).await?;
        }
        Ok(())
    }

    /// A frame for the block, or the fact that it is sealed already.
    async fn target(&mut self, index: u32, block: BlockId) -> Result<Target, CallError> {
        let began = Instant::now();
        let parent = match index.checked_sub(1) {
            None => self.parent,
            Some(before) => self.blocks.get(before as usize).copied(),
        };
        loop {
            let op = Request::LeaseWrite {
                repeat: None,
                space: self.open.space,
                blocks: vec![block],
                parent,
                ttl: None,
                want: Memory::Pinned,
            };
            let leased = self.service.leased(&self.session, op).await;
            let full = match leased {
                Ok(leased) => {
                    let held =
                        leased.lease.map(|lease| HeldLease::write(&self.service, &self.session, lease));
                    match (leased.grants.first(), held) {
                        (Some(Grant::Granted { frame, fence, .. }), Some(held)) => {
                            self.expect_not_cleared()?;
                            return Ok(Target::Frame { held, frame: *frame, fence: *fence });
                        }
                        (Some(Grant::Exists), _) => {
                            self.expect_not_cleared()?;
                            return Ok(Target::Exists);
                        }
                        (Some(Grant::Throttled | Grant::Promoting), _) => CallError::new(
                            Code::ResourceExhausted,
                            "no memory for another block; back off and ask again",
                        ),
                        (Some(Grant::Missing(_) | Grant::Granted { .. }) | None, _) => {
                            return Err(CallError::internal("a write lease without a frame"));
                        }
                    }
                }
                Err(error) if error.code == Code::ResourceExhausted => error,
                Err(error) => return Err(error),
            };
            if began.elapsed() > FRAME_WITHIN {
                return Err(full);
            }
            // Blocks of our own that wait to be durable hold frames: let them finish first.
            if self.seals.is_empty() {
                tokio::time::sleep(FRAME_AGAIN).await;
            } else {
                self.one_seal().await?;
            }
        }
    }

    /// After a lease: the sums of this stream are of the generation that it began with. A lease of an earlier one
    /// cannot be sealed in any more.
    fn expect_not_cleared(&self) -> Result<(), CallError> {
        let generation = self.service.engine().spaces().generation(self.open.space);
        if generation == Some(self.generation) { Ok(()) } else { Err(Refusal::Cleared.into()) }
    }

    /// All bytes of a block are there.
    async fn complete(
        &mut self,
        index: u32,
        block: BlockId,
        expected: Option<Checksum>,
        found: Checksum,
    ) -> Result<(), CallError> {
        let filling =
            self.filling.remove(&index).ok_or_else(|| CallError::internal("a complete block is unknown"))?;
        if let Some(expected) = expected.filter(|expected| *expected != found) {
            return Err(CallError::invalid(format!(
                "block {index} arrived with checksum {:016x}, expected was {:016x}; nothing of it was sealed",
                found.get(),
                expected.get()
            )));
        }
        let held = match filling.target {
            Target::Frame { held, .. } => held,
            Target::Exists => {
                let header = self.service.engine().view(|core| core.stat(block)).and_then(|view| view.header);
                let outcome = match header {
                    Some(header) if header.checksum == found => SealOutcome::Already,
                    Some(_) => SealOutcome::Conflict,
                    None => SealOutcome::Lost,
                };
                return self.note(index, outcome);
            }
        };
        let op = Request::Seal {
            repeat: None,
            lease: held.id(),
            blocks: vec![(0, self.open.block_bytes, found)],
            durability: self.durability,
        };
        let (service, session) = (self.service.clone(), self.session.clone());
        self.seals.push(Box::pin(async move {
            let sealed = service.sealed(&session, op).await;
            drop(held);
            let outcome = sealed.and_then(|outcomes| {
                let outcome = outcomes.first().and_then(|outcome| SealOutcome::try_from(*outcome).ok());
                outcome.ok_or_else(|| CallError::internal("a seal without an outcome"))
            });
            (index, outcome)
        }));
        // The request goes out now; what is answered at once is noted at once.
        while let Some(Some((index, outcome))) = self.seals.next().now_or_never() {
            self.note(index, outcome?)?;
        }
        while self.seals.len() >= SEALS_MAX {
            self.one_seal().await?;
        }
        Ok(())
    }

    async fn one_seal(&mut self) -> Result<(), CallError> {
        match self.seals.next().await {
            Some((index, outcome)) => self.note(index, outcome?),
            None => Ok(()),
        }
    }

    fn note(&mut self, index: u32, outcome: SealOutcome) -> Result<(), CallError> {
        let slot = self.outcomes.get_mut(index as usize);
        *slot.ok_or_else(|| CallError::internal("an outcome of no block"))? = outcome;
        Ok(())
    }
}

fn copy_in(
    service: &Service,
    frame: FrameRef,
    fence: Fence,
    piece: &v1::WritePiece,
) -> Result<(), CallError> {
    let lost =
        || CallError::new(Code::Aborted, format!("block {} lost its frame; write it again", piece.index));
    let memory = service.engine().chunk(frame.chunk).ok_or_else(lost)?;
    if memory.fence(frame.index) != fence {
        return Err(lost());
    }
    memory
        .copy_in(frame.index, piece.offset, &piece.data)
        .map_err(|outside| CallError::internal(&outside.to_string()))
}
