//! Read streams: sealed blocks, copied out of leased frames piece by piece.
//!
//! Promises: a piece leaves only if the frame's fence had not moved after its
//! bytes were copied; the lease of a stream ends with it, and the stream with its
//! reader, or when that one stands still.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;
use tonic::{Code, Status};

use terrace_core::{BlockId, Fence, FrameRef, Grant, LeaseId, Micros, MissReason, Purpose, Request};
use terrace_proto::{PIECE_BYTES, v1};

use crate::convert::{self, CallError};
use crate::grpc::idle::in_time;
use crate::grpc::pieces::Pieces;
use crate::service::Service;
use crate::session::{Session, StreamGuard};

/// Blocks that one stream pins at a time.
const BLOCKS_AT_ONCE: usize = 32;

type Sender = mpsc::Sender<Result<v1::ReadResponse, Status>>;

/// One stream.
pub(super) struct Read {
    service: Arc<Service>,
    session: StreamGuard,
    blocks: Vec<BlockId>,
    /// How long blocks are waited for, all together.
    wait: Duration,
    pieces: Arc<Pieces>,
}

/// Ends a lease when the stream lets go of it, whatever the reason.
pub(super) struct HeldLease {
    service: Arc<Service>,
    session: Arc<Session>,
    lease: LeaseId,
    abort: bool,
}

impl HeldLease {
    pub(super) fn read(service: &Arc<Service>, session: &Arc<Session>, lease: LeaseId) -> Self {
        Self { service: service.clone(), session: session.clone(), lease, abort: false }
    }

    /// A write lease gives its unsealed frames back first.
    pub(super) fn write(service: &Arc<Service>, session: &Arc<Session>, lease: LeaseId) -> Self {
        Self { service: service.clone(), session: session.clone(), lease, abort: true }
    }

    pub(super) fn id(&self) -> LeaseId {
        self.lease
    }
}

impl Drop for HeldLease {
    fn drop(&mut self) {
        let engine = self.service.engine();
        if self.abort {
            engine.tell(self.session.id, Request::Abort { lease: self.lease, indexes: Vec::new() });
        }
        engine.tell(self.session.id, Request::Release { leases: vec![self.lease] });
    }
}

impl Read {
    pub(super) fn new(
        service: Arc<Service>,
        session: StreamGuard,
        request: &v1::ReadRequest,
        pieces: Arc<Pieces>,
    ) -> Result<Self, CallError> {
        let open = session.space(request.space)?;
        let limit = service.facts().blocks_max;
        let blocks = convert::blocks(&session.tenant.key, open.space, &request.keys, limit)?;
        let wait = Micros::from_millis(request.wait_ms).min(service.facts().edges.wait_max);
        Ok(Self { service, session, blocks, wait: Duration::from_micros(wait.get()), pieces })
    }

    pub(super) async fn run(self, sender: &Sender) -> Result<(), CallError> {
        let mut wait = self.wait;
        for (batch, blocks) in self.blocks.chunks(BLOCKS_AT_ONCE).enumerate() {
            let began = Instant::now();
            let Some((_held, grants)) = self.lease(sender, blocks, wait).await? else { return Ok(()) };
            wait = wait.saturating_sub(began.elapsed());
            for (position, grant) in grants.iter().enumerate() {
                let index = u32::try_from(batch * BLOCKS_AT_ONCE + position)
                    .map_err(|_| CallError::internal("more blocks than a request may have"))?;
                let sent = tokio::select! {
                    () = self.session.closed() => return Err(CallError::gone()),
                    sent = self.send(sender, index, grant) => sent?,
                };
                if !sent {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Leases blocks; `None` when nobody reads any more.
    async fn lease(
        &self,
        sender: &Sender,
        blocks: &[BlockId],
        wait: Duration,
    ) -> Result<Option<(Option<HeldLease>, Vec<Grant>)>, CallError> {
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let op = self.service.lease_read_op(None, blocks.to_vec(), None, wait_ms, Purpose::Prefill);
        let (service, session) = (self.service.clone(), Arc::clone(&self.session));
        let mut asked = Box::pin(async move {
            let leased = service.leased(&session, op).await?;
            let held = leased.lease.map(|lease| HeldLease::read(&service, &session, lease));
            Ok((held, leased.grants))
        });
        let stopped = tokio::select! {
            leased = &mut asked => return leased.map(Some),
            () = self.session.closed() => Err(CallError::gone()),
            () = sender.closed() => Ok(None),
        };
        // What is granted later is given back then.
        tokio::spawn(asked);
        stopped
    }

    /// False when nobody reads any more.
    async fn put(&self, sender: &Sender, message: v1::ReadResponse) -> Result<bool, CallError> {
        let idle = self.service.facts().edges.stream_idle;
        Ok(in_time(idle, sender.send(Ok(message))).await?.is_ok())
    }

    /// Sends one block, or what became of it. False when nobody reads any more.
    async fn send(&self, sender: &Sender, index: u32, grant: &Grant) -> Result<bool, CallError> {
        let (outcome, reason) = convert::outcome(grant);
        let bare =
            v1::ReadResponse { index, outcome: outcome.into(), reason: reason.into(), ..Default::default() };
        let Grant::Granted { block, frame, fence, length, checksum, .. } = *grant else {
            return self.put(sender, bare).await;
        };
        let checksum = checksum.ok_or_else(|| CallError::internal("a read lease without a checksum"))?;
        let mut offset = 0;
        while offset < length.get() {
            let bytes = (length.get() - offset).min(PIECE_BYTES as u64);
            let Some(data) = self.piece(frame, fence, offset, bytes)? else {
                if offset > 0 {
                    return Err(CallError::new(
                        Code::Aborted,
                        format!("block {index} was dropped while it was read; read it again"),
                    ));
                }
                let missing = v1::ReadResponse {
                    outcome: v1::GrantOutcome::Missing.into(),
                    reason: convert::miss_reason(MissReason::Unknown).into(),
                    ..bare
                };
                return self.put(sender, missing).await;
            };
            self.service.metrics().streamed_out(data.len());
            let piece = v1::ReadResponse {
                offset,
                length: length.get(),
                checksum: checksum.get(),
                data,
                block_id: convert::block_bytes(block),
                ..bare.clone()
            };
            if !self.put(sender, piece).await? {
                return Ok(false);
            }
            offset += bytes;
        }
        Ok(true)
    }

    /// Copies a piece; `None` if the frame does not hold the block any more.
    fn piece(
        &self,
        frame: FrameRef,
        fence: Fence,
        offset: u64,
        bytes: u64,
    ) -> Result<Option<Bytes>, CallError> {
        let Some(memory) = self.service.engine().chunk(frame.chunk) else { return Ok(None) };
        let length = usize::try_from(bytes).map_err(|_| CallError::internal("piece length"))?;
        let mut piece = self.pieces.take(length);
        memory
            .copy_out(frame.index, offset, &mut piece)
            .map_err(|outside| CallError::internal(&outside.to_string()))?;
        // The copy must be complete before the fence is looked at again.
        std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
        Ok((memory.fence(frame.index) == fence).then(|| Bytes::from_owner(piece)))
    }
}
